"""Train networks of configs/cifar with the data on the device, and print a table of accuracies.

Each network is trained with each seed; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from tqdm import tqdm

from mmrla.engine.amp import warn_of_slow_bfloat16
from mmrla.engine.cifar import Trainer, load_split, run, table
from mmrla.engine.data.config import set_data_root
from mmrla.engine.errors import exit_with_message, require_at_least
from mmrla.engine.run.config import add_layout_argument, find_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla train-cifar", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", help="config files of configs/cifar; none: the table")
    parser.add_argument("--data-root", metavar="DIR", help="folder of CIFAR, as the configs say")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--epochs", type=int, help="a shorter or longer schedule, its steps in proportion"
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the step; CUDA graphs on a GPU"
    )
    add_layout_argument(parser, default="channels_last")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--dry-run", action="store_true", help="build the networks, read the data, and stop"
    )
    parser.add_argument("--log-dir", type=Path, default=Path("work_dirs/cifar"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all networks with all seeds and print the table."""
    args = parse_args(argv)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # mmengine would print how each parameter starts.
    MMLogger.get_instance("mmrla", log_level="WARNING")
    with exit_with_message():
        require_at_least(args, epochs=1, threads=1)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        configs = {path: Config.fromfile(path) for path in map(find_config, args.configs)}
        for cfg in configs.values():
            if args.data_root is not None:
                set_data_root(cfg, args.data_root)
        if args.dry_run:
            for cfg in configs.values():
                Trainer(cfg, 0, device)
                for loader in (cfg.train_dataloader, cfg.test_dataloader):
                    load_split(loader.dataset, device)
            print(f"dry run: {len(configs)} networks and their data are fine")
            return
        if args.amp:
            warn_of_slow_bfloat16()
        # Seeds outside, so that what is there after an interruption can be compared.
        for seed, (path, cfg) in tqdm(list(product(args.seeds, configs.items()))):
            epochs = args.epochs or cfg.train_cfg.max_epochs
            log = args.log_dir / f"{Path(path).stem}_{epochs}e_seed{seed}.jsonl"
            run(
                cfg, log, seed, device, epochs=epochs, amp=args.amp, compiled=args.compile,
                channels_last=args.channels_last is not False,
            )  # fmt: skip
        print(table(args.log_dir))
