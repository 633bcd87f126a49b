"""Repairs of COCO annotation files that need no guessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from mmrla.datasets.findings import DataError
from mmrla.datasets.reading import area_of, shown_size
from mmrla.datasets.segmentations import are_numbers, segmentation_fault, uncompressed


def repair(content: Any, images: str | Path) -> tuple[Any, Counter[str]]:
    """Repair a copy of an annotation file's content.

    Missing or repeated annotation ids are renumbered; boxes and areas given as strings become
    numbers; a polygon that is a flat list is nested; missing areas, ``iscrowd`` and image sizes are
    filled in; backslashes in file names become slashes, and the name of the image folder is removed
    if the file exists without it.

    Returns:
        The repaired content, and the number of records changed by each repair.

    Raises:
        mmrla.datasets.findings.DataError: It does not contain lists of images and annotations.
    """
    lists = [content.get(key) for key in ("images", "annotations")] if _is_dict(content) else []
    if not lists or not all(isinstance(one, list) and all(map(_is_dict, one)) for one in lists):
        raise DataError("not COCO's format: no lists of records as images and annotations")
    folder, done = Path(images), Counter[str]()
    # Records are copied, what is in them is replaced, never changed: files can be large.
    copies = {key: [dict(one) for one in content[key]] for key in ("images", "annotations")}
    content = {**content, **copies}
    for record in content["images"]:
        _repair_image(record, folder, done)
    for record in content["annotations"]:
        _repair_annotation(record, done)
    ids = [record.get("id") for record in content["annotations"]]
    if None in ids or len(set(map(str, ids))) < len(ids):
        done["annotations numbered anew: an id was missing or occurred twice"] = len(ids)
        for number, record in enumerate(content["annotations"], 1):
            record["id"] = number
    return content, done


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _repair_image(record: dict[str, Any], folder: Path, done: Counter[str]) -> None:
    name = record.get("file_name")
    if not isinstance(name, str):
        return
    if "\\" in name and not (folder / name).is_file():
        name = name.replace("\\", "/")
        done["file_name: backslashes turned"] += 1
    first, _, rest = name.partition("/")
    if (
        rest
        and first == folder.name
        and not (folder / name).is_file()
        and (folder / rest).is_file()
    ):
        name = rest
        done[f"file_name: {first}/ taken off, the folder's own name"] += 1
    record["file_name"] = name
    if (record.get("width") is None or record.get("height") is None) and (folder / name).is_file():
        record["width"], record["height"] = shown_size(folder / name)
        done["width and height read from the image"] += 1


def _repair_annotation(record: dict[str, Any], done: Counter[str]) -> None:
    box, area = record.get("bbox"), record.get("area")
    if isinstance(box, list) and any(isinstance(value, str) for value in box):
        try:
            record["bbox"] = [float(value) for value in box]
            done["bbox: strings turned into numbers"] += 1
        except (TypeError, ValueError):
            pass  # words are for a person
    if isinstance(area, str):
        try:
            record["area"] = float(area)
            done["area: a string turned into a number"] += 1
        except ValueError:
            pass
    shape = record.get("segmentation")
    if _are_numbers(shape) and len(shape) >= 6 and len(shape) % 2 == 0:
        record["segmentation"] = shape = [shape]
        done["segmentation: a flat polygon nested"] += 1
    if record.get("iscrowd") is None:
        record["iscrowd"] = 0
        done["iscrowd: 0 filled in"] += 1
    box = record.get("bbox")
    if record.get("area") is None and _are_numbers(box) and len(box) == 4:
        record["area"] = _area(shape, box)
        done["area computed"] += 1


def _area(shape: Any, box: list[Any]) -> float:
    if not shape or segmentation_fault(shape, None):
        return box[2] * box[3]
    if isinstance(shape, list):
        return sum(area_of(polygon) for polygon in shape)
    counts = shape["counts"]
    # Counts of an RLE are in turn of pixels outside and inside.
    return sum((uncompressed(counts) or () if isinstance(counts, str) else counts)[1::2])


def _are_numbers(values: Any) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and are_numbers(values)
