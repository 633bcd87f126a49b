from __future__ import annotations

import shutil

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmrla.registry  # noqa: F401
from mmrla.layers import MRLABase, MRLALight
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
COCO = [
    f"{detector}_r{depth}{suffix}_1x"
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet")
    for depth in (50, 101)
    for suffix in ("", "_mrla", "_mrla-base")
]


def load(name: str) -> Config:
    return Config.fromfile(ROOT / "configs" / f"{name}.py")


def test_every_promised_config_is_there():
    assert {p.stem for p in CONFIGS} == {*COCO, "demo_mask_rcnn_r18_mrla_shapes"}


@pytest.mark.parametrize("name", COCO)
def test_recipe(name, tmp_path, monkeypatch):
    """mmdet's 1x schedule and the paper's detection recipe, whatever folder one stands in."""
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    detector = name.rsplit("_r", 1)[0]
    backbone = cfg.model.backbone
    assert backbone.type == "mmrla.MRLAResNet"
    assert backbone.depth == int(name.split("_r")[-1].split("_")[0])
    assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)
    assert backbone.get("drop_path_rate", 0) == 0
    checkpoint = f"torchvision://resnet{backbone.depth}"
    assert backbone.init_cfg == dict(type="mmrla.WarmStart", checkpoint=checkpoint)
    assert backbone.get("mrla_drop_path_rate") is None
    expected = {
        "": None,
        "mrla": dict(type="MRLALight", head_channels=32),
        "mrla-base": dict(type="MRLABase", head_channels=16),
    }["mrla-base" if "mrla-base" in name else "mrla" if "mrla" in name else ""]
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
    mrla = [m for m in model.backbone.modules() if isinstance(m, MRLALight | MRLABase)]
    blocks = sum(model.backbone.stage_blocks)
    assert len(mrla) == (0 if layer_attention is None else blocks)
    assert {type(m).__name__ for m in mrla} == ({layer_attention.type} if mrla else set())


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
