"""What MRLA costs beside the plain network: operations, backbones, depth, a detector.

Runs the parity tests first and times nothing if one fails. Every comparison is side by side in one
process; ratios are medians over rounds. Writes CSV files named by device and torch version, a
Markdown table and pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import models
import ops
import torch
from common import ROOT, Row, device_name, markdown, require_parity, save
from mmengine.logging import MMLogger

PARTS = ("ops", "models", "scaling", "detector")
# Upper bounds, and what the released code took where that was measured.
BARS = [
    ("ResNet-50", "light fused", "kept over plain", 1.08, "1.84"),
    ("ResNet-50", "base fused", "kept over plain", 1.35, "2.15"),
    ("ResNet-101", "base fused", "kept over plain", 1.40, "3.61"),
    ("ResNet-50", "light fused", "over plain", 1.15, "1.29"),
    ("ResNet-101", "base fused", "over plain", 1.30, "2.02"),
]
GPU_BARS = [
    ("ResNet-50", "light fused", "over plain", 1.12, ""),
    ("ResNet-50", "light fused", "forward over plain", 1.08, ""),
]


def bars(rows: list[Row], device: torch.device) -> list[Row]:
    """Each bar with what was measured, or that it was not."""
    here = {(row["network"], row["variant"]): row for row in rows}
    found: list[Row] = []
    for on, listed in (("cpu", BARS), ("cuda", GPU_BARS)):
        for network, variant, column, bound, released in listed:
            row = here.get((network, variant)) if device.type == on else None
            value = row and row[column]
            found.append(
                {
                    "bar": f"{network} + {variant.split()[0]}, {column}",
                    "on": on,
                    "released": released,
                    "must reach": f"<= {bound}",
                    "measured": value or "not measured",
                    "met": "" if not value else "yes" if float(str(value)) <= bound else "no",
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
        columns = [("over plain", "training step"), ("forward over plain", "forward"),
                   ("kept over plain", "memory kept for backward")]  # fmt: skip
        figure, axes = plt.subplots(1, 3, figsize=(14, 0.4 * len(rows) + 1.6), sharey=True)
        labels = [f"{row['network']} {row['variant']}" for row in rows]
        for axis, (column, name) in zip(axes, columns, strict=True):
            values = [float(str(row[column] or 0)) for row in rows]
            colours = ["tab:blue" if "fused" in label else "tab:gray" for label in labels]
            drawn = axis.barh(labels, values, color=colours)
            axis.bar_label(drawn, [f"{v:.2f}" if v else "" for v in values], padding=2)
            axis.axvline(1, color="black", linewidth=1)
            axis.set_xlim(0, 1.15 * max(values))
            axis.set_xlabel(f"{name}, over the plain network")
        axes[0].invert_yaxis()
        figure.suptitle(title)
        figure.tight_layout()
        paths.append(out / "models.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    if "scaling" in results:
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
        for axis, column in zip(axes, ("over plain", "kept over plain"), strict=True):
            for variant in dict.fromkeys(row["variant"] for row in results["scaling"]):
                rows = [row for row in results["scaling"] if row["variant"] == variant]
                style = "k-" if variant == "plain" else "o-" if "fused" in str(variant) else "x--"
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
    parser.add_argument("--rounds", type=int, default=9, help="of each comparison")
    parser.add_argument("--quick", action="store_true", help="fewer networks, for a first look")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs/benchmark")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    MMLogger.get_instance("mmrla", log_level="WARNING")
    require_parity()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, list[Row]] = {}
    for part in args.parts:
        print(f"\n{part}", flush=True)
        if part == "ops":
            results[part] = ops.measure(device, args.rounds, args.quick)
        elif part == "models":
            results[part] = models.measure(device, args.rounds, args.quick, args.compiled)
        elif part == "scaling":
            results[part] = models.measure_scaling(device, args.rounds, args.quick)
        else:
            results[part] = models.measure_detector(device, args.rounds, args.quick)
        print(markdown(results[part]))
        print(save(part, results[part], args.out, device), flush=True)
    title = f"{device_name(device)}, torch {torch.__version__}"
    text = [f"# {title}", *(f"## {part}\n\n{markdown(rows)}" for part, rows in results.items())]
    if "models" in results:
        table = bars(results["models"], device)
        text.insert(1, f"## Bars\n\n{markdown(table)}")
        print(f"\n{markdown(table)}")
    (args.out / "benchmark.md").write_text("\n\n".join(text) + "\n")
    for path in (args.out / "benchmark.md", *draw(results, args.out, title)):
        print(path)


if __name__ == "__main__":
    main()
