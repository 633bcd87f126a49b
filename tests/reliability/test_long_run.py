"""2,000 iterations of the demo's detector: what grows, and what the loss does."""

from __future__ import annotations

import csv
import ctypes
import os
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest
from mmengine.hooks import Hook

from mmrla.datasets import generate_shapes
from mmrla.registry import HOOKS
from tests.helpers import DEMO, python


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Mallinfo2(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def allocated() -> int:
    """Bytes that ``malloc`` has given out and not got back, tensors included; 0 without glibc."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Mallinfo2
    found = mallinfo()
    return found.uordblks + found.hblkhd


@HOOKS.register_module()
class ResourcesHook(Hook):
    """What a process holds at every 10th iteration, as CSV, and the loss.

    Resident memory grows by what malloc keeps between pieces of changing sizes too; what it has
    given out does not.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.out.write_text("iter,rss,allocated,blocks,fds,loss\n")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.every_n_train_iters(runner, 10):
            return
        fds = len(os.listdir("/proc/self/fd"))
        with self.out.open("a") as file:
            held = f"{resident()},{allocated()},{sys.getallocatedblocks()},{fds}"
            file.write(f"{runner.iter + 1},{held},{float(outputs['loss'])}\n")


CONFIG = f"""
_base_ = {str(DEMO)!r}
custom_imports = dict(
    imports=["mmrla", "tests.reliability.test_long_run"], allow_failed_imports=False
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
    python("-m", "mmrla", "train", "config.py", "--data-root", "data", "--work-dir", "out",
           "--cfg-options", *options, cwd=folder)  # fmt: skip
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
