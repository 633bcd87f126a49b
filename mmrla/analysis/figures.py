"""Figures for the results of :mod:`mmrla.analysis`, in one style, without a screen or pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmrla.analysis.recorder import GroupRecord

# Any: newer matplotlib spells out every name in its types, older has none.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "nearest",
}
HEAT = "viridis"
WARM = "inferno"
DPI = 160


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, folders made as needed; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=DPI)
    return path


def draw_seeds(
    axis: Axes, runs: Sequence[Mapping[str, Any]], color: Any, label: str, scale: float = 1.0
) -> None:
    """Draw a network's curve: the mean over seeds, and their range as a band.

    Args:
        axis: Where to draw.
        runs: Per seed, as in docs/results.json: the first metric of ``curve`` counts.
        color: Of line and band.
        label: Of the line.
        scale: Of the epochs, for another unit.
    """
    x = [scale * epoch for epoch, _ in runs[0]["curve"]]
    values = np.array([[metrics[0] for _, metrics in run["curve"]] for run in runs])
    centre, low, high = values.mean(0), values.min(0), values.max(0)
    if len(x) == 1:  # a band has no width there
        axis.errorbar(x, centre, [centre - low, high - centre], fmt=".", color=color, label=label)
    else:
        axis.plot(x, centre, marker=".", color=color, label=label)
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def as_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """A figure as pixels ``[H, W, 3]`` of uint8 in RGB."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with mpl.rc_context(STYLE):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def choose_heads(counts: Mapping[str, int], heads: Sequence[int] | int) -> list[list[int]]:
    """Which heads to draw.

    Args:
        counts: The number of heads by the name of a group or a network.
        heads: Indices of heads; or how many, spread evenly.

    Raises:
        ValueError: A head that there is not, or a number below 1.
    """
    if isinstance(heads, int):
        if heads < 1:
            raise ValueError(f"the number of heads must be at least 1, got {heads}")
        return [
            sorted({round(i) for i in np.linspace(0, count - 1, min(heads, count))})
            for count in counts.values()
        ]
    for name, count in counts.items():
        bad = [head for head in heads if not 0 <= head < count]
        if bad:
            raise ValueError(f"no head {bad[0]} in {name}, which has {count}: 0 to {count - 1}")
    return [list(heads)] * len(counts)


def _scale(
    groups: Sequence[GroupRecord], maps: Sequence[np.ndarray], height: float
) -> tuple[Normalize, str]:
    """The colours' scale and its label, in lines that fit beside a figure of this height in inches.

    From 0 to 1 for shares, else to the largest value drawn, and from the minimum if below 0.
    """
    label = groups[0].label
    if all(group.sum_to_one for group in groups):
        norm = Normalize(0, 1)
        if max(len(group.layers) for group in groups) > 6:
            # Shares of many layers are small, and a few near 1 would hide how they differ.
            norm, label = PowerNorm(0.5, 0, 1), f"{label} (square-root scale)"
    else:
        largest = max((float(np.nanmax(one)) for one in maps), default=1.0)
        least = min((float(np.nanmin(one)) for one in maps), default=0.0)
        norm = Normalize(min(least, 0.0), largest if largest > 0 else 1.0)
    return norm, textwrap.fill(label, max(16, int(10 * height)))


def _heat_map(axis: Any, scores: np.ndarray, group: GroupRecord, norm: Normalize) -> Any:
    """One map ``[T, S]``: rows are querying layers, columns the layers they attend to."""
    aspect = "auto" if 2 * len(group.sources) < len(group.layers) else "equal"
    drawn = axis.imshow(scores, cmap=HEAT, norm=norm, aspect=aspect)
    for names, set_ticks in ((group.sources, axis.set_xticks), (group.layers, axis.set_yticks)):
        ticks = list(range(0, len(names), math.ceil(len(names) / 12)))
        set_ticks(ticks, [names[i] for i in ticks])
    if max(map(len, group.sources)) > 3:
        axis.tick_params(axis="x", rotation=90)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=2)
    if len(group.layers) <= 6:
        for t, s in zip(*np.nonzero(~np.isnan(scores)), strict=True):
            shade = norm(scores[t, s])
            axis.text(
                s, t, f"{scores[t, s]:.2f}", ha="center", va="center", fontsize=7,
                color="black" if shade > 0.6 else "white",
            )  # fmt: skip
    return drawn


@_styled
def layer_attention_figure(
    groups: Sequence[GroupRecord], heads: Sequence[int] | int = 3, title: str = ""
) -> Figure:
    """Scores of layers over layers as heat maps, mean over images: Fig. 1a of the paper.

    For each group the mean over all heads, then single heads, all with the same colour scale.

    Args:
        groups: As recorded.
        heads: See :func:`choose_heads`.
        title: Of the figure.

    Raises:
        ValueError: A head that a group does not have.
    """
    chosen = choose_heads({group.name: group.scores.shape[1] for group in groups}, heads)
    panels = 1 + max(map(len, chosen))
    means = [group.scores.mean(0).numpy() for group in groups]
    maps = [
        [("mean of heads", mean.mean(0)), *((f"head {head}", mean[head]) for head in own)]
        for mean, own in zip(means, chosen, strict=True)
    ]
    # The longer side of the grid lies across.
    across = len(groups) >= panels
    shape = (panels, len(groups)) if across else (len(groups), panels)
    side = 2.5 if max(len(group.layers) for group in groups) > 6 else 1.85
    height = side * 1.13 * shape[0] + 0.9
    norm, label = _scale(groups, [scores for own in maps for _, scores in own], height)
    figure = Figure(figsize=(side * shape[1] + 1.4, height), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    drawn = None
    for i, (group, own) in enumerate(zip(groups, maps, strict=True)):
        for j in range(panels):
            axis = axes[j, i] if across else axes[i, j]
            if j >= len(own):
                axis.set_axis_off()
                continue
            name, scores = own[j]
            drawn = _heat_map(axis, scores, group, norm)
            axis.set_title(f"{group.name}, {name}")
    figure.supxlabel("layer attended to (block of the group)", fontsize=9)
    figure.supylabel("querying layer (block of the group)", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, aspect=30)
    figure.suptitle(title)
    return figure


@_styled
def all_heads_figure(group: GroupRecord, title: str = "") -> Figure:
    """Every head of one group as a small heat map, mean over images."""
    scores = group.scores.mean(0).numpy()
    count, layers = len(scores), len(group.layers)
    columns = min(count, 16 if count > 64 else 8)
    rows = math.ceil(count / columns)
    side = 0.85 if layers <= 6 else 1.3
    height = (side + 0.22) * rows + 1.2
    norm, label = _scale([group], [scores], height)
    figure = Figure(figsize=(max(side * columns + 1.6, 4.5), height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    drawn = None
    for head, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if head < count:
            drawn = axis.imshow(scores[head], cmap=HEAT, norm=norm)
            axis.set_title(f"head {head}" if columns <= 8 else str(head), fontsize=7, pad=2)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, label=label, shrink=0.8, aspect=30)
    names = f"{group.layers[0]} to {group.layers[-1]}"
    figure.supxlabel(f"layer attended to, blocks {names}", fontsize=9)
    figure.supylabel(f"querying layer, blocks {names}", fontsize=9)
    figure.suptitle(f"{group.name}, all heads\n{title}")
    return figure


@_styled
def similarity_figure(similarities: Mapping[str, np.ndarray], bins: int, title: str = "") -> Figure:
    """Histograms of values in [0, 1], one panel for each name and one for all: Fig. 2b.

    Args:
        similarities: Values by name, of any shape.
        bins: How many bins [0, 1] is cut into.
        title: Of the figure.
    """
    panels = {"all layers": np.concatenate([v.ravel() for v in similarities.values()])}
    if len(similarities) > 1:
        panels.update(similarities)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.2 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = np.linspace(0, 1, bins + 1)
    for index, axis in enumerate(axes.flat):
        if index >= len(panels):
            axis.set_axis_off()
            continue
        name, values = list(panels.items())[index]
        flat = values.ravel()
        colour = "tab:blue" if index == 0 else "0.45"
        axis.hist(flat, edges, weights=np.full(flat.size, 1 / flat.size), color=colour)
        median = float(np.median(flat))
        axis.axvline(median, color="tab:red", linewidth=1)
        axis.set_title(f"{name}: median {median:.2f} of {flat.size:,} pairs")
        axis.set_xlim(0, 1)
        axis.tick_params(labelbottom=index + columns >= len(panels))
    figure.supxlabel("absolute cosine similarity of consecutive layers' queries, per head",
                     fontsize=9)  # fmt: skip
    figure.supylabel("share of query pairs", fontsize=9)
    figure.suptitle(title)
    return figure


def lines_of(rows: Sequence[Mapping[str, Any]], by: str, column: str) -> dict[str, list[float]]:
    """A column's values by those of column ``by``; what is not a finite number has no point."""
    lines: dict[str, list[float]] = {}
    for row in rows:
        found = isinstance(row[column], (int, float)) and math.isfinite(row[column])
        lines.setdefault(row[by], []).append(row[column] if found else math.nan)
    return lines


@_styled
def lines_figure(
    points: Mapping[float, str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    title: str = "",
) -> Figure:
    """Values as lines, in panels side by side: Fig. 5 of the paper, and its table of B.2.

    Args:
        points: Places along the horizontal axis, and how they are called.
        panels: Values by the label of the panel's axis and by line, one for each point; NaN if
            there is none. The line "plain" is dashed.
        xlabel: Label of the horizontal axis.
        title: Of the figure.
    """
    figure = Figure(figsize=(4.3 * len(panels) + 0.4, 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    places = list(points)
    ticks: list[float] = []
    for place in places:  # labels of close neighbours would overlap
        if not ticks or place - ticks[-1] >= (places[-1] - places[0]) / 9:
            ticks.append(place)
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for index, (label, values) in enumerate(lines.items()):
            style = "k--" if label == "plain" else "os^Dv"[index % 5] + "-"
            axis.plot(places, values, style, label=label, markersize=4)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(name)
        axis.set_xticks(ticks, [points[place] for place in ticks])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    return figure


@_styled
def bars_figure(panels: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """Ratios as bars, in panels side by side; a line marks 1, and naive backends are grey.

    Args:
        panels: Ratios by the label of the panel's axis and by bar, NaN if there is none.
        title: Of the figure.
    """
    count = max(map(len, panels.values()))
    figure = Figure(figsize=(15, 0.3 * count + 1.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, ratios) in zip(axes, panels.items(), strict=True):
        colours = ["tab:gray" if "naive" in bar else "tab:blue" for bar in ratios]
        bars = axis.barh(list(ratios), list(ratios.values()), color=colours)
        axis.bar_label(bars, ["" if r != r else f"{r:.2f}" for r in ratios.values()], padding=2)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlim(0, 1.15 * np.nanmax([1, *ratios.values()]))
        axis.set_xlabel(name)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    return figure


def overlay(image: np.ndarray, values: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """An image under a map in warm colours.

    Args:
        image: ``[H, W, 3]`` of uint8.
        values: ``[h, w]`` in [0, 1], enlarged to the image.
        strength: How opaque the map is.

    Returns:
        ``[H, W, 3]`` of uint8.
    """
    large = cv2.resize(values.astype(np.float32), image.shape[1::-1])
    colours = mpl.colormaps[WARM](np.clip(large, 0, 1))[..., :3] * 255
    grey = image.mean(-1, keepdims=True)
    return ((1 - strength) * grey + strength * colours).round().astype(np.uint8)


@_styled
def overlay_figure(
    rows: Sequence[tuple[str, np.ndarray, Sequence[np.ndarray]]],
    columns: Sequence[tuple[str, str]],
    label: str,
    title: str = "",
    notes: Sequence[Sequence[str]] | None = None,
    boxes: Sequence[tuple[float, float, float, float] | None] | None = None,
) -> Figure:
    """Images with maps over them, one row per image and one column per map.

    Args:
        rows: For each image its name, its pixels ``[H, W, 3]`` and maps in [0, 1], one per column.
        columns: Of each map the network, which neighbours share, and what it is of.
        label: Of the colour bar.
        title: Of the figure.
        notes: A few words below each map.
        boxes: Of each image a rectangle (x, y, width, height in pixels) to mark in red.
    """
    count = len(columns) + 1
    aspect = np.mean([image.shape[0] / image.shape[1] for _, image, _ in rows])
    height = 1.6 * float(aspect) + (0.22 if notes else 0.12)
    figure = Figure(figsize=(1.75 * count + 0.8, height * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for i, (name, image, maps) in enumerate(rows):
        shown = [image, *(overlay(image, one) for one in maps)]
        for j, (axis, pixels) in enumerate(zip(axes[i], shown, strict=True)):
            axis.imshow(pixels, interpolation="antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            box = None if boxes is None else boxes[i]
            if box is not None:
                axis.add_patch(Rectangle(box[:2], *box[2:], fill=False, color="red", linewidth=1.2))
            if notes is not None and j:
                axis.set_xlabel(notes[i][j - 1], fontsize=7)
        axes[i, 0].set_ylabel(name if len(name) <= 22 else f"{name[:20]}...", fontsize=7)
    axes[0, 0].set_title("image")
    for axis, (network, part) in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(f"{network}\n{part}")
    bar = ScalarMappable(Normalize(0, 1), WARM)
    figure.colorbar(bar, ax=axes, label=label, shrink=0.9, aspect=12 + 8 * len(rows))
    figure.suptitle(title)
    return figure
