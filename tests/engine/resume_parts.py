"""What the configs of test_resume.py add to a run, imported by them by name."""

from __future__ import annotations

import os
import signal

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from mmrla.checkpoints import atomic

# "iter_6.pth": die when half of this file has been written. "iter_6.pth:named": just after that.
# "iter_6.pth:noted": once last_checkpoint names it, before anything else happens.
DIE = os.environ.get("MMRLA_TEST_DIE", "")


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(AmpOptimWrapper):
    """Loss scaling on the CPU, by factors that leave a mark on the weights' bits."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler(
            "cpu", init_scale=3.0, growth_factor=1.7, growth_interval=3
        )

    optim_context = OptimWrapper.optim_context


def _die() -> None:
    os.killpg(0, signal.SIGKILL)


def _dying_fsync(descriptor: int) -> None:
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if f".{DIE}." in path:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        _die()
    _fsync(descriptor)


def _dying_replace(source, target) -> None:
    _replace(source, target)
    name = os.path.basename(target)
    _named.append(name)
    if DIE in (f"{name}:named", f"{_named[-2]}:noted" if name == "last_checkpoint" else ""):
        _die()


_named = [""]
_fsync, _replace = os.fsync, os.replace
if DIE:
    atomic.os.fsync = _dying_fsync
    atomic.os.replace = _dying_replace
