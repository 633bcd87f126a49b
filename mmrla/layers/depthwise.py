"""The baseline of the paper's ablations: a depthwise convolution instead of layer attention.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql, section 5.3, Table 4 (g).
"""

from __future__ import annotations

from torch import Tensor

from mmrla.layers.layer_attention import LayerAttention
from mmrla.layers.query_key_value import depthwise_conv


class DWConv(LayerAttention):
    """``o_t = DWConv3x3(x_t)``: the value of MRLA without attention or memory of earlier layers.

    Args:
        channels: C of the layer before it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.value = depthwise_conv(channels)

    def forward(self, x: Tensor, shortcut: Tensor, state: None) -> tuple[Tensor, None]:
        """See :class:`LayerAttention`; there is no state."""
        return self.value(x), None

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"channels={self.channels}"
