"""Cost of a backbone at one depth, counted; on a GPU with the peak of a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmrla.analysis.complexity import activation_memory, complexity
from mmrla.commands.timing import Timed, peak_memory

MIB = 2**20


def memory_row(model: nn.Module, batch: int, size: int, amp: bool) -> dict[str, Any]:
    """Columns of a backbone; ``batch`` and ``amp`` are of the training step on a GPU."""
    device = next(model.parameters()).device
    found = complexity(model, torch.rand(1, 3, size, size, device=device))
    # Two images, because batch norm has to see more than one value per channel.
    kept = activation_memory(model, torch.empty(2, 3, size, size, device=device))
    on_gpu = device.type == "cuda"
    return {
        "params_m": round(found.params / 1e6, 3),
        "gflops": round(found.macs / 1e9, 3),
        "kept_mib_per_image": round(kept / MIB, 2),
        "peak_mib": _peak(model, torch.rand(batch, 3, size, size, device=device), amp)
        if on_gpu
        else "",
        "batch": batch if on_gpu else "",
    }


def _peak(model: nn.Module, images: torch.Tensor, amp: bool) -> float:
    """MiB that a training step takes at most; inf: more than there is."""

    def forward() -> torch.Tensor:
        return model(images)[-1].float().square().mean()

    one = Timed(model, forward, images.device, amp, lr=1e-6)
    try:
        one.train_step()  # makes momenta and workspaces
        before = torch.cuda.memory_allocated(images.device)
        peak = before + (peak_memory(one.train_step, images.device) or 0)
        return round(peak / MIB, 1)
    except torch.cuda.OutOfMemoryError:
        return math.inf


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one peak a GPU or the words for what did not fit."""
    text = [f"{'depth':>5}  {'':<12}{'params, M':>10}{'GFLOPs':>9}{'kept, MiB/image':>17}"
            f"{'peak, MiB/GPU':>16}"]  # fmt: skip
    for row in rows:
        peak = row["peak_mib"]
        peak = "no GPU" if peak == "" else "out of memory" if math.isinf(peak) else f"{peak:.0f}"
        text.append(
            f"{row['depth']:>5}  {row['layer_attention']:<12}{row['params_m']:>10.3f}"
            f"{row['gflops']:>9.3f}{row['kept_mib_per_image']:>17.1f}{peak:>16}"
        )
    return "\n".join(text)
