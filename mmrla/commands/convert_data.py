"""Convert Pascal VOC, YOLO, labelme, CVAT or Roboflow's COCO to COCO's layout, and check it."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmrla.datasets.convert import convert_data
from mmrla.engine.data.sets import print_report, sets_in
from mmrla.engine.errors import exit_with_message


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        "mmrla convert-data",
        description=__doc__,
        epilog="Exit status 0: no errors in what was written. 1: errors. 2: nothing was written "
        "whole.",
    )
    parser.add_argument("source", metavar="IN", help="a folder, CVAT's XML, or a zip of a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument(
        "--val", type=float, default=0.0, metavar="FRACTION",
        help="of the training images that become the validation set, if there is none",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="which images that are")
    parser.add_argument("--link", action="store_true", help="link to the images, copy nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert and check; returns 1 if the check finds errors, else 0."""
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    with exit_with_message():
        done = convert_data(args.source, args.out, args.val, args.seed, args.link)
        print(f"{args.source}: {done.format}, {len(done.classes)} classes: {done.classes}")
        for name, (images, objects) in done.counts.items():
            print(f"{name}: {images} images, {objects} objects")
        for kind, count in done.left_out.items():
            print(f"left out: {count} of kind {kind!r}, which this reader does not convert")
        if "val" not in done.counts:
            print("no validation set: --val 0.2 splits one off the training images")
        sets = sets_in(args.out)
        if 0 < done.boxes < done.objects:
            print(
                f"{done.boxes} of {done.objects} objects have a box and no polygon: enough for a "
                "Faster R-CNN or RetinaNet, not for a Mask R-CNN"
            )
            sets = [replace(one, need_masks=False) for one in sets]
        errors = print_report(sets, limit=5)
    return 1 if errors else 0
