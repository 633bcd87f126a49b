"""Heads with more or fewer classes than the data stop before anything is built."""

from __future__ import annotations

import re
from pathlib import Path

import mmdet
import pytest
from mmengine.config import Config

import mmrla.registry  # noqa: F401
from mmrla.engine.data.classes import check_classes
from mmrla.engine.run.checks import check_config
from tests.datasets.bad_sets import CLASSES, Coco, write_image
from tests.helpers import refusal
from tests.zygote import run_command

BOX = dict(type="Shared2FCBBoxHead")
ROI = "model = dict(roi_head=dict("


def detector(model: dict, dataset: dict | None = None, **more) -> Config:
    own = dict(type="CocoDataset", ann_file="a.json", metainfo=dict(classes=CLASSES))
    repeated = dict(type="RepeatDataset", times=2, dataset=own | (dataset or {}))
    loader = dict(dataset=repeated)
    return Config(dict(default_scope="mmdet", model=model, train_dataloader=loader, **more))


def two_stage(box: object, **mask: object) -> dict:
    roi = dict(type="StandardRoIHead", bbox_head=box)
    if mask:
        roi["mask_head"] = dict(type="FCNMaskHead", **mask)
    rpn = dict(type="RPNHead", num_classes=1)
    return dict(type="MaskRCNN", backbone=dict(type="VGG", num_classes=9), rpn_head=rpn,
                roi_head=roi)  # fmt: skip


WRONG = {
    "RetinaNet, fewer": (
        dict(type="RetinaNet", bbox_head=dict(type="RetinaHead", num_classes=2)),
        "model.bbox_head.num_classes=2, but", "model = dict(bbox_head=dict(num_classes=3))",
    ),
    "boxes and masks left at 80": (
        two_stage(dict(BOX, num_classes=80), num_classes=80), "mask_head.num_classes=80, but",
        f"{ROI}bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))",
    ),
    "masks alone": (
        two_stage(dict(BOX, num_classes=3), num_classes=80),
        "model.roi_head.mask_head.num_classes=80, but", f"{ROI}mask_head=dict(num_classes=3)))",
    ),
    "a default": (
        two_stage(BOX), "roi_head.bbox_head.num_classes=80, but",
        f"{ROI}bbox_head=dict(num_classes=3)))",
    ),
    "the third of a cascade": (
        two_stage([dict(BOX, num_classes=3), dict(BOX, num_classes=3), dict(BOX, num_classes=4)]),
        "model.roi_head.bbox_head.2.num_classes=4, but",
        "--cfg-options model.roi_head.bbox_head.2.num_classes=3",
    ),
    "things and stuff": (
        dict(type="Mask2Former", panoptic_head=dict(type="Mask2FormerHead", num_stuff_classes=0)),
        "model.panoptic_head.num_things_classes=80, but", "num_things_classes=3",
    ),
    "a teacher's student": (
        dict(type="SemiBaseDetector", detector=two_stage(dict(BOX, num_classes=2))),
        "model.detector.roi_head.bbox_head.num_classes=2, but", "num_classes=3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", [check_classes, check_config])
@pytest.mark.parametrize("name", WRONG)
def test_both_numbers_and_what_to_write(name, check):
    model, given, write = WRONG[name]
    cfg = detector(model, train_cfg=dict(max_epochs=1), optim_wrapper=dict(optimizer={}))
    with pytest.raises(ValueError, match="train_dataloader.dataset.dataset has 3 cl") as caught:
        check(cfg, ("train", "val"))
    assert given in str(caught.value)
    assert write in str(caught.value)
    # What it says to write is right.
    options = str(caught.value).rpartition("--cfg-options ")[2].split()
    cfg.merge_from_dict({k: int(v) for k, v in (o.split("=") for o in options)})
    check(cfg, ("train", "val"))


def test_classes_that_the_config_does_not_name(tmp_path):
    head = dict(type="RetinaNet", bbox_head=dict(type="RetinaHead", num_classes=3))
    with pytest.raises(ValueError, match=r"has 80 classes \(person, .*metainfo.classes is not set"):
        check_classes(detector(head, dict(metainfo=None)), ["train"])
    with pytest.raises(ValueError, match=r"dataset.metainfo.classes='bolt'.*\('bolt',\)"):
        check_classes(detector(head, dict(metainfo=dict(classes="bolt"))), ["train"])
    check_classes(detector(head, dict(type="NotThere", metainfo=None)), ["train"])
    check_classes(detector(head), ["test"])
    # Folders of a classifier.
    for name in CLASSES:
        write_image(tmp_path / "train" / name / "1.jpg")
    data = dict(type="CustomDataset", data_root=str(tmp_path), data_prefix="train")
    model = dict(type="ImageClassifier", head=dict(type="LinearClsHead", num_classes=1000))
    loader = dict(dataset=data)
    cfg = Config(dict(default_scope="mmpretrain", model=model, train_dataloader=loader))
    with pytest.raises(ValueError, match=re.escape("model.head.num_classes=1000, but")):
        check_classes(cfg, ["train"])
    cfg.model.head.num_classes = 3
    check_classes(cfg, ["train"])


@pytest.fixture
def config(tmp_path):
    """RetinaNet with its 80 classes for a set of three."""
    coco = Coco(tmp_path).write()
    path = tmp_path / "config.py"
    path.write_text(
        f"_base_ = 'mmrla::retinanet_r50_mrla_1x.py'\nroot = {str(coco.root)!r}\n"
        "data = dict(data_root=root, ann_file='annotations/instances_train.json',\n"
        "    data_prefix=dict(img='train/'), metainfo=dict(classes=('ant', 'bee', 'cat')))\n"
        "train_dataloader = dict(dataset=data)\nval_dataloader = dict(dataset=data)\n"
        "model = dict(backbone=dict(depth=18, init_cfg=None),\n"
        "    neck=dict(in_channels=[64, 128, 256, 512]))\n"
    )
    return path


@pytest.mark.parametrize("option", [["--dry-run"], []])
def test_command_stops(option, config, tmp_path, capsys):
    said = refusal(capsys, "train", config, "--work-dir", tmp_path / "run", *option)
    assert "model.bbox_head.num_classes=80, but train_dataloader" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("runner", ["Runner", "FlexibleRunner"])
def test_mmdets_own_program_stops(runner, config, tmp_path):
    """It knows nothing of mmrla; the config does."""
    program = Path(mmdet.__file__).parent / ".mim/tools/train.py"
    options = [f"runner_type={runner}"]
    if runner == "FlexibleRunner":
        options += ["train_dataloader.persistent_workers=False", "train_dataloader.num_workers=0"]
    work_dir = tmp_path / "run"
    done = run_command(program, config, "--work-dir", work_dir, "--cfg-options", *options)
    assert done.returncode == 1
    assert "ValueError: model.bbox_head.num_classes=80, but train_dataloader" in done.stderr
    assert not list(tmp_path.glob("run/*.pth"))
