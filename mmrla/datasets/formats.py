"""Recognises the format of a dataset, and reads it as COCO's."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from mmrla.datasets.cvat import read_cvat
from mmrla.datasets.findings import DataError
from mmrla.datasets.labelme import read_labelme
from mmrla.datasets.reading import FOLDERS, SPLITS, Reading, split_of
from mmrla.datasets.voc import ANNOTATIONS, IMAGES, LISTS, voc_to_coco
from mmrla.datasets.yolo import read_yolo, yolo_names

NAMES = {"voc": "Pascal VOC", "yolo": "YOLO", "labelme": "labelme", "cvat": "CVAT", "coco": "COCO"}
"""Formats by the short names that :func:`recognise` returns."""


def recognise(root: str | Path) -> str | None:
    """The format of a folder, or of a CVAT file: a key of :data:`NAMES`, or None.

    Only the first entries of folders are checked, and only small files are read completely.
    """
    root = Path(root)
    if root.is_file():
        return "cvat" if _root_tag(root) == "annotations" else None
    if not root.is_dir():
        return None
    if _voc_folders(root):
        return "voc"
    if any(_root_tag(path) == "annotations" for path in sorted(root.glob("[!.]*.xml"))[:3]):
        return "cvat"
    if coco_files(root):
        return "coco"
    if yolo_names(root) is not None or next((root / "labels").rglob("*.txt"), None):
        return "yolo"
    for folder in (root, *(root / name for name in FOLDERS)):
        first = next(folder.glob("[!.]*.json"), None)
        if first is not None and '"shapes"' in first.read_text(errors="replace"):
            return "labelme"
    return None


def coco_files(root: Path) -> list[Path]:
    """Annotation files as COCO and Roboflow place them."""
    return sorted([*root.glob("annotations/[!.]*.json"), *root.glob("*/_annotations.coco.json"),
                   *root.glob("_annotations.coco.json")])  # fmt: skip


def read(root: str | Path) -> Reading:
    """Read a dataset in any of the formats in :data:`NAMES`.

    Raises:
        mmrla.datasets.findings.DataError: A file cannot be read; the message names it.
        ValueError: The format is unknown.
    """
    root = Path(root)
    kind = recognise(root)
    readers = dict(
        voc=_read_voc, yolo=read_yolo, labelme=read_labelme, cvat=read_cvat, coco=_read_coco
    )
    if kind not in readers:
        raise ValueError(
            f"{root.absolute()} is in no format that is known here: Pascal VOC (Annotations/*.xml "
            "or XML beside images), YOLO (labels/*.txt, data.yaml), labelme (*.json), CVAT (*.xml) "
            "or COCO (annotations/*.json, _annotations.coco.json)"
        )
    reading = readers[kind](root)
    reading.format = NAMES[kind]
    return reading


def _root_tag(path: Path) -> str | None:
    try:
        return next(ElementTree.iterparse(path, events=("start",)))[1].tag
    except (ElementTree.ParseError, OSError, StopIteration):
        return None


# --- COCO ---


def _read_coco(root: Path) -> Reading:
    """Read Roboflow's layout, a JSON in each image folder, or COCO's own layout."""
    reading = Reading()
    paths = coco_files(root)
    # Without captions and keypoints, if there are any.
    paths = [p for p in paths if p.name.startswith(("instances_", "_annotations"))] or paths
    for path in paths:
        beside = path.name == "_annotations.coco.json"
        name = path.parent.name if beside else path.stem.removeprefix("instances_")
        folder = path.parent if beside else images_beside(root, path) or root
        split = split_of(re.sub(r"\d{4}$", "", name.rpartition("_")[2]))
        if split is None and len(paths) > 1:
            raise DataError(
                f"{path}: {name!r} is none of {', '.join(SPLITS)}, and it is one of {len(paths)} "
                "annotation files; rename it or take it out"
            )
        split = split or "train"
        try:
            content = json.loads(path.read_bytes())
            _add_coco(reading, split, content, folder)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: not in COCO's format ({error!r})") from error
    return reading


def images_beside(root: Path, ann_file: Path) -> Path | None:
    """The folder of images of an annotation file in ``annotations/``, or None."""
    name = re.sub(r"^instances?_", "", ann_file.stem)
    names = [name, *(name.rpartition("_")[2:]), re.sub(r"\d{4}$", "", name)]
    for folder in (root, root / "images"):
        for candidate in names:
            if candidate and (folder / candidate).is_dir():
                return folder / candidate
    images = root / "images"
    return images if images.is_dir() else None


def _add_coco(reading: Reading, split: str, content: dict, folder: Path) -> None:
    used = {record["category_id"] for record in content["annotations"]}
    # Roboflow puts a category of the project's name in front, which nothing is of.
    labels = {
        category["id"]: str(category["name"])
        for category in content["categories"]
        if category["id"] in used or category.get("supercategory") != "none"
    }
    reading.classes += [name for name in labels.values() if name not in reading.classes]
    ids = {}
    for record in content["images"]:
        source, size = folder / record["file_name"], (record["width"], record["height"])
        ids[record["id"]] = reading.image(split, source, record["file_name"], size)
    for record in content["annotations"]:
        kept = {k: v for k, v in record.items() if k not in ("id", "image_id", "category_id")}
        box = kept.pop("bbox")
        reading.add(split, ids[record["image_id"]], labels[record["category_id"]], box, **kept)


# --- Pascal VOC ---


def _voc_folders(root: Path) -> list[tuple[str, Path, str, str]]:
    """Split, folder and the names of its folders of annotations and images, of each VOC folder."""
    for marks, images in ((ANNOTATIONS, IMAGES), ("annotations", "images")):
        if (root / marks).is_dir() and next((root / marks).glob("*.xml"), None):
            return [("", root, marks, images if (root / images).is_dir() else ".")]
    found = []
    for folder in (root, *(root / name for name in FOLDERS)):
        first = next(folder.glob("[!.]*.xml"), None) if folder.is_dir() else None
        if first is not None and _root_tag(first) == "annotation":
            name = None if folder == root else split_of(folder.name)
            found.append((name or "", folder, ".", "."))
    return found


def voc_lists(root: Path) -> list[Path]:
    """The image lists of a VOC folder that are splits; trainval if there is no other."""
    lists = root / LISTS / "Main"
    found = [lists / f"{name}.txt" for name in (*SPLITS, "trainval")]
    found = [path for path in found if path.is_file()]
    parts = {path.stem for path in found}
    return [p for p in found if p.stem != "trainval" or not {"train", "val"} <= parts]


def _read_voc(root: Path) -> Reading:
    reading = Reading()
    jobs: list[tuple[str, Path, Path | None, str, str]] = []
    for split, folder, marks, images in _voc_folders(root):
        lists = [] if split else voc_lists(folder)
        names = {path.stem for path in lists}
        for path in lists:
            if path.stem != "trainval" or "train" not in names:
                name = "train" if path.stem == "trainval" else path.stem
                jobs.append((name, folder, path, marks, images))
        if not lists:
            jobs.append((split or "train", folder, None, marks, images))
    contents = [
        voc_to_coco(folder, chosen, annotations=marks, images=images)
        for _, folder, chosen, marks, images in jobs
    ]
    # One order of the classes for all splits, whichever occur in each.
    reading.classes = sorted({c["name"] for content in contents for c in content["categories"]})
    for (split, folder, chosen, _, images), content in zip(jobs, contents, strict=True):
        if chosen and chosen.stem == "trainval" and "val" in reading.splits:
            held = {record["file_name"] for record in reading.splits["val"]["images"]}
            content["images"] = [r for r in content["images"] if r["file_name"] not in held]
            ids = {record["id"] for record in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        labels = {category["id"]: category["name"] for category in content["categories"]}
        for record in content["annotations"]:
            label = labels[record["category_id"]]
            record["category_id"] = reading.classes.index(label) + 1
        reading.splits[split] = {key: content[key] for key in ("images", "annotations")}
        reading.sources[split] = [folder / images / r["file_name"] for r in content["images"]]
    return reading
