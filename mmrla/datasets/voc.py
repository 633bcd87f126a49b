"""Reads a Pascal VOC folder as a dataset in COCO's format."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmrla.datasets.coco_check import read_annotations
from mmrla.datasets.findings import DataError
from mmrla.datasets.images import IMAGE_SUFFIXES
from mmrla.datasets.reading import lines_of

ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", "ImageSets"


def read_set(path: str | Path, classes: Sequence[str] | None = None) -> Any:
    """Read a COCO annotation file, or a list below ``ImageSets/`` or all of a VOC folder.

    Raises:
        mmrla.datasets.findings.DataError: It, or an annotation, cannot be read.
        FileNotFoundError: It does not exist.
    """
    path = Path(path)
    if path.name == ANNOTATIONS and path.is_dir():
        return voc_to_coco(path.parent, None, classes)
    if path.suffix == ".txt":
        for parent in path.parents:
            if parent.name == LISTS and (parent.parent / ANNOTATIONS).is_dir():
                return voc_to_coco(parent.parent, path, classes)
    return read_annotations(path)


def voc_to_coco(
    folder: str | Path, split: str | Path | None = None, classes: Sequence[str] | None = None, *,
    annotations: str = ANNOTATIONS, images: str = IMAGES,
) -> dict[str, Any]:  # fmt: skip
    """Read the boxes of a Pascal VOC folder: ``Annotations/``, ``JPEGImages/`` and ``ImageSets/``.

    VOC counts pixels from 1 and its corners belong to the box, so ``xmin, xmax`` becomes
    ``x = xmin - 1``, ``width = xmax - xmin + 1``. Coinciding corners are annotation mistakes: such
    a box gets zero width or height here, so that :func:`mmrla.datasets.check_coco` finds it. A
    difficult object becomes a crowd, which training and evaluation ignore. Images without objects
    are kept.

    Sizes come from the annotations, so the check can compare them with the images; if they are
    missing or zero, they are read from the image.

    Args:
        folder: The VOC folder.
        split: Which images: a list in ``ImageSets/`` by its path, or by name, as ``'train'``, in
            ``ImageSets/Main/``. Default: all that have an annotation, in the order of their names.
        classes: Categories in order, if any of them occurs; other names come after.
            Default: the names that occur, sorted.
        annotations: The name of the folder of annotations, below ``folder``.
        images: The name of the folder of images.

    Returns:
        Content of a COCO annotation file: ``images`` with ``file_name`` relative to
        ``JPEGImages/``, ``annotations`` and ``categories``, with ids from 1.

    Raises:
        FileNotFoundError: The folder has no ``Annotations/``, or there is no such list.
        mmrla.datasets.findings.DataError: An annotation is missing, not XML, or incomplete; the
            message names the file.
    """
    folder = Path(folder)
    if not (folder / annotations).is_dir():
        raise FileNotFoundError(
            f"no Pascal VOC folder, it has no {annotations}/: {folder.absolute()}"
        )
    records: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    names: list[str] = []
    beside = {path.stem: path.name for path in _files(folder / images, IMAGE_SUFFIXES)}
    for number, stem in enumerate(_stems(folder, split, annotations), 1):
        path = folder / annotations / f"{stem}.xml"
        root = _parse(path)
        # The name in the file is often that of another machine or of before a renaming.
        file_name = beside.get(stem, f"{stem}.jpg")
        width, height = _size(root, path, folder / images / file_name)
        records.append(dict(id=number, file_name=file_name, width=width, height=height))
        for element in root.iter("object"):
            name, box, difficult = _object(element, path)
            if name not in names:
                names.append(name)
            objects.append(
                dict(
                    id=len(objects) + 1,
                    image_id=number,
                    category_id=name,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=difficult,
                )
            )
    names.sort()
    if classes is not None and not set(names).isdisjoint(classes):
        names = [*classes, *(name for name in names if name not in classes)]
    ids = {name: index for index, name in enumerate(names, 1)}
    for annotation in objects:
        annotation["category_id"] = ids[annotation["category_id"]]
    categories = [dict(id=index, name=name) for name, index in ids.items()]
    return dict(images=records, annotations=objects, categories=categories)


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if p.suffix.lower() in suffixes and not p.name.startswith("._"))


def _stems(folder: Path, split: str | Path | None, annotations: str) -> list[str]:
    if split is None:
        return [path.stem for path in _files(folder / annotations, (".xml",))]
    listed = Path(split)
    if not listed.is_file():
        listed = folder / LISTS / "Main" / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"no list of images {split!r}: {listed.absolute()} does not exist")
    marks = folder / annotations
    return [_stem(line, marks) for line in lines_of(listed) if line]


def _stem(line: str, annotations: Path) -> str:
    # Lists of one class have 1 or -1 after each name, others more numbers; names may have spaces.
    while not (annotations / f"{line}.xml").is_file():
        shorter = re.sub(r"\s+-?\d+$", "", line)
        if shorter == line:
            break
        line = shorter
    return line


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(f"no annotation of a listed image: {path.absolute()}") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not XML ({error})") from error


def _size(root: ElementTree.Element, path: Path, image: Path) -> tuple[int, int]:
    given = [root.findtext(f"size/{side}") for side in ("width", "height")]
    try:
        width, height = (int(float(text or 0)) for text in given)
    except ValueError as error:
        raise DataError(f"{path}: width and height must be numbers, got {given}") from error
    if width > 0 and height > 0:
        return width, height
    try:
        with Image.open(image) as opened:
            return opened.size
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: gives no size, and {image} cannot be read: {error}") from error


def _object(element: ElementTree.Element, path: Path) -> tuple[str, list[float], int]:
    name = (element.findtext("name") or "").strip()
    given = [element.findtext(f"bndbox/{c}") for c in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(text) for text in given)  # type: ignore[arg-type]
        difficult = int(element.findtext("difficult") or 0)
    except (TypeError, ValueError):
        name = ""
    if not name:
        text = ElementTree.tostring(element, encoding="unicode")
        shown = " ".join(text.split())[:200]
        raise DataError(f"{path}: an object needs a name and a bndbox of four numbers, got {shown}")
    width, height = (b - a + 1 if b != a else 0.0 for a, b in ((left, right), (top, bottom)))
    return name, [left - 1, top - 1, width, height], int(difficult > 0)
