"""``mmrla test``: evaluate a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from mmrla.checkpoints.files import CheckpointError, safe_loading
from mmrla.datasets.findings import DataError
from mmrla.engine.amp import set_test_amp
from mmrla.engine.errors import exit_with_message
from mmrla.engine.run.checks import prepare_runner
from mmrla.engine.run.config import add_common_arguments, load_config
from mmrla.engine.run.runner import prediction_writer, show_predictions, use_tta


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser("mmrla test", description="Evaluate a checkpoint.")
    parser.add_argument("config", help="config file, or a name that mmrla list shows")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--out", metavar="FILE.pkl", help="write all predictions to FILE.pkl")
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="write pictures of predictions to WORK_DIR/DIR (a classifier's) or, beside the "
        "ground truth, to WORK_DIR/TIMESTAMP/DIR (a detector's)",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="autocast: float16 on a GPU, bfloat16 on a CPU (classifiers)",
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: the config's tta_model and tta_pipeline, else each image as "
        "it is and mirrored",
    )
    parser.add_argument("--wait-time", type=float, default=2, help="seconds a window stays")
    add_common_arguments(parser)
    return parser.parse_args(argv)


@record  # of several processes, torchrun shows the traceback of the one that failed first
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; exits with status 2 and one line if the input is wrong."""
    args = parse_args(argv)
    with exit_with_message():
        if not Path(args.checkpoint).is_file() and "://" not in args.checkpoint:
            raise FileNotFoundError(f"no such checkpoint: {Path(args.checkpoint).absolute()}")
        if args.out is not None and not args.out.endswith((".pkl", ".pickle")):
            raise ValueError(f"--out must name a .pkl file, got {args.out!r}")
        cfg = load_config(args, ("test",))
        cfg.load_from = args.checkpoint
        if args.amp:
            set_test_amp(cfg)
        if args.tta:
            use_tta(cfg)
        if args.show or args.show_dir:
            show_predictions(cfg, args)
        runner = prepare_runner(cfg, ("test",), args.dry_run)
        if runner is None:
            return
        if args.out is not None:
            runner.test_evaluator.metrics.append(prediction_writer(cfg, args.out))
    with exit_with_message(CheckpointError, DataError), safe_loading():
        runner.test()
