"""Train the networks of docs/results.md and write its tables and picture (`make results`).

What has finished, here or in docs/results.json, is not trained again; what was interrupted goes on.
Rows that have not run stay in the tables with the time they need.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from tqdm import tqdm

from mmrla.analysis.figures import draw_seeds
from mmrla.analysis.pages import gains, last_values, replace_part, spread
from mmrla.commands.timing import cpu_name
from mmrla.datasets import generate_shapes
from mmrla.engine import set_data_root
from mmrla.engine.cifar import read_log, run
from mmrla.engine.errors import exit_with_message
from mmrla.engine.report import newest, read_scalars

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORD = ROOT / "docs/results.md", ROOT / "docs/results.json"
PICTURE = ROOT / "docs/images/results.png"
SEEDS = (0, 1, 2)
IMAGES = 10_000
RELEASED = {"model.backbone.zero_init_mrla": False, "model.backbone.mrla_drop_path_rate": 0.2}
DROPPED = {"model.backbone.mrla_drop_path_rate": 0.2}
FULL = {"model.backbone.zero_init_mrla": False}


class Row(NamedTuple):
    """A network as it is trained in one experiment."""

    name: str
    config: str
    options: Mapping[str, Any] = {}
    epochs: int | None = None
    """Instead of the experiment's."""


class Experiment(NamedTuple):
    """Networks that are compared with the first of them."""

    title: str
    about: str
    metrics: Mapping[str, str]
    """The logs' names of what is compared, and the table's; the first is the one that counts."""
    rows: tuple[Row, ...]
    epochs: int | None = None
    hours: float = 0.0
    """What a run takes on one CPU thread, about."""
    compiled: bool = False
    """Whether torch.compile is used; times are those of such runs alone."""


_LIGHT, _BASE = "cifar/resnet20_mrla_cifar10.py", "cifar/resnet20_mrla-base_cifar10.py"
_R20 = {"model.backbone.depth": 20}
EXPERIMENTS = {
    "cifar": Experiment(
        "CIFAR-10, short schedule",
        "ResNet-20 of basic blocks, 10,000 training images (one draw), 12 epochs from scratch, "
        "steps of the learning rate in proportion, batch 128, bfloat16 autocast, torch.compile; "
        "top-1 of the last epoch on all 10,000 test images. Times are those of compiled runs, the "
        "epoch that compiles left out.",
        {"top1": "top-1"},
        (
            Row("plain", "cifar/resnet20_plain_cifar10.py"),
            Row("light", _LIGHT),
            Row("base", _BASE),
            Row("light, released start and drop path", _LIGHT, RELEASED),
            Row("plain, 18 epochs", "cifar/resnet20_plain_cifar10.py", epochs=18),
            Row("light, drop path 0.2", _LIGHT, DROPPED),
            Row("light, released start", _LIGHT, FULL),
            Row("base, released start and drop path", _BASE, RELEASED),
            Row("base, drop path 0.2", _BASE, DROPPED),
            Row("base, released start", _BASE, FULL),
            Row("DLA", "cifar/resnet56_dla_cifar10.py", _R20),
            Row("SE", "cifar/resnet56_se_cifar10.py", _R20),
            Row("ECA", "cifar/resnet56_eca_cifar10.py", _R20),
            Row("KCLA", "cifar/resnet56_kcla_cifar10.py", _R20),
            Row("RLA_g", "cifar/resnet56_rla-g_cifar10.py", _R20),
            Row("DIA", "cifar/resnet56_dia_cifar10.py", _R20),
        ),
        epochs=12,
        hours=0.1,
        compiled=True,
    ),
    "cifar-vit": Experiment(
        "CIFAR-10, short schedule, vision transformer",
        "The same images and epochs; a small ViT: patches of 4 pixels, 8 blocks of 64 channels, "
        "AdamW, warm-up and cosine in proportion; bfloat16 autocast, torch.compile.",
        {"top1": "top-1"},
        (
            Row("plain", "cifar/vit_plain_cifar10.py"),
            Row("AttnRes", "cifar/vit_attnres_cifar10.py"),
            Row("AttnRes, blocks", "cifar/vit_attnres-block_cifar10.py"),
            Row("DenseFormer", "cifar/vit_denseformer_cifar10.py"),
        ),
        epochs=12,
        hours=0.1,
        compiled=True,
    ),
    "bccd": Experiment(
        "Blood cells: RetinaNet on real ImageNet weights",
        "BCCD, 205 training and 72 test photographs at 256 x 192, 3 classes; EfficientNet-Lite0 "
        "from its ImageNet weights, 6 epochs; layer attentions start as the identity.",
        {"coco/bbox_mAP": "AP", "coco/bbox_mAP_50": "AP50"},
        (
            Row("plain", "bccd/retinanet_efficientnet-lite0_bccd.py"),
            Row("light", "bccd/retinanet_efficientnet-lite0_mrla_bccd.py"),
            Row("base", "bccd/retinanet_efficientnet-lite0_mrla-base_bccd.py"),
        ),
        hours=0.1,
    ),
    "demo": Experiment(
        "Demo: Mask R-CNN on generated shapes",
        "ResNet-18 of 16 base channels from scratch, 800 training and 120 validation images of "
        "128 px, 7 epochs.",
        {"coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP"},
        (
            Row(
                "plain",
                "demo_mask_rcnn_r18_mrla_shapes.py",
                {"model.backbone.layer_attention": None},
            ),
            Row("light", "demo_mask_rcnn_r18_mrla_shapes.py"),
        ),
        hours=0.2,
    ),
}


class Place(NamedTuple):
    """Where runs and data are."""

    work_dir: Path
    data: Mapping[str, Path]

    def of(self, experiment: str, row: Row, seed: int) -> Path:
        """The folder of one run."""
        name = row.name.replace(", ", "_").replace(" ", "-")
        return self.work_dir / experiment / f"{name}_seed{seed}"


def train_cifar(row: Row, seed: int, experiment: Experiment, folder: Path, data: Path) -> None:
    """Train one network of the CIFAR experiment on this process's thread."""
    cfg = Config.fromfile(ROOT / "configs" / row.config)
    cfg.merge_from_dict(dict(row.options))
    set_data_root(cfg, str(data))
    run(
        cfg, folder / "log.jsonl", seed, torch.device("cpu"), row.epochs or experiment.epochs,
        amp=True, compiled=experiment.compiled, images=IMAGES, name=row.name, eval_interval=3,
    )  # fmt: skip


def train_detector(row: Row, seed: int, folder: Path, data: Path) -> None:
    """Train one detector by tools/train.py; goes on where it was interrupted."""
    if row.config.startswith("demo") and not data.exists():
        generate_shapes(data, 800, 120, seed=0)
    spent = folder / "seconds.json"
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = {"randomness.seed": seed, **row.options}
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tools/train.py"), str(ROOT / "configs" / row.config),
            "--data-root", str(data.absolute()), "--work-dir", str(folder.absolute()),
            *(["--resume"] if (folder / "last_checkpoint").exists() else []),
            "--cfg-options", *(f"{key}={value}" for key, value in options.items()),
        ],
        check=False, cwd=ROOT,  # the backbone's weights are in checkpoints/
    )  # fmt: skip
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
    folder.mkdir(parents=True, exist_ok=True)
    spent.write_text(json.dumps(before + used))
    if done.returncode:
        raise ValueError(f"{row.config} ended with status {done.returncode}; see {folder}")
    (folder / "finished").touch()


def finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """What a finished run's files tell: curve, seconds and digest; None if it is not finished."""
    log = folder / "log.jsonl"
    if log.exists():
        settings, *lines = read_log(log)
        if len(lines) < settings["epochs"]:
            return None
        points = [(line["epoch"], [line["top1"]]) for line in lines if "top1" in line]
        # The first epoch compiles.
        seconds = len(lines) * median(line["seconds"] for line in lines)
        text, device = log.read_bytes(), settings["device"]
        compiled = settings.get("compiled", False)
    elif (folder / "finished").exists():
        path = newest(folder, "*/vis_data/scalars.json")
        found = [line for line in read_scalars(path) if set(experiment.metrics) <= line.keys()]
        points = [
            (line["step"], [round(100 * line[key], 2) for key in experiment.metrics])
            for line in found
        ]
        seconds = json.loads((folder / "seconds.json").read_text())
        text, device, compiled = path.read_bytes(), "cpu", False
    else:
        return None
    device = cpu_name() if device == "cpu" else device
    return dict(
        curve=points, seconds=round(seconds), digest=hashlib.sha256(text).hexdigest()[:12],
        device=device, compiled=compiled, torch=torch.__version__, date=date.today().isoformat(),
    )  # fmt: skip


def collect(place: Place) -> dict[str, dict[str, dict[str, Any]]]:
    """Finished runs by experiment, row and seed: those of the record and those found here."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, experiment in EXPERIMENTS.items():
        for row in experiment.rows:
            for seed in SEEDS:
                runs = record.setdefault(name, {}).setdefault(row.name, {})
                if str(seed) not in runs:
                    found = finished(place.of(name, row, seed), experiment)
                    if found is not None:
                        runs[str(seed)] = found
    return record


def _seconds(runs: Mapping[str, Mapping[str, Any]], compiled: bool) -> dict[str, float]:
    """By device, the mean time of the runs that were, or were not, compiled."""
    found: dict[str, list[float]] = {}
    for one in runs.values():
        if one.get("compiled", False) is compiled:
            found.setdefault(one["device"], []).append(one["seconds"])
    return {device: mean(values) for device, values in found.items()}


def _time_over_plain(row: Mapping[str, float], plain: Mapping[str, float]) -> float | None:
    """Mean ratio of times over the devices that ran both; None if there is none."""
    both = row.keys() & plain.keys()
    return mean(row[device] / plain[device] for device in both) if both else None


def table(name: str, experiment: Experiment, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each network: mean and spread over seeds, each seed, gain and time over plain."""
    plain = runs[experiment.rows[0].name]
    titles = list(experiment.metrics.values())
    head = ["network", *titles, f"{titles[0]} of each seed", f"{titles[0]} over plain, same seeds",
            "time over plain", "logs' SHA-256"]  # fmt: skip
    plain_seconds = _seconds(plain, experiment.compiled)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in experiment.rows:
        of_row = runs[row.name]
        if not of_row:
            waits = f"not run: about {experiment.hours:.1f} h per seed"
            lines.append(f"| {row.name} | {waits} |" + " |" * (len(head) - 2))
            continue
        last = {seed: found["curve"][-1][1] for seed, found in sorted(of_row.items())}
        cells = [row.name]
        cells += [spread([value[i] for value in last.values()]) for i in range(len(titles))]
        cells.append(", ".join(f"{value[0]:.1f}" for value in last.values()))
        gained = gains(of_row, plain)
        cells.append("" if row is experiment.rows[0] or not gained else spread(gained, "+.1f"))
        ratio = _time_over_plain(_seconds(of_row, experiment.compiled), plain_seconds)
        cells.append(f"{ratio:.2f}" if ratio else "")
        cells.append(" ".join(f"`{found['digest']}`" for _, found in sorted(of_row.items())))
        lines.append(f"| {' | '.join(cells)} |")
    times = ", ".join(f"{seconds:.0f} s ({on})" for on, seconds in plain_seconds.items())
    lines += ["", f"A plain run takes, on one thread: {times}."] if times else []
    return "\n".join(lines)


def summary(record: Mapping[str, Any]) -> Iterator[str]:
    """A line per experiment: the defaults of light and base over plain."""
    yield "| | plain | light | base | seeds |"
    yield "|---|---|---|---|---|"
    for name, experiment in EXPERIMENTS.items():
        if all(row.name != "light" for row in experiment.rows):
            continue
        title = next(iter(experiment.metrics.values()))
        cells, seeds = [f"{experiment.title}, {title}"], []
        for row in ("plain", "light", "base"):
            of_row = record[name].get(row, {})
            seeds.append(len(of_row))
            values = list(last_values(of_row).values())
            missing = "not run" if any(row == r.name for r in experiment.rows) else ""
            cells.append(spread(values) if values else missing)
        yield f"| {' | '.join(cells)} | {max(seeds)} |"


def draw(record: Mapping[str, Any]) -> None:
    """Draw a line per network, mean and spread over seeds, along epochs and time."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = colormaps["tab20"].colors
    shown = {name: e for name, e in EXPERIMENTS.items() if any(record[name].values())}
    figure = Figure(figsize=(11, 3.2 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (name, experiment), (by_epoch, by_time) in zip(shown.items(), axes, strict=True):
        plain = _seconds(record[name][experiment.rows[0].name], experiment.compiled)
        for row, color in zip(experiment.rows, colors[::2] + colors[1::2], strict=False):
            runs = list(record[name][row.name].values())
            if not runs:
                continue
            seconds = _seconds(record[name][row.name], experiment.compiled)
            ratio = _time_over_plain(seconds, plain) or math.nan
            label = f"{row.name} ({len(runs)})"
            draw_seeds(by_epoch, runs, color, label)
            draw_seeds(by_time, runs, color, label, ratio / runs[0]["curve"][-1][0])
        by_epoch.set_xlabel("epoch")
        by_time.set_xlabel("training time, in runs of the plain network")
        by_epoch.set_ylabel(next(iter(experiment.metrics.values())))
        by_epoch.set_title(experiment.title, loc="left", fontsize=10)
        by_time.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)


def write(record: Mapping[str, Any]) -> None:
    """Write docs/results.json, the picture, and the part of docs/results.md between the marks."""
    RECORD.write_text(
        json.dumps(record, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    )
    draw(record)
    parts = ["\n".join(summary(record)), f"![curves](images/{PICTURE.name})"]
    for name, experiment in EXPERIMENTS.items():
        rows = table(name, experiment, record[name])
        parts += [f"### {experiment.title}", experiment.about, rows]
    replace_part(PAGE, "results", "\n" + "\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--rows", nargs="+", help="names of rows; default all")
    parser.add_argument("--hours", type=float, help="begin no run after this time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write-only", action="store_true", help="train nothing")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs/results")
    parser.add_argument("--cifar10", type=Path, default=ROOT / "data/cifar10")
    parser.add_argument("--bccd", type=Path, default=ROOT / "data/bccd", help="the VOC folder")
    parser.add_argument("--shapes", type=Path, default=ROOT / "data/shapes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance("mmrla", log_level="WARNING")
    data = dict(cifar=args.cifar10, bccd=args.bccd, demo=args.shapes)
    place = Place(args.work_dir, data | {"cifar-vit": args.cifar10})
    started = time.monotonic()
    # Seeds outside: what there is after an interruption can be compared.
    planned = [
        (name, row, seed)
        for seed in args.seeds
        for name in args.only
        for row in EXPERIMENTS[name].rows
        if not args.rows or row.name in args.rows
    ]
    with exit_with_message():
        done = collect(place)
        for name, row, seed in tqdm([] if args.write_only else planned):
            if str(seed) in done[name][row.name]:
                continue
            if args.hours is not None and time.monotonic() - started > 3600 * args.hours:
                break
            folder = place.of(name, row, seed)
            if name.startswith("cifar"):
                train_cifar(row, seed, EXPERIMENTS[name], folder, place.data[name])
            else:
                train_detector(row, seed, folder, place.data[name])
        write(collect(place))


if __name__ == "__main__":
    main()
