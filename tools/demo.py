"""`make demo`: from nothing to a trained detector, its AP and pictures, in minutes.

Generates a small COCO-format set, then runs tools/train.py and tools/test.py on it as anybody
would, and draws what came out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo_mask_rcnn_r18_mrla_shapes.py"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--epochs", type=int, help="shorter or longer training")
    parser.add_argument("--num-train", type=int, default=800, help="training images")
    parser.add_argument("--num-val", type=int, default=120, help="validation images")
    parser.add_argument("--seed", type=int, default=0, help="of the set and of training")
    parser.add_argument("--pictures", type=int, default=8, help="how many pictures to draw")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="layout of images and weights; default: as tools/train.py chooses",
    )
    return parser.parse_args()


def step(title: str) -> None:
    print(f"\n=== {title} ===", flush=True)


def run(*command: object) -> None:
    words = [sys.executable, *map(str, command)]
    print("$ python " + " ".join(words[1:]), flush=True)
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    args = parse_args()
    started = time.time()
    data, train_dir, test_dir = (args.work_dir / name for name in ("data", "train", "test"))

    step("1/4 generate the demo set")
    from mmrla.datasets import generate_shapes
    from mmrla.engine.errors import exit_with_message

    with exit_with_message():
        generate_shapes(data, args.num_train, args.num_val, seed=args.seed)
    print(f"{args.num_train} + {args.num_val} images of circles, squares and triangles in {data}")

    step("2/4 train")
    options = [f"randomness.seed={args.seed}"]
    if args.epochs is not None:
        options += [f"train_cfg.max_epochs={args.epochs}"]
        options += [f"param_scheduler.1.{key}={args.epochs}" for key in ("end", "T_max")]
    layout = {None: [], True: ["--channels-last"], False: ["--no-channels-last"]}
    common = ["--data-root", data, *layout[args.channels_last]]
    trained = time.time()
    run(
        ROOT / "tools/train.py", args.config, *common, "--work-dir", train_dir,
        "--cfg-options", *options,
    )  # fmt: skip
    trained = time.time() - trained

    step("3/4 evaluate")
    from mmrla.engine.report import ap_table, draw_predictions, newest, plot_run, read_scalars

    checkpoint = Path((train_dir / "last_checkpoint").read_text().strip())
    run(
        ROOT / "tools/test.py", args.config, checkpoint, *common, "--work-dir", test_dir,
        "--out", args.work_dir / "predictions.pkl",
    )  # fmt: skip

    step("4/4 draw")
    curve = args.work_dir / "curve.png"
    plot_run(read_scalars(newest(train_dir, "*/vis_data/scalars.json")), curve)
    from mmdet.apis import init_detector
    from mmdet.registry import DATASETS
    from mmengine.config import Config

    from mmrla.checkpoints.files import safe_loading
    from mmrla.engine import set_data_root

    cfg = Config.fromfile(args.config)
    set_data_root(cfg, data)
    with safe_loading():
        model = init_detector(cfg, str(checkpoint), device="cpu")
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    pictures = draw_predictions(
        model, dataset, range(min(args.pictures, len(dataset))), args.work_dir / "pictures"
    )

    metrics = json.loads(newest(test_dir, "*/[0-9]*.json").read_text().splitlines()[-1])
    print(f"\nAP in percent on {args.num_val} validation images, {checkpoint.name}:")
    print(ap_table(metrics))
    print(f"\npictures    {pictures[0].parent}/ (ground truth left, predictions right)")
    print(f"curve       {curve}")
    print(f"checkpoint  {checkpoint}")
    print(f"training took {trained:.0f} s, all of it {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
