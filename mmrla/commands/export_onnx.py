"""Write a backbone, a classifier or a single-stage detector as ONNX, and compare with torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrla.engine.errors import reporting_errors
from mmrla.engine.export import PARTS, export_onnx, exportable, onnx_error
from mmrla.engine.inspection import add_network_arguments, build_network

TOLERANCE = 1e-4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla export-onnx", description=__doc__.splitlines()[0])
    add_network_arguments(parser)
    parser.set_defaults(out=Path("work_dirs/onnx"))
    parser.add_argument(
        "--part", choices=PARTS, default="model", help="default: the model, its scores and boxes"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"), help="of an image"
    )
    parser.add_argument(
        "--static", action="store_true", help="one image of --size alone, nothing left open"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the graph and compare; exits with an error if it differs from torch."""
    args = parse_args(argv)
    with reporting_errors():
        if min(args.size) < 1:
            raise ValueError(f"--size must be positive, got {args.size[0]} {args.size[1]}")
        network = build_network(
            args.config, args.checkpoint, options=args.cfg_options, seed=args.seed,
            need_head=args.part == "model",
        )  # fmt: skip
        flat = exportable(network, args.part)
        path = args.out / f"{network.stem}_{args.part}.onnx"
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
