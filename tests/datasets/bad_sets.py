"""A small clean set in COCO's format, and everything that can be wrong with one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

CLASSES = ("ant", "bee", "cat")
HEIGHT, WIDTH = 48, 64


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # imwrite cannot take every name on every system.
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def annotation(number: int, image: int, **changes: Any) -> dict[str, Any]:
    x, y, width, height = 4, 6, 30, 20
    return {
        "id": number, "image_id": image, "category_id": 1 + number % 3, "iscrowd": 0,
        "bbox": [x, y, width, height], "area": width * height,
        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
        **changes,
    }  # fmt: skip


def rle(height: int = HEIGHT, width: int = WIDTH, compressed: bool = True) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[6:26, 4:34] = 1
    if compressed:
        found = mask_utils.encode(mask)
        return {"size": [height, width], "counts": found["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {
        "size": [height, width],
        "counts": np.diff([0, *edges.tolist(), len(flat)]).tolist(),
    }


class Coco:
    """A set of six images with two objects each, changed before it is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "train"
        self.ann_file = root / "annotations/instances_train.json"
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
        for number in range(1, 7):
            self.images.append(
                dict(id=number, file_name=f"{number}.jpg", height=HEIGHT, width=WIDTH)
            )
            self.annotations += [annotation(2 * number + i, number) for i in range(2)]
            write_image(self.folder / f"{number}.jpg")

    def write(self, text: str | None = None) -> Coco:
        self.ann_file.parent.mkdir(parents=True, exist_ok=True)
        content = dict(images=self.images, annotations=self.annotations, categories=self.categories)
        self.ann_file.write_text(json.dumps(content) if text is None else text)
        return self

    def image(self, number: int) -> Path:
        return self.folder / f"{number}.jpg"

    def resize(self, number: int, height: int, width: int) -> None:
        """Another size of an image, said so in its record."""
        write_image(self.image(number), height, width)
        self.images[number - 1].update(height=height, width=width)
        # Their boxes and polygons would lie outside.
        for record in self.annotations:
            if record["image_id"] == number:
                record.update(bbox=[0, 0, width, height], area=width * height)
                record["segmentation"] = [[0, 0, width, 0, width, height, 0, height]]

    def rename(self, number: int, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.image(number).rename(target)
        self.images[number - 1]["file_name"] = name


class Case(NamedTuple):
    """Something wrong with a set, always with image 2 or its annotation 4 unless said otherwise."""

    change: Callable[[Coco], Any]
    found: dict[str, int]
    """Findings by kind."""
    images: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Images left with ``on_bad='skip'``, before mmdet's own filters."""
    gone: int = 0
    """Annotations that are left out."""


WITHOUT_2 = (1, 3, 4, 5, 6)


def _first(**changes: Any) -> Callable[[Coco], Any]:
    return lambda coco: coco.annotations[2].update(changes)


def _record(**changes: Any) -> Callable[[Coco], Any]:
    return lambda coco: coco.images[1].update(changes)


def _truncate(coco: Coco) -> None:
    whole = coco.image(2).read_bytes()
    coco.image(2).write_bytes(whole[: len(whole) * 2 // 3])


def _truncated_png(coco: Coco) -> None:
    coco.rename(2, "2.png")
    write_image(coco.folder / "2.png")
    whole = (coco.folder / "2.png").read_bytes()
    (coco.folder / "2.png").write_bytes(whole[: len(whole) // 2])


def _same_image_twice(coco: Coco) -> None:
    coco.images.append(copy.deepcopy(coco.images[1]))


def _two_images_of_one_id(coco: Coco) -> None:
    coco.images[2]["id"] = 2


def _same_annotation_twice(coco: Coco) -> None:
    coco.annotations.append(copy.deepcopy(coco.annotations[2]))


def _two_annotations_of_one_id(coco: Coco) -> None:
    coco.annotations[3]["id"] = coco.annotations[2]["id"]


def _crowds(coco: Coco) -> None:
    for record in coco.annotations[2:4]:
        record.update(iscrowd=1, segmentation=rle(compressed=False))


def _mixed(coco: Coco) -> None:
    coco.annotations[2]["segmentation"] = rle()
    coco.annotations[3].update(segmentation=rle(compressed=False))
    coco.annotations[5].update(segmentation=rle(), iscrowd=1)


def _drop_annotations_of_2(coco: Coco) -> None:
    coco.annotations = [r for r in coco.annotations if r["image_id"] != 2]


def _without_key(key: str) -> Callable[[Coco], Any]:
    return lambda coco: coco.annotations[2].pop(key)


def _turned(orientation: int, height: int, width: int) -> Callable[[Coco], Any]:
    """Image 2 is stored as 64 x 48 with an EXIF orientation; its record says height and width."""

    def change(coco: Coco) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(coco.image(2)) as image:
            image.save(coco.image(2), exif=exif)
        coco.images[1].update(height=height, width=width)

    return change


def _sixteen_bits(coco: Coco) -> None:
    coco.rename(2, "2.png")
    pixels = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    cv2.imwrite(str(coco.folder / "2.png"), pixels)


CASES: dict[str, Case] = {
    "clean": Case(lambda coco: None, {}),
    "missing image": Case(lambda coco: coco.image(2).unlink(), {"missing-image": 1}, WITHOUT_2, 2),
    "truncated JPEG": Case(_truncate, {"truncated-image": 1}, WITHOUT_2, 2),
    "truncated PNG": Case(_truncated_png, {"truncated-image": 1}, WITHOUT_2, 2),
    "empty image file": Case(
        lambda coco: coco.image(2).write_bytes(b""), {"unreadable-image": 1}, WITHOUT_2, 2
    ),
    "a web page as image": Case(
        lambda coco: coco.image(2).write_text("<html>404"), {"unreadable-image": 1}, WITHOUT_2, 2
    ),
    "sides exchanged": Case(
        _record(height=WIDTH, width=HEIGHT), {"size-mismatch": 1}, WITHOUT_2, 2
    ),
    "turned by EXIF, annotated as stored": Case(
        _turned(6, HEIGHT, WIDTH), {"exif-stored": 1}, WITHOUT_2, 2
    ),
    "turned by EXIF, annotated as shown": Case(_turned(6, WIDTH, HEIGHT), {}),
    "turned by EXIF, annotated as neither": Case(
        _turned(6, HEIGHT, HEIGHT), {"size-mismatch": 1}, WITHOUT_2, 2
    ),
    "upside down by EXIF": Case(_turned(3, HEIGHT, WIDTH), {"exif-unclear": 1}),
    "16 bits a channel": Case(_sixteen_bits, {"deep-image": 1}),
    "zero-area box": Case(_first(bbox=[4, 6, 0, 20]), {"zero-area": 1}, gone=1),
    "area of zero": Case(_first(area=0), {"zero-area": 1}, gone=1),
    "negative box": Case(_first(bbox=[34, 26, -30, -20]), {"zero-area": 1}, gone=1),
    "box outside": Case(_first(bbox=[70, 6, 30, 20]), {"outside-box": 1}, gone=1),
    "box beyond the edge": Case(_first(bbox=[50, 6, 30, 20]), {"beyond-image": 1}),
    "NaN box": Case(_first(bbox=[4, 6, float("nan"), 20]), {"bad-box": 1}, gone=1),
    "box of three": Case(_first(bbox=[4, 6, 30]), {"bad-box": 1}, gone=1),
    "no annotations of an image": Case(_drop_annotations_of_2, {"empty-image": 1}),
    "unknown category": Case(_first(category_id=99), {"unknown-category": 1}, gone=1),
    "unknown image": Case(_first(image_id=99), {"unknown-image": 1}, gone=1),
    "no area": Case(_without_key("area"), {"bad-record": 1}, gone=1),
    "no bbox": Case(_without_key("bbox"), {"bad-box": 1}, gone=1),
    "an image twice": Case(_same_image_twice, {"duplicate-image-id": 1, "duplicate-file": 1}),
    "two images of one id": Case(
        _two_images_of_one_id, {"duplicate-image-id": 1, "unknown-image": 2}, (1, 4, 5, 6), 4
    ),
    "an annotation twice": Case(_same_annotation_twice, {"duplicate-annotation-id": 1}, gone=1),
    "two annotations of one id": Case(
        _two_annotations_of_one_id, {"duplicate-annotation-id": 1}, gone=2
    ),
    "RLEs and polygons": Case(_mixed, {"mixed-segmentation": 1}),
    "RLE of another size": Case(
        _first(segmentation=rle(HEIGHT, WIDTH + 1)), {"bad-segmentation": 1}, gone=1
    ),
    "RLE that ends too early": Case(
        _first(segmentation={"size": [HEIGHT, WIDTH], "counts": [100, 5]}),
        {"bad-segmentation": 1},
        gone=1,
    ),
    "polygon of two points": Case(
        _first(segmentation=[[4, 6, 30, 20]]), {"bad-segmentation": 1}, gone=1
    ),
    "no segmentation": Case(_without_key("segmentation"), {"missing-segmentation": 1}, gone=1),
    "crowds only": Case(_crowds, {"crowd-only": 1}),
    "name not in ASCII": Case(lambda coco: coco.rename(2, "größe_图像 é.jpg"), {}),
    "image of 1 x 1": Case(lambda coco: coco.resize(2, 1, 1), {"tiny-image": 1}),
    "image of 20000 x 10": Case(
        lambda coco: coco.resize(2, 10, 20000), {"tiny-image": 1, "extreme-image": 1}
    ),
    "name that climbs out": Case(
        _record(file_name="../train/2.jpg"), {"path-escape": 1}, WITHOUT_2, 2
    ),
    "absolute name": Case(
        lambda coco: coco.images[1].update(file_name=str(coco.image(2))),
        {"path-escape": 1},
        WITHOUT_2,
        2,
    ),
    "marked ignore": Case(_first(ignore=1), {"marked-ignore": 1}),
    "ids of wrong types": Case(
        _first(category_id=[1], image_id={}), {"unknown-category": 1, "unknown-image": 1}, gone=1
    ),
}
"""What is left out where it is skipped; findings of the kinds in FATAL are in BROKEN."""


def _reverse_categories(coco: Coco) -> None:
    coco.categories.reverse()


def _rename_category(coco: Coco) -> None:
    coco.categories[1]["name"] = "wasp"


def _all_crowds(coco: Coco) -> None:
    for record in coco.annotations:
        record.update(iscrowd=1, segmentation=rle(compressed=False))


def _no_known_category(coco: Coco) -> None:
    for record in coco.categories:
        record["name"] = f"not {record['name']}"


BROKEN: dict[str, tuple[Callable[[Coco], Any], str | None, str]] = {
    "not JSON": (lambda coco: None, "{'images': [", "not-json"),
    "half a file": (lambda coco: None, '{"images": [{"id": 1, "fi', "not-json"),
    "empty file": (lambda coco: None, "", "not-json"),
    "nested too deeply": (lambda coco: None, "[" * 100_000, "not-json"),
    "a list": (lambda coco: None, "[1, 2]", "not-coco"),
    "no images": (lambda coco: coco.images.clear(), None, "not-coco"),
    "no annotations at all": (lambda coco: coco.annotations.clear(), None, "no-annotations"),
    "crowds alone": (_all_crowds, None, "only-crowds"),
    "all marked ignore": (
        lambda coco: [r.update(ignore=1) for r in coco.annotations], None, "only-crowds",
    ),
    "two categories of one name": (
        lambda coco: coco.categories[2].update(name="bee"), None, "duplicate-category",
    ),
    "categories in another order": (_reverse_categories, None, "class-order"),
    "a class in the middle is no category": (_rename_category, None, "class-order"),
    "no class is a category": (_no_known_category, None, "no-class"),
}  # fmt: skip
