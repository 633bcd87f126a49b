"""Make a checkpoint for publication: weights only, averaged if any, with a hash in its name."""

from __future__ import annotations

import argparse
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from mmrla.checkpoints import load_file, state_dict_of
from mmrla.engine.errors import exit_with_message


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla publish", description=__doc__)
    parser.add_argument("src", type=Path, help="training checkpoint")
    parser.add_argument(
        "dst", type=Path, help="name to write as DST_<yyyymmdd>-<first 8 of its SHA-256>.pth"
    )
    parser.add_argument("--no-ema", action="store_true", help="leave averaged weights aside")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    args = parse_args(argv)
    with exit_with_message():
        checkpoint = load_file(args.src)
        state = state_dict_of(checkpoint, "raw" if args.no_ema else "averaged")
        kept = {"state_dict": {k: v.detach().cpu().clone() for k, v in state.items()}}
        meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
        if isinstance(meta, dict) and "dataset_meta" in meta:
            # What inference needs to name its classes.
            kept["meta"] = {"dataset_meta": meta["dataset_meta"]}
        stem = args.dst.with_suffix("") if args.dst.suffix == ".pth" else args.dst
        stem.parent.mkdir(parents=True, exist_ok=True)
        draft = stem.with_name(f".{stem.name}.part")
        torch.save(kept, draft)
        digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:8]
        date = datetime.date.today().strftime("%Y%m%d")
        final = draft.rename(stem.with_name(f"{stem.name}_{date}-{digest}.pth"))
        print(f"wrote: {final}, {len(state)} tensors, {final.stat().st_size / 2**20:.1f} MiB")
