"""Kinds of findings about a dataset, and the class of a finding."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ERRORS: dict[str, str] = {
    "not-json": "the annotation file is not JSON",
    "not-coco": "the annotation file is not in COCO's format",
    "no-annotations": "there is no annotation at all",
    "only-crowds": "all annotations are crowds or marked ignore, so there is nothing to train on",
    "bad-record": "a record lacks a field or a field has a wrong type",
    "duplicate-image-id": "several images have the same id",
    "duplicate-annotation-id": "several annotations have the same id",
    "duplicate-category": "several categories have the same id or name",
    "path-escape": "a file_name leads out of the image folder",
    "missing-image": "an image file does not exist",
    "unreadable-image": "an image file is empty or not an image",
    "truncated-image": "an image file ends too early or is damaged",
    "size-mismatch": "an image's size differs from its record",
    "exif-stored": "a record has the stored size of an image that is rotated by its EXIF data",
    "unknown-image": "an annotation's image has no record",
    "unknown-category": "an annotation's category has no record",
    "bad-box": "a box is not four finite numbers",
    "zero-area": "a box has zero width, height or area (a side below a pixel)",
    "outside-box": "a box is outside its image",
    "bad-segmentation": "a segmentation is neither polygons nor an RLE of the image's size",
    "missing-segmentation": "an annotation lacks a segmentation that is needed or that others have",
    "class-order": "the classes are in another order than the categories, which shifts labels",
    "no-class": "no category is one of the classes",
}
"""Kinds of findings that are errors, with descriptions."""

WARNINGS: dict[str, str] = {
    "empty-image": "an image has no annotations",
    "crowd-only": "all annotations of an image are crowds",
    "tiny-image": "an image has a side below 32 pixels, which filter_cfg leaves out",
    "extreme-image": "an image is more than 50 times as long as it is wide, or very large",
    "exif-unclear": "EXIF data rotates an image; its size does not show whether boxes are rotated",
    "deep-image": "an image has more than 8 bits per channel and is reduced to 8 when it is read",
    "beyond-image": "a box extends beyond its image by more than a pixel",
    "mixed-segmentation": "single objects are RLEs next to polygons; poly2mask=False ignores RLEs",
    "marked-ignore": "an annotation is marked ignore, and mmdet leaves it out",
    "duplicate-file": "several images have the same file",
    "missing-class": "a class has no category",
    "unnamed-category": "a category is not among the classes; its annotations are left out",
    "empty-folder": "a class folder has no images",
}
"""Kinds of findings that training can handle."""

KINDS: dict[str, str] = {**ERRORS, **WARNINGS}

FATAL = (
    "not-json", "not-coco", "no-annotations", "only-crowds", "duplicate-category", "class-order",
    "no-class",
)  # fmt: skip
"""Kinds that concern the whole file, so dropping records does not help."""


class DataError(ValueError):
    """Data that is not fit for training; the message lists the first findings."""


@dataclass(frozen=True)
class Finding:
    """One problem in a dataset."""

    kind: str
    """One of :data:`KINDS`."""
    text: str
    """One line for people."""
    path: str
    """The file it is about."""
    image_id: Any = None
    annotation_id: Any = None

    @property
    def severity(self) -> str:
        """``'error'`` or ``'warning'``."""
        return "error" if self.kind in ERRORS else "warning"

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"severity": self.severity, **asdict(self)}


def count_kinds(findings: Iterable[Finding]) -> dict[str, int]:
    """Number of findings of each kind, in the order of :data:`KINDS`."""
    counts = Counter(finding.kind for finding in findings)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def summary(findings: Iterable[Finding]) -> str:
    """Counts of kinds in one line: ``3 missing-image, 1 zero-area``."""
    return ", ".join(f"{count} {kind}" for kind, count in count_kinds(findings).items())


def class_names(value: Any, where: str = "classes") -> tuple[str, ...]:
    """The names of classes as mmengine reads them: a sequence, or the path of a file of lines.

    Raises:
        ValueError: It is a string that is not a file: most likely a single class without its comma.
        TypeError: It is neither.
    """
    if isinstance(value, str):
        if not os.path.isfile(value):
            raise ValueError(
                f"{where}={value!r} is a string: write ({value!r},), with the comma, for one class"
            )
        with open(value, encoding="utf-8") as file:
            return tuple(line.rstrip("\n\r") for line in file)
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{where} must be names of classes, as ('bolt', 'nut'), got {value!r}")
    return tuple(value)
