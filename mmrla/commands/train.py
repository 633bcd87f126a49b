"""``mmrla train``: train the network of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from mmrla.checkpoints.files import CheckpointError, safe_loading
from mmrla.datasets.findings import DataError
from mmrla.engine.amp import set_amp
from mmrla.engine.errors import exit_with_message
from mmrla.engine.run.checks import prepare_runner
from mmrla.engine.run.config import add_common_arguments, load_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla train", description="Train the network of a config.")
    parser.add_argument("config", help="config file, or a name that mmrla list shows")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from CHECKPOINT, or from the newest one in the work dir",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="automatic mixed precision: optim_wrapper.dtype, else float16 on a GPU, bfloat16 on "
        "a CPU",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the real batch size over auto_scale_lr.base_batch_size",
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


@record  # of several processes, torchrun shows the traceback of the one that failed first
def main(argv: Sequence[str] | None = None) -> None:
    """Train; exits with status 2 and one line if the input is wrong."""
    args = parse_args(argv)
    with exit_with_message():
        cfg = load_config(args, ("train", "val"))
        set_amp(cfg, args.amp)
        if args.auto_scale_lr:
            if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
                raise ValueError(
                    "--auto-scale-lr: the config sets no auto_scale_lr.base_batch_size"
                )
            cfg.auto_scale_lr.enable = True
        if args.resume is not None:
            cfg.resume = True
            cfg.load_from = None if args.resume == "auto" else args.resume
        runner = prepare_runner(cfg, ("train", "val"), args.dry_run)
        if runner is None:
            return
    with exit_with_message(CheckpointError, DataError), safe_loading():
        runner.train()
