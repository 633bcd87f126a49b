"""Multi-head layer attention.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from mmrla.layers.layer_attention import Retrieval
from mmrla.layers.query_key_value import QueryKeyValue
from mmrla.ops import mla
from mmrla.ops.reference import base_reference, channel_means, project

MLAState = tuple[Tensor, ...]
"""The features of a group so far, each ``[B, C, H, W]``."""


class MLA(QueryKeyValue):
    """Multi-head layer attention (Eq. 3 and 4): quadratic in depth.

    ``o_t = sum_{s<=t} softmax_s(<f_Q^t(X_t), f_K^t(X_s)>_head / sqrt(d_k)) * f_V^t(X_s)``: like
    MRLA-base, but layer t recomputes the keys and values of all earlier layers with its own
    functions. (The released file mixes up heads and layers from the second layer on; this follows
    the equation.)

    Args:
        channels: C of the layer before it; the same in a whole group.
        head_channels: d_k, channels of one head, which divides C; ``'all'``: C, one head. 32 in the
            paper, as for MRLA-light.
        kernel_size: Of the Conv1D of query and key, odd. Default: from C as in ECA-Net.
        projection: ``'conv1d'`` or ``'fc'``, see :class:`QueryKeyValue`.
        value_conv: Whether the value is convolved, see :class:`QueryKeyValue`.

    Raises:
        TypeError: As :class:`QueryKeyValue`.
        ValueError: As :class:`QueryKeyValue`.
    """

    def forward(
        self, x: Tensor, shortcut: Tensor, state: MLAState | None
    ) -> tuple[Tensor, MLAState]:
        """See :class:`LayerAttention`; the state holds the features of the group."""
        features = (*(state or ()), x)
        if self.calls_parts:
            means = [channel_means(feature) for feature in features]
            query = self.called(self.query, means[-1])
            keys = [self.called(self.key, mean) for mean in means]
            values = [self.value_of(feature) for feature in features]
            return base_reference(query, keys, values, self.head_channels), features
        weights = (self.query.weight, self.key.weight, self.value_weight)
        return mla(features, *weights, self.head_channels), features

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: MLAState | None, memory: None = None
    ) -> Retrieval:
        """See :class:`LayerAttention`; the scores are the softmax of Eq. 4."""
        means = [channel_means(feature) for feature in (*(state or ()), x)]
        query = project(means[-1], self.query.weight)
        keys = [project(mean, self.key.weight) for mean in means]
        return self.softmax_retrieval(query, keys)
