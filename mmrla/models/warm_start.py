"""Starting an MRLA network from the weights of the plain one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mmengine.logging import print_log
from mmengine.model import BaseModule, initialize
from torch import Tensor, nn

from mmrla.checkpoints import convert_state_dict, load_file, load_into, state_dict_of
from mmrla.checkpoints.files import CheckpointError
from mmrla.checkpoints.plan import is_warm_start
from mmrla.checkpoints.report import is_mrla_key, plugin_keys
from mmrla.layers import LayerAttention
from mmrla.layers.layer_attention import start_as_identity
from mmrla.registry import WEIGHT_INITIALIZERS


@WEIGHT_INITIALIZERS.register_module()
class WarmStart:
    """Initialise an MRLA network from a checkpoint, so that it starts as the saved network.

    From a plain checkpoint (torchvision's, timm's or mmpretrain's key names) the network computes
    exactly the plain network at step 0: the norms after the layer attentions start at gamma = 0,
    and MRLA is learned from the first step on (DIANet's unit cannot start like this, and the log
    says so). A checkpoint with MRLA weights (mmrla's or the released key names) is loaded
    unchanged.

    With ``frozen_stages``, ``norm_eval`` or a ``norm_cfg`` that freezes norms, a newly initialised
    layer attention stays trainable and its norms keep updating statistics, while one from the
    checkpoint is frozen like the rest.

    A host supports this by a method ``start_as_identity`` of its parts, which makes them add zero,
    and by calling :func:`init_weights_warm` in its ``init_weights``.

    Args:
        checkpoint: A local file, ``torchvision://resnet50``, an http(s) address, ...
        freeze_mrla: True freezes the MRLA parts of frozen stages (and their norms, with
            ``norm_eval``) whatever the checkpoint contains, False never does. Default None: as
            above. The same applies to plugins, which a plain checkpoint does not have either.
        allow_missing: Patterns of model keys that may be missing from the checkpoint.

    Raises:
        mmrla.checkpoints.files.CheckpointError: The file cannot be read, does not fit, or contains
            MRLA weights although the network was built to keep its MRLA parts trainable.
    """

    def __init__(
        self, checkpoint: str, freeze_mrla: bool | None = None, allow_missing: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.freeze_mrla = freeze_mrla
        self.allow_missing = tuple(allow_missing)

    def __call__(self, module: nn.Module) -> None:
        """Fill ``module``, a host of layer attentions; called by mmengine."""
        converted = _backbone_of(self.checkpoint, module)
        own = module.state_dict()
        if not any(is_mrla_key(key) for key in converted):
            start_as_identity(module)
            never = {type(m).__name__ for m in module.modules() if not _starts_as_identity(m)}
            if never:
                print_log(
                    f"with {', '.join(sorted(never))} the network does not start as the plain one: "
                    "it scales features from the first step on",
                    logger="current",
                    level=logging.WARNING,
                )
        elif self.freeze_mrla is None and getattr(module, "keep_mrla_trainable", False):
            raise CheckpointError(
                f"{self.checkpoint}: holds MRLA weights, which could not be known when the network "
                "was built; set freeze_mrla=True (as in the paper) or freeze_mrla=False in init_cfg"
            )
        plugins = plugin_keys(module)
        has_plugins = any(f"backbone.{key}" in converted for key in plugins)
        keeps = self.freeze_mrla is None and getattr(module, "keep_plugins_trainable", False)
        if has_plugins and keeps:
            raise CheckpointError(
                f"{self.checkpoint}: holds weights of plugins, which could not be known when the "
                "network was built; set freeze_mrla=True or freeze_mrla=False in init_cfg"
            )
        load_into(
            module,
            converted,
            allow_missing=self.allow_missing,
            source=f"warm start from {self.checkpoint}",
        )
        fresh = sorted(k for k in own if is_mrla_key(k) and f"backbone.{k}" not in converted)
        if fresh:
            print_log(
                f"{len(fresh)} tensors of layer attentions are newly initialised", logger="current"
            )
        if plugins and not has_plugins:
            print_log(f"{len(plugins)} tensors of plugins are newly initialised", logger="current")

    def _get_init_info(self) -> str:
        return f"WarmStart from {self.checkpoint}"


def _starts_as_identity(module: nn.Module) -> bool:
    return not isinstance(module, LayerAttention) or module.starts_as_identity


def _backbone_of(checkpoint: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint's backbone under ``backbone.*``, in the names of ``module``."""
    state = state_dict_of(load_file(checkpoint))
    if any(key.startswith("backbone.") for key in state):
        # Of a detector or classifier, only the backbone concerns us.
        state = {k: v for k, v in state.items() if k.startswith("backbone.")}
    bare = {key.removeprefix("backbone."): value for key, value in state.items()}
    plain = {k for k, _ in module.named_parameters() if not is_mrla_key(k)} - plugin_keys(module)
    if plain <= bare.keys():  # its names already, also of networks that the converter does not know
        return {f"backbone.{key}": value for key, value in bare.items()}
    converted = convert_state_dict(state)
    return {k: v for k, v in converted.items() if k.startswith("backbone.")}


def load_backbone(module: nn.Module, checkpoint: str) -> None:
    """Load a backbone from a backbone's, classifier's or detector's checkpoint.

    Raises:
        CheckpointError: The file cannot be read or does not fit.
    """
    load_into(module, _backbone_of(checkpoint, module), source=checkpoint)


def init_weights_warm(module: BaseModule) -> bool:
    """Carry out a host's ``init_cfg`` if it is a warm start, and return whether it was.

    The host's children are left alone: their own initialisation would undo the loaded weights.
    """
    if not is_warm_start(module.init_cfg):
        return False
    initialize(module, module.init_cfg)
    module.is_init = True
    return True
