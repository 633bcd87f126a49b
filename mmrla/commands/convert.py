"""Convert a released MRLA checkpoint, or a plain one, to mmrla's key names, or back."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mmrla.checkpoints import convert_state_dict, detect, load_file, state_dict_of, to_released
from mmrla.engine.errors import exit_with_message


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla convert", description=__doc__)
    parser.add_argument("src", help="checkpoint to read: a file, torchvision://NAME or an address")
    parser.add_argument("dst", type=Path, help="file to write, tensors only")
    parser.add_argument("--to", choices=["mmrla", "released"], default="mmrla", help="key names")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights if there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the file."""
    args = parse_args(argv)
    with exit_with_message():
        state = state_dict_of(load_file(args.src), "averaged" if args.ema else "default")
        print(f"found: {detect(state).description}, {len(state)} tensors")
        converted = convert_state_dict(state)
        if args.to == "released":
            converted = to_released(converted)
        args.dst.parent.mkdir(parents=True, exist_ok=True)
        # A link there is replaced, not followed; and nobody ever sees half a file.
        handle, draft = tempfile.mkstemp(dir=args.dst.parent, prefix=f".{args.dst.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({"state_dict": {k: v.clone() for k, v in converted.items()}}, file)
            os.chmod(draft, 0o644)
            os.replace(draft, args.dst)
        except BaseException:
            os.unlink(draft)
            raise
        print(f"wrote: {args.dst}, {args.to} key names")
