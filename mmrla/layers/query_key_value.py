"""Common base of layer attentions with a query, a key and a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrla.layers.layer_attention import LayerAttention, Retrieval
from mmrla.layers.norm import is_plain, norm_of
from mmrla.ops import Op, eca_kernel_size, query_key
from mmrla.ops.checks import check_head_channels
from mmrla.ops.reference import autocast_dtype, channel_means, layer_weights, project

ALL = "all"
"""``head_channels`` of one head: as many channels as the layer has."""


class QueryKeyValue(LayerAttention):
    """Query, key and value of a layer (section 4), common to MRLA and its relatives.

    Args:
        channels: C of the layer before it.
        head_channels: d_k, channels of one head, which divides C; or ``'all'``: C, one head.
        kernel_size: Of the Conv1D of query and key, odd. Default: from C as in ECA-Net.
        projection: ``'conv1d'``: query and key are a Conv1D along the channel means. ``'fc'``: each
            is a fully connected layer, C x C.
        value_conv: Whether the value is a depthwise 3x3 convolution of x; else it is x.

    Raises:
        TypeError: ``head_channels`` is neither an int nor ``'all'``, ``kernel_size`` is not an int,
            or ``value_conv`` is not a bool.
        ValueError: ``head_channels`` does not divide C, an even ``kernel_size``, one with ``'fc'``,
            or an unknown ``projection``.
    """

    PROJECTIONS = ("conv1d", "fc")
    tail_op: Op | None = None
    """The operation that :meth:`tail` runs; None: there is no fused tail."""
    tail_act: type[nn.Module] = nn.Identity
    """Class of the activation after the out norm that ``tail_op`` includes."""

    def __init__(
        self, channels: int, head_channels: int | str = 32, kernel_size: int | None = None,
        projection: str = "conv1d", value_conv: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(channels)
        self.head_channels = head_channels_of(channels, head_channels)
        if projection not in self.PROJECTIONS:
            raise ValueError(f"projection must be one of {self.PROJECTIONS}, got {projection!r}")
        if not isinstance(value_conv, bool):
            raise TypeError(f"value_conv must be a bool, got {value_conv!r}")
        self.projection = projection
        self.query: nn.Conv1d | nn.Linear
        self.key: nn.Conv1d | nn.Linear
        self.value: nn.Conv2d | None = None
        if projection == "fc":
            if kernel_size is not None:
                raise ValueError(f"projection='fc' has no kernel_size, got {kernel_size=}")
            self.query = nn.Linear(channels, channels, bias=False)
            self.key = nn.Linear(channels, channels, bias=False)
        else:
            if kernel_size is None:
                kernel_size = eca_kernel_size(channels)
            if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
                raise TypeError(f"kernel_size must be an int, got {kernel_size!r}")
            if kernel_size < 1 or kernel_size % 2 == 0:
                raise ValueError(f"kernel_size must be odd and positive, got {kernel_size=}")
            self.query = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
            self.key = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        if value_conv:
            self.value = depthwise_conv(channels)

    @property
    def value_weight(self) -> Tensor | None:
        """The value's convolution, ``[C, 1, 3, 3]``, or None where the value is x."""
        return None if self.value is None else self.value.weight

    @property
    def calls_parts(self) -> bool:
        """Whether query, key and value are called as modules; else their weights are enough.

        They are for their hooks, which make the weights in ``torch.nn.utils.prune``, and during
        torch.jit tracing, because FLOP counters (``mmengine.analysis``) attribute operations to the
        module being called.
        """
        return torch.jit.is_tracing() or not is_plain(self)

    def query_key_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key of ``x``, ``[B, C]`` each."""
        if not self.calls_parts:
            return query_key(x, self.query.weight, self.key.weight)
        means = channel_means(x)
        return self.called(self.query, means), self.called(self.key, means)

    @staticmethod
    def called(layer: nn.Conv1d | nn.Linear, means: Tensor) -> Tensor:
        """:func:`mmrla.ops.reference.project` by a call of the query or the key."""
        if layer.weight.dtype != means.dtype:
            return project(means, layer.weight)
        with torch.autocast(means.device.type, enabled=False):
            if isinstance(layer, nn.Linear):
                return layer(means)
            return layer(means.unsqueeze(1)).squeeze(1)

    def value_of(self, x: Tensor) -> Tensor:
        """The value of ``x``, shaped like it."""
        return x.to(autocast_dtype(x)) if self.value is None else self.value(x)

    def fuses_tail(
        self, z: Tensor, norm: nn.Module, out_norm: nn.Module, act: type[nn.Module] = nn.Identity
    ) -> bool:
        """See :class:`LayerAttention`: between plain batch norms without hooks."""
        return (
            self.tail_op is not None
            and act is self.tail_act
            and self.projection == "conv1d"
            and self.value is not None
            and type(norm) is nn.BatchNorm2d
            and type(out_norm) is nn.BatchNorm2d
            and is_plain(self, norm, out_norm)
            and self.tail_op.select(z).backend.name == "fused"
        )

    def tail(
        self, z: Tensor, shortcut: Tensor, state: Any, norm: Any, out_norm: Any, scale: Any
    ) -> tuple[Tensor, Any]:
        """See :class:`LayerAttention`."""
        assert self.value is not None
        weights = self.tail_weights(self.query.weight, self.key.weight, self.value.weight)
        return self.run_tail(state, z, shortcut, norm_of(norm), weights, norm_of(out_norm), scale)

    def tail_weights(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """The weights that :attr:`tail_op` takes."""
        raise NotImplementedError

    def run_tail(self, state: Any, *args: Any) -> tuple[Tensor, Any]:
        """Output and state of :attr:`tail_op`, given the state and its other arguments."""
        raise NotImplementedError

    def heads(self, of: Tensor) -> Tensor:
        """A query or key ``[B, C]`` as ``[B, heads, d_k]``."""
        return of.unflatten(1, (-1, self.head_channels))

    def softmax_retrieval(self, query: Tensor, keys: Sequence[Tensor]) -> Retrieval:
        """Result of :meth:`retrieval` if scores are a softmax over the keys ``[B, C]``."""
        scores = layer_weights(query, keys, self.head_channels)
        return Retrieval(self.heads(query), scores.permute(1, 2, 0))

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        shown = f"channels={self.channels}, head_channels={self.head_channels}"
        return shown if self.projection == "conv1d" else f"{shown}, projection={self.projection!r}"


def depthwise_conv(channels: int) -> nn.Conv2d:
    """A depthwise 3x3 convolution without bias, Kaiming normal (fan_out)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def head_channels_of(channels: int, head_channels: int | str) -> int:
    """d_k as a number: ``'all'`` is C.

    Raises:
        TypeError: ``head_channels`` is neither an int nor ``'all'``.
        ValueError: It does not divide C.
    """
    if isinstance(head_channels, str):
        if head_channels != ALL:
            raise TypeError(f"head_channels must be an int or {ALL!r}, got {head_channels!r}")
        return channels
    check_head_channels(channels, head_channels)
    return head_channels
