"""Folders in the layout of YOLO's tools and Roboflow: ``images/``, ``labels/``, ``data.yaml``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmrla.datasets.findings import DataError
from mmrla.datasets.images import images_in
from mmrla.datasets.reading import FOLDERS, Reading, lines_of, shown_size, split_of


def _data(root: Path) -> Mapping[str, Any] | None:
    for path in sorted([*root.glob("[!.]*.yaml"), *root.glob("[!.]*.yml")]):
        try:
            data = yaml.safe_load(path.read_bytes())
        except yaml.YAMLError as error:
            text = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: not YAML ({text})") from error
        if isinstance(data, Mapping) and "names" in data:
            return data
    return None


def yolo_names(root: Path) -> list[str] | None:
    """The class names of a YOLO folder, or None."""
    data = _data(root)
    if data is None:
        for path in (root / "classes.txt", root / "labels/classes.txt"):
            if path.is_file():
                return [line for line in lines_of(path) if line]
        return None
    names = data["names"]
    if isinstance(names, Mapping):
        names = [names.get(index) for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, (str, int)) for name in names):
        raise DataError(f"{root}: names in its YAML file must be 0, 1, ... or a list, got {names}")
    return [str(name) for name in names]


def _splits(root: Path) -> Iterator[tuple[str, Path]]:
    data = _data(root) or {}
    base = root / str(data.get("path") or ".")
    base = base if base.is_dir() else root  # often a path of another machine
    named = {split_of(key) for key in FOLDERS if data.get(key)}
    for key in FOLDERS:
        name = split_of(key) or key
        given = data.get(key) or ()
        for text in [given] if isinstance(given, str) else given:
            places = [base / text, root / text.removeprefix("../")]
            if text.startswith("../"):
                places.reverse()  # Roboflow writes ../train/images for train/images.
            for folder in places:
                if folder.exists():
                    yield name, folder
                    break
            else:
                raise DataError(f"{root}: its YAML file has {key}: {text}, which does not exist")
        if name not in named:
            for folder in (root / "images" / key, root / key / "images"):
                if folder.is_dir():
                    yield name, folder


def _listed(name: str, beside: Path, root: Path) -> Path:
    """An image of a list: its name is relative to the list's folder, or to the dataset's."""
    return beside / name if (beside / name).is_file() else root / name


def _labels_of(image: Path, root: Path) -> Path:
    # A folder called images above the dataset is not the dataset's.
    parts = list((image.relative_to(root) if image.is_relative_to(root) else image).parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = root.joinpath(*parts).with_suffix(".txt")
    return labels if labels.is_file() else image.with_suffix(".txt")


def read_yolo(root: Path) -> Reading:
    """Read a YOLO folder: boxes, polygons (four corners too), images without labels.

    Raises:
        mmrla.datasets.findings.DataError: Something cannot be read; the message gives file and
            line.
    """
    root = root.absolute()  # as the paths in some lists
    names = yolo_names(root)
    if names is None:
        raise DataError(f"{root}: no names of classes: neither data.yaml nor classes.txt is there")
    reading = Reading(names)
    splits = list(_splits(root)) or [
        ("train", root / "images" if (root / "images").is_dir() else root)
    ]
    for name, folder in splits:
        if folder.is_file():
            paths = [_listed(line, folder.parent, root) for line in lines_of(folder) if line]
            folder = root
        else:
            paths = images_in(folder)
        for path in paths:
            width, height = shown_size(path)
            inside = path.is_relative_to(folder)
            file_name = path.relative_to(folder).as_posix() if inside else path.name
            image = reading.image(name, path, file_name, (width, height))
            labels = _labels_of(path, root)
            for number, line in enumerate(lines_of(labels) if labels.is_file() else (), 1):
                if line:
                    _add_line(reading, name, image, line, f"{labels}:{number}", (width, height))
    return reading


def _add_line(
    reading: Reading, split: str, image: int, line: str, where: str, size: tuple[int, int]
) -> None:
    try:
        label, *values = (float(word) for word in line.split())
        name = reading.classes[int(label)] if label >= 0 else ""
        if not name or not all(map(math.isfinite, values)):
            raise ValueError
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError
    except (ValueError, IndexError):
        raise DataError(
            f"{where}: needs a class from 0 to {len(reading.classes) - 1} and x, y, width, height "
            f"or a polygon, as fractions of the image, got {line[:80]!r}"
        ) from None
    values = [value * size[index % 2] for index, value in enumerate(values)]
    if len(values) == 4:
        x, y, width, height = values
        reading.add(split, image, name, [x - width / 2, y - height / 2, width, height])
    else:
        reading.add_polygons(split, image, name, [values])
