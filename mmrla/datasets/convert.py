"""Converts datasets in other formats to COCO's layout."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mmrla.datasets.findings import DataError
from mmrla.datasets.formats import read, recognise
from mmrla.datasets.reading import Reading


class Converted(NamedTuple):
    """Result of :func:`convert_data`."""

    format: str
    """For display, such as ``'YOLO'``."""
    classes: list[str]
    counts: dict[str, tuple[int, int]]
    """Images and objects of each split."""
    objects: int
    """Of all splits."""
    boxes: int
    """Objects without a polygon or mask."""
    left_out: Counter[str]
    """Shapes that the reader does not convert, by kind."""


def convert_data(
    source: str | Path, out: str | Path, val: float = 0.0, seed: int = 0, link: bool = False
) -> Converted:
    """Write a dataset in COCO's layout, for the detector configs with ``--data-root``.

    Annotations become ``annotations/instances_SPLIT2017.json``, images ``SPLIT2017/``, with their
    original names. Image files are copied unchanged; boxes and sizes refer to images as displayed,
    rotated by their EXIF data.

    Args:
        source: A folder, CVAT's XML, or a zip of a folder. See
            :func:`mmrla.datasets.formats.read`.
        out: The new folder, which must be absent or empty.
        val: If the set has no ``val`` split: the fraction of ``train`` that becomes one.
        seed: Selects these images.
        link: Create symbolic links to the images instead of copies.

    Raises:
        FileNotFoundError: There is no ``source``.
        FileExistsError: ``out`` is not empty.
        ValueError: The format is unknown, ``val`` is not from 0 to below 1 or cannot be split off,
            or ``link`` is True for a zip.
        mmrla.datasets.findings.DataError: Something cannot be read, or two images have the same
            name.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {source.absolute()}")
    if not 0 <= val < 1:
        raise ValueError(f"val must be a fraction from 0 to below 1, got {val}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"already exists and is not empty: {out.absolute()}")
    with _unpacked(source, link) as root:
        reading = read(root)
        if val and "val" not in reading.splits:
            _split_off(reading, val, seed)
        if not any(split["images"] for split in reading.splits.values()):
            raise DataError(f"{source}: no image is in it")
        for target, file in _places(reading, out).items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                target.symlink_to(file.absolute())
            else:
                shutil.copyfile(file, target)
        (out / "annotations").mkdir()
        counts, boxes = {}, 0
        for name, content in reading.contents().items():
            path = out / f"annotations/instances_{name}2017.json"
            path.write_text(json.dumps(content))
            counts[name] = len(content["images"]), len(content["annotations"])
            boxes += sum(not record.get("segmentation") for record in content["annotations"])
        return Converted(
            reading.format, reading.classes, counts,
            sum(objects for _, objects in counts.values()), boxes, reading.left_out,
        )  # fmt: skip


@contextmanager
def _unpacked(source: Path, link: bool) -> Iterator[Path]:
    if not zipfile.is_zipfile(source):
        yield source
        return
    if link:
        raise ValueError(f"the images of a zip cannot be linked to: {source}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(source) as packed:
                # macOS puts a file ._NAME beside or below __MACOSX/ for each.
                names = [name for name in packed.namelist() if "/._" not in f"/{name}"]
                packed.extractall(folder, names)  # those that lead out of the folder stay in it
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise DataError(f"{source}: damaged, or no zip that can be read ({error})") from error
        root = Path(folder)
        inside = [path for path in root.iterdir() if path.name != "__MACOSX"]
        if len(inside) == 1 and inside[0].is_dir() and recognise(root) is None:
            root = inside[0]
        yield root


def _split_off(reading: Reading, fraction: float, seed: int) -> None:
    """Move images of ``train`` to ``val``, at least one."""
    whole, sources = reading.splits.get("train", {}), reading.sources.get("train", [])
    if len(sources) < 2:
        raise ValueError(f"no validation images can be split off {len(sources)} training image(s)")
    chosen = list(range(len(sources)))
    random.Random(seed).shuffle(chosen)
    moved = set(chosen[: max(1, round(fraction * len(chosen)))])
    for name in ("train", "val"):
        kept = [i for i in range(len(sources)) if (i in moved) == (name == "val")]
        ids = {whole["images"][i]["id"] for i in kept}
        objects = [a for a in whole["annotations"] if a["image_id"] in ids]
        reading.splits[name] = dict(images=[whole["images"][i] for i in kept], annotations=objects)
        reading.sources[name] = [sources[i] for i in kept]


def _places(reading: Reading, out: Path) -> dict[Path, Path]:
    """Where images go, and their files; all are checked before the first is copied."""
    places: dict[Path, Path] = {}
    for name, files in reading.sources.items():
        folder = out / f"{name}2017"
        for file, record in zip(files, reading.splits[name]["images"], strict=True):
            if not file.is_file():
                raise DataError(f"no such image: {file.absolute()}")
            target = folder / record["file_name"]
            if not target.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"an image's name leads out of its folder: {record['file_name']!r}")
            # One file may have two records.
            if places.setdefault(target, file) != file:
                raise DataError(
                    f"two images have the name {target.name}: {places[target]} and {file}"
                )
    return places
