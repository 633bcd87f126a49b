"""Recurrent layer attention, linearised by a feature map.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, appendix A.3; the feature map is that of Transformers
are RNNs, ICML 2020, https://arxiv.org/abs/2006.16236.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrla.layers.layer_attention import Retrieval
from mmrla.layers.query_key_value import QueryKeyValue
from mmrla.ops import linear_rla, query_key
from mmrla.ops.linear_rla import LinearRLAState, feature_map_of


class LinearRLA(QueryKeyValue):
    """Linear recurrent layer attention (A.3): linear in depth, with a state of d_k values.

    ``U_t = U_{t-1} + phi(K_t)^T V_t``, ``Z_t = Z_{t-1} + phi(K_t)^T``,
    ``o_t = phi(Q_t) U_t / (phi(Q_t) Z_t)`` in each head, with ``phi = elu + 1``.

    A layer keeps ``d_k * C * H * W`` numbers per image, so a single head of all channels only suits
    narrow layers and small maps. Channel-wise, phi(Q_t) cancels: o_t is the mean of the values so
    far, weighted by phi(K_s), and the query's gradient is zero up to rounding.

    Args:
        channels: C of the layer before it; the same in a whole group.
        head_channels: d_k, channels of one head, which divides C; ``'all'``: C, one head; 1:
            channel-wise.
        kernel_size: As in :class:`MLA`, like those below.
        projection: As above.
        value_conv: As above.

    Raises:
        TypeError: As :class:`QueryKeyValue`.
        ValueError: As :class:`QueryKeyValue`.
    """

    def forward(
        self, x: Tensor, shortcut: Tensor, state: LinearRLAState | None
    ) -> tuple[Tensor, LinearRLAState]:
        """See :class:`LayerAttention`; the state is ``(U_t, Z_t)``."""
        query, key = self.query_key_of(x)
        return linear_rla(query, key, self.value_of(x), state, self.head_channels)

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: Any, memory: Tensor | None = None
    ) -> Retrieval:
        """See :class:`LayerAttention`; scores are ``phi(q_t) phi(k_s)^T`` over their sum.

        Args:
            x: As in :meth:`forward`.
            shortcut: Unused.
            state: Unused: it holds sums over layers.
            memory: phi of the earlier layers' keys, ``[B, heads, t - 1, d_k]``.
        """
        query, key = map(self.heads, query_key(x, self.query.weight, self.key.weight))
        keys = feature_map_of(key)[:, :, None]
        if memory is not None:
            keys = torch.cat([memory, keys], dim=2)
        scores = (feature_map_of(query)[:, :, None] * keys).sum(-1)
        total = scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return Retrieval(query, scores / total, keys)
