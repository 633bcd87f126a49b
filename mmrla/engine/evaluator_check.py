"""Checks that annotation files of COCO metrics and datasets match, which mmdet does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mmrla.engine.data_check import datasets_of, evaluators, path_under, type_name


def check_evaluators(cfg: Config, splits: Iterable[str]) -> None:
    """Raise if an evaluator's annotation file is of other images than its dataset's.

    mmdet's metrics match predictions to annotations by image id only, so a file of another set
    silently gives meaningless metrics.

    Args:
        cfg: The config, after all options, whose files exist.
        splits: Which of ``'train'``, ``'val'``, ``'test'`` the run uses.

    Raises:
        ValueError: An image or category of a dataset is missing from the evaluator's file or
            differs there. The message gives both places and files.
    """
    for split in splits:
        metrics = [
            (where, Path(one["ann_file"]))
            for where, one in evaluators(cfg, split)
            if type_name(one).endswith("CocoMetric") and _is_coco(one.get("ann_file"))
        ]
        sets = [
            (where, Path(path_under(one.get("data_root") or "", one["ann_file"])))
            for where, one in datasets_of(cfg, [split])
            if type_name(one).endswith("CocoDataset") and _is_coco(one.get("ann_file"))
        ]
        # Of several metrics, each may be of one of several sets.
        if len(sets) != 1:
            continue
        ((where, path),) = sets
        for place, file in metrics:
            if file.resolve() != path.resolve():
                _compare(place, file, where, path)


def warn_of_unchecked(cfg: Config, splits: Iterable[str]) -> None:
    """Log the sets in COCO's format whose dataset class does not check them."""
    places = [
        where
        for where, one in datasets_of(cfg, splits)
        if type_name(one).endswith("CocoDataset")
        and not type_name(one).endswith("CheckedCocoDataset")
    ]
    if places:
        print_log(
            f"{', '.join(places)}: type='mmrla.CheckedCocoDataset' would check annotations and "
            "images; for this type, run mmrla check-data --config",
            logger="current",
            level=logging.WARNING,
        )


def _compare(place: str, file: Path, where: str, path: Path) -> None:
    theirs, ours = _read(file), _read(path)
    if theirs is None or ours is None:
        return
    for name, (there, here) in {
        "image": (theirs[0], ours[0]), "category": (theirs[1], ours[1])
    }.items():  # fmt: skip
        for number, text in here.items():
            if there.get(number) != text:
                found = repr(there[number]) if number in there else "missing"
                raise ValueError(
                    f"{place}.ann_file={file} is not of {where}'s images: {name} {number} is "
                    f"{text!r} in {path}, and {found} there; predictions would be compared with "
                    f"other annotations. Set {place}.ann_file={path}"
                )


def _read(path: Path) -> tuple[dict[Any, Any], dict[Any, Any]] | None:
    """Names of images and of categories by id; None if the file is checked elsewhere."""
    try:
        content = json.loads(path.read_bytes())
        return (
            {image["id"]: Path(image["file_name"]).name for image in content["images"]},
            {category["id"]: category["name"] for category in content["categories"]},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_coco(path: Any) -> bool:
    return isinstance(path, str) and path.endswith(".json") and "://" not in path
