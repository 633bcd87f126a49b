"""Common parts of timm's networks with a layer attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from timm.layers import DropPath, use_reentrant_ckpt
from torch import Tensor, nn

from mmrla.layers import LayerAttention
from mmrla.layers.builder import build, check_placement, layer_attention_class, layer_attentions
from mmrla.layers.layer_attention import start_as_identity

Config = Mapping[str, Any] | str
"""``dict(type='MRLALight', ...)``, or just a name."""

_KNOWN = layer_attentions()


def build_attention(
    config: Config,
    channels: int,
    host: str,
    *,
    shares: bool,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    placements: Collection[str] = ("after",),
    index: int | None = None,
) -> LayerAttention:
    """Build a layer attention of :mod:`mmrla.layers`.

    Args:
        config: A name such as ``'MRLALight'``, or ``dict(type=..., ...)`` with a name or a class.
        channels: C of the layer before it.
        host: Name of the network in messages.
        shares: Whether layers of a group may share parts in this network.
        defaults: Defaults for arguments that ``config`` does not set, by class name.
        placements: The network's placements, of :data:`mmrla.layers.PLACEMENTS`.
        index: Its number within the group, for types that take it.

    Raises:
        TypeError: Neither a name nor a dict with a ``type``, or an argument that the type does not
            take.
        ValueError: An unknown type, one that the network does not support, or invalid arguments.
    """
    config = dict(type=config) if isinstance(config, str) else config
    cls = layer_attention_class(config, _KNOWN.get, lambda: [
        name for name, known in _KNOWN.items()
        if known.placement in placements and (shares or not known.shared)
    ])  # fmt: skip
    check_placement(cls, config, host, placements, shares)
    return build(cls, config, channels, defaults, index=index)


def drop_path_of(asked: float | None, block: Any) -> nn.Module:
    """Stochastic depth of an attention branch: the given rate or, with None, the block's.

    Raises:
        ValueError: A rate outside [0, 1).
    """
    rates = (part.drop_prob for part in block.modules() if isinstance(part, DropPath))
    rate = max(rates, default=0.0) if asked is None else asked
    if isinstance(rate, bool) or not 0 <= rate < 1:
        raise ValueError(f"mrla_drop_path_rate must be in [0, 1), got {rate!r}")
    return DropPath(rate) if rate else nn.Identity()


class LayerAttentionNetwork:
    """A mixin before a network of timm: initialisation and checkpointing of layer attentions."""

    zero_init_mrla: bool
    """A plain value, set before the ancestor's constructor, which calls init_weights."""

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """As timm's; then initialise the layer attention, see ``zero_init_mrla``."""
        super().init_weights(*args, **kwargs)
        if self.zero_init_mrla:
            start_as_identity(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's.

        Raises:
            RuntimeError: Reentrant checkpointing is on, which would lose gradients.
        """
        if enable and use_reentrant_ckpt():
            raise RuntimeError(
                "reentrant checkpointing (TIMM_REENTRANT_CKPT, timm.layers.set_reentrant_ckpt) "
                "loses the gradients of the state that layers hand on; turn it off"
            )
        super().set_grad_checkpointing(enable)


def with_own_attention(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A plain network's weights, completed by the current attention weights of ``model``.

    Weights that already contain layer attention are returned unchanged, so loading stays strict:
    missing keys are an error.
    """
    if any("mrla" in key for key in state):
        return state
    return {**{k: v for k, v in model.state_dict().items() if "mrla" in k}, **state}
