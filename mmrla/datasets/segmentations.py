"""Checks of segmentations and of single values in an annotation file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def is_id(value: Any) -> bool:
    """Whether it can be an id: an integer or a string."""
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def are_numbers(values: list[Any]) -> bool:
    """Whether all are finite numbers; fast, for hundreds of thousands of lists."""
    return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))


def is_size(value: Any) -> bool:
    """Whether it is a positive integer number of pixels."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def shorten(value: Any, limit: int = 80) -> str:
    """Its repr, cut after ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def segmentation_fault(segmentation: Any, image: Mapping[str, Any] | None) -> str | None:
    """The error of a non-empty segmentation, or None."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return f"no polygon of three points or more: {shorten(polygon)}"
            if not are_numbers(polygon):
                return f"not all coordinates are finite numbers: {shorten(polygon)}"
        return None
    if not isinstance(segmentation, Mapping):
        return f"neither polygons nor an RLE: {shorten(segmentation)}"
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_size, size)):
        return f"an RLE without size [height, width], got {shorten(size)}"
    if image is not None and size != [image["height"], image["width"]]:
        return f"an RLE of {size}, the image has [{image['height']}, {image['width']}]"
    if isinstance(counts, str):
        counts = uncompressed(counts)
    if (
        not isinstance(counts, list)
        or any(type(count) is not int or count < 0 for count in counts)
        or sum(counts) != size[0] * size[1]
    ):
        return f"an RLE whose counts do not add up to {size[0]} x {size[1]}"
    return None


def uncompressed(text: str) -> list[int] | None:
    """Counts of a compressed RLE, None if it is invalid.

    Each number is cut in groups of 5 bits, the lowest first, one character of value 48 + group,
    plus 32 if another follows; from the third on it is the difference to the count two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return None if shift else counts
