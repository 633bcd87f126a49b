"""DenseFormer: learned, static weights over the outputs of all blocks.

Paper: DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted Averaging,
NeurIPS 2024, https://arxiv.org/abs/2402.02622. With x_0 the embedded tokens and x_l the output of
block l, the next block reads ``sum_{i<=l} alpha_{l,i} x_i``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrla.layers.layer_attention import LayerAttention, Retrieval
from mmrla.ops.attn_res import weighted_sum


class DenseFormer(LayerAttention):
    """Depth-weighted averaging: the weights alpha are learned and do not depend on the input.

    They start at (0, ..., 0, 1), which is exactly the plain network. Compared with attention over
    layers, it shows how much of a gain needs attention at all.

    Args:
        channels: C.
        index: Number of blocks before the one whose output it takes.
    """

    placement = "output"
    uses_shortcut = True
    scores_sum_to_one = False

    def __init__(self, channels: int, index: int = 0) -> None:
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.empty(index + 2))
        self.start_as_identity()

    @property
    def scores_label(self) -> str:
        """See :class:`LayerAttention`."""
        return "alpha, learned"

    def start_as_identity(self) -> None:
        """Pass the block's own output on."""
        with torch.no_grad():
            self.alpha.zero_()[-1] = 1

    def forward(
        self, x: Tensor, shortcut: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`LayerAttention`; the state holds x_0 and all outputs so far."""
        outputs = (*(state or (shortcut,)), x)
        return weighted_sum(outputs, self.alpha.unbind()), outputs

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: tuple[Tensor, ...] | None, memory: None = None
    ) -> Retrieval:
        """See :class:`LayerAttention`; the scores are alpha, and there is no query."""
        scores = self.alpha.expand(len(x), 1, -1)
        return Retrieval(scores[..., :1] * 0, scores, sources=range(len(self.alpha)))
