"""Dynamic layer attention: MRLA whose retrieved features are refreshed for the current layer.

Paper: Strengthening Layer Interaction via Dynamic Layer Attention, IJCAI 2024,
https://arxiv.org/abs/2406.13392. Forward, the dynamic sharing unit (DSU) sums up the layers of a
group: ``(h_t, c_t) = DSU(GAP(x_t), h_{t-1}, c_{t-1})``. Backward, it refreshes the features of
earlier layers, ``z <- z * DSU(GAP(z), h_t, c_t)``, and MRLA attends to these. Details that the
paper leaves open follow the released code; see each class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrla.layers.channel_cell import ChannelCell, pooled
from mmrla.layers.mrla import MRLABase, MRLALight
from mmrla.layers.query_key_value import QueryKeyValue, depthwise_conv


class _Dynamic(QueryKeyValue):
    """A mixin before MRLA-light or MRLA-base: the dynamic sharing unit (DSU)."""

    tail_op = None  # the DSU needs the layer's output first

    def __init__(
        self, channels: int, head_channels: int = 32, kernel_size: int | None = None,
        reduction: int = 16,
    ) -> None:  # fmt: skip
        super().__init__(channels, head_channels, kernel_size)
        self.cell = ChannelCell(channels, reduction, output_gate=False)
        if "refresh" in self.shared:
            self.refresh = depthwise_conv(channels)


class DLALight(_Dynamic, MRLALight):
    """Dynamic layer attention, light: MRLA-light on a refreshed shortcut.

    ``s'_t = s_t * DSU(GAP(s_t), h_t, c_t) + DWConv3x3(s_t)`` for the layer's shortcut ``s_t``, and
    ``o_t = lambda_t * s'_t + sigmoid(<q_t, k_t>_head / sqrt(d_k)) * DWConv3x3(x_t)``. A group's
    layers share the DSU and the shortcut's convolution.

    Args:
        channels: C of the layer before it; the same in a whole group.
        head_channels: As in :class:`MRLALight`.
        kernel_size: As in :class:`MRLALight`.
        reduction: The DSU's bottlenecks have ``C // reduction`` channels. Default 16, as in the
            released ImageNet networks; 20 in the detectors, 4 for CIFAR.

    Raises:
        ValueError: As :class:`MRLALight`, or ``reduction`` is not from 1 to C.
    """

    shared = ("cell", "refresh")

    def forward(self, x: Tensor, shortcut: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See :class:`LayerAttention`; the state is the DSU's."""
        state = self.cell(pooled(x), state)
        scale = self.cell(pooled(shortcut), state)[0].to(shortcut.dtype)
        refreshed = shortcut * scale[:, :, None, None] + self.refresh(shortcut)
        # Under autocast the convolution is of a lower precision than x.
        o, _ = super().forward(x, refreshed.to(x.dtype), None)
        return o, state


class DLABase(_Dynamic, MRLABase):
    """Dynamic layer attention, base: MRLA-base whose keys and values are refreshed at each layer.

    At layer t, for all s < t, ``k_s <- k_s * DSU(k_s, h_t, c_t)`` and
    ``V_s <- V_s * DSU(GAP(V_s), h_t, c_t)``; refreshed values stay refreshed for later layers. Then
    ``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s``.

    The original values are kept, with their means and the product of their factors, so memory grows
    linearly with depth and not quadratically.

    Args:
        channels: C of the layer before it; the same in a whole group.
        head_channels: As in :class:`MRLABase`. Default 32, as in the released code.
        kernel_size: As in :class:`MRLABase`.
        reduction: The DSU's bottlenecks have ``C // reduction`` channels. Default 16; 4 in the
            released CIFAR networks, which are the only released ones with DLA-base.

    Raises:
        ValueError: As :class:`MRLABase`, or ``reduction`` is not from 1 to C.
    """

    shared = ("cell",)

    def forward(self, x: Tensor, shortcut: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See :class:`LayerAttention`.

        The state holds, of the group so far, keys ``[t, B, C]``, factors of values ``[t, B, C]``,
        means of values times these factors ``[t, B, C]``, values, and the DSU's state.
        """
        query, key = self.query_key_of(x)
        value = self.value(x)
        batch, channels = x.shape[:2]
        ones, mean = torch.ones_like(key)[None], pooled(value)[None]
        if state is None:
            cell = self.cell(pooled(x), None)
            keys, factors, means, values = key[None], ones, mean, (value,)
        else:
            keys, factors, means, values, cell = state
            cell = self.cell(pooled(x), cell)
            # All refreshed in one go: the DSU's hidden state is that of this layer for each.
            old = torch.cat([keys, means]).to(cell[0].dtype)
            at_layer = tuple(part.repeat(len(old), 1) for part in cell)
            scale = self.cell(old.flatten(0, 1), at_layer)[0].unflatten(0, (-1, batch))
            key_scale, value_scale = scale.chunk(2)
            keys = torch.cat([keys * key_scale, key[None]])
            factors = torch.cat([factors * value_scale, ones])
            means = torch.cat([means * value_scale, mean])
            values = (*values, value)
        heads = (channels // self.head_channels, self.head_channels)
        logits = (query * keys).unflatten(2, heads).sum(3) / self.head_channels**0.5
        weights = logits.softmax(0).repeat_interleave(self.head_channels, 2) * factors
        o = torch.zeros_like(value)
        for weight, v in zip(weights.to(value.dtype), values, strict=True):
            o = o + weight[:, :, None, None] * v
        return o, (keys, factors, means, values, cell)
