"""``mmrla check-data``: finds the datasets in a folder or a config, and reports on each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmrla.datasets.coco_check import check_coco
from mmrla.datasets.findings import DataError, Finding, count_kinds
from mmrla.datasets.formats import NAMES, images_beside, recognise, voc_lists
from mmrla.datasets.images import IMAGE_SUFFIXES, check_class_folders
from mmrla.datasets.repair import repair
from mmrla.datasets.voc import ANNOTATIONS, IMAGES, LISTS, read_set
from mmrla.engine.data.classes import class_of, classes_of
from mmrla.engine.data.config import SPLITS, datasets_of, path_under, type_name


@dataclass
class DataSet:
    """One dataset to check."""

    images: Path
    """Folder of images, or of class folders."""
    ann_file: Path | None = None
    """In COCO's format, or of Pascal VOC a list of images or the folder ``Annotations/``; None:
    class folders."""
    classes: Sequence[str] | None = None
    need_masks: bool | None = None
    turns: bool = True
    """Whether images are rotated by their EXIF data when read."""
    used_as: list[str] = field(default_factory=list)
    """Places in the config."""

    @property
    def title(self) -> str:
        """For people."""
        of = f"{self.ann_file}, images in {self.images}" if self.ann_file else str(self.images)
        return f"{of} ({', '.join(self.used_as)})" if self.used_as else of

    @property
    def is_json(self) -> bool:
        """Whether it has an annotation file in COCO's format."""
        return self.ann_file is not None and self.ann_file.suffix == ".json"

    def check(self, decode: bool, workers: int) -> tuple[list[Finding], bool]:
        """The findings, and whether :func:`repair` can fix some of them."""
        if self.ann_file is None:
            return check_class_folders(self.images, decode=decode, workers=workers), False
        try:
            content = read_set(self.ann_file, self.classes)
        except DataError as error:
            return [Finding("not-json", str(error), str(self.ann_file))], False
        findings = check_coco(
            content, self.ann_file, self.images, classes=self.classes, need_masks=self.need_masks,
            files="decode" if decode else "headers", workers=workers, turns=self.turns,
        )  # fmt: skip
        errors = any(finding.severity == "error" for finding in findings)
        return findings, errors and self.is_json and _can_mend(content, self.images)


def _can_mend(content: Any, images: Path) -> bool:
    try:
        return bool(repair(content, images)[1])
    except DataError:
        return False


def sets_in(root: str | Path) -> list[DataSet]:
    """The sets of a folder.

    ``annotations/instances_NAME.json`` beside ``NAME/`` or ``images/NAME/``, as COCO has them, any
    other JSON in ``annotations/`` whose name ends with that of a folder; ``Annotations/`` and
    ``JPEGImages/`` as Pascal VOC has them, by the lists of train, val and test if there are any; or
    class folders of images, directly or in ``train/``, ``val/`` and ``test/``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No set is found in it, it is in a format that must be converted, or the images
            of an annotation file cannot be located.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root.absolute()}")
    files = sorted((root / "annotations").glob("[!.]*.json"))
    instances = [path for path in files if path.name.startswith("instances_")]
    found = []
    for path in instances or files:
        images = images_beside(root, path)
        if images is None:
            raise ValueError(
                f"{path}: no folder of images of that name in {root.absolute()}; name both with "
                "--ann FILE --images DIR"
            )
        found.append(DataSet(images, path))
    if found:
        return found
    if (root / ANNOTATIONS).is_dir() and (root / IMAGES).is_dir():
        return [DataSet(root / IMAGES, path) for path in voc_lists(root) or [root / ANNOTATIONS]]
    kind = recognise(root)
    if kind is not None:
        raise ValueError(
            f"{root.absolute()} is in {NAMES[kind]}'s format and folders, which is not trained on; "
            f"convert it: mmrla convert-data {root} OUT"
        )
    splits = [root / name for name in SPLITS if (root / name).is_dir()]
    folders = [folder for folder in splits or [root] if _has_class_folders(folder)]
    if not folders:
        raise ValueError(
            f"no set in {root.absolute()}: neither annotations/*.json, nor Pascal VOC's "
            "Annotations/ and JPEGImages/, nor folders of images for each class; name what is "
            "elsewhere with --ann FILE --images DIR"
        )
    return [DataSet(folder) for folder in folders]


def _has_class_folders(folder: Path) -> bool:
    return any(
        entry.suffix.lower() in IMAGE_SUFFIXES
        for child in folder.iterdir()
        if child.is_dir()
        for entry in child.iterdir()
    )


def sets_of_config(cfg: Config) -> tuple[list[DataSet], dict[str, str]]:
    """The sets that a config's dataloaders read, as far as they can be checked.

    With the classes that the config names, or those of its dataset's class, and whether masks are
    loaded. A set that is used twice in the same way is listed once.

    Returns:
        The sets in COCO's or Pascal VOC's format or of class folders; and the reason why each of
        the others, by its place and type, cannot be checked.

    Raises:
        ValueError: The config names no set that can be checked.
    """
    found: dict[Any, DataSet] = {}
    unchecked: dict[str, str] = {}
    scope = cfg.get("default_scope") or "mmdet"
    for where, dataset in datasets_of(cfg, SPLITS):
        one = _set_of(dataset, where, scope)
        if isinstance(one, str):
            unchecked[f"{where} ({type_name(dataset)})"] = one
            continue
        key = (one.images, one.ann_file, tuple(one.classes or ()), one.need_masks, one.turns)
        found.setdefault(key, one).used_as.append(where)
    if not found:
        others = "".join(f"; {place}: {reason}" for place, reason in unchecked.items())
        raise ValueError(
            f"the config names no local set in COCO's or Pascal VOC's format or of class folders"
            f"{others}"
        )
    return list(found.values()), unchecked


def _set_of(dataset: Any, where: str, scope: str) -> DataSet | str:
    """A set to check, or the reason why it cannot be checked."""
    root, kind = dataset.get("data_root") or "", type_name(dataset)
    prefix, ann_file = dataset.get("data_prefix") or {}, dataset.get("ann_file")
    if kind in ("ImageNet", "CustomDataset") and not ann_file:
        folder = prefix if isinstance(prefix, str) else prefix.get("img_path", "")
        path = path_under(root, folder or dataset.get("split") or "")
        return _REMOTE if "://" in path else DataSet(Path(path))
    voc, coco = _formats(dataset, scope)
    if not voc and not coco:
        return "annotations of this type are not known to the check"
    if not ann_file:
        return "it has no ann_file"
    ann_file = path_under(root, ann_file)
    if voc:
        folder = path_under(root, prefix.get("sub_data_root") or "")
        names = [dataset.get("ann_subdir", ANNOTATIONS), dataset.get("img_subdir", IMAGES)]
        inside = Path(folder, LISTS) in Path(ann_file).parents
        if names != [ANNOTATIONS, IMAGES] or not inside:
            return f"its list is not below {LISTS}/ beside {ANNOTATIONS}/ and {IMAGES}/"
        images = str(Path(folder, IMAGES))
    else:
        images = path_under(root, prefix.get("img") or "")
    if "://" in images or "://" in ann_file:
        return _REMOTE
    from mmrla.datasets.checked_coco import loads_masks, reads_turned

    classes = classes_of(dataset, where, scope)
    pipeline = dataset.get("pipeline") or ()
    return DataSet(
        Path(images or root or "."), Path(ann_file), classes, loads_masks(pipeline),
        reads_turned(pipeline),
    )  # fmt: skip


_REMOTE = "it is not in a local folder"


def _formats(dataset: Any, scope: str) -> tuple[bool, bool]:
    """Whether a dataset reads its files like mmdet's for Pascal VOC, or like the one for COCO."""
    from mmdet.datasets import CocoDataset, XMLDataset

    cls = class_of(DATASETS, dataset, scope)
    if not isinstance(cls, type):
        return False, type_name(dataset).endswith("CocoDataset")
    return tuple(
        all(getattr(cls, name, None) is getattr(known, name) for name in _READERS)
        for known in (XMLDataset, CocoDataset)
    )  # type: ignore[return-value]


_READERS = ("load_data_list", "parse_data_info")


def print_report(
    sets: Iterable[DataSet], *, decode: bool = False, workers: int = 1, allow: Sequence[str] = (),
    limit: int = 20, details: list[dict[str, Any]] | None = None,
) -> int:  # fmt: skip
    """Print lines about each set; returns the number of errors.

    Args:
        sets: The datasets to check.
        decode: Whether to decode all images.
        workers: Number of processes that check images.
        allow: Kinds of errors to ignore.
        limit: Maximum number of findings to list per kind, 0 for all.
        details: Gets a dict for each set, with all findings.
    """
    errors = 0
    for one in sets:
        findings, mendable = one.check(decode, workers)
        own = sum(f.severity == "error" and f.kind not in allow for f in findings)
        errors += own
        print(f"{one.title}: {own} errors, {len(findings) - own} warnings")
        counts = count_kinds(findings)
        for kind, count in counts.items():
            print(f"  {count:>8} {kind}")
        for kind, count in counts.items():
            listed = [f for f in findings if f.kind == kind]
            for finding in listed[: limit or None]:
                print(f"  {finding}")
            if limit and count > limit:
                print(f"  ... and {count - limit} more {kind} (--limit 0 or --json shows all)")
        if own and mendable:
            print(
                f"  some of this can be mended: mmrla check-data --ann {one.ann_file} --images "
                f"{one.images} --fix OUT.json"
            )
        if details is not None:
            details.append(dict(
                images=str(one.images), ann_file=str(one.ann_file) if one.ann_file else None,
                used_as=one.used_as, errors=own, counts=counts,
                findings=[finding.to_dict() for finding in findings],
            ))  # fmt: skip
        sys.stdout.flush()
    return errors


def write_json(
    details: Sequence[dict[str, Any]], path: str | Path, unchecked: Mapping[str, str]
) -> None:
    """Write the report, and which sets were not checked, to ``path`` and nowhere else."""
    path = Path(path)
    if path.is_symlink():
        path.unlink()  # replaced, not followed
    content = dict(sets=details, not_checked=dict(unchecked))
    path.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")
