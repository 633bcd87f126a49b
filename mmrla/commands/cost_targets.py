"""The report of ``mmrla cost speed``: targets, pictures, and the tests that come before it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mmrla.analysis.figures import bars_figure, lines_figure, lines_of, save
from mmrla.commands.cost_speed import Row
from mmrla.commands.timing import cpu_name
from mmrla.configs import ROOT


def device_name(device: torch.device) -> str:
    """``NVIDIA-H200``, or ``cpu-<kind>-<threads>threads``."""
    if device.type == "cuda":
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return f"cpu-{re.sub(r'[^A-Za-z0-9]+', '-', cpu_name())}-{torch.get_num_threads()}threads"


def require_parity() -> None:
    """Run tests that compare the default backend with the naive one; leave unless they pass."""
    tests = ["tests/ops/test_tails.py", "tests/models/test_fused_tail.py"]
    chosen = "equal_plain or narrow or same_network"
    print(f"parity tests first: {' '.join(tests)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests, "-k", chosen], cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit("error: parity tests fail; what is not right is not timed")


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
        return max(found, key=lambda row: row[self.column], default=None)

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
_AT_256 = {  # the bound, and what was before: channels_last, NCHW
    ("light", "train"): (1.25, "2.22", "2.14"),
    ("light", "inference"): (1.05, "2.30", "2.16"),
    ("base", "train"): (1.40, "2.37", "2.28"),
    ("base", "inference"): (1.15, "2.59", "2.28"),
}
GPU_TARGETS = [
    *(
        Target(kind, f"{step} over plain", bound, before, mode, batch=256)
        for (kind, step), (bound, *both) in _AT_256.items()
        for mode, before in zip((BF16, BF16_NCHW), both, strict=True)
    ),
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
            value = row and row[target.column]
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


def draw(results: Mapping[str, Sequence[Row]], out: Path, title: str) -> Iterator[Path]:
    """Bars of time and memory over the plain host, and lines along depth."""
    columns = {"train over plain": "training step", "inference over plain": "inference",
               "kept over plain": "memory kept for backward"}  # fmt: skip
    if "models" in results:
        others = [row for row in results["models"] if row["variant"] != "plain"]
        bars = ["{network}, {batch} x, {mode}: {variant}".format(**row) for row in others]
        panels = {
            f"{what}, over the plain network": {
                bar: row[column] or math.nan for bar, row in zip(bars, others, strict=True)
            }
            for column, what in columns.items()
        }
        yield save(bars_figure(panels, title), out / "models.png")
    if "scaling" in results:
        rows = results["scaling"]
        depths = {depth: str(depth) for depth in dict.fromkeys(row["depth"] for row in rows)}
        lines = {
            f"{columns[column]}, over plain": lines_of(rows, "variant", column)
            for column in ("train over plain", "kept over plain")
        }
        yield save(lines_figure(depths, lines, "depth of the ResNet", title), out / "scaling.png")
