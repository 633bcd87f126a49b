"""AttnRes: attention over all earlier sub-layers in place of the residual stream.

Paper: Attention Residuals, Moonshot AI, 2026, https://arxiv.org/abs/2603.15031. With v_0 the
embedded tokens and v_i the output of sub-layer i (each attention and each MLP is one), the input of
sub-layer l + 1, and finally of the network's last norm, is, token by token,

``h_{l+1} = sum_{i<=l} a_i v_i``, ``a = softmax_i(w_{l+1} . RMSNorm(v_i))``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrla.layers.checks import check_count
from mmrla.layers.layer_attention import LayerAttention, Retrieval
from mmrla.ops.attn_res import attend_to_sources, inverse_rms, source_weights

Sources = tuple[tuple[Tensor, ...], Tensor]
"""Maps ``[..., C]``, and the reciprocal root mean square of each of their tokens."""


class AttnRes(LayerAttention):
    """Attention Residuals: each sub-layer reads a weighted sum of all outputs before it.

    There is no other residual stream. The learned query w starts at zero, so all weights are equal
    and ``h_{l+1}`` is the plain stream divided by the number of sources. Norms cancel this factor:
    a pre-norm network starts as the plain one, up to the epsilon of its norms.

    With ``block_size = S > 1`` (Block AttnRes) the outputs of S consecutive sub-layers are added
    up, and the sources are v_0, the sums of finished blocks and the sum so far of this one.

    Args:
        channels: C of the tokens.
        block_size: S, sub-layers per block; 1: full AttnRes.
        index: Number of sub-layers before the one whose output it takes.

    Raises:
        TypeError: ``block_size`` is not an int.
        ValueError: ``block_size`` is below 1.
    """

    placement = "sublayer"
    uses_shortcut = True

    def __init__(self, channels: int, block_size: int = 1, index: int = 0) -> None:
        super().__init__(channels)
        check_count("block_size", block_size)
        self.block_size, self.index = block_size, index
        self.query = nn.Parameter(torch.zeros(channels))

    def start_as_identity(self) -> None:
        """Weigh all sources equally."""
        nn.init.zeros_(self.query)

    def _sources(self, x: Tensor, shortcut: Tensor, state: Sources | None) -> Sources:
        with torch.autocast(x.device.type, enabled=False):
            sources, scales = state or ((shortcut,), inverse_rms(shortcut)[None])
            if self.index % self.block_size:
                x = sources[-1] + x.to(shortcut.dtype)
                sources, scales = sources[:-1], scales[:-1]
            return (*sources, x), torch.cat([scales, inverse_rms(x)[None]])

    def forward(self, x: Tensor, shortcut: Tensor, state: Sources | None) -> tuple[Tensor, Sources]:
        """See :class:`LayerAttention`; ``x`` and ``shortcut`` are ``[..., C]``."""
        sources, scales = self._sources(x, shortcut, state)
        return attend_to_sources(self.query, scales, sources), (sources, scales)

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: Sources | None, memory: None = None
    ) -> Retrieval:
        """See :class:`LayerAttention`; the mean over tokens of the weights of Eq. 1."""
        sources, scales = self._sources(x, shortcut, state)
        weights = source_weights(self.query, scales, sources).flatten(2).mean(2).T
        ends = (*range(0, self.index + 1, self.block_size), self.index + 1)
        query = self.query.expand(len(x), 1, -1)
        return Retrieval(query, weights[:, None], sources=ends)
