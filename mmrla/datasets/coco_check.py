"""What is wrong with a set in COCO's format: its annotation file and its folder of images.

:func:`check_coco` finds it, :func:`drop_bad` takes it out. Nothing here writes a file, and nothing
needs an mm package.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

ERRORS: dict[str, str] = {
    "not-json": "the annotation file is not JSON",
    "not-coco": "the annotation file is not in COCO's format",
    "no-annotations": "there is no annotation at all",
    "bad-record": "a record lacks a field or has a wrong type in it",
    "duplicate-image-id": "several images have one id",
    "duplicate-annotation-id": "several annotations have one id",
    "duplicate-category": "several categories have one id or one name",
    "path-escape": "a file_name leads out of the folder of images",
    "missing-image": "an image file is not there",
    "unreadable-image": "an image file is no image, or empty",
    "truncated-image": "an image file ends too early or is damaged",
    "size-mismatch": "an image is of another size than its record says",
    "unknown-image": "an annotation is of an image that has no record",
    "unknown-category": "an annotation is of a category that has no record",
    "bad-box": "a box is not four finite numbers",
    "zero-area": "a box or area is of no size (a side below a pixel)",
    "outside-box": "a box lies outside its image",
    "bad-segmentation": "a segmentation is neither polygons nor an RLE of the image's size",
    "missing-segmentation": "an annotation has no segmentation where others have or it is needed",
    "class-order": "the classes are in another order than the categories, which shifts labels",
    "no-class": "no category is one of the classes",
}
"""Kinds of findings that are wrong data, with what they mean."""

WARNINGS: dict[str, str] = {
    "empty-image": "an image has no annotations",
    "crowd-only": "all annotations of an image are crowds",
    "tiny-image": "an image has a side below 32 pixels, which filter_cfg leaves out",
    "extreme-image": "an image is more than 50 times as long as it is wide, or very large",
    "beyond-image": "a box reaches out of its image by more than a pixel",
    "mixed-segmentation": "single objects are RLEs beside polygons; poly2mask=False ignores those",
    "marked-ignore": "an annotation is marked ignore, and mmdet leaves it out",
    "duplicate-file": "several images have one file",
    "missing-class": "a class has no category",
    "unnamed-category": "a category is none of the classes; its annotations are left out",
    "empty-folder": "a folder of a class has no images",
}
"""Kinds of findings that training copes with."""

KINDS: dict[str, str] = {**ERRORS, **WARNINGS}

FATAL = ("not-json", "not-coco", "no-annotations", "duplicate-category", "class-order", "no-class")
"""Kinds that concern the whole file, so that leaving something out does not help."""

TINY = 32
EXTREME_RATIO = 50
EXTREME_PIXELS = 2**27


class DataError(ValueError):
    """Data that cannot be trained on as it is; the message lists the first findings."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """One of :data:`KINDS`."""
    text: str
    """One line for people."""
    path: str
    """The file it is about."""
    image_id: Any = None
    annotation_id: Any = None

    @property
    def severity(self) -> str:
        """``'error'`` or ``'warning'``."""
        return "error" if self.kind in ERRORS else "warning"

    def __str__(self) -> str:
        return f"{self.severity}: {self.kind}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"severity": self.severity, **asdict(self)}


def count_kinds(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each kind, in the order of :data:`KINDS`."""
    counts = Counter(finding.kind for finding in findings)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def read_annotations(path: str | Path) -> Any:
    """Parse an annotation file.

    Raises:
        DataError: It is not JSON, with where it stops being so.
        FileNotFoundError: It is not there.
    """
    raw = Path(path).read_bytes()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        seen = "it is empty" if not raw.strip() else f"it begins with {raw[:20]!r}"
        raise DataError(f"{path}: not JSON ({what}; {seen})") from error


def check_coco(
    content: Any,
    ann_file: str | Path,
    images: str | Path | None,
    *,
    classes: Sequence[str] | None = None,
    need_masks: bool | None = None,
    files: str = "headers",
    workers: int = 1,
) -> list[Finding]:
    """Find what is wrong with a set.

    Args:
        content: The parsed annotation file, see :func:`read_annotations`.
        ann_file: Its path, for messages.
        images: Folder that ``file_name`` is relative to; None leaves image files alone.
        classes: Names that will be trained on; None: all categories.
        need_masks: Whether masks will be learned: True: every annotation must have a segmentation;
            False: segmentations do not matter; None: those that are there must be right, and all
            annotations or none have one.
        files: How closely to look at image files: ``'names'``: whether they are there;
            ``'headers'``: also format, size and the end of the file, which shows most truncated
            JPEGs and PNGs; ``'decode'``: also every pixel.
        workers: Processes that look at image files.

    Returns:
        The findings, those about the whole file first.

    Raises:
        ValueError: An unknown value of ``files``.
    """
    if files not in ("names", "headers", "decode"):
        raise ValueError(f"files must be 'names', 'headers' or 'decode', got {files!r}")
    check = _Check(str(ann_file), classes, need_masks)
    check.run(content)
    if images is not None and check.by_id:
        check.look_at_files(str(images), files, workers)
    return check.findings


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: list[Any]) -> bool:
    """Whether all are finite numbers; of hundreds of thousands of lists, so the quick way."""
    return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def climbs_out(file_name: str) -> bool:
    """Whether a name from a file leads out of the folder that it is to be found in."""
    # Backslashes too: what is a name here is a path elsewhere.
    name = file_name.replace("\\", "/")
    drive = len(name) > 1 and name[1] == ":"
    return name.startswith("/") or drive or "://" in name or ".." in name.split("/")


class _Check:
    """One annotation file, walked through once."""

    def __init__(
        self, ann_file: str, classes: Sequence[str] | None, need_masks: bool | None
    ) -> None:
        self.ann_file = ann_file
        self.classes = classes
        self.need_masks = need_masks
        self.findings: list[Finding] = []
        self.seen: set[Any] = set()
        """Ids of images."""
        self.by_id: dict[Any, Mapping[str, Any]] = {}
        """Image records that are whole and may be looked for, by id."""

    def add(self, kind: str, text: str, image_id: Any = None, annotation_id: Any = None) -> None:
        self.findings.append(Finding(kind, text, self.ann_file, image_id, annotation_id))

    def run(self, content: Any) -> None:
        lists = {}
        for key in ("images", "annotations", "categories"):
            value = content.get(key) if isinstance(content, Mapping) else None
            if not isinstance(value, list):
                held = sorted(content)[:6] if isinstance(content, Mapping) else type(content)
                self.add("not-coco", f"no list {key!r} in {self.ann_file}, it holds {held}")
            else:
                lists[key] = value
        if len(lists) < 3:
            return
        for key in ("images", "categories"):
            if not lists[key]:
                self.add("not-coco", f"the list {key!r} of {self.ann_file} is empty")
        categories = self._categories(lists["categories"])
        self._images(lists["images"])
        self._annotations(lists["annotations"], categories)

    def _categories(self, records: list[Any]) -> set[Any]:
        ids: set[Any] = set()
        names: list[str] = []
        for record in records:
            if (
                not isinstance(record, Mapping)
                or not _is_id(record.get("id"))
                or not isinstance(record.get("name"), str)
            ):
                self.add("not-coco", f"a category without id and name: {_shorten(record)}")
                continue
            if record["id"] in ids or record["name"] in names:
                self.add("duplicate-category", f"category {record['id']} {record['name']!r}")
            ids.add(record["id"])
            names.append(record["name"])
        if self.classes is not None:
            self._classes(names, list(self.classes))
        return ids

    def _classes(self, names: list[str], classes: list[str]) -> None:
        # As mmdet gives labels: in the order of the categories, not of the classes.
        labelled = [name for name in names if name in classes]
        missing = [name for name in classes if name not in names]
        if not labelled:
            shown = f"classes {_shorten(classes)}, categories {_shorten(names)}"
            self.add("no-class", f"no class is a category of {self.ann_file}: {shown}")
            return
        wrong = [i for i, name in enumerate(labelled) if i >= len(classes) or name != classes[i]]
        if wrong:
            i = wrong[0]
            wanted = classes[i] if i < len(classes) else None
            self.add(
                "class-order",
                f"label {i} would be category {labelled[i]!r} and is called {wanted!r}: labels go "
                "by the order of the categories; give the classes in the order "
                f"{_shorten(labelled)}"
                + (f" (no category is called {', '.join(map(repr, missing))})" if missing else ""),
            )
        for name in missing:
            self.add("missing-class", f"class {name!r} is no category of {self.ann_file}")
        for name in names:
            if name not in classes:
                self.add("unnamed-category", f"category {name!r} is none of the classes")

    def _images(self, records: list[Any]) -> None:
        files: set[str] = set()
        for record in records:
            bad = None
            if not isinstance(record, Mapping) or not _is_id(record.get("id")):
                self.add("bad-record", f"an image without an id: {_shorten(record)}")
                continue
            image = record["id"]
            if image in self.seen:
                text = f"image id {image!r}: {_shorten(record.get('file_name'))}"
                self.add("duplicate-image-id", text, image)
            self.seen.add(image)
            if not isinstance(record.get("file_name"), str) or not record["file_name"]:
                bad = "file_name"
            elif not _is_size(record.get("width")) or not _is_size(record.get("height")):
                bad = "width and height in whole pixels"
            if bad:
                self.add("bad-record", f"image {image!r} has no {bad}: {_shorten(record)}", image)
                continue
            name = record["file_name"]
            if climbs_out(name) or "\0" in name:
                self.add("path-escape", f"image {image!r}: file_name {name!r}", image)
                continue
            if name in files:
                self.add("duplicate-file", f"image {image!r}, as another one: {name}", image)
            files.add(name)
            width, height = record["width"], record["height"]
            short, long = sorted((width, height))
            shown = f"image {image!r}, {name}, is {width} x {height}"
            if short < TINY:
                self.add("tiny-image", shown, image)
            if long > EXTREME_RATIO * short or width * height > EXTREME_PIXELS:
                self.add("extreme-image", shown, image)
            self.by_id[image] = record

    def _annotations(self, records: list[Any], categories: set[Any]) -> None:
        if not records:
            self.add("no-annotations", f"the list 'annotations' of {self.ann_file} is empty")
            return
        seen: set[Any] = set()
        crowds: dict[Any, list[bool]] = defaultdict(list)
        without: list[tuple[Any, Any]] = []
        forms: Counter[str] = Counter()
        for record in records:
            if not isinstance(record, Mapping) or not _is_id(record.get("id")):
                self.add("bad-record", f"an annotation without an id: {_shorten(record)}")
                continue
            number, image = record["id"], record.get("image_id")
            what = f"annotation {number!r}"
            if number in seen:
                self.add("duplicate-annotation-id", f"{what} of image {image!r}", image, number)
            seen.add(number)
            known = _is_id(image) and image in self.seen
            if not known:
                self.add("unknown-image", f"{what}: image_id {_shorten(image)}", None, number)
            category = record.get("category_id")
            if not _is_id(category) or category not in categories:
                text = f"{what} of image {image!r}: category_id {_shorten(category)}"
                self.add("unknown-category", text, image, number)
            crowd = record.get("iscrowd", 0)
            if crowd not in (0, 1) or not _is_number(record.get("area")):
                bad = "iscrowd of 0 or 1" if crowd not in (0, 1) else "finite area"
                self.add("bad-record", f"{what} of image {image!r} has no {bad}", image, number)
            if record.get("ignore"):
                self.add("marked-ignore", f"{what} of image {image!r}", image, number)
            size = self.by_id.get(image) if known else None
            self._box(record, what, size)
            if known:
                crowds[image].append(crowd == 1)
            segmentation = record.get("segmentation")
            if self.need_masks is False:
                continue
            if not segmentation:
                without.append((number, image))
                continue
            fault = segmentation_fault(segmentation, size)
            if fault:
                text = f"{what} of image {image!r}: {fault}"
                self.add("bad-segmentation", text, image, number)
            elif crowd != 1:
                forms["rle" if isinstance(segmentation, Mapping) else "polygons"] += 1
        # A set of boxes alone has none at all, which is fine unless masks are to be learned.
        if without and (self.need_masks or len(without) < len(records)):
            for number, image in without:
                text = f"annotation {number!r} of image {image!r} has no segmentation"
                self.add("missing-segmentation", text, image, number)
        if len(forms) == 2:
            text = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
            self.add("mixed-segmentation", f"{self.ann_file}: {text} of single objects")
        for image, record in self.by_id.items():
            if image not in crowds:
                self.add("empty-image", f"image {image!r}, {record['file_name']}", image)
            elif all(crowds[image]):
                self.add("crowd-only", f"image {image!r}, {record['file_name']}", image)

    def _box(self, record: Mapping[str, Any], what: str, image: Mapping[str, Any] | None) -> None:
        box, number, of = record.get("bbox"), record["id"], record.get("image_id")
        where = f"{what} of image {of!r}"
        if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
            self.add("bad-box", f"{where}: bbox {_shorten(box)}", of, number)
            return
        x, y, width, height = box
        area: Any = record.get("area")
        # What mmdet takes for no object.
        if width < 1 or height < 1 or (_is_number(area) and area <= 0):
            self.add("zero-area", f"{where}: bbox {box}, area {area}", of, number)
            return
        if image is None:
            return
        across, down = image["width"], image["height"]
        if x >= across or y >= down or x + width <= 0 or y + height <= 0:
            self.add("outside-box", f"{where}: bbox {box}, image {across} x {down}", of, number)
        elif x < -1 or y < -1 or x + width > across + 1 or y + height > down + 1:
            self.add("beyond-image", f"{where}: bbox {box}, image {across} x {down}", of, number)

    def look_at_files(self, folder: str, files: str, workers: int) -> None:
        there = _names_in(folder, {record["file_name"] for record in self.by_id.values()})
        jobs = []
        for image, record in self.by_id.items():
            name = record["file_name"]
            path = os.path.join(folder, name)
            if name not in there:
                text = f"image {image!r}: no such file: {path}{_other_spelling(path)}"
                self.findings.append(Finding("missing-image", text, path, image))
            elif files != "names":
                jobs.append((image, path, (record["width"], record["height"])))
        found = look_at(
            [(path, size) for _, path, size in jobs], decode=files == "decode", workers=workers
        )
        for (image, path, _), fault in zip(jobs, found, strict=True):
            if fault is not None:
                kind, text = fault
                self.findings.append(Finding(kind, f"image {image!r}: {path}: {text}", path, image))


def _names_in(folder: str, names: Collection[str]) -> set[str]:
    """Which of the names are files there, by listing each folder once."""
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


def _other_spelling(path: str) -> str:
    """A hint where the file is there under the same letters in other code points, or in case."""
    folder, name = os.path.split(path)
    wanted = unicodedata.normalize("NFC", name).casefold()
    if not os.path.isdir(folder):
        return ""
    for other in os.listdir(folder) if len(name) != len(name.encode()) else ():
        if unicodedata.normalize("NFC", other).casefold() == wanted:
            return f" (there is {other!r}, the same letters in another Unicode form or case)"
    return ""


# --- image files ---

Fault = tuple[str, str]
"""Kind and text."""


def image_fault(
    path: str, size: tuple[int, int] | None = None, *, decode: bool = False
) -> Fault | None:
    """What is wrong with an image file, None if nothing.

    Args:
        path: A local file.
        size: Width and height that it should have, after the turn that its EXIF data ask for,
            which OpenCV carries out on reading.
        decode: Whether to decode all pixels. Without, a JPEG or PNG is decoded only if it does not
            end as such a file does; other formats are trusted once their header is right.
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
            with Image.open(file) as image:
                found, kind = image.size, image.format
                if size is not None and found != size and image.getexif().get(0x0112, 1) >= 5:
                    found = found[::-1]
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
    if size is not None and found != tuple(size):
        return "size-mismatch", f"is {found[0]} x {found[1]}, its record says {size[0]} x {size[1]}"
    return None


def _ends_well(kind: str | None, tail: bytes) -> bool | None:
    """Whether a file ends as one of its format does; None where that says nothing."""
    if kind in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.endswith(b"IEND\xaeB`\x82")
    return None


def _faults_of(
    chunk: Sequence[tuple[str, tuple[int, int] | None]], decode: bool
) -> list[Fault | None]:
    return [image_fault(path, size, decode=decode) for path, size in chunk]


def look_at(
    jobs: Sequence[tuple[str, tuple[int, int] | None]], *, decode: bool, workers: int = 1
) -> list[Fault | None]:
    """:func:`image_fault` of many files with their sizes, in order, in ``workers`` processes."""
    if workers <= 1 or len(jobs) < 64:
        return _faults_of(jobs, decode)
    step = max(1, min(512, len(jobs) // (4 * workers)))
    chunks = [jobs[i : i + step] for i in range(0, len(jobs), step)]
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(partial(_faults_of, decode=decode), chunks)
        return [fault for part in parts for fault in part]


# --- segmentations ---


def segmentation_fault(segmentation: Any, image: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a segmentation that is not empty, None if nothing.

    Args:
        segmentation: Polygons ``[[x1, y1, x2, y2, ...], ...]`` or an RLE
            ``{'size': [height, width], 'counts': ...}``, with counts as a list or in COCO's
            compressed form.
        image: The image's record, None if there is none.
    """
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return f"no polygon of three points or more: {_shorten(polygon)}"
            if not _are_numbers(polygon):
                return f"not all coordinates are finite numbers: {_shorten(polygon)}"
        return None
    if not isinstance(segmentation, Mapping):
        return f"neither polygons nor an RLE: {_shorten(segmentation)}"
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(map(_is_size, size)):
        return f"an RLE without size [height, width], got {_shorten(size)}"
    if image is not None and size != [image["height"], image["width"]]:
        return f"an RLE of {size}, the image has [{image['height']}, {image['width']}]"
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if (
        not isinstance(counts, list)
        or any(type(count) is not int or count < 0 for count in counts)
        or sum(counts) != size[0] * size[1]
    ):
        return f"an RLE whose counts do not add up to {size[0]} x {size[1]}"
    return None


def _uncompressed(text: str) -> list[int] | None:
    """Counts of a compressed RLE, None if it is none.

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


# --- leaving out ---


def drop_bad(content: Mapping[str, Any], findings: Iterable[Finding]) -> dict[str, Any]:
    """The set without the images and annotations that findings of severity error are about.

    Of records with one id the first stays if the others equal it, else none of them does: nobody
    can tell what is whose. What an image loses, its annotations lose too.

    Args:
        content: In COCO's format; left as it is.
        findings: Of :func:`check_coco`, none of :data:`FATAL`.
    """
    bad_images: set[Any] = set()
    bad_annotations: set[Any] = set()
    for finding in findings:
        if finding.severity == "error" and not finding.kind.startswith("duplicate-"):
            if finding.annotation_id is not None:
                bad_annotations.add(finding.annotation_id)
            elif finding.image_id is not None:
                bad_images.add(finding.image_id)
    images = [r for r in _once(content["images"]) if r["id"] not in bad_images]
    kept = {record["id"] for record in images}
    annotations = [
        record
        for record in _once(content["annotations"])
        if record["id"] not in bad_annotations
        and _is_id(record.get("image_id"))
        and record["image_id"] in kept
    ]
    return {**content, "images": images, "annotations": annotations}


def _once(records: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    by_id: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if isinstance(record, Mapping) and _is_id(record.get("id")):
            by_id[record["id"]].append(record)
    for same in by_id.values():
        if all(other == same[0] for other in same[1:]):
            yield same[0]


def summary(findings: Iterable[Finding]) -> str:
    """Counts of kinds in one line: ``3 missing-image, 1 zero-area``."""
    return ", ".join(f"{count} {kind}" for kind, count in count_kinds(findings).items())


def check_class_folders(
    folder: str | Path, *, decode: bool = False, workers: int = 1
) -> list[Finding]:
    """Find what is wrong with a folder of class folders of images, as ImageNet has them.

    Args:
        folder: Holds one folder for each class.
        decode: As in :func:`image_fault`.
        workers: Processes that look at files.
    """
    findings: list[Finding] = []
    paths: list[str] = []
    for klass in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        own = sorted(
            str(path) for path in klass.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not own:
            findings.append(Finding("empty-folder", f"{klass} has no images", str(klass)))
        paths += own
    faults = look_at([(path, None) for path in paths], decode=decode, workers=workers)
    for path, fault in zip(paths, faults, strict=True):
        if fault is not None:
            findings.append(Finding(fault[0], f"{path}: {fault[1]}", path))
    return findings


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp"})
