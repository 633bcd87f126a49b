"""Checks of image files."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from mmrla.datasets.findings import Finding

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")

_ORIENTATION = 0x0112

Fault = tuple[str, str]
"""Kind and text."""


def image_fault(
    path: str, size: tuple[int, int] | None = None, *, decode: bool = False, turns: bool = True
) -> Fault | None:
    """The error or warning about an image file, errors first, or None.

    Args:
        path: A local file.
        size: Width and height that it should have when it is read.
        decode: Whether to decode all pixels. Otherwise a JPEG or PNG is decoded only if its end is
            unexpected, and for other formats only the header is checked.
        turns: Whether it is rotated by its EXIF data when read, as by OpenCV's default, or read as
            stored.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            # Pillow warns of large images; how large one may be is not this function's business.
            warnings.simplefilter("ignore")
            end = file.seek(0, os.SEEK_END)
            if end == 0:
                return "unreadable-image", "the file is empty"
            file.seek(-min(end, 12), os.SEEK_END)
            tail = file.read()
            file.seek(0)
            head = file.read(26)
            file.seek(0)
            with Image.open(file) as image:
                stored, orientation, kind = *stored_size(image), image.format
                deep = _bits(image, head) > 8
                if decode or _ends_well(kind, tail) is False:
                    try:
                        image.load()
                    except Exception as error:
                        return "truncated-image", f"cannot be decoded ({str(error)[:120]})"
    except FileNotFoundError:
        return "missing-image", "no such file"
    except Image.DecompressionBombError:
        # Larger than Pillow will touch, which OpenCV may well read.
        return None
    except Exception as error:  # Pillow's plugins raise whatever they meet
        return "unreadable-image", f"no image ({type(error).__name__}: {str(error)[:120]})"
    if size is not None and (fault := _size_fault(stored, orientation, tuple(size), turns)):
        return fault
    if deep:
        return "deep-image", "has more than 8 bits per channel, of which the upper 8 are read"
    return None


def stored_size(image: Image.Image) -> tuple[tuple[int, int], int]:
    """Size as stored, and EXIF orientation 1 to 8 if OpenCV applies it."""
    if image.format in ("JPEG", "MPO", "PNG"):
        # Asking a PNG without EXIF data for them would decode it.
        return image.size, image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    if image.format == "TIFF":
        tags = image.tag_v2
        return (tags[256], tags[257]), tags.get(_ORIENTATION, 1)
    return image.size, 1


def turned(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The size of an image as displayed."""
    return stored[::-1] if orientation in (5, 6, 7, 8) else stored


def images_in(folder: Path) -> list[Path]:
    """The image files below a folder, sorted, without macOS's ``._`` files."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")
    )


def _bits(image: Image.Image, head: bytes) -> int:
    """Bits per channel; Pillow's mode does not show it for a PNG with 3 x 16."""
    if image.format == "PNG":
        return head[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,)))
    return 16 if image.mode.startswith(("I", "F")) else 8


def _size_fault(
    stored: tuple[int, int], orientation: int, size: tuple[int, ...], turns: bool
) -> Fault | None:
    shown = turned(stored, orientation)
    if size == stored != shown and turns:
        return "exif-stored", (
            f"is stored as {stored[0]} x {stored[1]}, which is what its record says, but its EXIF "
            f"orientation {orientation} turns it to {shown[0]} x {shown[1]} as it is read, so its "
            "boxes are wrong; either read images as stored, with color_type="
            "'color_ignore_orientation' for each LoadImageFromFile, or take the orientation out of "
            "the files (exiftool -Orientation= -overwrite_original DIR)"
        )
    read = shown if turns else stored
    if size != read:
        return "size-mismatch", f"is {read[0]} x {read[1]}, its record says {size[0]} x {size[1]}"
    if turns and orientation in range(2, 9) and stored == shown:
        return "exif-unclear", (
            f"is turned or mirrored by its EXIF orientation {orientation} as it is read; see in a "
            "picture whether its boxes are too"
        )
    return None


def _ends_well(kind: str | None, tail: bytes) -> bool | None:
    """Whether a file ends correctly for its format; None if this cannot be determined."""
    if kind in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.endswith(b"IEND\xaeB`\x82")
    return None


def _faults_of(
    chunk: Sequence[tuple[str, tuple[int, int] | None]], decode: bool, turns: bool
) -> list[Fault | None]:
    return [image_fault(path, size, decode=decode, turns=turns) for path, size in chunk]


def look_at(
    jobs: Sequence[tuple[str, tuple[int, int] | None]], *, decode: bool, workers: int = 1,
    turns: bool = True,
) -> list[Fault | None]:  # fmt: skip
    """:func:`image_fault` of many files with their sizes, in order, in ``workers`` processes."""
    if workers <= 1 or len(jobs) < 64:
        return _faults_of(jobs, decode, turns)
    step = max(1, min(512, len(jobs) // (4 * workers)))
    chunks = [jobs[i : i + step] for i in range(0, len(jobs), step)]
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(partial(_faults_of, decode=decode, turns=turns), chunks)
        return [fault for part in parts for fault in part]


def check_class_folders(
    folder: str | Path, *, decode: bool = False, workers: int = 1
) -> list[Finding]:
    """Find errors in a folder with class folders of images, like ImageNet."""
    findings: list[Finding] = []
    paths: list[str] = []
    for klass in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        own = [str(path) for path in images_in(klass)]
        if not own:
            findings.append(Finding("empty-folder", f"{klass} has no images", str(klass)))
        paths += own
    faults = look_at([(path, None) for path in paths], decode=decode, workers=workers)
    for path, fault in zip(paths, faults, strict=True):
        if fault is not None:
            findings.append(Finding(fault[0], f"{path}: {fault[1]}", path))
    return findings


def names_in(folder: str, names: Collection[str]) -> set[str]:
    """The names that exist as files, by listing each folder once."""
    by_parent: dict[str, set[str]] = defaultdict(set)
    for name in names:
        by_parent[os.path.dirname(name)].add(name)
    there: set[str] = set()
    for parent, members in by_parent.items():
        path = os.path.join(folder, parent)
        if not os.path.isdir(path):
            continue
        with os.scandir(path) as entries:
            listed = {entry.name for entry in entries if entry.is_file()}
        there.update(name for name in members if os.path.basename(name) in listed)
    return there


def other_spelling(path: str) -> str:
    """A hint if the file exists with another Unicode normalisation or case."""
    folder, name = os.path.split(path)
    wanted = unicodedata.normalize("NFC", name).casefold()
    if not os.path.isdir(folder):
        return ""
    for other in os.listdir(folder) if len(name) != len(name.encode()) else ():
        if unicodedata.normalize("NFC", other).casefold() == wanted:
            return f" (there is {other!r}, the same letters in another Unicode form or case)"
    return ""
