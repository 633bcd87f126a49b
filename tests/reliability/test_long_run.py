"""2,000 iterations of the demo's detector: what grows, and what the loss does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from itertools import pairwise
from statistics import mean, median

import pytest

from mmrla.datasets import generate_shapes
from tests.conftest import ROOT

CONFIG = f"""
_base_ = {str(ROOT / "configs/demo_mask_rcnn_r18_mrla_shapes.py")!r}
custom_imports = dict(
    imports=["mmrla", "tests.reliability.resources"], allow_failed_imports=False
)
custom_hooks = [
    dict(type="mmrla.ResourcesHook", out="resources.csv"),
    dict(type="mmrla.NonFiniteGuardHook"),
]
randomness = dict(seed=0)
"""


def train(folder, epochs, images):
    """Rows of resources.csv: iter, rss, fds, loss."""
    generate_shapes(folder / "data", images, 16)
    (folder / "config.py").write_text(CONFIG)
    options = [f"train_cfg.max_epochs={epochs}"]
    options += [f"param_scheduler.1.{key}={epochs}" for key in ("end", "T_max")]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/train.py", "config.py", "--data-root", "data",
         "--work-dir", "out", "--cfg-options", *options],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (folder / "resources.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def growth(rows, key):
    """Of the median over the last tenth beyond that over the tenth in the middle."""
    tenth = len(rows) // 10
    middle = rows[len(rows) // 2 :][:tenth]
    return median(r[key] for r in rows[-tenth:]) / median(r[key] for r in middle) - 1


@pytest.mark.slow
def test_2000_iterations(tmp_path):
    rows = train(tmp_path, epochs=20, images=400)
    assert rows[-1]["iter"] == 2000
    found = {key: growth(rows, key) for key in ("rss", "allocated", "blocks", "fds")}
    losses = [mean(r["loss"] for r in rows[i : i + 20]) for i in range(0, len(rows), 20)]
    print(f"rss {rows[-1]['rss'] / 2**20:.0f} MiB, growth {found}, losses {losses}")
    assert max(found[key] for key in ("rss", "allocated", "blocks")) <= 0.02
    assert found["fds"] <= 0
    # Falls steeply, then on, and never jumps back.
    assert losses[-1] < 0.5 * losses[0]
    assert all(later < 1.15 * earlier for earlier, later in pairwise(losses))
