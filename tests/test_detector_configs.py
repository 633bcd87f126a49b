"""Configs of detectors are mmdet's recipes with other backbones."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from mmengine.config import Config

from mmrla.layers import LayerAttention
from tests.config_names import (
    BASE16,
    COCO,
    CONFIGS,
    DEMO,
    LIGHT,
    LITE,
    OTHERS,
    RELU,
    TRANSFORMERS,
    WITH_RELU,
    load,
)  # fmt: skip
from tests.helpers import build


@pytest.mark.parametrize("name", COCO)
def test_coco(name, tmp_path, monkeypatch):
    """mmdet's 1x schedule and the paper's detection recipe, whatever folder one stands in."""
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    detector, depth, kind = re.fullmatch(r"(.+)_r(\d+)_?(.*?)_?1x", name).groups()
    backbone = cfg.model.backbone
    assert backbone.type == "mmrla.MRLAResNet"
    assert backbone.depth == int(depth)
    assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)
    assert backbone.get("drop_path_rate", 0) == 0
    checkpoint = f"torchvision://resnet{depth}"
    assert backbone.init_cfg == dict(type="mmrla.WarmStart", checkpoint=checkpoint)
    assert backbone.get("mrla_drop_path_rate") is None
    assert (
        backbone.layer_attention
        == {
            "": None,
            "mrla": dict(type="MRLALight", head_channels=32),
            "mrla-base": BASE16,
            "rla-g": dict(
                type="RecurrentLayerAggregation", hidden_channels=32, concat_output=False
            ),
            "kcla": dict(type="KCLA", head_channels=64),
        }[kind]
    )
    assert backbone.get("mrla_act_cfg") == (RELU if kind in WITH_RELU else None)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.param_scheduler[1].milestones == [8, 11]
    lr = 0.01 if detector == "retinanet" else 0.02
    optimizer = dict(type="SGD", lr=lr, momentum=0.9, weight_decay=0.0001)
    assert cfg.optim_wrapper.optimizer == optimizer
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    scales = [t.scale for t in cfg.train_dataloader.dataset.pipeline if t.type == "Resize"]
    assert scales == [(1333, 800)]
    assert cfg.val_evaluator.metric == (["bbox", "segm"] if detector == "mask_rcnn" else "bbox")


@pytest.mark.parametrize("name", OTHERS)
def test_other_detectors_differ_from_mmdets_in_backbone_and_care(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(name).to_dict()
    (tmp_path / "theirs.py").write_text(f"_base_ = 'mmdet::{OTHERS[name]}.py'\n")
    expected = Config.fromfile(tmp_path / "theirs.py").to_dict()
    light = LIGHT["resnet50"] if "mrla" in name else None
    expected["model"]["backbone"].update(
        type="mmrla.MRLAResNet",
        init_cfg=dict(type="mmrla.WarmStart", checkpoint="torchvision://resnet50"),
        layer_attention=BASE16 if "mrla-base" in name else light,
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


@pytest.mark.parametrize("name", [name for name in OTHERS if "mrla" in name])
def test_other_detectors_train(name, tmp_path):
    """Two steps at small size from a warm start: the second reaches every layer attention."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    from mmrla.models import MRLAResNet

    plain = tmp_path / "resnet18.pth"
    torch.save(MRLAResNet(18, layer_attention=None).state_dict(), plain)
    cfg = load(name).model
    cfg.backbone.depth = 18
    cfg.backbone.init_cfg.checkpoint = str(plain)
    cfg.neck.in_channels = {"atss": [64, 128, 256, 512], "detr": [512]}.get(
        name.split("_")[0], [128, 256, 512]
    )
    for part in ("encoder", "decoder"):
        if part in cfg:
            cfg[part].num_layers = 1
    model = build(cfg, "mmdet")
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


# Each kind of detector, backbone and layer attention once.
BUILT = ["mask_rcnn_r50_mrla_1x", "faster_rcnn_r50_rla-g_1x", "retinanet_r101_mrla-base_1x",
         "faster_rcnn_r50_kcla_1x", "mask_rcnn_r50_gc_1x", "atss_r50_1x", "detr_r50_mrla_150e",
         "deformable-detr_r50_mrla_50e", *TRANSFORMERS, DEMO]  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_builds_from_anywhere(name, tmp_path, monkeypatch):
    """A dumped copy in an empty folder builds the same model as the config in its place."""
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    cfg.dump(str(tmp_path / "copy.py"))
    copied = Config.fromfile(str(tmp_path / "copy.py"))
    assert copied.model == cfg.model
    backbone = build(copied.model, "mmdet").backbone
    attention = copied.model.backbone.layer_attention
    mrla = [m for m in backbone.modules() if isinstance(m, LayerAttention)]
    layers = {
        "MRLAPyramidVisionTransformerV2": lambda: sum(backbone.num_layers),
        "MRLAVisionTransformer": lambda: backbone.num_layers,
        "MRLAResNet": lambda: sum(backbone.stage_blocks),
    }[type(backbone).__name__]()
    assert len(mrla) == (0 if attention is None else layers)
    assert {type(m).__name__ for m in mrla} == ({attention.type} if mrla else set())


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


def test_inherits_what_it_does_not_change(tmp_path):
    """A user's config that names ours as base by path, from a folder of its own."""
    for path in CONFIGS.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(CONFIGS / "_base_", tmp_path / "_base_")
    mine = tmp_path / "mine.py"
    mine.write_text(
        '_base_ = "./mask_rcnn_r50_mrla_1x.py"\n'
        "model = dict(backbone=dict(layer_attention=dict(head_channels=16)))\n"
    )
    cfg = Config.fromfile(str(mine))
    assert cfg.model.backbone.layer_attention == dict(type="MRLALight", head_channels=16)
