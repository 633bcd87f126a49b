"""Weights spread over processes: mmengine's FSDP strategy, on a CPU too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine import _strategy
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmrla.engine.data_check import type_name
from mmrla.registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(_strategy.FSDPStrategy):
    """mmengine's strategy for its ``FlexibleRunner``, which trains with gloo where there is no GPU.

    A checkpoint is one file with the whole network, which any runner loads. Weight decay and
    clipping of gradients are those of one process: mmengine's strategy takes every weight for a
    flat one, and each process clips by the norm of its own part.

    Args:
        model_wrapper: As in :class:`mmengine._strategy.FSDPStrategy`; ``use_orig_params`` is always
            True.
        state_dict_cfg: Likewise, but ``'full'`` by default.
        **kwargs: Likewise.
    """

    unsharded: nn.Module
    """The network before its weights were spread, on the device ``meta``."""

    def __init__(
        self,
        *,
        model_wrapper: dict | None = None,
        state_dict_cfg: str | dict = "full",
        **kwargs: Any,
    ) -> None:
        model_wrapper = {"type": "MMFullyShardedDataParallel", **(model_wrapper or {})}
        model_wrapper["use_orig_params"] = True
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            model_wrapper["device_id"] = torch.device("cpu")  # mmengine names a GPU
        super().__init__(model_wrapper=model_wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if on_cpu:
            # FSDP would not copy what is there already, free its memory, and crash.
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """As the ancestor's; keeps names and shapes of the whole network."""
        model = super().build_model(model)
        empty: dict[int, Tensor] = {id(b): b.to("meta") for b in model.buffers()}
        for p in model.parameters():
            empty[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        self.unsharded = copy.deepcopy(model, empty)
        return model

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        """As the ancestor's, from shapes that FSDP has not made flat."""
        wrapper = super().build_optim_wrapper(optim_wrapper, self.unsharded)
        if isinstance(wrapper, OptimWrapper):
            shards = {
                name.replace("_fsdp_wrapped_module.", ""): p
                for name, p in self.model.named_parameters()
            }
            of_whole = {id(p): shards[name] for name, p in self.unsharded.named_parameters()}
            for group in wrapper.optimizer.param_groups:
                group["params"] = [of_whole[id(p)] for p in group["params"]]
            if wrapper.clip_grad_kwargs and wrapper.clip_func is nn.utils.clip_grad_norm_:
                wrapper.clip_func = lambda _, **kwargs: self.model.clip_grad_norm_(**kwargs)
        return wrapper

    def model_state_dict(self) -> dict:
        """As the ancestor's, of plain tensors: FSDP leaves marks that are not safe to load."""
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


def use_one_process(cfg: Config) -> None:
    """Have a run that no launcher started do without a strategy for several processes, in place."""
    if cfg.launcher == "none" and "strategy" in cfg:
        cfg.strategy = dict(type="SingleDeviceStrategy")
        if type_name(cfg.get("optim_wrapper")) == "DeepSpeedOptimWrapper":
            cfg.optim_wrapper.type = "OptimWrapper"
