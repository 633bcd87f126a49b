from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmrla.datasets import CLASSES, generate_shapes
from tests.helpers import files_in


def test_deterministic_and_growing(tmp_path):
    """The same again; more are the same and others; another seed changes all; nothing twice."""
    first = generate_shapes(tmp_path / "first", 3, 4, seed=3)
    before = files_in(first)
    assert files_in(generate_shapes(tmp_path / "again", 3, 4, seed=3)) == before
    images = {k: v for k, v in before.items() if k.endswith(".png")}
    other = files_in(generate_shapes(tmp_path / "other", 3, 4, seed=4))
    assert not any(other[k] == v for k, v in images.items())
    written = (first / "val2017/000000000000.png").stat().st_mtime_ns
    generate_shapes(first, 3, 4, seed=3)
    assert (first / "val2017/000000000000.png").stat().st_mtime_ns == written
    generate_shapes(first, 5, 4, seed=3)
    assert images.items() <= files_in(first).items()
    annotations = json.loads((first / "annotations/instances_train2017.json").read_text())
    assert len(annotations["images"]) == 5


def test_annotations_describe_what_is_visible(tmp_path):
    shapes = generate_shapes(tmp_path / "shapes", 1, 40, seed=3)
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


def test_never_touches_somebody_elses_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no generated set"):
        generate_shapes(tmp_path, 1, 1)
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    with pytest.raises(ValueError, match="num_val must be at least 1, got 0"):
        generate_shapes(tmp_path / "x", 1, 0)
    with pytest.raises(ValueError, match="image_size must be at least 32, got 16"):
        generate_shapes(tmp_path / "x", 1, 1, image_size=16)
