"""What MRLA costs beside the plain network: backbones, depth, a detector.

Runs tests of the backends' parity first and times nothing if one fails. Every comparison is side by
side in one process; ratios are medians over rounds. Writes CSV files named by device and torch
version, a Markdown table and pictures. On a CPU, OMP_NUM_THREADS=1 makes times steadier; operations
on a GPU are timed by ``mmrla check-gpu``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import models
import torch
from common import ROOT, Row, device_name, markdown, require_parity, save
from mmengine.logging import MMLogger

PARTS = ("models", "scaling", "detector")


class Target(NamedTuple):
    """An upper bound of a column, in every row that has what is said here."""

    variant: str
    column: str
    bound: float
    before: str
    """The value when the target was set."""
    mode: str | None = None
    network: str | None = "ResNet-50"
    batch: int | None = None

    def worst(self, rows: Sequence[Row]) -> Row | None:
        """The row with the highest value; None if nothing was measured."""
        said = {key: getattr(self, key) for key in ("variant", "mode", "network", "batch")}
        found = [
            row
            for row in rows
            if row.get(self.column) is not None
            and all(value in (None, row[key]) for key, value in said.items())
        ]
        return max(found, key=lambda row: float(str(row[self.column])), default=None)

    def __str__(self) -> str:
        where = self.network or "every network"
        batch = "" if self.batch is None else f", batch {self.batch}"
        return f"{where}, {self.mode or 'every mode'}{batch}: {self.variant}, {self.column}"


F32, BF16, BF16_NCHW = "float32-nchw", "bfloat16-channels_last", "bfloat16-nchw"
TARGETS = [
    Target("light", "train over plain", 1.35, "1.38", F32),
    Target("light", "train over plain", 1.65, "2.66", BF16),
    Target("light", "inference over plain", 1.30, "1.35", F32),
    Target("light", "inference over plain", 1.50, "1.79", BF16),
    Target("light", "train over plain", 2.0, "4.0", BF16, "ResNet-20"),
    Target("light", "train over naive", 1.03, "2.00", network=None),
    Target("light", "inference over naive", 1.03, "1.10", network=None),
    Target("base", "train over naive", 1.03, "1.86", network=None),
    Target("base", "inference over naive", 1.03, "1.22", network=None),
    Target("light", "kept over plain", 1.35, "1.07"),
    Target("base", "kept over plain", 1.60, "1.32"),
]
GPU_TARGETS = [
    Target("light", "train over plain", 1.25, "2.22", BF16, batch=256),
    Target("light", "train over plain", 1.25, "2.14", BF16_NCHW, batch=256),
    Target("light", "inference over plain", 1.05, "2.30", BF16, batch=256),
    Target("light", "inference over plain", 1.05, "2.16", BF16_NCHW, batch=256),
    Target("base", "train over plain", 1.40, "2.37", BF16, batch=256),
    Target("base", "train over plain", 1.40, "2.28", BF16_NCHW, batch=256),
    Target("base", "inference over plain", 1.15, "2.59", BF16, batch=256),
    Target("base", "inference over plain", 1.15, "2.28", BF16_NCHW, batch=256),
    Target("light", "peak over plain", 1.10, "1.09", BF16, batch=256),
    Target("base", "peak over plain", 1.35, "1.35", BF16, batch=256),
    Target("light", "train over plain", 1.25, "", BF16, batch=8),
    Target("light", "inference over plain", 1.25, "", BF16, batch=8),
]


def targets(rows: Sequence[Row], device: torch.device) -> list[Row]:
    """Each target with the worst measurement, if there is one."""
    found: list[Row] = []
    for on, listed in (("cpu", TARGETS), ("cuda", GPU_TARGETS)):
        for target in listed:
            row = target.worst(rows) if device.type == on else None
            value = row and float(str(row[target.column]))
            found.append(
                {
                    "target": str(target),
                    "on": on,
                    "before": target.before,
                    "must reach": f"<= {target.bound}",
                    "measured": value or "not measured",
                    "met": "" if not value else "yes" if value <= target.bound else "no",
                    "worst row": row and f"{row['network']}, {row['mode']}",
                    "remark": row and row["remark"],
                }
            )
    return found


def draw(results: dict[str, list[Row]], out: Path, title: str) -> list[Path]:
    """Bars of time and memory over the plain host, and lines along depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    if "models" in results:
        rows = [row for row in results["models"] if row["variant"] != "plain"]
        columns = [("train over plain", "training step"), ("inference over plain", "inference"),
                   ("kept over plain", "memory kept for backward")]  # fmt: skip
        figure, axes = plt.subplots(1, 3, figsize=(15, 0.3 * len(rows) + 1.6), sharey=True)
        labels = [
            f"{row['network']}, {row['batch']} x, {row['mode']}: {row['variant']}" for row in rows
        ]
        for axis, (column, name) in zip(axes, columns, strict=True):
            values = [float(str(row[column] or 0)) for row in rows]
            colours = ["tab:gray" if "naive" in label else "tab:blue" for label in labels]
            drawn = axis.barh(labels, values, color=colours)
            axis.bar_label(drawn, [f"{v:.2f}" if v else "" for v in values], padding=2)
            axis.axvline(1, color="black", linewidth=1)
            axis.set_xlim(0, 1.15 * max(1, *values))
            axis.set_xlabel(f"{name}, over the plain network")
        axes[0].invert_yaxis()
        figure.suptitle(title)
        figure.tight_layout()
        paths.append(out / "models.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    if "scaling" in results:
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
        for axis, column in zip(axes, ("train over plain", "kept over plain"), strict=True):
            for variant in dict.fromkeys(row["variant"] for row in results["scaling"]):
                rows = [row for row in results["scaling"] if row["variant"] == variant]
                style = "k-" if variant == "plain" else "x--" if "naive" in str(variant) else "o-"
                axis.plot([row["depth"] for row in rows], [row[column] for row in rows], style,
                          label=variant)  # fmt: skip
            axis.set_xlabel("depth of the ResNet")
            axis.set_ylim(bottom=0.9)
        axes[0].set_ylabel("training step, over the plain network")
        axes[1].set_ylabel("memory kept for backward, over the plain network")
        axes[0].legend()
        figure.suptitle(title)
        figure.tight_layout()
        paths.append(out / "scaling.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=models.MODES, default=models.MODES,
                        help="of models and detector; default all")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="of each comparison")
    parser.add_argument("--quick", action="store_true", help="fewer depths, for a first look")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs/benchmark")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    MMLogger.get_instance("mmrla", log_level="WARNING")
    require_parity()
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, list[Row]] = {}
    for part in args.parts:
        print(f"\n{part}", flush=True)
        if part == "models":
            rows = models.measure(device, args.rounds, args.quick, args.compiled, args.modes)
        elif part == "scaling":
            rows = models.measure_scaling(device, args.rounds, args.quick)
        else:
            rows = models.measure_detector(device, args.rounds, args.modes)
        if not rows:
            print(f"nothing to measure on {device.type} in {', '.join(args.modes)}")
            continue
        results[part] = rows
        print(markdown(rows))
        print(save(part, rows, args.out, device), flush=True)
    if not results:
        return
    title = f"{device_name(device)}, torch {torch.__version__}"
    text = [f"# {title}", *(f"## {part}\n\n{markdown(rows)}" for part, rows in results.items())]
    if "models" in results:
        table = targets(results["models"], device)
        text.insert(1, f"## Targets\n\n{markdown(table)}")
        print(f"\n{markdown(table)}")
    (args.out / "benchmark.md").write_text("\n\n".join(text) + "\n")
    for path in (args.out / "benchmark.md", *draw(results, args.out, title)):
        print(path)


if __name__ == "__main__":
    main()
