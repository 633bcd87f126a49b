"""Weights spread over processes: mmengine's FSDP strategy, on a CPU too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine import _strategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmrla.registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(_strategy.FSDPStrategy):
    """mmengine's strategy for its ``FlexibleRunner``, which trains with gloo where there is no GPU.

    Checkpoints hold the whole network, in one file that every runner loads.

    Args:
        model_wrapper: As in :class:`mmengine._strategy.FSDPStrategy`; ``use_orig_params`` is True.
        state_dict_cfg: Likewise, but ``'full'`` by default.
        **kwargs: Likewise.
    """

    unsharded: nn.Module
    """The network before it was spread, without values: keys and shapes of a checkpoint."""

    def __init__(
        self,
        *,
        model_wrapper: dict | None = None,
        state_dict_cfg: str | dict = "full",
        **kwargs: Any,
    ) -> None:
        default: dict = dict(type="MMFullyShardedDataParallel", use_orig_params=True)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            default["device_id"] = torch.device("cpu")  # mmengine names a GPU
        super().__init__(
            model_wrapper={**default, **(model_wrapper or {})},
            state_dict_cfg=state_dict_cfg,
            **kwargs,
        )
        if on_cpu:
            # What is there already would not be copied, and its memory is freed: torch crashes.
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """As the ancestor's; keeps the keys and shapes of the whole network."""
        model = super().build_model(model)
        tensors = (*model.parameters(), *model.buffers())
        self.unsharded = copy.deepcopy(model, {id(t): t.detach().to("meta") for t in tensors})
        return model

    def model_state_dict(self) -> dict:
        """As the ancestor's, of plain tensors: what FSDP notes on its own is not safe to load."""
        state = super().model_state_dict()
        if self._is_full_state_dict():
            for key, value in state.items():
                state[key] = value.detach()
        return state

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """As the ancestor's, which gives torch its arguments in the order of torch 2.0."""
        own = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(own)
