"""A hook that writes down what a training process holds."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmrla.registry import HOOKS


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Mallinfo2(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


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
    """What a process holds at every 10th iteration, as CSV.

    Resident memory and what malloc has given out (bytes), Python's blocks, open file descriptors,
    and the loss. Resident memory grows by what malloc keeps between pieces of changing sizes too;
    what it has given out does not.

    Args:
        out: The file.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.out.write_text("iter,rss,allocated,blocks,fds,loss\n")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Called by the runner after each iteration."""
        if not self.every_n_train_iters(runner, 10):
            return
        fds = len(os.listdir("/proc/self/fd"))
        with self.out.open("a") as file:
            held = f"{resident()},{allocated()},{sys.getallocatedblocks()},{fds}"
            file.write(f"{runner.iter + 1},{held},{float(outputs['loss'])}\n")
