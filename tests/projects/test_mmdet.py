"""Detectors of other families, trained on real images by mmdet's own tools and by mim."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, overlay_environment
from tests.projects.commands import check_layer_attentions, run, train, train_by_the_prefix_alone

pytestmark = pytest.mark.slow

EPOCHS = 6
# From scratch, so nothing is frozen.
SMALL = """
_base_ = {base}
backbone = dict({backbone}depth=18, init_cfg=None, frozen_stages=-1, norm_eval=False)
model = dict(backbone=backbone, neck=dict(in_channels={channels}))
data_root = {data!r}
train_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(160, 128), keep_ratio=True), dict(type="PackDetInputs")]
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root=data_root, indices=8, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, indices=4))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
param_scheduler = []
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=3e-4))
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""


def check_training(log: str, work_dir: Path) -> None:
    losses = [float(x) for x in re.findall(r"Epoch\(train\).*? loss: (\S+)", log)]
    assert len(losses) == 4 * EPOCHS
    assert np.isfinite(losses).all()
    # Of the same eight images, in the first epoch and in the last.
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses
    assert re.search(r"coco/bbox_mAP: -?\d", log)
    check_layer_attentions(work_dir, "epoch_1.pth", f"epoch_{EPOCHS}.pth")


def small(base: str, coco_mini: Path, channels: list[int], backbone: str = "") -> str:
    return SMALL.format(
        base=repr(base), data=f"{coco_mini}/", channels=channels, backbone=backbone, epochs=EPOCHS
    )


def test_atss_by_mim(projects, is_fork, coco_mini, tmp_path):
    """The config that ships here, which imports mmrla by custom_imports."""
    base = str(ROOT / "configs/atss_r50_mrla_1x.py")
    (tmp_path / "small.py").write_text(small(base, coco_mini, [64, 128, 256, 512]))
    package = "onedl-mmdetection" if is_fork else "mmdet"
    log = run(
        projects, "-m", "mim", "train", package, "small.py", "--gpus", 0, "--work-dir", "out",
        cwd=tmp_path,
    )  # fmt: skip
    check_training(log, tmp_path / "out")


def test_deformable_detr_by_mmdets_script(projects, coco_mini, tmp_path):
    """mmdet's own config and nothing but the prefix; the import where mmcv has no operations."""
    base = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
    host = (
        "type='mmrla.MRLAResNet', norm_cfg=dict(requires_grad=True), "
        "layer_attention=dict(type='MRLALight', head_channels=32), "
    )
    text = small(base, coco_mini, [128, 256, 512], host)
    (tmp_path / "small.py").write_text(text)
    log = train_by_the_prefix_alone(projects, "mmdet", "small.py", tmp_path, needs_ops=True)
    if log is None:
        text += "custom_imports = dict(imports=['mmrla'], allow_failed_imports=False)\n"
        (tmp_path / "small.py").write_text(text)
        log = train(projects, "mmdet", "small.py", tmp_path)
    check_training(log, tmp_path / "out")


def test_named_base_by_mmdets_script(coco_mini, tmp_path):
    """mmdet's script imports nothing of mmrla before it reads `mmrla::`."""
    python = overlay_environment(tmp_path / "env")
    base = "mmrla::retinanet_r50_mrla_1x.py"
    (tmp_path / "small.py").write_text(small(base, coco_mini, [64, 128, 256, 512]))
    assert "please specify the package name" in train(
        python, "mmdet", "small.py", tmp_path, ok=False
    )
    run(python, "-m", "mmrla.startup", "on", cwd=tmp_path)
    check_training(train(python, "mmdet", "small.py", tmp_path), tmp_path / "out")
