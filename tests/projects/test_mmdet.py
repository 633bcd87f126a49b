"""Detectors of other families, trained on real images by mmdet's own tools and by mim."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.projects.commands import run, train_by_the_prefix_alone

pytestmark = pytest.mark.slow

SMALL = """
_base_ = {base}
model = dict(backbone=dict({backbone}depth=18, init_cfg=None), neck=dict(in_channels={channels}))
data_root = {data!r}
train_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(160, 128), keep_ratio=True), dict(type="PackDetInputs")]
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root=data_root, indices=16, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, indices=4))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3))
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""


def check_training(log: str, work_dir: Path) -> None:
    losses = [float(x) for x in re.findall(r"Epoch\(train\).*? loss: (\S+)", log)]
    assert len(losses) == 16
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4]), losses
    assert re.search(r"coco/bbox_mAP: -?\d", log)
    before, after = (
        torch.load(work_dir / f"epoch_{n}.pth", map_location="cpu", weights_only=False)
        for n in (1, 2)
    )
    # Stage 1 is frozen, and what lies in it with it, as this is no warm start.
    ours = [k for k in after["state_dict"] if ".mrla." in k and "layer1" not in k]
    assert len([k for k in ours if k.endswith("mrla.query.weight")]) == 6
    still = [k for k in ours if torch.equal(before["state_dict"][k], after["state_dict"][k])]
    assert not still, still


def test_atss_by_mim(projects, is_fork, coco_mini, tmp_path):
    """The config that ships here, which imports mmrla by custom_imports."""
    base = str(ROOT / "configs/atss_r50_mrla_1x.py")
    (tmp_path / "small.py").write_text(
        SMALL.format(
            base=repr(base), data=f"{coco_mini}/", backbone="", channels=[64, 128, 256, 512]
        )
    )
    package = "onedl-mmdetection" if is_fork else "mmdet"
    log = run(
        projects, "-m", "mim", "train", package, "small.py", "--gpus", 0, "--work-dir", "out",
        cwd=tmp_path,
    )  # fmt: skip
    check_training(log, tmp_path / "out")


def test_deformable_detr_by_the_prefix_alone(projects, is_fork, coco_mini, tmp_path):
    base = "'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'"
    host = (
        "type='mmrla.MRLAResNet', norm_cfg=dict(requires_grad=True), "
        "layer_attention=dict(type='MRLALight', head_channels=32), "
    )
    (tmp_path / "small.py").write_text(
        SMALL.format(base=base, data=f"{coco_mini}/", backbone=host, channels=[128, 256, 512])
    )
    log = train_by_the_prefix_alone(projects, "mmdet", "small.py", tmp_path, is_fork=is_fork)
    if log is not None:
        check_training(log, tmp_path / "out")
