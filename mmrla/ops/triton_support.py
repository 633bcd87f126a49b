"""Whether Triton's kernels can run a tensor."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def triton_is_recent() -> bool:
    """Whether Triton 3 or later is installed; the kernels use what 2.1 lacks."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return int(triton.__version__.split(".")[0]) >= 3


@functools.cache
def has_triton() -> bool:
    """Whether a recent Triton is installed and a CUDA device is there that it compiles for."""
    if not torch.cuda.is_available() or not triton_is_recent():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (7, 0)


def use_triton(x: Tensor) -> bool:
    """Whether the operations on ``x`` go to Triton's kernels; float64 stays in plain torch."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and has_triton()
