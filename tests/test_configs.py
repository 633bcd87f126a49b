"""Configs are the recipes that their names and the papers say, and nothing else."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from mmengine.config import Config
from mmpretrain.structures import DataSample

from mmrla.layers import LayerAttention
from tests.config_names import (
    ABLATION,
    CIFAR,
    COCO,
    COMPARED,
    COMPOSED,
    CONFIGS,
    DEITS,
    DEMO,
    DENSENETS,
    IMAGENET,
    INTERACTIONS,
    LITE,
    OTHERS,
    RELU,
    STREAMS,
    TRANSFORMERS,
    VITS,
    WITH_RELU,
    WITHIN,
    WITHIN_COCO,
    backbone_of,
    holds,
    load,
    plugins_of,
    read,
    transform_types,
    without,
)  # fmt: skip
from tests.helpers import build


def test_every_promised_config_is_there():
    def found(folder: str) -> set[str]:
        return {p.stem for p in (CONFIGS / folder).glob("*.py")}

    assert found(".") == {*COCO, *WITHIN_COCO, *TRANSFORMERS, *OTHERS, DEMO}
    within = {f"resnet50_{name}_in1k" for name in (*WITHIN, *COMPOSED)}
    assert found("imagenet") == {*IMAGENET, *DEITS, *COMPARED, *within, "efficientnet-lite0_in1k"}
    assert found("bccd") == {*LITE}
    assert found("cifar") == {*CIFAR, *VITS}
    eca = "resnet50_eca_drop-path_in1k"
    assert found("ablation") == {*(f"{name}_in1k" for name in ABLATION), eca}


@pytest.mark.parametrize("name", [*WITHIN, *COMPOSED])
def test_within_layer_attention_is_all_that_differs(name):
    """From the network with MRLA on ImageNet; on COCO from the plain detector, as on ImageNet."""
    cfg = load(f"imagenet/resnet50_{name}_in1k")
    ours = ("plugins", "layer_attention", "mrla_drop_path_rate")
    assert without(cfg, *ours) == without(load("imagenet/resnet50_mrla_in1k"), *ours)
    kind, count, *_ = WITHIN[name.removeprefix("mrla_")]
    attention = cfg.model.backbone.layer_attention
    assert (attention and attention.type) == ("MRLALight" if name in COMPOSED else None)
    assert cfg.model.backbone.get("mrla_drop_path_rate") == (0.2 if attention else None)
    backbone = backbone_of(cfg, stem_channels=16, base_channels=16)
    assert [type(m).__name__ for m in plugins_of(backbone)] == [kind] * count
    for detector in [n for n in WITHIN_COCO if f"_r50_{name}_1x" in n]:
        found, plain = load(detector), load(detector.replace(f"_{name}_", "_"))
        assert without(found, "plugins") == without(plain, "plugins")
        assert found.model.backbone.plugins == cfg.model.backbone.plugins


def test_ecas_stochastic_depth_is_an_ablation():
    base, dropped = load("imagenet/resnet50_eca_in1k"), load("ablation/resnet50_eca_drop-path_in1k")
    assert without(base, "plugins") == without(dropped, "plugins")
    plugins = plugins_of(backbone_of(dropped, stem_channels=16, base_channels=16))
    assert [m.drop_path.drop_prob for m in plugins] == [0.2] * 16


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet(name, tmp_path, monkeypatch):
    """What the paper's appendix B.1 says, whatever folder one stands in."""
    monkeypatch.chdir(tmp_path)
    cfg = load(f"imagenet/{name}")
    network, kind, _ = name.split("_")
    backbone, optimizer = cfg.model.backbone, cfg.optim_wrapper.optimizer
    heads = {"r": 32, "e": 8}.get(network[0], 16)
    light = dict(type="MRLALight", head_channels=heads)
    base = dict(type="MRLABase", head_channels=min(heads, 16))
    assert backbone.layer_attention == (base if "base" in kind else light)
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
            assert sum(milestone <= epoch for milestone in main.milestones) == int(epoch / 2.4)
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
    backbone, (network, *kinds, _) = cfg.model.backbone, name.split("_")
    width = cfg.model.head.in_channels
    if name in DENSENETS:
        assert backbone == dict(type="DenseNet", arch=name[8:11])
        assert width == DENSENETS[name]
    else:
        (kind,), depth = kinds, int(network.removeprefix("resnet"))
        assert (backbone.type, backbone.depth) == ("mmrla.MRLAResNet", depth)
        type_, reduction = INTERACTIONS.get(kind, (None, None))
        attention = backbone.layer_attention
        assert (attention and attention.type) == type_
        assert not attention or attention.get("reduction") == reduction
        behind = kind.startswith("dla") or kind == "kcla"
        assert backbone.mrla_drop_path_rate == (0.2 if behind else None)
        assert backbone.get("mrla_act_cfg") == (RELU if kind in WITH_RELU else None)
        assert width == backbone_of(cfg).feat_dim
    for config in (cfg, ours):
        del config.model["backbone"], config.model.head["in_channels"]
    assert cfg._cfg_dict == ours._cfg_dict


def test_efficientnet_lite_is_on_the_recipe_of_the_others():
    cfg, ours = load("imagenet/efficientnet-lite0_in1k"), load("imagenet/efficientnet-b0_mrla_in1k")
    backbone, pixels = cfg.model.backbone, cfg.data_preprocessor
    assert (backbone.pop("arch"), backbone.pop("layer_attention")) == ("lite0", None)
    assert (pixels.pop("mean"), pixels.pop("std")) == ([127.0] * 3, [128.0] * 3)
    for place, keys in ((ours.model.backbone, ("arch", "layer_attention")),
                        (ours.data_preprocessor, ("mean", "std"))):  # fmt: skip
        for key in keys:
            del place[key]
    assert cfg._cfg_dict == ours._cfg_dict


def cifar_attention(kind: str, bottleneck: bool) -> dict | None:
    """What a config of this name trains."""
    kind, d = kind.removesuffix("_se").removesuffix("_eca"), 16 if bottleneck else 32
    return {
        "mrla": dict(type="MRLALight", head_channels=32),
        "mrla-base": dict(type="MRLABase", head_channels=32),
        "dla": dict(type="DLALight", head_channels=d, reduction=4),
        "dla-base": dict(type="DLABase", head_channels=d, reduction=4),
        "kcla": dict(type="KCLA", head_channels=16),
        "dia": dict(type="DIAUnit", reduction=4),
        "rla-g": dict(type="RecurrentLayerAggregation", hidden_channels=12),
    }.get(kind)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar(data):
    """All of them: the recipe of one base, the network, and its plugins."""
    recipe = load(f"cifar/_base_/{data}")
    assert recipe.model.head.num_classes == int(data[5:])
    assert recipe.data_preprocessor.num_classes == int(data[5:])
    assert recipe.train_dataloader.dataset.type == f"mmrla.{data.upper()}"
    assert (recipe.train_cfg.max_epochs, recipe.train_dataloader.batch_size) == (180, 128)
    assert recipe.param_scheduler.milestones == [100, 150]
    optimizer = recipe.optim_wrapper.optimizer
    assert holds(optimizer, type="SGD", lr=0.1, momentum=0.9, weight_decay=0.0001)
    assert transform_types(recipe) == ["RandomCrop", "RandomFlip", "PackInputs"]
    rest = {k: v for k, v in recipe.to_dict().items() if k != "model"}
    for name in sorted(n for n in CIFAR if n.endswith(f"_{data}")):
        cfg = load(f"cifar/{name}")
        network, kind = name.removesuffix(f"_{data}").split("_", 1)
        found = cfg.to_dict()
        assert {k: v for k, v in found.items() if k in rest} == rest
        assert cfg.model.head.num_classes == int(data[5:])
        backbone, bottleneck = found["model"]["backbone"], network.endswith("-bottleneck")
        plugins = backbone.pop("plugins", None)
        expected = dict(
            type="mmrla.MRLAResNetCIFAR",
            depth=int(re.search(r"\d+", network)[0]),
            layer_attention=cifar_attention(kind, bottleneck),
            **(dict(mrla_act_cfg=RELU) if kind in WITH_RELU else {}),
        )
        # On basic blocks what measures best on few epochs: no drop path, and the identity start.
        if bottleneck:
            rate = None if kind in ("dia", "rla-g") else 0.2
            expected |= dict(block="bottleneck", zero_init_residual=False, mrla_drop_path_rate=rate,
                             zero_init_mrla=False)  # fmt: skip
        assert backbone == expected, name
        within = WITHIN.get(kind.removeprefix("mrla_"))
        assert bool(plugins) == bool(within)
        if within or kind in INTERACTIONS:
            model = backbone_of(cfg)
            assert model.feat_dim == cfg.model.head.in_channels
            names = [type(m).__name__ for m in plugins_of(model)]
            assert names == ([within[0]] * within[3 if bottleneck else 2] if within else [])


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


@pytest.mark.parametrize("name", ABLATION)
def test_ablation_changes_what_it_says_and_nothing_else(name):
    """Beside MRLA-light's config; its first line says where the paper has it."""
    path, network = CONFIGS / "ablation" / f"{name}_in1k.py", name.split("_")[0]
    light = read(CONFIGS / "imagenet" / f"{network}_mrla_in1k.py")
    cfg, expected = read(path), copy.deepcopy(light)
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
    for name in ("ablation/resnet50_mla_no-sd_in1k", "ablation/resnet50_mrla_no-sd_mixup-ls_in1k",
                 "ablation/deit-tiny_mrla_sd_in1k", "cifar/resnet56-bottleneck_dla_cifar10",
                 "cifar/vit_attnres_cifar10"):  # fmt: skip
        assert load(name).to_dict() == Config.fromfile(CONFIGS / f"{name}.py").to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATION)
def test_ablation_trains(name):
    """A step of the whole classifier on two images: every parameter gets a gradient."""
    cfg = load(f"ablation/{name}_in1k")
    if cfg.model.backbone.type.endswith("VisionTransformer"):
        cfg.model.backbone.img_size = 64
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build(cfg.model, "mmpretrain").train()
    samples = [DataSample().set_gt_label(i) for i in (1, 2)]
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    model.loss(data["inputs"], data["data_samples"])["loss"].backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    layer = next(m for m in model.modules() if isinstance(m, LayerAttention))
    assert type(layer).__name__ == cfg.model.backbone.layer_attention.type
