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


def cut(path: Path, share: float = 0.5) -> None:
    """Leave only the beginning of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def annotation(number: int, image: int) -> dict[str, Any]:
    x, y, width, height = 4, 6, 30, 20
    return dict(
        id=number, image_id=image, category_id=1 + number % 3, iscrowd=0,
        bbox=[x, y, width, height], area=width * height,
        segmentation=[[x, y, x + width, y, x + width, y + height, x, y + height]],
    )  # fmt: skip


def rle(height: int = HEIGHT, width: int = WIDTH, compressed: bool = True) -> dict[str, Any]:
    """The mask of :func:`annotation`."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[6:26, 4:34] = 1
    counts = mask_utils.encode(mask)["counts"].decode()
    if not compressed:
        counts = [4 * height + 6, *[20, height - 20] * 29, 20, height - 26 + (width - 34) * height]
    return dict(size=[height, width], counts=counts)


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
            name = f"{number}.jpg"
            self.images.append(dict(id=number, file_name=name, height=HEIGHT, width=WIDTH))
            self.annotations += [annotation(2 * number + i, number) for i in range(2)]
            write_image(self.folder / name)

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

    def rename(self, number: int, name: str) -> Path:
        target = self.folder / name
        self.image(number).rename(target)
        self.images[number - 1]["file_name"] = name
        return target


class Case(NamedTuple):
    """Something wrong with a set, always with image 2 or its annotation 4 unless said otherwise."""

    change: Callable[[Coco], Any]
    found: dict[str, int]
    """Findings by kind."""
    images: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Images left with ``on_bad='skip'``, before mmdet's own filters."""
    gone: int = 0
    """Annotations that are left out."""


def lost(kind: str, change: Callable[[Coco], Any]) -> Case:
    """The image is left out."""
    return Case(change, {kind: 1}, (1, 3, 4, 5, 6), 2)


def first(**changes: Any) -> Callable[[Coco], Any]:
    return lambda coco: coco.annotations[2].update(changes)


def bad(*kinds: str, **changes: Any) -> Case:
    """The annotation is left out."""
    return Case(first(**changes), dict.fromkeys(kinds, 1), gone=1)


def lacks(key: str, kind: str) -> Case:
    return Case(lambda coco: coco.annotations[2].pop(key), {kind: 1}, gone=1)


def record(**changes: Any) -> Callable[[Coco], Any]:
    return lambda coco: coco.images[1].update(changes)


def _truncated_png(coco: Coco) -> None:
    path = coco.rename(2, "2.png")
    write_image(path)
    cut(path)


def _crowds(records: list[dict]) -> None:
    for one in records:
        one.update(iscrowd=1, segmentation=rle(compressed=False))


def _mixed(coco: Coco) -> None:
    coco.annotations[2]["segmentation"] = rle()
    coco.annotations[3].update(segmentation=rle(compressed=False))
    coco.annotations[5].update(segmentation=rle(), iscrowd=1)


def _drop_annotations_of_2(coco: Coco) -> None:
    coco.annotations = [r for r in coco.annotations if r["image_id"] != 2]


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
    pixels = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    cv2.imwrite(str(coco.rename(2, "2.png")), pixels)


CASES: dict[str, Case] = {
    "clean": Case(lambda coco: None, {}),
    "missing image": lost("missing-image", lambda coco: coco.image(2).unlink()),
    "truncated JPEG": lost("truncated-image", lambda coco: cut(coco.image(2), 2 / 3)),
    "truncated PNG": lost("truncated-image", _truncated_png),
    "empty image file": lost("unreadable-image", lambda coco: coco.image(2).write_bytes(b"")),
    "a web page as image": lost(
        "unreadable-image", lambda coco: coco.image(2).write_text("<html>404")
    ),
    "sides exchanged": lost("size-mismatch", record(height=WIDTH, width=HEIGHT)),
    "turned by EXIF, annotated as stored": lost("exif-stored", _turned(6, HEIGHT, WIDTH)),
    "turned by EXIF, annotated as shown": Case(_turned(6, WIDTH, HEIGHT), {}),
    "turned by EXIF, annotated as neither": lost("size-mismatch", _turned(6, HEIGHT, HEIGHT)),
    "upside down by EXIF": Case(_turned(3, HEIGHT, WIDTH), {"exif-unclear": 1}),
    "16 bits a channel": Case(_sixteen_bits, {"deep-image": 1}),
    "zero-area box": bad("zero-area", bbox=[4, 6, 0, 20]),
    "area of zero": bad("zero-area", area=0),
    "negative box": bad("zero-area", bbox=[34, 26, -30, -20]),
    "box outside": bad("outside-box", bbox=[70, 6, 30, 20]),
    "box beyond the edge": Case(first(bbox=[50, 6, 30, 20]), {"beyond-image": 1}),
    "NaN box": bad("bad-box", bbox=[4, 6, float("nan"), 20]),
    "box of three": bad("bad-box", bbox=[4, 6, 30]),
    "no annotations of an image": Case(_drop_annotations_of_2, {"empty-image": 1}),
    "unknown category": bad("unknown-category", category_id=99),
    "unknown image": bad("unknown-image", image_id=99),
    "no area": lacks("area", "bad-record"),
    "no bbox": lacks("bbox", "bad-box"),
    "an image twice": Case(
        lambda coco: coco.images.append(copy.deepcopy(coco.images[1])),
        {"duplicate-image-id": 1, "duplicate-file": 1},
    ),
    "two images of one id": Case(
        lambda coco: coco.images[2].update(id=2), {"duplicate-image-id": 1, "unknown-image": 2},
        (1, 4, 5, 6), 4,
    ),
    "an annotation twice": Case(
        lambda coco: coco.annotations.append(copy.deepcopy(coco.annotations[2])),
        {"duplicate-annotation-id": 1}, gone=1,
    ),
    "two annotations of one id": Case(
        lambda coco: coco.annotations[3].update(id=coco.annotations[2]["id"]),
        {"duplicate-annotation-id": 1}, gone=2,
    ),
    "RLEs and polygons": Case(_mixed, {"mixed-segmentation": 1}),
    "RLE of another size": bad("bad-segmentation", segmentation=rle(HEIGHT, WIDTH + 1)),
    "RLE that ends too early": bad(
        "bad-segmentation", segmentation={"size": [HEIGHT, WIDTH], "counts": [100, 5]}
    ),
    "polygon of two points": bad("bad-segmentation", segmentation=[[4, 6, 30, 20]]),
    "no segmentation": lacks("segmentation", "missing-segmentation"),
    "crowds only": Case(lambda coco: _crowds(coco.annotations[2:4]), {"crowd-only": 1}),
    "name not in ASCII": Case(lambda coco: coco.rename(2, "größe_图像 é.jpg"), {}),
    "image of 1 x 1": Case(lambda coco: coco.resize(2, 1, 1), {"tiny-image": 1}),
    "image of 20000 x 10": Case(
        lambda coco: coco.resize(2, 10, 20000), {"tiny-image": 1, "extreme-image": 1}
    ),
    "name that climbs out": lost("path-escape", record(file_name="../train/2.jpg")),
    "absolute name": lost(
        "path-escape", lambda coco: coco.images[1].update(file_name=str(coco.image(2)))
    ),
    "marked ignore": Case(first(ignore=1), {"marked-ignore": 1}),
    "ids of wrong types": bad("unknown-category", "unknown-image", category_id=[1], image_id={}),
}  # fmt: skip
"""What is left out where it is skipped; findings of the kinds in FATAL are in BROKEN."""


def _no_known_category(coco: Coco) -> None:
    for one in coco.categories:
        one["name"] = f"not {one['name']}"


BROKEN: dict[str, tuple[Callable[[Coco], Any], str | None, str]] = {
    "not JSON": (lambda coco: None, "{'images': [", "not-json"),
    "half a file": (lambda coco: None, '{"images": [{"id": 1, "fi', "not-json"),
    "empty file": (lambda coco: None, "", "not-json"),
    "nested too deeply": (lambda coco: None, "[" * 100_000, "not-json"),
    "a list": (lambda coco: None, "[1, 2]", "not-coco"),
    "no images": (lambda coco: coco.images.clear(), None, "not-coco"),
    "no annotations at all": (lambda coco: coco.annotations.clear(), None, "no-annotations"),
    "crowds alone": (lambda coco: _crowds(coco.annotations), None, "only-crowds"),
    "all marked ignore": (
        lambda coco: [r.update(ignore=1) for r in coco.annotations], None, "only-crowds",
    ),
    "two categories of one name": (
        lambda coco: coco.categories[2].update(name="bee"), None, "duplicate-category",
    ),
    "categories in another order": (lambda coco: coco.categories.reverse(), None, "class-order"),
    "a class in the middle is no category": (
        lambda coco: coco.categories[1].update(name="wasp"), None, "class-order",
    ),
    "no class is a category": (_no_known_category, None, "no-class"),
}  # fmt: skip
