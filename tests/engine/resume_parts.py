"""What configs of these tests add to a run, imported by them by name."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS

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
    if f".{DIE}." in os.readlink(f"/proc/self/fd/{descriptor}"):
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
    atomic.os.fsync, atomic.os.replace = _dying_fsync, _dying_replace


@HOOKS.register_module()
class FailingHook(Hook):
    """The process of rank MMRLA_TEST_RANK fails in its second step, MMRLA_TEST_HOW."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter != 1 or os.environ.get("RANK", "0") != os.environ.get("MMRLA_TEST_RANK"):
            return
        Path(runner.work_dir, "failed_at").write_text(str(time.time()))
        if os.environ["MMRLA_TEST_HOW"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a wire came loose")


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for _, value in sorted(state.items()):
        found.update(value.numpy().tobytes())
    return found.hexdigest()


@HOOKS.register_module()
class DigestHook(Hook):
    """Each process writes a digest of its weights at the end."""

    def after_train(self, runner):
        found = digest(runner.model.module.state_dict())
        Path(runner.work_dir, f"rank{os.environ['RANK']}").write_text(found)


@HOOKS.register_module()
class LossesHook(Hook):
    """Each process writes its losses, and how many units FSDP has made of the network."""

    def before_train(self, runner):
        names = [type(module).__name__ for module in runner.model.modules()]
        self.units = sum("FullyShardedDataParallel" in name for name in names)
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs["loss"].item())

    def after_train(self, runner):
        found = dict(losses=self.losses, units=self.units)
        Path(runner.work_dir, f"losses{runner.rank}.json").write_text(json.dumps(found))
