"""Pascal VOC folders: read as COCO's format, checked, trained and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

import mmrla.registry  # noqa: F401
from mmrla.datasets import CheckedCocoDataset, DataError, check_coco, voc_to_coco
from mmrla.engine import check_data, set_data_root
from mmrla.engine.data.sets import sets_of_config
from mmrla.models import MRLAEfficientNet
from tests.conftest import ROOT

CLASSES = ("RBC", "WBC", "Platelets")


def write_voc(root: Path, name: str, objects, size=(64, 48), said=None, suffix="jpg") -> None:
    """An image and its annotation, of size ``said``; objects: name, corners, difficult."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size[::-1], 3), 220, np.uint8)
    lines = []
    for label, (left, top, right, bottom), difficult in objects:
        pixels[top - 1 : bottom, left - 1 : right] = 60 * CLASSES.index(label), 40, 90
        box = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        lines.append(
            f"<object><name>{label}</name>{part if difficult else ''}<bndbox>{box}</bndbox>"
            + (f"<difficult>{difficult}</difficult>" if difficult is not None else "")
            + "</object>"
        )
    width, height = said or size
    of = "" if said == () else f"<size><width>{width}</width><height>{height}</height></size>"
    Image.fromarray(pixels).save(root / f"JPEGImages/{name}.{suffix}")
    (root / f"Annotations/{name}.xml").write_text(
        f"<annotation><filename>of_before.jpg</filename>{of}{''.join(lines)}</annotation>"
    )


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "voc"
    write_voc(root, "b", [("WBC", (1, 1, 64, 48), 0), ("RBC", (10, 12, 30, 40), 1)])
    write_voc(root, "a", [("RBC", (5, 6, 5, 6), None)], said=())
    write_voc(root, "empty", [], said=(0, 0), suffix="png")
    write_voc(root, "wrong", [("Platelets", (2, 3, 9, 9), 0)], said=(48, 64))
    (root / "ImageSets/Main/train.txt").write_text("b\nempty  1\n\n")
    return root


def test_what_is_read(voc):
    content = voc_to_coco(voc, "train", CLASSES)
    assert content == dict(
        images=[
            dict(id=1, file_name="b.jpg", width=64, height=48),
            dict(id=2, file_name="empty.png", width=64, height=48),
        ],
        annotations=[
            dict(id=1, image_id=1, category_id=2, bbox=[0, 0, 64, 48], area=64 * 48, iscrowd=0),
            dict(id=2, image_id=1, category_id=1, bbox=[9, 11, 21, 29], area=21 * 29, iscrowd=1),
        ],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
    )
    whole = voc_to_coco(voc)
    assert [image["file_name"] for image in whole["images"]] == [
        "a.jpg", "b.jpg", "empty.png", "wrong.jpg"]  # fmt: skip
    assert [c["name"] for c in whole["categories"]] == ["Platelets", "RBC", "WBC"]
    # Classes of another set do not hide that none of them is here.
    foreign = voc_to_coco(voc, "train", ("person", "dog"))
    assert [c["name"] for c in foreign["categories"]] == ["RBC", "WBC"]
    findings = check_coco(whole, voc, voc / "JPEGImages")
    assert sorted(f.kind for f in findings) == ["empty-image", "size-mismatch", "zero-area"]
    json.dumps(whole)


def test_names_with_spaces_and_numbers(voc):
    for name in ("my cat", "my cat 1"):
        write_voc(voc, name, [("RBC", (5, 6, 50, 40), 0)])
    (voc / "ImageSets/Main/train.txt").write_text("my cat\nmy cat 1\nmy cat 1 -1\nb  2  1\n")
    names = [image["file_name"] for image in voc_to_coco(voc, "train")["images"]]
    assert names == ["my cat.jpg", "my cat 1.jpg", "my cat 1.jpg", "b.jpg"]


def test_the_dataset_holds_what_mmdets_reads(voc):
    """But for the last column and row of a box, which mmdet leaves out."""
    from mmdet.datasets import XMLDataset

    (voc / "ImageSets/Main/train.txt").write_text("b\nwrong\n")
    common = dict(data_root=str(voc), metainfo=dict(classes=CLASSES), pipeline=[])
    common["ann_file"] = "ImageSets/Main/train.txt"
    ours = CheckedCocoDataset(data_prefix=dict(img="JPEGImages/"), **common)
    theirs = XMLDataset(data_prefix=dict(sub_data_root=f"{voc}/"), **common)
    assert len(ours) == len(theirs) == 2
    for index in range(2):
        mine, other = ours.get_data_info(index), theirs.get_data_info(index)
        assert Path(mine["img_path"]) == Path(other["img_path"])
        assert (mine["width"], mine["height"]) == (other["width"], other["height"])
        for a, b in zip(mine["instances"], other["instances"], strict=True):
            assert a["bbox"][:2] == b["bbox"][:2]
            assert a["bbox"][2:] == [side + 1 for side in b["bbox"][2:]]
            assert all(a[key] == b[key] for key in ("bbox_label", "ignore_flag"))
    with pytest.raises(DataError, match="no class is a category"):
        CheckedCocoDataset(**{**common, "metainfo": None}, data_prefix=dict(img="JPEGImages/"))


def test_what_cannot_be_read_is_named(voc, tmp_path):
    (voc / "Annotations/b.xml").unlink()
    for text, message in (
        (None, "no annotation of a listed image: .*b.xml"),
        ("<annotation>", "b.xml: not XML"),
        ("<annotation><size><width>wide</width></size></annotation>", r"numbers, got \['wide', N"),
        ("<annotation><object><name>RBC</name></object></annotation>", "four numbers, got <object"),
        ("<annotation><object><bndbox/></object></annotation>", "needs a name and a bndbox"),
    ):
        if text is not None:
            (voc / "Annotations/b.xml").write_text(text)
        with pytest.raises(DataError, match=message):
            voc_to_coco(voc, "train")
    with pytest.raises(FileNotFoundError, match=f"no Pascal VOC folder.*{tmp_path}"):
        voc_to_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="no list of images 'val'.*Main/val.txt"):
        voc_to_coco(voc, "val")
    (voc / "JPEGImages/a.jpg").unlink()
    with pytest.raises(DataError, match="a.xml: gives no size, and .*a.jpg cannot be read"):
        voc_to_coco(voc)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "_mrla", "_mrla-base"])
def test_detectors_of_blood_cells_train(kind, tmp_path):
    """The recipe as it is, from a warm start, on a folder of four images."""
    rng = np.random.default_rng(0)
    root = tmp_path / "voc"
    for index in range(4):
        left, top = rng.integers(1, 60, 2)
        boxes = [("RBC", (left, top, left + 50, top + 50), 0), ("WBC", (100, 60, 220, 170), 0)]
        write_voc(root, f"{index}", boxes, (256, 192))
    for name, images in (("train", range(4)), ("test", range(2, 4))):
        (root / f"ImageSets/Main/{name}.txt").write_text("\n".join(map(str, images)))
    torch.save(MRLAEfficientNet("lite0", layer_attention=None).state_dict(), tmp_path / "lite0.pth")
    cfg = Config.fromfile(ROOT / f"configs/bccd/retinanet_efficientnet-lite0{kind}_bccd.py")
    set_data_root(cfg, root)
    check_data(cfg)
    sets, unchecked = sets_of_config(cfg)
    assert not unchecked
    assert [one.ann_file.name for one in sets] == ["train.txt", "test.txt"]
    for one in sets:
        assert one.check(decode=False, workers=1) == ([], False)
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / "lite0.pth")
    cfg.model.test_cfg.score_thr = 0.0  # so that there are detections after two steps
    cfg.work_dir = str(tmp_path / "run")
    # Runs of one process find experiments and visualizers again by their names.
    cfg.experiment_name = cfg.visualizer.name = tmp_path.name
    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = 2
    runner = Runner.from_cfg(cfg)
    runner.train()
    (scalars,) = (tmp_path / "run").glob("*/vis_data/scalars.json")
    last = [json.loads(line) for line in scalars.read_text().splitlines()][-1]
    assert {f"coco/bbox_mAP{kind}" for kind in ("", "_50")} <= last.keys()
    assert last["coco/bbox_mAP"] >= 0
    assert (tmp_path / "run/epoch_2.pth").is_file()
    moved = {
        k for k, p in runner.model.backbone.named_parameters() if ".mrla.norm" in k and p.any()
    }
    count = sum(".mrla.norm" in k for k, _ in runner.model.backbone.named_parameters())
    assert len(moved) == count == (18 if kind else 0)
