"""Draw the README's picture: how a layer reads earlier ones, and what that gave.

The right half comes from docs/results.json, which `make results` writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mmrla.analysis.figures import save

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 5
GREY, BLUE, ORANGE, GREEN = "0.55", "#3a6ea5", "#d9822b", "#4a8f5a"
COLOURS = {"plain": GREY, "light": BLUE, "base": GREEN}


def draw_idea(axis: Axes) -> None:
    """Layers of a stage in a row; the last one's query reaches the keys and values before it."""
    last = LAYERS - 1
    for i in range(LAYERS):
        box = FancyBboxPatch(
            (i - 0.3, 0), 0.6, 0.5, boxstyle="round,pad=0.02", facecolor="#eef3f9" if i < last else
            "#fdebd8", edgecolor=BLUE if i < last else ORANGE,
        )  # fmt: skip
        axis.add_patch(box)
        axis.text(i, 0.25, f"layer {i + 1}", ha="center", va="center", fontsize=8)
        if i:
            axis.add_patch(_arrow((i - 0.66, 0.25), (i - 0.33, 0.25), GREY))
        axis.text(
            i, -0.16, f"$k_{i + 1}, v_{i + 1}$", ha="center", va="top", fontsize=9, color=BLUE
        )
        # The weights of a softmax, as they might be: the closer layer counts more.
        width = 0.8 + 3.2 * (i + 1) / LAYERS
        axis.add_patch(
            _arrow((last, 0.58), (i, 0.58), BLUE, bend=0.1 + 0.07 * (last - i), width=width)
            if i < last
            else _arrow((last + 0.1, 0.58), (last + 0.1, 1.05), ORANGE)
        )
    axis.text(last + 0.17, 0.85, f"$o_{LAYERS} = \\sum_s\\, w_s(q_{LAYERS}, k_s)\\, v_s$",
              fontsize=9, color=ORANGE, ha="left", va="center")  # fmt: skip
    axis.text(last / 2, 1.62, f"the query $q_{LAYERS}$ retrieves from all layers so far",
              fontsize=9, ha="center", color=BLUE)  # fmt: skip
    axis.set(xlim=(-0.5, last + 1.7), ylim=(-0.45, 1.8))
    axis.axis("off")


def _arrow(
    start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0,
    width: float = 1.2,
) -> FancyArrowPatch:  # fmt: skip
    return FancyArrowPatch(
        start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9,
        color=colour, linewidth=width, shrinkA=0, shrinkB=0,
    )  # fmt: skip


def draw_result(axis: Axes, runs: dict[str, dict[str, Any]]) -> None:
    """Top-1 along epochs, the mean over seeds and their range."""
    for name, colour in COLOURS.items():
        found = list(runs[name].values())
        if not found:
            continue
        epochs = [point[0] for point in found[0]["curve"]]
        values = [[run["curve"][i][1][0] for run in found] for i in range(len(epochs))]
        centre = [mean(v) for v in values]
        axis.plot(epochs, centre, color=colour, marker=".")
        axis.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=colour,
                          alpha=0.2, linewidth=0)  # fmt: skip
        label = name if name == "plain" else f"MRLA-{name}"
        axis.plot([], [], color=colour, marker=".", label=f"{label} {centre[-1]:.1f}")
    seeds = f"{len(runs['plain'])} seed{'s' * (len(runs['plain']) > 1)}"
    axis.set_title(f"CIFAR-10, 10,000 images, ResNet-20,\n{seeds}: mean and range",
                   fontsize=9, loc="left")  # fmt: skip
    axis.set(xlabel="epoch", ylabel="top-1, %")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/overview.png")
    args = parser.parse_args()
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    idea, result = figure.subplots(1, 2, width_ratios=(2.3, 1))
    draw_idea(idea)
    draw_result(result, json.loads((ROOT / "docs/results.json").read_text())["cifar"])
    print(save(figure, args.out))


if __name__ == "__main__":
    main()
