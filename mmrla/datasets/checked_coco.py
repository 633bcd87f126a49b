"""mmdet's COCO dataset with checks, so that bad data is reported and not silently trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
import torch
from mmdet.datasets import CocoDataset
from mmengine.logging import print_log

from mmrla.datasets.coco_check import check_coco, drop_bad
from mmrla.datasets.findings import (
    ERRORS,
    FATAL,
    WARNINGS,
    DataError,
    Finding,
    class_names,
    summary,
)
from mmrla.datasets.images import image_fault
from mmrla.datasets.voc import read_set
from mmrla.registry import DATASETS

ON_BAD = ("skip", "raise")
_SHOWN = 5
# Kinds that say that an image cannot be read, or not safely.
_OF_IMAGES = frozenset(
    {"path-escape", "missing-image", "unreadable-image", "truncated-image", "size-mismatch",
     "exif-stored"}
)  # fmt: skip


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset`` with a check of the annotation file and the images.

    When it is built, the annotation file is checked (see :data:`mmrla.datasets.findings.ERRORS`)
    and the presence of each image, by listing its folder. In training each image file is checked
    right before it is read: format, size and end of the file.

    For a set without errors its contents equal those of mmdet's dataset. A Pascal VOC folder is
    read directly, with a list below its ``ImageSets/`` as ``ann_file``, see
    :func:`mmrla.datasets.voc_to_coco`.

    Args:
        on_bad: ``'skip'`` leaves out images and annotations with errors, with a count for each
            kind in the log. ``'raise'`` stops and shows the first few. Errors of the whole file
            always stop: not JSON or COCO's format, categories that would shift labels. In
            ``test_mode`` a bad image always stops: without it the metrics would refer to another
            set.
        allow: Kinds of errors to leave to mmdet, such as ``('zero-area',)``.
        files: How thoroughly to check image files when the dataset is built, as in
            :func:`mmrla.datasets.coco_check.check_coco`: ``'names'`` (default), ``'headers'`` or
            ``'decode'``.
        **kwargs: As in mmdet's.

    Raises:
        ValueError: An unknown ``on_bad``, ``files`` or kind in ``allow``.
        mmrla.datasets.findings.DataError: Bad data, as described above, or nothing is left.
    """

    def __init__(
        self, *args: Any, on_bad: str = "skip", allow: Sequence[str] = (), files: str = "names",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if on_bad not in ON_BAD:
            raise ValueError(f"on_bad must be one of {ON_BAD}, got {on_bad!r}")
        if files not in ("names", "headers", "decode"):
            raise ValueError(f"files must be 'names', 'headers' or 'decode', got {files!r}")
        allow = (allow,) if isinstance(allow, str) else tuple(allow)
        unknown = [kind for kind in allow if kind not in ERRORS]
        if unknown:
            raise ValueError(f"allow must name kinds of {sorted(ERRORS)}, got {unknown}")
        self.on_bad = on_bad
        self.allow = allow
        self.files = files
        # In shared memory, so that the processes of a dataloader count together.
        self.skipped_images = torch.zeros(1, dtype=torch.long).share_memory_()
        pipeline = kwargs.get("pipeline") or ()
        self._needs_masks = loads_masks(pipeline)
        self._turns = reads_turned(pipeline)
        self._warned: set[str] = set()
        classes = (kwargs.get("metainfo") or {}).get("classes")
        if classes is not None:
            class_names(classes, "metainfo.classes")
        super().__init__(*args, **kwargs)

    def COCOAPI(self, path: str) -> Any:  # what the ancestor calls to read its file
        """The COCO index of an annotation file, checked."""
        content = read_set(path, self.metainfo.get("classes"))
        # Where images do not lie in local files, their backend tells when they are read.
        folder = self.data_prefix.get("img") or "."
        findings = check_coco(
            content, self.ann_file, None if "://" in folder else folder,
            classes=self.metainfo.get("classes"), need_masks=self._needs_masks, files=self.files,
            turns=self._turns,
        )  # fmt: skip
        errors = [f for f in findings if f.severity == "error" and f.kind not in self.allow]
        self._refuse(errors)
        if errors:
            before = len(content["images"]), len(content["annotations"])
            content = drop_bad(content, errors)
            left = len(content["images"]), len(content["annotations"])
            print_log(
                f"data: {self.ann_file}: {summary(errors)}; left out {before[0] - left[0]} of "
                f"{before[0]} images and {before[1] - left[1]} of {before[1]} annotations "
                "(mmrla check-data lists them)",
                logger="current",
                level=logging.WARNING,
            )
            if not all(left):
                raise DataError(_message(self.ann_file, errors, "nothing is left to train on"))
        warned = [f for f in findings if f.severity == "warning"]
        if warned:
            print_log(f"data: {self.ann_file}: {summary(warned)}", logger="current")
        return _index(content)

    def _refuse(self, errors: Sequence[Finding]) -> None:
        fatal = [f for f in errors if f.kind in FATAL]
        if fatal:
            raise DataError(_message(self.ann_file, fatal, "cannot be used"))
        if errors and self.on_bad == "raise":
            raise DataError(_message(self.ann_file, errors, "on_bad='raise'"))
        images = [f for f in errors if f.kind in _OF_IMAGES]
        if images and self.test_mode:
            raise DataError(_message(self.ann_file, images, "evaluation needs every image"))

    def filter_data(self) -> list[dict]:
        """As the ancestor's, but an error if nothing is left, which mmengine does not support."""
        kept = super().filter_data()
        if kept and not self.test_mode and not any(_is_trained_on(info) for info in kept):
            raise DataError(
                f"{self.ann_file}: nothing to train on: of {len(kept)} images none has an object "
                f"of the classes {str(self.metainfo['classes'])[:120]} that is no crowd"
            )
        if not kept:
            raise DataError(
                f"{self.ann_file}: none of {len(self.data_list)} images is left after "
                f"filter_cfg={self.filter_cfg} with classes {str(self.metainfo['classes'])[:120]}"
            )
        return kept

    def prepare_data(self, idx: int) -> Any:
        """As the ancestor's, after a check of the image file.

        Returns:
            Output of the pipeline; None for a skipped image, so that the caller takes another one.

        Raises:
            DataError: The image is bad, and must not be skipped.
        """
        info = self.get_data_info(idx)
        path = info["img_path"]
        fault = None
        if "://" not in path:
            fault = image_fault(path, (info["width"], info["height"]), turns=self._turns)
        if fault is not None and fault[0] in WARNINGS:
            if fault[0] not in self._warned:
                self._warned.add(fault[0])
                text = f"data: {fault[0]}: {path}: {fault[1]} (other such images are not named)"
                print_log(text, logger="current", level=logging.WARNING)
            fault = None
        if fault is None or fault[0] in self.allow:
            try:
                return self.pipeline(info)
            except Exception as error:
                # Is it the image, or something else in the pipeline?
                fault = None if "://" in path else _decode_fault(path, error)
                if fault is None:
                    raise DataError(f"{path}: the pipeline fails on it: {error!r}") from error
        kind, text = fault
        if self.on_bad == "raise" or self.test_mode:
            raise DataError(f"{kind}: {path}: {text}")
        self.skipped_images += 1
        print_log(
            f"data: skipped an image while training, {int(self.skipped_images)} so far: {kind}: "
            f"{path}: {text}",
            logger="current",
            level=logging.WARNING,
        )
        return None


def _decode_fault(path: str, error: Exception) -> tuple[str, str] | None:
    fault = image_fault(path, decode=True)
    if fault is None and mmcv.imread(path) is None:
        fault = "unreadable-image", f"OpenCV reads no such image ({str(error)[:120]})"
    return fault


def loads_masks(pipeline: Sequence[Any]) -> bool:
    """Whether a pipeline loads masks."""
    return any(isinstance(step, Mapping) and step.get("with_mask") for step in pipeline)


def reads_turned(pipeline: Sequence[Any]) -> bool:
    """Whether a pipeline rotates images by their EXIF data, which is the default."""
    colors = (step.get("color_type") for step in pipeline if isinstance(step, Mapping))
    return not any(str(color).endswith("_ignore_orientation") for color in colors)


def _is_trained_on(info: Mapping[str, Any]) -> bool:
    return any(not instance["ignore_flag"] for instance in info["instances"])


def _message(ann_file: str, errors: Sequence[Finding], why: str) -> str:
    shown = "; ".join(f"{f.kind}: {f.text}" for f in errors[:_SHOWN])
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return (
        f"bad data in {os.path.abspath(ann_file)} ({why}): {summary(errors)}: {shown}{more} "
        "(mmrla check-data lists all)"
    )


def _index(content: dict[str, Any]) -> Any:
    index = CocoDataset.COCOAPI()
    index.dataset = content
    index.createIndex()
    # mmdet's names for them, which it sets before there is anything.
    index.img_ann_map, index.cat_img_map = index.imgToAnns, index.catToImgs
    return index
