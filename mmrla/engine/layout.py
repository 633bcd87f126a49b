"""channels_last as one switch for a run: weights, batches, optimizer state and checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmrla.loads import unwrapped
from mmrla.registry import HOOKS

__all__ = ["ChannelsLastHook", "use_channels_last"]


def use_channels_last(model: nn.Module) -> None:
    """Convert a network to channels_last: its weights, and the output of its data preprocessor.

    Outputs, gradients and state-dict keys are unchanged. Converting only the weights is not enough:
    data preprocessors make NCHW batches.

    Args:
        model: A detector, a classifier or a backbone, possibly wrapped in DDP; converted in place.
    """
    for parameter in model.parameters():
        parameter.data = _channels_last(parameter.data)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            # Its buckets keep the strides of earlier: without new ones, the first step would get
            # wrong gradients. Pickling makes new ones, and nothing public does.
            module.__setstate__(module.__getstate__())
    preprocessor = getattr(unwrapped(model), "data_preprocessor", None)
    if preprocessor is not None and _turn_batch not in preprocessor._forward_hooks.values():
        preprocessor.register_forward_hook(_turn_batch)


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Trains and evaluates in channels_last, the best layout for tensor cores and AMX.

    It converts the network once its weights are loaded, and every batch after the data
    preprocessor. Results equal those in NCHW up to rounding. Checkpoints are written in the
    ordinary layout, so runs with and without this hook can resume from each other's. The tools add
    it to each run.

    Args:
        enabled: True or False; None: True for a network whose backbone consists of convolutions, in
            mixed precision: an ``AmpOptimWrapper``, or ``fp16=True`` in the loop of a run that does
            not train; False for mmengine's ``FlexibleRunner``.
    """

    # Checkpoints are turned after all other hooks have put their part into them.
    priority = "LOWEST"

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = enabled
        self._turned: bool | None = None

    def before_train(self, runner: Runner) -> None:
        """Convert the network, its moving average, and the state of a resumed optimizer."""
        wrappers = optim_wrappers(runner)
        if not self._turn(runner, _dtype_of(wrappers[0])):
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                use_channels_last(hook.ema_model)
        for wrapper in wrappers:
            for state in wrapper.optimizer.state.values():
                state.update(apply_to(dict(state), torch.is_tensor, _channels_last))

    def before_val(self, runner: Runner) -> None:
        """Turn the network of a run that has not trained."""
        self._turn(runner, torch.bfloat16 if runner.val_loop.fp16 else None)

    def before_test(self, runner: Runner) -> None:
        """Turn the network of a run that has not trained."""
        self._turn(runner, torch.bfloat16 if runner.test_loop.fp16 else None)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Write the ordinary layout."""
        if self._turned:
            _make_contiguous(checkpoint)

    def _turn(self, runner: Runner, dtype: torch.dtype | None) -> bool:
        if self._turned is None:  # once: validations keep the layout of the training around them
            mixed = dtype in (torch.bfloat16, torch.float16)
            # A strategy may have spread the weights as flat pieces.
            whole = not hasattr(runner, "strategy")
            default = mixed and whole and _is_convolutional(unwrapped(runner.model))
            self._turned = default if self.enabled is None else self.enabled
            if self._turned:
                use_channels_last(runner.model)
                print_log("layout: channels_last", logger="current")
        return self._turned


def optim_wrappers(runner: Runner) -> list[OptimWrapper]:
    """The wrapper of each optimizer of a run."""
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _channels_last(tensor: Tensor) -> Tensor:
    # nn.Module.to(memory_format=...) would fail at the weights of 3-D convolutions.
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _turn_batch(module: nn.Module, args: Any, output: Any) -> Any:
    return apply_to(output, torch.is_tensor, _channels_last)


def _is_convolutional(model: nn.Module) -> bool:
    """Whether at least half of a backbone's parameters belong to 2-D convolutions."""
    network = getattr(model, "backbone", model)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    inside = sum(p.numel() for m in convolutions for p in m.parameters(recurse=False))
    return 2 * inside >= sum(p.numel() for p in network.parameters())


def _dtype_of(wrapper: OptimWrapper) -> torch.dtype | None:
    # A subclass with a constructor of its own, for loss scaling alone, may cast nothing.
    if not isinstance(wrapper, AmpOptimWrapper) or not hasattr(wrapper, "cast_dtype"):
        return None
    return wrapper.cast_dtype or torch.float16  # mmengine's default on a GPU


def _make_contiguous(tensors: dict) -> None:
    # In place: a state dict carries metadata that a new one would lack.
    for key, value in tensors.items():
        if isinstance(value, Tensor):
            tensors[key] = value.to(memory_format=torch.contiguous_format)
        elif isinstance(value, dict):
            _make_contiguous(value)
