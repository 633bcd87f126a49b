from __future__ import annotations

import copy
import functools
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample

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
COCO += ["mask_rcnn_r50_kcla_1x", "faster_rcnn_r50_kcla_1x"]
# Within-layer attentions: how many plugins of which class ResNet-50, ResNet-56 of basic blocks and
# ResNet-56 of bottlenecks have.
WITHIN = {
    "se": ("SE", 16, 27, 18),
    "eca": ("ECA", 16, 27, 18),
    "cbam": ("CBAM", 16, 27, 18),
    "a2": ("DoubleAttention", 5, 5, 5),
    "aa": ("AttentionAugmentedConv", 13, 18, 12),
    "ba": ("BridgeAttention", 16, 27, 18),
    "tdam": ("TDAM", 9, 18, 12),
    "nl": ("NonLocal2d", 1, 1, 1),
    "gc": ("ContextBlock", 13, 27, 18),
    "gc1": ("ContextBlock", 1, 1, 1),
}
WITHIN_COCO = [
    f"{detector}_r50_{name}_1x"
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet")
    for name in ("se", "eca", "ba", "nl", "gc")
]
COMPOSED = ("mrla_se", "mrla_eca")
# Detectors of other families, with their own recipes: mmdet's config of each.
OTHER_DETECTORS = {
    "atss_r50{}_1x": ("atss/atss_r50_fpn_1x_coco", ("", "_mrla", "_mrla-base")),
    "detr_r50{}_150e": ("detr/detr_r50_8xb2-150e_coco", ("", "_mrla")),
    "deformable-detr_r50{}_50e": (
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco",
        ("", "_mrla"),
    ),
}
OTHERS = [name.format(kind) for name, (_, kinds) in OTHER_DETECTORS.items() for kind in kinds]


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
    "kcla": ("KCLA", None),
}
# Those whose norm a ReLU follows.
WITH_RELU = ("dla-base", "kcla")
BOTH = ("resnet50", "resnet101", "efficientnet-b0", "efficientnet-b1", "deit-tiny", "deit-small",
        "deit-base", "ceit-tiny", "ceit-small", "pvtv2-b0", "pvtv2-b1")  # fmt: skip
IMAGENET = [
    *(f"{network}_mrla_in1k" for network in (*LIGHT_ONLY, *BOTH)),
    *(f"{network}_mrla-base_in1k" for network in BOTH),
]
# In place of the residual stream, by what a config's name says.
STREAMS = {
    "attnres": dict(type="AttnRes"),
    "attnres-block": dict(type="AttnRes", block_size=4),
    "denseformer": dict(type="DenseFormer"),
}
DEITS = [f"deit-{size}_{kind}_in1k" for size in ("tiny", "small") for kind in list(STREAMS)[:2]]
DEITS.append("deit-small_denseformer_in1k")
VITS = [f"vit_{kind}_cifar10" for kind in ("plain", *STREAMS)]
LITE = [f"retinanet_efficientnet-lite0{kind}_bccd" for kind in ("", "_mrla", "_mrla-base")]
COMPARED = [
    "resnet50_plain_in1k",
    *(f"resnet50_{name}_in1k" for name in INTERACTIONS),
    "resnet101_kcla_in1k",
    *DENSENETS,
]
CIFAR = [
    f"resnet{depth}_{kind}_cifar{classes}"
    for depth in (20, 56, 110)
    for kind in ("plain", "mrla", "mrla-base")
    for classes in (10, 100)
]
CIFAR += [f"resnet56_{name}_cifar10" for name in INTERACTIONS]
BOTTLENECK = {
    *(
        f"resnet{depth}-bottleneck_{kind}_cifar{classes}"
        for depth in (20, 56, 110)
        for kind in ("plain", "mrla", "mrla-base", "dla", "dla-base")
        for classes in (10, 100)
    ),
    *(f"resnet56-bottleneck_{n}_cifar10" for n in (*WITHIN, *COMPOSED, *INTERACTIONS)),
    *(f"resnet{depth}-bottleneck_kcla_cifar10" for depth in (20, 110)),
}

LIGHT = {"resnet50": dict(type="MRLALight", head_channels=32),
         "deit-tiny": dict(type="MRLALight", head_channels=16)}  # fmt: skip
# Of an ablation: what its backbone has other than that of MRLA-light's config.
VARIANTS = {
    "mla": lambda light: dict(type="MLA", head_channels=light["head_channels"]),
    "dwconv": lambda light: dict(type="DWConv"),
    "mrla_no-previous": lambda light: dict(light, recurrence=None),
    "mrla_no-dwconv": lambda light: dict(light, value_conv=False),
    "mrla_fc": lambda light: dict(light, projection="fc"),
    "mrla_lambda1": lambda light: dict(light, fixed_lambda=1),
    "mrla_dk-all": lambda light: dict(light, head_channels="all"),
}
ABLATION = {
    f"{network}_{name}": dict(layer_attention=make(LIGHT[network]))
    for name, make in VARIANTS.items()
    for network in LIGHT
}
for network, sweep in (
    ("resnet50", (1, 2, 4, 8, 16, 64, 128, 256)),
    ("deit-tiny", (1, 4, 8, 32, 64)),
):
    for d in sweep:
        found = dict(LIGHT[network], head_channels=d)
        ABLATION[f"{network}_mrla_dk{d}"] = dict(layer_attention=found)
for name, d in (("linear-rla", 32), ("linear-rla_dk1", 1)):
    found = dict(type="LinearRLA", head_channels=d)
    ABLATION[f"resnet50_{name}"] = dict(layer_attention=found)
BASE16 = dict(type="MRLABase", head_channels=16)
ABLATION["resnet50_dwconv_sd"] = ABLATION["resnet50_dwconv"]
ABLATION["resnet50_mrla_output"] = dict(
    layer_attention=dict(LIGHT["resnet50"], recurrence="output")
)
ABLATION["resnet50_mrla-base_dk32"] = dict(layer_attention=dict(BASE16, head_channels=32))
OFF = dict(mrla_drop_path_rate=0.0)
for name in ("resnet50_dwconv", "resnet50_mla"):
    ABLATION[f"{name}_no-sd"] = ABLATION[name] | OFF
ABLATION["resnet50_dwconv"] = ABLATION.pop("resnet50_dwconv_no-sd")
ABLATION["resnet50_mrla_no-sd"] = ABLATION["resnet50_mrla_no-sd_mixup-ls"] = dict(OFF)
ABLATION["resnet50_mrla-base_no-sd"] = dict(layer_attention=BASE16) | OFF
ABLATION["deit-tiny_mrla_sd"] = dict(mrla_drop_path_rate=None)


def load(name: str) -> Config:
    return Config.fromfile(ROOT / "configs" / f"{name}.py")


def test_every_promised_config_is_there():
    def found(folder: str) -> set[str]:
        return {p.stem for p in (ROOT / "configs" / folder).glob("*.py")}

    within = (*WITHIN, *COMPOSED)
    detectors = {*COCO, *WITHIN_COCO, *TRANSFORMERS, *OTHERS}
    assert found(".") == {*detectors, "demo_mask_rcnn_r18_mrla_shapes"}
    others = {*COMPARED, *(f"resnet50_{name}_in1k" for name in within)}
    assert found("imagenet") == {*IMAGENET, *DEITS, *others, "efficientnet-lite0_in1k"}
    assert found("bccd") == {*LITE}
    residual = {*CIFAR, *(f"resnet56_{n}_cifar10" for n in within), *BOTTLENECK}
    assert found("cifar") == {*residual, *VITS}
    eca = "resnet50_eca_drop-path_in1k"
    assert found("ablation") == {*(f"{name}_in1k" for name in ABLATION), eca}


def plugins_of(model) -> list:
    return [getattr(m, n) for m in model.modules() for n in getattr(m, "plugin_names", ())]


def without(cfg: Config, *keys: str) -> dict:
    found = cfg.to_dict()
    for key in keys:
        found["model"]["backbone"].pop(key, None)
    return found


@pytest.mark.parametrize("name", [*WITHIN, *COMPOSED])
def test_within_layer_attention_is_all_that_differs(name):
    """From the network with MRLA on ImageNet, from the plain one on CIFAR; and it is all there."""
    kind, many, many_cifar, _ = WITHIN[name.removeprefix("mrla_")]
    hosts = (
        (f"imagenet/resnet50_{name}_in1k", "imagenet/resnet50_mrla_in1k", many),
        (f"cifar/resnet56_{name}_cifar10", "cifar/resnet56_plain_cifar10", many_cifar),
    )
    for path, base, count in hosts:
        cfg = load(path)
        ours = ("plugins", "layer_attention", "mrla_drop_path_rate")
        assert without(cfg, *ours) == without(load(base), *ours)
        attention = cfg.model.backbone.layer_attention
        assert (attention and attention.type) == ("MRLALight" if name in COMPOSED else None)
        rate = 0.2 if attention and path.startswith("imagenet") else None
        assert cfg.model.backbone.get("mrla_drop_path_rate") == rate
        narrow = dict(stem_channels=16, base_channels=16)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            backbone = MODELS.build({**cfg.model.backbone, **narrow})
        assert [type(m).__name__ for m in plugins_of(backbone)] == [kind] * count


def test_ecas_stochastic_depth_is_an_ablation():
    base, dropped = load("imagenet/resnet50_eca_in1k"), load("ablation/resnet50_eca_drop-path_in1k")
    assert without(base, "plugins") == without(dropped, "plugins")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        plugins = plugins_of(MODELS.build(dropped.model.backbone))
    assert [m.drop_path.drop_prob for m in plugins] == [0.2] * 16


@pytest.mark.parametrize("name", WITHIN_COCO)
def test_detectors_with_within_layer_attention(name, tmp_path, monkeypatch):
    """As the plain detector but for the plugins, from the same checkpoint."""
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    detector, attention = name.removesuffix("_1x").rsplit("_r50_", 1)
    assert without(cfg, "plugins") == without(load(f"{detector}_r50_1x"), "plugins")
    imagenet = load(f"imagenet/resnet50_{attention}_in1k")
    assert cfg.model.backbone.plugins == imagenet.model.backbone.plugins


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
        "kcla": dict(type="KCLA", head_channels=64),
    }[kind]
    assert backbone.layer_attention == expected
    assert backbone.get("mrla_act_cfg") == (dict(type="ReLU") if kind in WITH_RELU else None)
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


@pytest.mark.parametrize("name", OTHERS)
def test_other_detectors_differ_from_mmdets_in_backbone_and_care(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = next(k for k in ("_mrla-base", "_mrla", "") if k in name)
    (base,) = (path for n, (path, _) in OTHER_DETECTORS.items() if n.format(kind) == name)
    cfg = load(name).to_dict()
    (tmp_path / "theirs.py").write_text(f"_base_ = 'mmdet::{base}.py'\n")
    expected = Config.fromfile(tmp_path / "theirs.py").to_dict()
    expected["model"]["backbone"].update(
        type="mmrla.MRLAResNet",
        init_cfg=dict(type="mmrla.WarmStart", checkpoint="torchvision://resnet50"),
        layer_attention={
            "": None,
            "_mrla": dict(type="MRLALight", head_channels=32),
            "_mrla-base": dict(type="MRLABase", head_channels=16),
        }[kind],
    )
    assert cfg.pop("custom_imports") == dict(imports=["mmrla"], allow_failed_imports=False)
    assert cfg.pop("custom_hooks") == [dict(type="SyncBuffersHook")]
    # As in the other detectors' configs: data that is checked, runs that go on after a kill.
    expected["train_dataloader"]["dataset"].update(type="mmrla.CheckedCocoDataset", on_bad="skip")
    for split in ("val", "test"):
        expected[f"{split}_dataloader"]["dataset"]["type"] = "mmrla.CheckedCocoDataset"
    expected["train_cfg"]["type"] = "mmrla.ResumableTrainLoop"
    expected["default_hooks"]["checkpoint"]["type"] = "mmrla.AtomicCheckpointHook"
    assert cfg == expected


@pytest.mark.parametrize("name", [name for name in OTHERS if name.count("mrla")])
def test_other_detectors_train(name, tmp_path):
    """Two steps at small size from a warm start: the second reaches every layer attention."""
    from mmrla.models import MRLAResNet

    plain = tmp_path / "resnet18.pth"
    torch.save(MRLAResNet(18, layer_attention=None).state_dict(), plain)
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    cfg = load(name).model
    cfg.backbone.depth = 18
    cfg.backbone.init_cfg.checkpoint = str(plain)
    cfg.neck.in_channels = {"atss": [64, 128, 256, 512], "detr": [512]}.get(
        name.split("_")[0], [128, 256, 512]
    )
    for part in ("encoder", "decoder"):
        if part in cfg:
            cfg[part].num_layers = 1
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg)
    model.init_weights()
    model.train()
    boxes = torch.tensor([[8.0, 8, 60, 50], [70, 30, 120, 90]])
    sample = DetDataSample(
        metainfo=dict(img_shape=(96, 128), batch_input_shape=(96, 128), pad_shape=(96, 128)),
        gt_instances=InstanceData(bboxes=boxes, labels=torch.tensor([3, 7])),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(2):
        optimizer.zero_grad()
        losses = model.loss(torch.randn(1, 3, 96, 128), [sample])
        total = sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if "loss" in k)
        assert total.isfinite()
        total.backward()
        optimizer.step()
    ours = {k: p for k, p in model.backbone.named_parameters() if ".mrla." in k}
    assert len(ours) >= 24
    without = {k for k, p in ours.items() if p.grad is None or not p.grad.any()}
    # With MRLA-base the first layer of a group attends to itself whatever query and key are.
    allowed = {f"layer{i}.0.mrla.{part}.weight" for i in range(1, 5) for part in ("query", "key")}
    assert without <= (allowed if "base" in name else set())


# Other detectors with within-layer attentions have the same backbones.
BUILT = [path for path in CONFIGS if path.stem not in WITHIN_COCO[5:]]


@pytest.mark.parametrize("path", BUILT, ids=lambda p: p.stem)
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
        depth = int(name.split("_")[0].removeprefix("resnet"))
        assert (backbone.type, backbone.depth) == ("mmrla.MRLAResNet", depth)
        type_, reduction = INTERACTIONS.get(kind, (None, None))
        attention = backbone.layer_attention
        assert (attention and attention.type) == type_
        assert not attention or attention.get("reduction") == reduction
        behind = kind.startswith("dla") or kind == "kcla"
        assert backbone.mrla_drop_path_rate == (0.2 if behind else None)
        assert backbone.get("mrla_act_cfg") == (dict(type="ReLU") if kind in WITH_RELU else None)
    for config in (cfg, ours):
        del config.model["backbone"], config.model.head["in_channels"]
    assert cfg._cfg_dict == ours._cfg_dict


def test_efficientnet_lite_is_on_the_recipe_of_the_others():
    cfg, ours = load("imagenet/efficientnet-lite0_in1k"), load("imagenet/efficientnet-b0_mrla_in1k")
    backbone = cfg.model.backbone
    assert (backbone.pop("arch"), backbone.pop("layer_attention")) == ("lite0", None)
    assert (cfg.data_preprocessor.pop("mean"), cfg.data_preprocessor.pop("std")) == (
        [127.0] * 3,
        [128.0] * 3,
    )
    for key in ("arch", "layer_attention"):
        del ours.model.backbone[key]
    for key in ("mean", "std"):
        del ours.data_preprocessor[key]
    assert cfg._cfg_dict == ours._cfg_dict


@pytest.mark.parametrize("name", LITE)
def test_detectors_of_blood_cells_differ_in_their_attention(name):
    cfg, plain = load(f"bccd/{name}").to_dict(), load(f"bccd/{LITE[0]}").to_dict()
    backbone = cfg["model"]["backbone"]
    kind = {"mrla": "MRLALight", "mrla-base": "MRLABase"}.get(name.split("_")[2])
    assert backbone["layer_attention"] == (kind and dict(type=kind, head_channels=8))
    assert backbone["mrla_drop_path_rate"] == 0
    assert backbone["init_cfg"]["type"] == "mmrla.WarmStart"
    backbone["layer_attention"] = None
    assert cfg == plain


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
    # What measures best on few epochs: no drop path, and the host's identity start.
    assert not {"mrla_drop_path_rate", "zero_init_mrla"} & backbone.keys()
    if kind in INTERACTIONS:
        assert attention.get("reduction", 4) == 4
    assert backbone.get("mrla_act_cfg") == (dict(type="ReLU") if kind in WITH_RELU else None)
    assert cfg.model.head.num_classes == int(classes[5:])
    assert cfg.data_preprocessor.num_classes == int(classes[5:])
    assert cfg.train_dataloader.dataset.type == f"mmrla.{classes.upper()}"
    assert (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size) == (180, 128)
    assert cfg.param_scheduler.milestones == [100, 150]
    optimizer = cfg.optim_wrapper.optimizer
    assert holds(optimizer, type="SGD", lr=0.1, momentum=0.9, weight_decay=0.0001)
    assert transform_types(cfg) == ["RandomCrop", "RandomFlip", "PackInputs"]


@pytest.mark.parametrize("name", [f"imagenet/{n}" for n in DEITS] + [f"cifar/{n}" for n in VITS])
def test_streams_are_all_that_differs(name):
    """From the network with MRLA-light on ImageNet, from the plain one on CIFAR."""
    network, kind, data = name.split("_")
    cfg, base = load(name), load(f"{network}_{'mrla' if data == 'in1k' else 'plain'}_{data}")
    assert cfg.model.backbone.pop("layer_attention") == STREAMS.get(kind)
    del base.model.backbone["layer_attention"]
    assert cfg._cfg_dict == base._cfg_dict
    if data == "cifar10":
        warm_up, main = cfg.param_scheduler
        assert (cfg.train_cfg.max_epochs, warm_up.end, main.begin) == (200, 10, 10)
        assert transform_types(cfg) == transform_types(load("cifar/resnet20_plain_cifar10"))


@functools.cache
def load_once(path: Path) -> dict:
    return Config.fromfile(path).to_dict()


def merged(path: Path) -> dict:
    """What ``Config.fromfile`` gives, with the recipes that configs inherit from read once."""
    if path.parent.name not in ("ablation", "cifar"):
        return copy.deepcopy(load_once(path))
    own = runpy.run_path(str(path))
    own = {k: v for k, v in own.items() if k == "_base_" or not k.startswith("_")}
    base = Config(merged((path.parent / own.pop("_base_")).resolve()))
    base.merge_from_dict(own)
    return base.to_dict()


@pytest.mark.parametrize("name", ABLATION)
def test_ablation_changes_what_it_says_and_nothing_else(name):
    """Beside MRLA-light's config; its first line says where the paper has it."""
    path, network = ROOT / "configs" / "ablation" / f"{name}_in1k.py", name.split("_")[0]
    light = load_once(ROOT / "configs" / "imagenet" / f"{network}_mrla_in1k.py")
    cfg, expected = merged(path), copy.deepcopy(light)
    expected["model"]["backbone"].update(ABLATION[name])
    if name.endswith("mixup-ls"):
        loss = cfg["model"]["head"]["loss"]
        assert (loss["type"], loss["label_smooth_val"]) == ("LabelSmoothLoss", 0.1)
        assert cfg["model"]["train_cfg"] == dict(augments=dict(type="Mixup", alpha=0.2))
        expected["model"]["head"]["loss"] = loss
        expected["model"]["train_cfg"] = cfg["model"]["train_cfg"]
    assert cfg == expected
    assert cfg != light
    networks = {"resnet50": "ResNet-50", "deit-tiny": "DeiT-T"}
    where = r"(Like )?(Table (4 \([a-g]\)|11|12 \([ab]\))|B\.4|A\.3|Eq\. 8)"
    assert re.match(rf"# {where}: {networks[network]} \+ ", path.read_text())


def test_configs_are_read_as_mmengine_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "ablation/resnet50_mla_no-sd_in1k",
        "ablation/resnet50_mrla_no-sd_mixup-ls_in1k",
        "ablation/deit-tiny_mrla_sd_in1k",
        "cifar/resnet56-bottleneck_mrla_se_cifar10",
    ):
        path = ROOT / "configs" / f"{name}.py"
        assert merged(path) == Config.fromfile(path).to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATION)
def test_ablation_trains(name):
    """A step of the whole classifier on two images: every parameter gets a gradient."""
    cfg = load(f"ablation/{name}_in1k")
    if cfg.model.backbone.type.endswith("VisionTransformer"):
        cfg.model.backbone.img_size = 64
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        cfg.model.data_preprocessor = cfg.data_preprocessor
        model = MODELS.build(cfg.model).train()
        samples = [DataSample().set_gt_label(i) for i in (1, 2)]
        images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
        data = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
        model.loss(data["inputs"], data["data_samples"])["loss"].backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    layer = next(m for m in model.modules() if isinstance(m, LayerAttention))
    assert type(layer).__name__ == cfg.model.backbone.layer_attention.type


def test_inherits_what_it_does_not_change(tmp_path):
    """A user's config that names ours as base by path, from a folder of its own."""
    for path in CONFIGS:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "configs/_base_", tmp_path / "_base_")
    mine = tmp_path / "mine.py"
    mine.write_text(
        '_base_ = "./mask_rcnn_r50_mrla_1x.py"\n'
        "model = dict(backbone=dict(layer_attention=dict(head_channels=16)))\n"
    )
    cfg = Config.fromfile(str(mine))
    assert cfg.model.backbone.layer_attention == dict(type="MRLALight", head_channels=16)
