from __future__ import annotations

import re
import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmrla.registry  # noqa: F401
from mmrla.layers import LayerAttention
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
COCO = [
    f"{detector}_r{depth}{suffix}_1x"
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet")
    for depth in (50, 101)
    for suffix in ("", "_mrla", "_mrla-base", "_rla-g")
    if depth == 50 or suffix != "_rla-g"
]


TRANSFORMERS = [
    *(f"{d}_pvtv2-{b}_mrla_1x" for d in ("mask_rcnn", "retinanet") for b in ("b0", "b1")),
    "mask_rcnn_vit-t_mrla_sfp_1x",
]
LIGHT_ONLY = ("resnet152", "resnext50-32x4d")
DENSENETS = tuple(f"densenet{depth}_in1k" for depth in (121, 161, 169, 201))
# Layer interactions beside MRLA, by what a config's name says: type, and reduction on ImageNet.
INTERACTIONS = {
    "dia": ("DIAUnit", 20),
    "rla-g": ("RecurrentLayerAggregation", None),
    "dla": ("DLALight", 16),
    "dla-base": ("DLABase", 16),
}
BOTH = ("resnet50", "resnet101", "efficientnet-b0", "efficientnet-b1", "deit-tiny", "deit-small",
        "deit-base", "ceit-tiny", "ceit-small", "pvtv2-b0", "pvtv2-b1")  # fmt: skip
IMAGENET = [
    *(f"{network}_mrla_in1k" for network in (*LIGHT_ONLY, *BOTH)),
    *(f"{network}_mrla-base_in1k" for network in BOTH),
]
COMPARED = [
    "resnet50_plain_in1k",
    *(f"resnet50_{name}_in1k" for name in INTERACTIONS),
    *DENSENETS,
]
CIFAR = [
    f"resnet{depth}_{kind}_cifar{classes}"
    for depth in (20, 56, 110)
    for kind in ("plain", "mrla", "mrla-base")
    for classes in (10, 100)
]
CIFAR += [f"resnet56_{name}_cifar10" for name in INTERACTIONS]


def load(name: str) -> Config:
    return Config.fromfile(ROOT / "configs" / f"{name}.py")


def test_every_promised_config_is_there():
    def found(folder: str) -> set[str]:
        return {p.stem for p in (ROOT / "configs" / folder).glob("*.py")}

    assert found(".") == {*COCO, *TRANSFORMERS, "demo_mask_rcnn_r18_mrla_shapes"}
    assert found("imagenet") == {*IMAGENET, *COMPARED}
    assert found("cifar") == set(CIFAR)


@pytest.mark.parametrize("name", COCO)
def test_recipe(name, tmp_path, monkeypatch):
    """mmdet's 1x schedule and the paper's detection recipe, whatever folder one stands in."""
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    detector, depth, kind = re.fullmatch(r"(.+)_r(\d+)_?(.*?)_?1x", name).groups()
    backbone = cfg.model.backbone
    assert backbone.type == "mmrla.MRLAResNet"
    assert backbone.depth == int(depth)
    assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)
    assert backbone.get("drop_path_rate", 0) == 0
    checkpoint = f"torchvision://resnet{backbone.depth}"
    assert backbone.init_cfg == dict(type="mmrla.WarmStart", checkpoint=checkpoint)
    assert backbone.get("mrla_drop_path_rate") is None
    expected = {
        "": None,
        "mrla": dict(type="MRLALight", head_channels=32),
        "mrla-base": dict(type="MRLABase", head_channels=16),
        "rla-g": dict(type="RecurrentLayerAggregation", hidden_channels=32, concat_output=False),
    }[kind]
    assert backbone.layer_attention == expected
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.param_scheduler[1].milestones == [8, 11]
    lr = 0.01 if detector == "retinanet" else 0.02
    optimizer = dict(type="SGD", lr=lr, momentum=0.9, weight_decay=0.0001)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    scales = [t.scale for t in cfg.train_dataloader.dataset.pipeline if t.type == "Resize"]
    assert scales == [(1333, 800)]
    metrics = ["bbox", "segm"] if detector == "mask_rcnn" else "bbox"
    assert cfg.val_evaluator.metric == metrics


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_builds_from_anywhere(path, tmp_path, monkeypatch):
    """A dumped copy in an empty folder builds the same model as the config in its place."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(path)
    cfg.dump(str(tmp_path / "copy.py"))
    copy = Config.fromfile(str(tmp_path / "copy.py"))
    assert copy.model == cfg.model
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(copy.model)
    layer_attention = copy.model.backbone.layer_attention
    mrla = [m for m in model.backbone.modules() if isinstance(m, LayerAttention)]
    backbone = model.backbone
    layers = {
        "MRLAPyramidVisionTransformerV2": lambda: sum(backbone.num_layers),
        "MRLAVisionTransformer": lambda: backbone.num_layers,
        "MRLAResNet": lambda: sum(backbone.stage_blocks),
    }[type(backbone).__name__]()
    assert len(mrla) == (0 if layer_attention is None else layers)
    assert {type(m).__name__ for m in mrla} == ({layer_attention.type} if mrla else set())


def holds(cfg, **expected) -> bool:
    return all(cfg[key] == value for key, value in expected.items())


def transform_types(cfg: Config) -> list[str]:
    return [t.type for t in cfg.train_dataloader.dataset.pipeline]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe(name, tmp_path, monkeypatch):
    """What the paper's appendix B.1 says, whatever folder one stands in."""
    monkeypatch.chdir(tmp_path)
    cfg = load(f"imagenet/{name}")
    network = name.split("_")[0]
    backbone, optimizer = cfg.model.backbone, cfg.optim_wrapper.optimizer
    heads = {"r": 32, "e": 8}.get(network[0], 16)
    if "base" in name.split("_")[1]:
        expected = dict(type="MRLABase", head_channels=min(heads, 16))
    else:
        expected = dict(type="MRLALight", head_channels=heads)
    assert backbone.layer_attention == expected
    assert cfg.train_dataloader.dataset.type == "ImageNet"
    assert cfg.train_dataloader.dataset.split == "train"
    assert cfg.val_dataloader.dataset.split == "val"
    assert holds(cfg.val_evaluator, type="Accuracy", topk=(1, 5))
    batch = cfg.auto_scale_lr.base_batch_size
    assert batch == 8 * cfg.train_dataloader.batch_size
    warm_up, main = cfg.param_scheduler
    if network.startswith("res"):
        assert (batch, cfg.train_cfg.max_epochs) == (256, 100)
        assert holds(optimizer, type="SGD", lr=0.1, momentum=0.9, weight_decay=0.0001)
        assert (warm_up.end, main.milestones, main.gamma) == (3, [30, 60, 90], 0.1)
        assert backbone.mrla_drop_path_rate == 0.2
        assert not backbone.get("drop_path_rate")
    elif network.startswith("efficientnet"):
        assert (batch, cfg.train_cfg.max_epochs) == (768, 350)
        assert holds(optimizer, type="RMSprop", lr=0.048, alpha=0.9, momentum=0.9)
        assert optimizer.weight_decay == 4e-5
        # 0.97 for every 2.4 epochs that have gone by.
        for epoch in (1, 2, 3, 4, 5, 12, 348, 349):
            steps = sum(milestone <= epoch for milestone in main.milestones)
            assert steps == int(epoch / 2.4)
        assert (backbone.drop_path_rate, backbone.norm_cfg.momentum) == (0.2, 0.01)
        assert backbone.get("mrla_drop_path_rate") is None
        assert cfg.model.head.dropout_rate == 0.2
        assert "AutoAugment" in transform_types(cfg)
        size = 240 if network.endswith("b1") else 224
        assert cfg.train_dataloader.dataset.pipeline[1].scale == size
        assert cfg.test_dataloader.dataset.pipeline[2].crop_size == size
    else:
        assert (batch, cfg.train_cfg.max_epochs) == (1024, 300)
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 0.001, 0.05)
        assert (warm_up.end, main.type, main.begin) == (5, "CosineAnnealingLR", 5)
        assert cfg.train_dataloader.sampler == dict(type="RepeatAugSampler", num_repeats=3)
        assert cfg.model.head.loss.label_smooth_val == 0.1
        augments = {a.type: a.alpha for a in cfg.model.train_cfg.augments}
        assert augments == {"Mixup": 0.8, "CutMix": 1.0}
        assert {"RandAugment", "RandomErasing"} <= set(transform_types(cfg))


@pytest.mark.parametrize("name", COMPARED)
def test_compared_networks_are_on_the_same_recipe(name):
    """All but the backbone, and what its width asks of the head, is as for MRLA."""
    cfg, ours = load(f"imagenet/{name}"), load("imagenet/resnet50_mrla_in1k")
    backbone, kind = cfg.model.backbone, name.split("_")[1]
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg.model)
    assert model(torch.randn(2, 3, 64, 64), mode="tensor").shape == (2, 1000)
    if name in DENSENETS:
        assert backbone == dict(type="DenseNet", arch=name[8:11])
    else:
        assert (backbone.type, backbone.depth) == ("mmrla.MRLAResNet", 50)
        type_, reduction = INTERACTIONS.get(kind, (None, None))
        attention = backbone.layer_attention
        assert (attention and attention.type) == type_
        assert not attention or attention.get("reduction") == reduction
        assert backbone.mrla_drop_path_rate == (0.2 if kind.startswith("dla") else None)
        assert backbone.get("mrla_act_cfg") == (dict(type="ReLU") if kind == "dla-base" else None)
    for config in (cfg, ours):
        del config.model["backbone"], config.model.head["in_channels"]
    assert cfg._cfg_dict == ours._cfg_dict


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipe(name):
    cfg = load(f"cifar/{name}")
    depth, kind, classes = name.removeprefix("resnet").split("_")
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.depth) == ("mmrla.MRLAResNetCIFAR", int(depth))
    types = {"plain": None, "mrla": "MRLALight", "mrla-base": "MRLABase"}
    types |= {name: found[0] for name, found in INTERACTIONS.items()}
    attention = backbone.layer_attention
    assert (attention and attention.type) == types[kind]
    behind = attention and kind not in ("dia", "rla-g")
    assert backbone.get("mrla_drop_path_rate") == (0.2 if behind else None)
    if kind in INTERACTIONS:
        assert attention.get("reduction", 4) == 4
    assert cfg.model.head.num_classes == int(classes[5:])
    assert cfg.data_preprocessor.num_classes == int(classes[5:])
    assert cfg.train_dataloader.dataset.type == f"mmrla.{classes.upper()}"
    assert (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size) == (180, 128)
    assert cfg.param_scheduler.milestones == [100, 150]
    optimizer = cfg.optim_wrapper.optimizer
    assert holds(optimizer, type="SGD", lr=0.1, momentum=0.9, weight_decay=0.0001)
    assert transform_types(cfg) == ["RandomCrop", "RandomFlip", "PackInputs"]


def test_inherits_what_it_does_not_change(tmp_path):
    """A user's config that names ours as base by path, from a folder of its own."""
    for path in CONFIGS:
        shutil.copy(path, tmp_path)
    mine = tmp_path / "mine.py"
    mine.write_text(
        '_base_ = "./mask_rcnn_r50_mrla_1x.py"\n'
        "model = dict(backbone=dict(layer_attention=dict(head_channels=16)))\n"
    )
    cfg = Config.fromfile(str(mine))
    assert cfg.model.backbone.layer_attention == dict(type="MRLALight", head_channels=16)
