from __future__ import annotations

import json

import pytest
from mmengine.config import Config

from mmrla.engine.data.config import check_evaluators, warn_of_unchecked
from mmrla.engine.run.checks import _check_initial_weights


def write(path, images, categories=("bolt", "nut")):
    path.write_text(json.dumps(dict(
        images=[dict(id=i, file_name=name) for i, name in enumerate(images)],
        categories=[dict(id=i, name=name) for i, name in enumerate(categories)],
        annotations=[],
    )))  # fmt: skip


def config(root, ann_file="own.json", evaluator="own.json", kind="mmdet.CocoMetric"):
    dataset = dict(type="mmrla.CheckedCocoDataset", data_root=str(root), ann_file=ann_file)
    return Config(
        dict(
            val_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dataset)),
            val_evaluator=[dict(type=kind, ann_file=str(root / evaluator))],
        )
    )


def test_another_set_is_refused(tmp_path):
    write(tmp_path / "own.json", ["a.jpg", "b.jpg"])
    write(tmp_path / "more.json", ["x/a.jpg", "b.jpg", "c.jpg"])  # holds all of it
    write(tmp_path / "other.json", ["a.jpg", "z.jpg"])
    write(tmp_path / "fewer.json", ["a.jpg"])
    write(tmp_path / "swapped.json", ["a.jpg", "b.jpg"], ["nut", "bolt"])
    for evaluator in ("own.json", "more.json"):
        check_evaluators(config(tmp_path, evaluator=evaluator), ["train", "val", "test"])
    for evaluator, message in (
        ("other.json", r"image 1 is 'b.jpg' in .*own.json, and 'z.jpg' there"),
        ("fewer.json", r"image 1 is 'b.jpg' in .*, and missing there.*Set val_evaluator\[0\]"),
        ("swapped.json", "category 0 is 'bolt' in .*, and 'nut' there"),
    ):
        cfg = config(tmp_path, evaluator=evaluator)
        with pytest.raises(ValueError, match=message):
            check_evaluators(cfg, ["val"])
        check_evaluators(cfg, ["test"])  # which this run does not use


def test_what_is_no_coco_file_is_left_alone(tmp_path):
    write(tmp_path / "own.json", ["a.jpg"])
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.txt").write_text("a")
    write(tmp_path / "z.json", ["z.jpg"])
    for change in (dict(evaluator="broken.json"), dict(evaluator="other.txt"),
                   dict(evaluator="z.json", kind="VOCMetric")):  # fmt: skip
        check_evaluators(config(tmp_path, **change), ["val"])


@pytest.mark.parametrize(
    ("kind", "said"),
    [("CocoDataset", 1), ("mmdet.CocoDataset", 1), ("mmrla.CheckedCocoDataset", 0), ("XML", 0)],
)
def test_a_set_that_nobody_checks_is_named(tmp_path, monkeypatch, kind, said):
    lines: list[str] = []
    monkeypatch.setattr("mmrla.engine.data.config.print_log", lambda text, **_: lines.append(text))
    cfg = config(tmp_path)
    cfg.val_dataloader.dataset.dataset.type = kind
    warn_of_unchecked(cfg, ["train", "val", "test"])
    assert ["val_dataloader.dataset.dataset: type='mmrla.Chec" in line for line in lines] == (
        [True] * said
    )


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (dict(init_cfg=[dict(type="Constant"), dict(checkpoint="no.pth")]), r"init_cfg\[1\].c"),
        (dict(roi_head=dict(bbox_head=[{}, dict(init_cfg=dict(checkpoint="no.pth"))])),
         r"roi_head.bbox_head\[1\].init_cfg.checkpoint"),
        (dict(teacher_ckpt="no.pth"), "teacher_ckpt"),
        (dict(backbone=dict(pretrained="no.pth")), "backbone.pretrained"),
    ],
)  # fmt: skip
def test_weights_that_are_not_there_are_found_anywhere(model, place):
    with pytest.raises(FileNotFoundError, match=rf"model.{place}.*: no such file: /.*no.pth"):
        _check_initial_weights(model, "model")
    _check_initial_weights(dict(pretrained="torchvision://resnet50", checkpoint=None), "model")
