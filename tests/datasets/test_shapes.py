from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmrla.datasets import CLASSES, generate_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("set") / "shapes", 12, 40, seed=3)


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_deterministic_and_growing(shapes, tmp_path):
    again = generate_shapes(tmp_path / "again", 12, 40, seed=3)
    assert tree(again) == tree(shapes)
    more = tree(generate_shapes(tmp_path / "more", 14, 40, seed=3))
    images = {k: v for k, v in tree(shapes).items() if k.suffix == ".png"}
    assert images.items() <= more.items()
    other = tree(generate_shapes(tmp_path / "other", 12, 40, seed=4))
    assert not any(other[k] == v for k, v in images.items())


def test_annotations_describe_what_is_visible(shapes):
    coco = COCO(str(shapes / "annotations/instances_val2017.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.imgs) == 40
    overlaps = several = 0
    for image in coco.imgs.values():
        pixels = cv2.imread(str(shapes / "val2017" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        taken = np.zeros(pixels.shape[:2], int)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.sum() == annotation["area"]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = annotation["bbox"]
            assert (x, y) == (columns[0], rows[0])
            assert (x + w, y + h) == (columns[-1] + 1, rows[-1] + 1)
            taken += mask
            several += len(annotation["segmentation"]) > 1
            box = np.zeros_like(taken)
            box[int(y) : int(y + h), int(x) : int(x + w)] = 1
            overlaps += ((taken - mask > 0) & (box > 0)).any()
        assert taken.max() <= 1  # no pixel belongs to two
    assert overlaps > 10
    areas = [a["area"] for a in coco.anns.values()]
    assert max(areas) / min(areas) > 20
    assert {a["category_id"] for a in coco.anns.values()} == {1, 2, 3}
    assert several > 0  # something is cut apart by what lies before it


def test_keeps_what_is_there_and_replaces_what_differs(tmp_path):
    root = generate_shapes(tmp_path / "s", 1, 1)
    before = (root / "val2017/000000000000.png").stat().st_mtime_ns
    generate_shapes(root, 1, 1)
    assert (root / "val2017/000000000000.png").stat().st_mtime_ns == before
    generate_shapes(root, 2, 1)
    annotations = json.loads((root / "annotations/instances_train2017.json").read_text())
    assert len(annotations["images"]) == 2


def test_never_touches_somebody_elses_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no generated set"):
        generate_shapes(tmp_path, 1, 1)
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    with pytest.raises(ValueError, match="num_val must be at least 1, got 0"):
        generate_shapes(tmp_path / "x", 1, 0)
    with pytest.raises(ValueError, match="image_size must be at least 32, got 16"):
        generate_shapes(tmp_path / "x", 1, 1, image_size=16)
