"""The datasets and evaluators of a config: their folder, files, annotations and classes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

SPLITS = ("train", "val", "test")


def inner_datasets(cfg: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """The innermost datasets of a dataloader with their place in the config.

    Wrappers (``RepeatDataset``, ``ConcatDataset``, ...) are unwrapped.
    """
    if isinstance(cfg, Mapping):
        if "dataset" in cfg:
            yield from inner_datasets(cfg["dataset"], f"{where}.dataset")
        elif "datasets" in cfg:
            for index, dataset in enumerate(cfg["datasets"]):
                yield from inner_datasets(dataset, f"{where}.datasets[{index}]")
        else:
            yield where, cfg


def datasets_of(cfg: Config, splits: Iterable[str]) -> Iterator[tuple[str, ConfigDict]]:
    """The innermost datasets of the splits' dataloaders with their places in the config."""
    for split in splits:
        loader = f"{split}_dataloader"
        yield from inner_datasets(cfg.get(loader), loader)


def type_name(part: Any) -> str:
    """The bare class name of a part of a config, however its ``type`` is given."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def evaluators(cfg: Config, split: str) -> Iterator[tuple[str, ConfigDict]]:
    """The evaluators of a split with their places in the config."""
    key = f"{split}_evaluator"
    yield from _metrics(cfg.get(key), key)


def _metrics(cfg: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    if not isinstance(cfg, Mapping):
        for index, single in enumerate(cfg or ()):
            yield from _metrics(single, f"{where}[{index}]")
    elif "metrics" in cfg:  # mmengine's Evaluator, mmdet's MultiDatasetsEvaluator
        yield from _metrics(cfg["metrics"], f"{where}.metrics")
    else:
        yield where, cfg


def _is_remote(path: str) -> bool:
    return "://" in path


def _starts_in(path: str, folder: str) -> bool:
    return bool(folder) and path.startswith(folder.rstrip("/") + "/")


def set_data_root(cfg: Config, root: str | Path) -> None:
    """Point every dataset and evaluator of a config at ``root``, in place.

    A dataset's ``data_root`` becomes ``root``; paths that began with the old one (an evaluator's
    ``ann_file``) begin with ``root`` instead. Relative paths of an evaluator whose dataset had no
    ``data_root`` are assumed to be in ``root``.

    Args:
        cfg: A config with ``{train,val,test}_dataloader`` and ``_evaluator``.
        root: The folder with ``annotations/`` and the image folders.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: The datasets have several roots, which one folder cannot replace; or an
            evaluator's annotation file is outside the dataset's old root, so its new path is
            unknown.
    """
    if not _is_remote(str(root)) and not Path(root).is_dir():
        raise FileNotFoundError(f"--data-root: no such folder: {Path(root).absolute()}")
    new = f"{str(root).rstrip('/')}/"
    _check_one_root(cfg)
    # val and test often share one dict: its root is read, and its path changed, once.
    roots: dict[int, str] = {}
    changed: set[int] = set()
    for split in SPLITS:
        old_roots = set()
        for _, dataset in datasets_of(cfg, [split]):
            old_roots.add(roots.setdefault(id(dataset), dataset.get("data_root") or ""))
            dataset["data_root"] = new
        for where, evaluator in evaluators(cfg, split):
            ann_file = evaluator.get("ann_file")
            if ann_file is None or id(evaluator) in changed:
                continue
            changed.add(id(evaluator))
            old = next((old for old in old_roots if _starts_in(ann_file, old)), None)
            if old is not None:
                evaluator["ann_file"] = new + ann_file[len(old.rstrip("/")) + 1 :]
            elif "" in old_roots and not Path(ann_file).is_absolute():
                evaluator["ann_file"] = new + ann_file
            elif not old_roots:
                continue
            else:
                raise ValueError(
                    f"--data-root: {where}.ann_file={ann_file!r} is not in the dataset's "
                    f"data_root ({', '.join(map(repr, sorted(old_roots)))}); set it with "
                    f"--cfg-options {where}.ann_file=..."
                )
    if "data_root" in cfg:
        cfg.data_root = new


def _check_one_root(cfg: Config) -> None:
    """Raise ValueError if the datasets of a config are in different folders."""
    places: dict[str, str] = {}
    for where, dataset in datasets_of(cfg, SPLITS):
        root, ann_file = dataset.get("data_root") or "", dataset.get("ann_file") or ""
        if root or not Path(ann_file).is_absolute():  # which no root would change
            places.setdefault(os.path.normpath(root) if root else "", where)
    if len(places) > 1:
        keys = [re.sub(r"\[(\d+)\]", r".\1", where) for where in places.values()]
        raise ValueError(
            "--data-root: the datasets of this config are in different folders ("
            + "; ".join(f"{where}: {root or 'no root'}" for root, where in places.items())
            + "), and --data-root would replace all of them by one. Set each: --cfg-options "
            + " ".join(f"{key}.data_root=..." for key in keys)
        )


def check_data(cfg: Config, splits: Iterable[str] = SPLITS) -> None:
    """Raise unless every local folder and annotation file that the config names exists.

    Args:
        cfg: The config, after all options.
        splits: Which of ``'train'``, ``'val'``, ``'test'`` will be used.

    Raises:
        FileNotFoundError: The message gives the place in the config, the absolute path and a fix.
        ValueError: A path that is relative to a data root leads out of it.
    """
    for split in splits:
        for where, dataset in datasets_of(cfg, [split]):
            root = dataset.get("data_root") or ""
            if root:
                _require(root, f"{where}.data_root", folder=True)
            _check_inside(root, dataset.get("ann_file"), f"{where}.ann_file")
            if dataset.get("ann_file"):
                _require(path_under(root, dataset["ann_file"]), f"{where}.ann_file", folder=False)
            prefixes = dataset.get("data_prefix") or {}
            if isinstance(prefixes, str):
                prefixes = {"img_path": prefixes}
            for name, prefix in prefixes.items():
                _check_inside(root, prefix, f"{where}.data_prefix.{name}")
                if prefix:
                    place = f"{where}.data_prefix.{name}"
                    _require(path_under(root, prefix), place, folder=True)
            if str(dataset.get("type")).rpartition(".")[2] == "ImageNet" and not prefixes:
                # Its folder of images is the split's.
                folder = dataset.get("split") or ""
                _require(path_under(root, folder), f"{where}.split={folder!r}", folder=True)
        for where, evaluator in evaluators(cfg, split):
            if evaluator.get("ann_file"):
                _require(evaluator["ann_file"], f"{where}.ann_file", folder=False)


def _check_inside(root: str, path: Any, where: str) -> None:
    """A relative path must stay in its root; an absolute path is assumed to be intended."""
    if not root or not path or _is_remote(str(path)) or Path(path).is_absolute():
        return
    if os.path.normpath(path).startswith(".."):
        raise ValueError(f"{where}={path!r} leads out of data_root={root!r}; use an absolute path")


def path_under(root: str, path: str) -> str:
    """A dataset's path below its ``data_root``; mmengine keeps absolute and remote paths."""
    if _is_remote(path) or Path(path).is_absolute() or not root:
        return path
    return f"{root.rstrip('/')}/{path}"


def _require(path: str, where: str, *, folder: bool) -> None:
    if _is_remote(path):
        return
    local = Path(path)
    if not (local.is_dir() if folder else local.is_file()):
        kind = "folder" if folder else "annotation file"
        raise FileNotFoundError(
            f"{where}: no such {kind}: {local.absolute()} (point every dataset and evaluator at "
            "your copy with --data-root DIR; mmrla convert-data brings other formats into this "
            "layout)"
        )


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
