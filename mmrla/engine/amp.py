"""Automatic mixed precision, on GPUs and CPUs."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from mmengine import optim
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim.optimizer.amp_optimizer_wrapper import GradScaler

from mmrla.registry import OPTIM_WRAPPERS

__all__ = [
    "AmpOptimWrapper", "has_fast_bfloat16", "set_amp", "set_test_amp", "warn_of_slow_bfloat16",
]  # fmt: skip


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(optim.AmpOptimWrapper):
    """mmengine's wrapper, which trains in bfloat16 if there is no GPU.

    On a CPU there is no loss scaling: bfloat16 has the range of float32. Checkpoints can be moved
    between GPU and CPU. On a CPU the tools use it instead of ``type='AmpOptimWrapper'``.

    Args:
        loss_scale: As in :class:`mmengine.optim.AmpOptimWrapper`; without effect on a CPU.
        dtype: Likewise; on a CPU ``'bfloat16'``, the default there.
        **kwargs: Likewise.

    Raises:
        ValueError: Another ``dtype`` on a CPU.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = "dynamic",
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if get_device() != "cpu":
            super().__init__(loss_scale, dtype, **kwargs)
            return
        _require_bfloat16(dtype)
        kwargs.pop("use_fsdp", None)
        optim.OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = torch.bfloat16
        self._scale_update_param = None
        self.loss_scaler = GradScaler(enabled=False)
        warn_of_slow_bfloat16()

    def state_dict(self) -> dict:
        """Of the optimizer and, on a GPU, of the loss scaler."""
        state = super().state_dict()
        if not state["loss_scaler"]:
            del state["loss_scaler"]  # a scaler that is on would refuse that of one that is off
        return state


def set_amp(cfg: Config, amp: bool) -> None:
    """Prepare a training run's optimizer for mixed precision, in place.

    Raises:
        ValueError: The config sets another dtype than bfloat16, and there is no GPU.
    """
    wrapper = cfg.optim_wrapper
    if amp:
        wrapper.type = "AmpOptimWrapper"
        wrapper.loss_scale = "dynamic"
    if get_device() == "cpu" and wrapper.get("type") in ("AmpOptimWrapper", optim.AmpOptimWrapper):
        _require_bfloat16(wrapper.get("dtype"))
        wrapper.type = "mmrla.AmpOptimWrapper"


def set_test_amp(cfg: Config) -> None:
    """Have a test run use autocast, in place.

    Raises:
        ValueError: It is a detector's run, and there is no GPU.
    """
    if get_device() == "cpu":
        if cfg.get("default_scope") != "mmpretrain":
            raise ValueError(
                "--amp on a CPU evaluates classifiers only: a detector's boxes would be bfloat16, "
                "in which coordinates above 512 px are multiples of 4; leave it out"
            )
        warn_of_slow_bfloat16()
    cfg.test_cfg = {**(cfg.get("test_cfg") or {}), "fp16": True}


def _require_bfloat16(dtype: str | torch.dtype | None) -> None:
    if dtype not in (None, "bfloat16", torch.bfloat16):
        raise ValueError(
            f"mixed precision on a CPU is bfloat16, got optim_wrapper.dtype={str(dtype)!r} and no "
            "GPU is visible; leave dtype out, set it to 'bfloat16', or train without AMP"
        )


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16 (Linux; elsewhere False)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint(("amx_bf16", "avx512_bf16", "bf16"))


def warn_of_slow_bfloat16() -> None:
    """Warn if mixed precision would make a run slower."""
    if get_device() == "cpu" and not has_fast_bfloat16():
        print_log(
            "this CPU has no instructions for bfloat16 (AMX, AVX512_BF16 or ARM's BF16), so mixed "
            "precision makes it much slower; float32 is the faster choice here",
            logger="current",
            level=logging.WARNING,
        )
