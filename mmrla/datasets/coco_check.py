"""Checks a dataset in COCO's format: its annotation file and its image folder.

:func:`check_coco` finds errors, :func:`drop_bad` removes bad records. Nothing here writes a file or
needs an mm package.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrla.datasets.findings import DataError, Finding
from mmrla.datasets.images import look_at, names_in, other_spelling
from mmrla.datasets.segmentations import (
    are_numbers,
    is_id,
    is_number,
    is_size,
    segmentation_fault,
    shorten,
)

TINY = 32
EXTREME_RATIO = 50
EXTREME_PIXELS = 2**27


def read_annotations(path: str | Path) -> Any:
    """Parse an annotation file.

    Raises:
        DataError: It is not JSON; the message gives the position.
        FileNotFoundError: It does not exist.
    """
    raw = Path(path).read_bytes()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        seen = "it is empty" if not raw.strip() else f"it begins with {raw[:20]!r}"
        raise DataError(f"{path}: not JSON ({what}; {seen})") from error


def check_coco(
    content: Any, ann_file: str | Path, images: str | Path | None, *,
    classes: Sequence[str] | None = None, need_masks: bool | None = None, files: str = "headers",
    workers: int = 1, turns: bool = True,
) -> list[Finding]:  # fmt: skip
    """Find the errors of a dataset.

    Args:
        content: The parsed annotation file, see :func:`read_annotations`.
        ann_file: Its path, for messages.
        images: Folder that ``file_name`` is relative to; None: do not check image files.
        classes: Names that will be trained on; None: all categories.
        need_masks: Whether masks will be learned. True: every annotation must have a segmentation;
            False: segmentations are ignored; None: existing ones must be valid, and either all
            annotations have one or none does.
        files: How thoroughly to check image files: ``'names'``: whether they exist; ``'headers'``:
            also format, size and the end of the file, which detects most truncated JPEGs and PNGs;
            ``'decode'``: also every pixel.
        workers: Number of processes that check image files.
        turns: Whether images are rotated by their EXIF data when read.

    Returns:
        The findings, beginning with those about the whole file.

    Raises:
        ValueError: An unknown value of ``files``.
    """
    if files not in ("names", "headers", "decode"):
        raise ValueError(f"files must be 'names', 'headers' or 'decode', got {files!r}")
    check = _Check(str(ann_file), classes, need_masks)
    check.run(content)
    if images is not None and check.by_id:
        check.look_at_files(str(images), files, workers, turns)
    return check.findings


def climbs_out(file_name: str) -> bool:
    """Whether a file name leads out of its folder."""
    # Backslashes too: what is a name here is a path elsewhere.
    name = file_name.replace("\\", "/")
    drive = len(name) > 1 and name[1] == ":"
    return name.startswith("/") or drive or "://" in name or ".." in name.split("/")


class _Check:
    """One pass through an annotation file."""

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
                or not is_id(record.get("id"))
                or not isinstance(record.get("name"), str)
            ):
                self.add("not-coco", f"a category without id and name: {shorten(record)}")
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
            shown = f"classes {shorten(classes)}, categories {shorten(names)}"
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
                f"{shorten(labelled)}"
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
            if not isinstance(record, Mapping) or not is_id(record.get("id")):
                self.add("bad-record", f"an image without an id: {shorten(record)}")
                continue
            image = record["id"]
            if image in self.seen:
                text = f"image id {image!r}: {shorten(record.get('file_name'))}"
                self.add("duplicate-image-id", text, image)
            self.seen.add(image)
            if not isinstance(record.get("file_name"), str) or not record["file_name"]:
                bad = "file_name"
            elif not is_size(record.get("width")) or not is_size(record.get("height")):
                bad = "width and height in whole pixels"
            if bad:
                self.add("bad-record", f"image {image!r} has no {bad}: {shorten(record)}", image)
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
            if not isinstance(record, Mapping) or not is_id(record.get("id")):
                self.add("bad-record", f"an annotation without an id: {shorten(record)}")
                continue
            number, image = record["id"], record.get("image_id")
            what = f"annotation {number!r}"
            if number in seen:
                self.add("duplicate-annotation-id", f"{what} of image {image!r}", image, number)
            seen.add(number)
            known = is_id(image) and image in self.seen
            if not known:
                self.add("unknown-image", f"{what}: image_id {shorten(image)}", None, number)
            category = record.get("category_id")
            if not is_id(category) or category not in categories:
                text = f"{what} of image {image!r}: category_id {shorten(category)}"
                self.add("unknown-category", text, image, number)
            crowd = record.get("iscrowd", 0)
            if crowd not in (0, 1) or not is_number(record.get("area")):
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
        if not any(
            isinstance(r, Mapping) and r.get("iscrowd", 0) != 1 and not r.get("ignore")
            for r in records
        ):
            text = f"all {len(records)} annotations of {self.ann_file} are crowds or marked ignore"
            self.add("only-crowds", f"{text}: there is nothing to train on")
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
        if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
            self.add("bad-box", f"{where}: bbox {shorten(box)}", of, number)
            return
        x, y, width, height = box
        area: Any = record.get("area")
        # What mmdet takes for no object.
        if width < 1 or height < 1 or (is_number(area) and area <= 0):
            self.add("zero-area", f"{where}: bbox {box}, area {area}", of, number)
            return
        if image is None:
            return
        across, down = image["width"], image["height"]
        if x >= across or y >= down or x + width <= 0 or y + height <= 0:
            self.add("outside-box", f"{where}: bbox {box}, image {across} x {down}", of, number)
        elif x < -1 or y < -1 or x + width > across + 1 or y + height > down + 1:
            self.add("beyond-image", f"{where}: bbox {box}, image {across} x {down}", of, number)

    def look_at_files(self, folder: str, files: str, workers: int, turns: bool) -> None:
        there = names_in(folder, {record["file_name"] for record in self.by_id.values()})
        jobs = []
        for image, record in self.by_id.items():
            name = record["file_name"]
            path = os.path.join(folder, name)
            if name not in there:
                text = f"image {image!r}: no such file: {path}{other_spelling(path)}"
                self.findings.append(Finding("missing-image", text, path, image))
            elif files != "names":
                jobs.append((image, path, (record["width"], record["height"])))
        found = look_at(
            [(path, size) for _, path, size in jobs],
            decode=files == "decode",
            workers=workers,
            turns=turns,
        )
        for (image, path, _), fault in zip(jobs, found, strict=True):
            if fault is not None:
                kind, text = fault
                self.findings.append(Finding(kind, f"image {image!r}: {path}: {text}", path, image))


def drop_bad(content: Mapping[str, Any], findings: Iterable[Finding]) -> dict[str, Any]:
    """The set without the images and annotations that findings of severity error are about.

    Of records with the same id the first is kept if the others equal it; otherwise none is, because
    references to it are ambiguous. If an image is dropped, so are its annotations.
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
        and is_id(record.get("image_id"))
        and record["image_id"] in kept
    ]
    return {**content, "images": images, "annotations": annotations}


def _once(records: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    by_id: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if isinstance(record, Mapping) and is_id(record.get("id")):
            by_id[record["id"]].append(record)
    for same in by_id.values():
        if all(other == same[0] for other in same[1:]):
            yield same[0]
