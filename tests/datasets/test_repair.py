"""``check-data --fix``: what takes no guess is mended, the rest and the input stay."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from pycocotools import mask as masks

from mmrla.cli import main
from mmrla.datasets import DataError, generate_shapes
from mmrla.datasets.repair import repair
from tests.helpers import refusal


@pytest.fixture
def whole(tmp_path):
    """A clean set: its annotation file, its folder of images, its content."""
    generate_shapes(tmp_path / "set", num_train=3, num_val=1)
    path = tmp_path / "set/annotations/instances_train2017.json"
    return path, tmp_path / "set/train2017", json.loads(path.read_text())


def _flatten(a: dict) -> None:
    if len(a["segmentation"]) == 1:
        a["segmentation"] = a["segmentation"][0]


FAULTS = {
    "no ids": ("annotations", lambda a: a.pop("id")),
    "ids all 1": ("annotations", lambda a: a.update(id=1)),
    "no area": ("annotations", lambda a: a.pop("area")),
    "no iscrowd": ("annotations", lambda a: a.pop("iscrowd")),
    "strings": (
        "annotations", lambda a: a.update(bbox=[str(v) for v in a["bbox"]], area=str(a["area"])),
    ),
    "flat": ("annotations", _flatten),
    "no size": ("images", lambda i: (i.pop("width"), i.pop("height"))),
    "backslashes": ("images", lambda i: i.update(file_name="train2017\\" + i["file_name"])),
    "folder twice": ("images", lambda i: i.update(file_name="train2017/" + i["file_name"])),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_without_a_guess(fault, whole, tmp_path, capsys):
    path, images, content = whole
    bad = copy.deepcopy(content)
    key, change = FAULTS[fault]
    for record in bad[key]:
        change(record)
    assert bad != content
    text = json.dumps(bad)
    path.write_text(text)
    arguments = ["check-data", "--ann", str(path), "--images", str(images)]
    before = main(arguments)
    assert ("--fix OUT.json" in capsys.readouterr().out) == bool(before)
    assert main([*arguments, "--fix", str(tmp_path / "out.json")]) == 0
    assert "nothing to mend" not in capsys.readouterr().out
    assert path.read_text() == text
    mended = json.loads((tmp_path / "out.json").read_text())
    assert mended["images"] == content["images"]
    for got, expected in zip(mended["annotations"], content["annotations"], strict=True):
        assert got["area"] == pytest.approx(expected["area"], rel=0.15)  # pixels or polygon
        assert got | dict(area=0, id=0) == expected | dict(area=0, id=0)
    ids = [a["id"] for a in mended["annotations"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_missing_area_is_that_of_the_rle(compressed, whole):
    _, images, content = whole
    mask = np.zeros((128, 128), np.uint8, order="F")
    mask[3:40, 7:20] = mask[60, 50:90] = 1
    rle = masks.encode(mask)
    rle = dict(size=rle["size"], counts=rle["counts"].decode())
    if not compressed:
        edges = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=0)).tolist()
        rle["counts"] = np.diff([0, *edges, mask.size]).tolist()
    record = content["annotations"][0]
    record.update(segmentation=rle, bbox=[7, 3, 83, 58])
    del record["area"]
    (mended, *_) = repair(content, images)[0]["annotations"]
    assert mended["area"] == mask.sum() == 521


def test_what_is_right_or_a_guess_stays_and_what_fix_refuses(whole, tmp_path, capsys):
    path, images, content = whole
    assert repair(content, images) == (content, {})
    for change in (dict(bbox=["left", 1, 2, 3]), dict(bbox=[1, 2, 3]), dict(segmentation=[1, 2])):
        bad = copy.deepcopy(content)
        bad["annotations"][0].update(change)
        assert repair(bad, images) == (bad, {})
    with pytest.raises(DataError, match="no lists of records"):
        repair([content], images)
    one = ["--ann", path, "--images", images]
    for argv, message in (
        ([*one, "--fix", path], "already exists"),
        ([*one, "--fix", tmp_path / "gone/out.json"], "no such folder"),
        ([tmp_path / "set", "--fix", tmp_path / "out.json"], "got 2 set(s)"),
    ):
        assert message in refusal(capsys, "check-data", *argv)
    assert not (tmp_path / "out.json").exists()
