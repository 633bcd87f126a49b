"""From data as it comes to a trained detector, its AP, a picture and an ONNX file, by commands."""

from __future__ import annotations

import json
import re
import shutil

import cv2
import pytest
from mmengine.config import Config

from mmrla.cli import main
from mmrla.datasets import generate_shapes
from tests.conftest import SHARED
from tests.helpers import refusal
from tests.zygote import run_command


def run(*words: object, cwd, ok: bool = True) -> str:
    done = run_command("-m", "mmrla", *words, cwd=cwd)
    assert (done.returncode == 0) is ok, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_shapes("mine", num_train=5, num_val=2)
    return "mine"


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn", "cpu"])
def test_a_new_config_passes_the_dry_run(detector, shapes, tmp_path, capsys):
    options = ["--cpu", "--epochs", "9"] if detector == "cpu" else ["--detector", detector]
    main(["new-config", shapes, "new/one.py", *options])
    cfg = Config.fromfile("new/one.py")
    assert cfg.train_cfg.max_epochs == (9 if detector == "cpu" else 100)
    capsys.readouterr()
    main(["train", "new/one.py", "--dry-run", "--cfg-options", "model.backbone.init_cfg=None"])
    said = capsys.readouterr()
    said = said.out + said.err
    assert "dry run: fine are" in said
    assert "images: train 5, val 2" in said
    content = json.loads((tmp_path / "mine/annotations/instances_train2017.json").read_text())
    classes = [category["name"] for category in content["categories"]]
    assert list(cfg.train_dataloader.dataset.metainfo.classes) == classes
    model = cfg.model.get("roi_head", cfg.model)
    heads = [model[name] for name in ("bbox_head", "mask_head") if name in model]
    assert {head.num_classes for head in heads} == {len(classes)}
    if detector == "cpu":
        sides = sorted((w * h) ** 0.5 for *_, w, h in (a["bbox"] for a in content["annotations"]))
        shown = max(content["images"][0]["width"], content["images"][0]["height"])
        anchor = 8 * cfg.model.bbox_head.anchor_generator.octave_base_scale
        small, large = (cfg.scale[0] / shown * sides[i] for i in (0, len(sides) // 2))
        assert min(small, 32) - 4 <= anchor <= max(large, 8)


def test_new_config_says_what_is_wrong(shapes, tmp_path, capsys):
    (tmp_path / "there.py").touch()
    shutil.copytree("mine", "no_val")
    (tmp_path / "no_val/annotations/instances_val2017.json").unlink()
    path = tmp_path / "mine/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    shutil.copytree("mine", "unknown")
    content["annotations"][0]["image_id"] = 99
    (tmp_path / "unknown/annotations/instances_train2017.json").write_text(json.dumps(content))
    for argv, message in (
        (["mine", "there.py"], "already exists"),
        (["mine", "new.txt"], "must end in .py"),
        (["gone", "new.py"], "no such folder"),
        (["no_val", "new.py"], "has no val set"),
        (["mine", "new.py", "--detector", "mask_rcnn"], "not every object has a mask"),
        (["mine", "new.py", "--detector", "mask_rcnn", "--cpu"], "--cpu is a RetinaNet"),
        (["unknown", "new.py", "--cpu"], "(KeyError(99)); run mmrla check-data unknown"),
        (["mine", "new.py", "--epochs", "0"], "--epochs must be at least 1"),
    ):
        assert message in refusal(capsys, "new-config", *argv)
    assert not (tmp_path / "new.py").exists()


@pytest.mark.slow
def test_from_voc_to_a_picture_and_onnx(tmp_path):
    """The commands of docs/own_data.md on real photographs, at a smaller scale, from scratch."""
    source = SHARED / "data/bccd"
    if not source.is_dir():
        pytest.skip(f"no real VOC folder: {source} is absent")
    pytest.importorskip("onnxruntime")
    # Status 1: two boxes of the real set have no size.
    said = run("convert-data", source, "cells", cwd=tmp_path, ok=False)
    assert "205 images, 2805 objects" in said
    run("new-config", "cells", "cells.py", "--cpu", "--epochs", "2", cwd=tmp_path)
    small = ["--cfg-options", "model.backbone.init_cfg=None", "model.test_cfg.score_thr=0.0",
             "train_dataloader.dataset.indices=32", "val_dataloader.dataset.indices=8"]  # fmt: skip
    said = run("train", "cells.py", *small, cwd=tmp_path)
    assert re.search(r"coco/bbox_mAP: \d", said)
    photo = next((tmp_path / "cells/test2017").iterdir())
    checkpoint = "work_dirs/cells/epoch_2.pth"
    run("predict", "cells.py", checkpoint, photo, "--out-dir", "found", cwd=tmp_path)
    assert cv2.imread(str(tmp_path / f"found/{photo.stem}.png")).std() > 10
    said = run("export-onnx", "cells.py", checkpoint, "--size", 128, 160, "--out", "onnx",
               "--images", photo, *small[:3], cwd=tmp_path)  # fmt: skip
    assert "0 without a partner" in said
    assert (tmp_path / "onnx/cells_detector.onnx").stat().st_size > 10**6
