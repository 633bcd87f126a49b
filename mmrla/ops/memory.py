"""What the fused operations ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrla.ops.custom_op import CAN_REGISTER

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous, in NCHW or channels_last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


# torch.compiler has this from 2.2 on.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._dynamo.is_compiling


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of ``x`` works in: autocast's, under it, else its own."""
    device = x.device.type
    if x.dtype == torch.float64 or not autocast_is_on(device):
        return x.dtype
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype() if device == "cpu" else torch.get_autocast_gpu_dtype()


def why_not_fused(x: Tensor) -> str | None:
    """Why no fused operation can run on ``x``, or None."""
    if x.device.type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, got x.device={x.device}"
    if x.dtype not in DTYPES:
        return f"it takes float64, float32, float16 and bfloat16, got x.dtype={x.dtype}"
    if torch.jit.is_tracing():
        return "torch.jit.trace records plain operations alone"
    if not CAN_REGISTER and is_compiling():
        return f"torch.compile needs torch.library.custom_op, which torch {torch.__version__} lacks"
    return None


def check_one_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise ValueError(f"all tensors must be on one device, got {names}")


def check_weight_dtype(name: str, weight: Tensor, x: Tensor) -> None:
    """Raise TypeError where a convolution of ``x`` by ``weight`` has no common dtype."""
    casts = torch.float64 not in (weight.dtype, x.dtype) and autocast_is_on(x.device.type)
    if weight.dtype != x.dtype and not casts:
        raise TypeError(f"{name} must have the dtype of x, got {weight.dtype} and {x.dtype=}")
