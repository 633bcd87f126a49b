"""A hook that writes down what a training process holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmrla.registry import HOOKS

PAGE = os.sysconf("SC_PAGE_SIZE")


@HOOKS.register_module()
class ResourcesHook(Hook):
    """Resident memory (bytes), open file descriptors and loss of every 10th iteration, as CSV.

    Args:
        out: The file.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.out.write_text("iter,rss,fds,loss\n")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Called by the runner after each iteration."""
        if not self.every_n_train_iters(runner, 10):
            return
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        fds = len(os.listdir("/proc/self/fd"))
        with self.out.open("a") as file:
            file.write(f"{runner.iter + 1},{rss},{fds},{float(outputs['loss'])}\n")
