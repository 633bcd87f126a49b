"""Draw how a layer reads earlier ones, and write what was measured beside each layer attention.

The README's picture, that of the family, and the last column of the table in
docs/layer_attentions.md.

Results come from docs/results.json, which `make results` writes.
"""

from __future__ import annotations

import argparse
import json
import re
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mmrla.analysis.figures import draw_seeds, save
from mmrla.analysis.pages import gains, last_values, spread
from mmrla.configs import ROOT

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


def draw_kind(axis: Axes, name: str, reads: str) -> None:
    """Four layers of one kind; ``reads`` is a second column of :data:`FAMILY`."""
    last = 3
    for i in range(last + 1):
        axis.add_patch(
            FancyBboxPatch((i - 0.25, 0), 0.5, 0.4, boxstyle="round,pad=0.02",
                           facecolor="#eef3f9", edgecolor=BLUE)
        )  # fmt: skip
        if i and reads != "instead":  # the stream of the plain network
            axis.add_patch(_arrow((i - 0.7, 0.2), (i - 0.3, 0.2), GREY))
        if reads == "neighbour" and i:
            axis.add_patch(_arrow((i - 1, 0.47), (i, 0.47), BLUE, bend=-0.45))
        if reads in ("hidden", "running"):
            axis.plot(i, 1.0, marker="o", markersize=9, color="#fdebd8", markeredgecolor=ORANGE)
            axis.add_patch(_arrow((i - 0.08, 0.45), (i - 0.08, 0.85), ORANGE))
            back = (i - 0.9, 0.92), (i - 0.2, 0.47)  # the state before goes into the layer
            if reads == "running":
                back = (i + 0.08, 0.85), (i + 0.08, 0.45)
            if i or reads == "running":
                axis.add_patch(_arrow(*back, BLUE))
            if i:
                axis.add_patch(_arrow((i - 0.85, 1.0), (i - 0.15, 1.0), ORANGE))
    readers = {"all": (last,), "static": (last,), "instead": (1, 2, last)}.get(reads, ())
    for reader in readers:
        for i in range(reader):
            colour, bend = GREEN if reads == "static" else BLUE, 0.25 + 0.12 * (reader - i)
            axis.add_patch(_arrow((i, 0.47), (reader, 0.47), colour, bend=-bend, width=1.0))
    axis.set(xlim=(-0.5, last + 0.5), ylim=(-0.1, 1.45))
    axis.set_title(name, fontsize=9)
    axis.axis("off")


FAMILY = (
    ("RLA$_g$, 2021: a hidden map", "hidden"),
    ("MRLA-light, 2023: gate and recurrence", "neighbour"),
    ("MRLA-base, 2023: softmax over a stage", "all"),
    ("DenseFormer, 2024: learned numbers", "static"),
    ("KCLA, 2026: a weighted running mean", "running"),
    ("AttnRes, 2026: no other residual", "instead"),
)


def draw_result(axis: Axes, runs: dict[str, dict[str, Any]]) -> None:
    """Top-1 along epochs, the mean over seeds and their range."""
    for name, colour in COLOURS.items():
        if not (last := last_values(runs[name])):
            continue
        label = name if name == "plain" else f"MRLA-{name}"
        label = f"{label} {mean(last.values()):.1f}"
        draw_seeds(axis, list(runs[name].values()), colour, label)
    seeds = f"{len(runs['plain'])} seed{'s' * (len(runs['plain']) > 1)}"
    axis.set_title(f"CIFAR-10, 10,000 images, ResNet-20,\n{seeds}: mean and range",
                   fontsize=9, loc="left")  # fmt: skip
    axis.set(xlabel="epoch", ylabel="top-1, %")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


# A type, and its rows in docs/results.json.
MEASURED = {
    "DIAUnit": ("cifar", "DIA"),
    "RecurrentLayerAggregation": ("cifar", "RLA_g"),
    "MRLABase": ("cifar", "base"),
    "MRLALight": ("cifar", "light"),
    "DLALight": ("cifar", "DLA"),
    "DenseFormer": ("cifar-vit", "DenseFormer"),
    "KCLA": ("cifar", "KCLA"),
    "AttnRes": ("cifar-vit", "AttnRes"),
}


def gain(record: dict[str, Any], experiment: str, name: str) -> str:
    """Accuracy over the plain network of the same seeds: mean, spread and number of seeds."""
    gained = gains(record[experiment][name], record[experiment]["plain"])
    return f"{spread(gained, '+.1f')} ({len(gained)})" if gained else "not run"


def write_gains(page: Path, record: dict[str, Any]) -> None:
    """Fill the last column of the page's table of types."""
    lines = page.read_text().splitlines()
    for kind, row in MEASURED.items():
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"| `{kind}`"))
        cells = lines[at].split(" |")
        lines[at] = " |".join([*cells[:-2], " " + gain(record, *row), ""])
    page.write_text("\n".join(lines) + "\n")


def facts() -> dict[str, str]:
    """What the badges say, as pyproject.toml has it."""
    text = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r"Python :: (3\.\d+)", text)
    (licence,) = re.findall(r'license = { text = "(.+)" }', text)
    (torch,) = re.findall(r'dependencies = \["torch(.+)"\]', text)
    return {
        "license": licence,
        "python": f"{versions[0]} to {versions[-1]}",
        "torch": torch.replace(">=", "≥ "),
    }


def badge(label: str, value: str) -> str:
    """Two words as SVG, which needs no network and no font."""
    left, right = (12 + 6.5 * len(text) for text in (label, value))
    boxes = ((0, left, "#555", label), (left, right, BLUE, value))
    parts = "".join(
        f'<rect x="{x}" width="{width}" height="20" fill="{fill}"/>'
        f'<text x="{x + width / 2}" y="14" fill="#fff" text-anchor="middle" '
        f'font-family="Verdana,sans-serif" font-size="11">{escape(text)}</text>'
        for x, width, fill, text in boxes
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{label}: {escape(value)}">{parts}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", help="folder")
    args = parser.parse_args()
    family = Figure(figsize=(9, 3.1), layout="constrained")
    axes = list(family.subplots(2, 3).flat)
    for axis, (name, reads) in zip(axes, FAMILY, strict=True):
        draw_kind(axis, name, reads)
    print(save(family, args.out / "family.png"))
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    idea, result = figure.subplots(1, 2, width_ratios=(2.3, 1))
    draw_idea(idea)
    record = json.loads((ROOT / "docs/results.json").read_text())
    draw_result(result, record["cifar"])
    write_gains(ROOT / "docs/layer_attentions.md", record)
    print(save(figure, args.out / "overview.png"))
    for label, value in facts().items():
        (args.out / f"{label}.svg").write_text(badge(label, value))


if __name__ == "__main__":
    main()
