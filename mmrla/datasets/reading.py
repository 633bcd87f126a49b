"""A dataset in another format, read as COCO's.

Readers keep boxes, and polygons with subpixel precision, and count the shapes that they do not
convert. Sizes are of images as displayed, rotated by their EXIF data, because YOLO's and labelme's
tools annotate those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmrla.datasets.findings import DataError
from mmrla.datasets.images import stored_size, turned

SPLITS = ("train", "val", "test")
_ALIASES = {"valid": "val", "validation": "val"}
FOLDERS = (*SPLITS, *_ALIASES)
"""Possible folder names of a split."""


def split_of(name: str) -> str | None:
    """The split of a folder with this name in any case, or None."""
    name = name.lower()
    return _ALIASES.get(name, name) if name in FOLDERS else None


class Reading:
    """A dataset in COCO's format under construction, split by split."""

    def __init__(self, classes: Iterable[str] = ()) -> None:
        self.format = ""
        """For people, as ``'YOLO'``."""
        self.classes = list(classes)
        """Names in the order of their ids, from 1."""
        self.splits: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, list[Path]] = {}
        """The file of each image of a split."""
        self.left_out: Counter[str] = Counter()
        """Shapes that the reader does not convert, by kind."""

    def image(self, split: str, source: Path, file_name: str, size: Sequence[int]) -> int:
        """Add an image, which will be ``file_name`` in its split's folder; returns its id."""
        images = self.splits.setdefault(split, dict(images=[], annotations=[]))["images"]
        number = len(images) + 1
        images.append(dict(id=number, file_name=file_name, width=size[0], height=size[1]))
        self.sources.setdefault(split, []).append(source)
        return number

    def add(self, name: str, image: int, label: str, box: Sequence[float], /, **more: Any) -> None:
        """Add an object, its box as x, y, width and height, with further keys of its record."""
        if label not in self.classes:
            self.classes.append(label)
        box = [round(value, 3) for value in box]
        record = dict(area=box[2] * box[3], iscrowd=0) | more
        annotations = self.splits[name]["annotations"]
        annotations.append(
            dict(id=len(annotations) + 1, image_id=image,
                 category_id=self.classes.index(label) + 1, bbox=box) | record
        )  # fmt: skip

    def add_polygons(
        self, name: str, image: int, label: str, polygons: Sequence[Sequence[float]]
    ) -> None:
        """Add an object of polygons ``[x1, y1, x2, y2, ...]``, with the box around them."""
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        rounded = [[round(value, 3) for value in polygon] for polygon in polygons]
        area = round(sum(map(area_of, polygons)), 3)
        self.add(name, image, label, box, segmentation=rounded, area=area)

    def contents(self) -> dict[str, dict[str, Any]]:
        """Contents of COCO's annotation files for the splits."""
        categories = [dict(id=i, name=label) for i, label in enumerate(self.classes, 1)]
        return {name: dict(**split, categories=categories) for name, split in self.splits.items()}


def area_of(polygon: Sequence[float]) -> float:
    """The area of a polygon ``[x1, y1, x2, y2, ...]``."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    turned = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(a * d - b * c for (a, b), (c, d) in turned)) / 2


def lines_of(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark, stripped.

    Raises:
        mmrla.datasets.findings.DataError: It is in another encoding.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in UTF-8, save it in that encoding ({error})") from error
    return [line.strip() for line in text.splitlines()]


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, rotated by its EXIF data.

    Raises:
        mmrla.datasets.findings.DataError: It is not an image.
    """
    try:
        with Image.open(path) as image:
            return turned(*stored_size(image))
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise DataError(f"{path}: no image ({str(error)[:120]})") from error
