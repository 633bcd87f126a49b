"""Export a backbone, a classifier or a detector with its boxes to ONNX, and compare with torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrla.engine.errors import exit_with_message
from mmrla.engine.export import (
    PARTS,
    export_onnx,
    exportable,
    int8_agreement,
    onnx_error,
    quantize_int8,
)
from mmrla.engine.inspection import add_network_arguments, find_images
from mmrla.engine.network import Network, build_network

TOLERANCE = 1e-4
PIXELS = 0.5
SCORE = 1e-3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla export-onnx", description=__doc__.splitlines()[0])
    add_network_arguments(parser, device=False)
    parser.set_defaults(out=Path("work_dirs/onnx"))
    parser.add_argument(
        "--part", choices=PARTS,
        help="detector: boxes, scores, labels and masks, for one size, the default for detectors; "
        "model: a classifier's scores, the default for classifiers, or a single-stage detector's "
        "maps; backbone: feature maps",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"), help="of an image"
    )
    parser.add_argument(
        "--static", action="store_true", help="one image of --size alone, nothing left open"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH",
        help="files, folders or globs in which a detector is compared with mmdet, or with which "
        "--int8 calibrates (every other one) and compares",
    )  # fmt: skip
    parser.add_argument(
        "--int8", action="store_true", help="write a classifier in int8 as well; needs --images"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the graph and compare; exits with an error if it differs from torch."""
    args = parse_args(argv)
    with exit_with_message():
        if min(args.size) < 1:
            raise ValueError(f"--size must be positive, got {args.size[0]} {args.size[1]}")
        if args.int8 and args.size[0] != args.size[1]:
            raise ValueError(f"--int8 needs a square --size, got {args.size[0]} {args.size[1]}")
        network = build_network(
            args.config, args.checkpoint, options=args.cfg_options, seed=args.seed,
            need_head=args.part != "backbone", size=args.size[0] if args.int8 else None,
        )  # fmt: skip
        scope = network.cfg.get("default_scope")
        part = args.part or ("detector" if scope == "mmdet" else "model")
        if args.int8 and (part != "model" or scope != "mmpretrain"):
            raise ValueError(f"--int8 is for classifiers, not for --part {part} of {network.name}")
        if part == "detector":
            if scope != "mmdet":
                raise ValueError(f"--part detector: {network.name} is no detector of mmdet")
            problem = _detector(args, network)
            if problem:
                sys.exit(f"error: {problem}")
            return
        images = find_images(args.images)
        if args.int8 and len(images) < 2:
            raise ValueError(
                f"--int8 needs two --images or more, to calibrate and compare, got {len(images)}"
            )
        if images and not args.int8:
            raise ValueError(f"--images is for detectors with boxes or --int8, not --part {part}")
        flat = exportable(network, part)
        path = args.out / f"{network.stem}_{part}.onnx"
        hint = "" if args.static else "; --static is faster"
        print(f"exporting {network.title}: minutes if it has many layers{hint}", flush=True)
        export_onnx(flat, path, tuple(args.size), not args.static)
        height, width = args.size
        sizes = [(height, width)]
        if not args.static:
            sizes += [(height + 32, width), (height, width + 64)]
        errors = onnx_error(path, flat, sizes)
    print(f"{path}: {network.title}")
    for (height, width), error in zip(sizes, errors, strict=True):
        print(f"{height}x{width}: onnxruntime differs from torch by {error:.1e} of the largest")
    if max(errors) > TOLERANCE:
        sys.exit(f"error: that is more than {TOLERANCE}")
    if args.int8:
        inputs = [network.read(image)[0] for image in images]
        quantized = quantize_int8(path, inputs[::2])
        compared = inputs[1::2]
        found = int8_agreement(path, quantized, compared)
        print(f"{quantized}: calibrated on {len(inputs[::2])} images")
        print(
            f"int8 on {len(compared)} others: the same best class in {found.same_class}, outputs "
            f"differ by {found.error:.1%} (root mean square), {found.speed:.2f} times as fast"
        )


def _detector(args: argparse.Namespace, network: Network) -> str:
    """Write the graph with boxes and compare it with mmdet; returns the problem, if any."""
    from mmrla.engine.detection_graph import DetectorGraph, detection_errors, export_detector

    images = find_images(args.images)
    size = tuple(args.size)
    path = args.out / f"{network.stem}_detector.onnx"
    export_detector(DetectorGraph(network), path, size)
    print(f"{path}: {network.title}, one image of {size[0]}x{size[1]}")
    if not images:
        print("not compared with mmdet: give --images")
    problem = ""
    for image, found in zip(images, detection_errors(path, network, size, images), strict=True):
        print(
            f"{image}: {found['count']} boxes of mmdet, {found['unmatched']} without a partner; "
            f"boxes differ by {found['box']:.1e} pixels, scores by {found['score']:.1e}"
            + (f", masks in {found['mask']:.1e} of the pixels" if "mask" in found else "")
        )
        if found["unmatched"] or found["box"] > PIXELS or found["score"] > SCORE:
            problem = f"{image}: onnxruntime and mmdet find different boxes"
    return problem
