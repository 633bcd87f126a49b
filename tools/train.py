"""Train the network of a config. `python tools/train.py --help` lists the options."""

from __future__ import annotations

import argparse

from torch.distributed.elastic.multiprocessing.errors import record

from mmrla.checkpoints.files import CheckpointError, safe_loading
from mmrla.datasets.coco_check import DataError
from mmrla.engine.amp import set_amp
from mmrla.engine.errors import reporting_errors
from mmrla.engine.launch import (
    add_common_arguments,
    build_only,
    build_runner,
    check_weights,
    init_cpu_distributed,
    load_config,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the network of a config.")
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
    return parser.parse_args()


@record  # of several processes, torchrun shows the traceback of the one that failed first
def main() -> None:
    args = parse_args()
    with reporting_errors():
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
        if args.dry_run:
            build_only(cfg, ("train", "val"))
            return
        check_weights(cfg)
        init_cpu_distributed(cfg)
        runner = build_runner(cfg)
    with reporting_errors(CheckpointError, DataError), safe_loading():
        runner.train()


if __name__ == "__main__":
    main()
