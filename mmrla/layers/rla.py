"""RLA_g: recurrent layer aggregation, a convolutional recurrence along depth.

Paper: Recurrence along Depth: Deep Convolutional Neural Networks with Recurrent Layer Aggregation,
NeurIPS 2021, https://arxiv.org/abs/2110.11852 ("RLA_g" in MRLA's paper). With the residual branch
``y_t = f_t(concat(x_{t-1}, h_{t-1}))`` (Figure 3, the released version):
``x_t = relu(y_t + x_{t-1})``, ``h_t = Conv3x3(tanh(BN_t(h_{t-1} + Conv1x1(y_t))))``; both
convolutions are shared in a stage, each layer has its own norm. ``h`` is zero before the first
layer and goes through all stages, average-pooled where the stride is 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrla.layers.checks import check_bool, check_count
from mmrla.layers.layer_attention import LayerAttention


class RecurrentLayerAggregation(LayerAttention):
    """RLA_g: a hidden map that each layer reads and writes.

    The input of the layer's first convolution is ``concat(x, h)``. It is computed as the sum of the
    layer's own convolution of x and one of h that belongs to this module, so its weights keep their
    shape.

    Args:
        channels: C of the layer's residual branch.
        hidden_channels: Channels of the hidden map. Default 32, as in the paper's ResNet-50.
        concat_output: Whether the host appends ``relu(BN(h))`` of the last layer to its last
            feature map, as the paper's classifiers do. False, as in its detectors: the parts only
            needed for that map exist, but are frozen.

    Raises:
        TypeError: ``hidden_channels`` is not an int, or ``concat_output`` is not a bool.
        ValueError: ``hidden_channels`` is not positive.
    """

    placement = "input"
    shared = ("aggregate", "recur")
    spans_stages = True

    def __init__(
        self, channels: int, hidden_channels: int = 32, concat_output: bool = True
    ) -> None:
        super().__init__(channels)
        check_count("hidden_channels", hidden_channels)
        check_bool("concat_output", concat_output)
        self.hidden_channels = hidden_channels
        self.concat_output = concat_output
        self.updates = True
        self.aggregate = nn.Conv2d(channels, hidden_channels, 1, bias=False)
        self.recur = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, bias=False)
        for conv in (self.aggregate, self.recur):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def join(self, conv: nn.Conv2d, stride: int, norm: Callable[[int], nn.Module]) -> None:
        """See :class:`LayerAttention`."""
        settings: dict[str, Any] = dict(
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        self.read = nn.Conv2d(self.hidden_channels, conv.out_channels, bias=False, **settings)
        nn.init.kaiming_normal_(self.read.weight, mode="fan_out", nonlinearity="relu")
        self.norm = norm(self.hidden_channels)
        self.stride = stride

    def output(self, norm: Callable[[int], nn.Module]) -> nn.Module:
        """See :class:`LayerAttention`: ``relu(BN(h))``.

        Without ``concat_output`` it is frozen, with everything that only leads to it.
        """
        output = nn.Sequential(norm(self.hidden_channels), nn.ReLU())
        if not self.concat_output:
            self.updates = False
            for parameter in (*output.parameters(), *self.norm.parameters()):
                parameter.requires_grad = False
        return output

    def at_input(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`LayerAttention`: ``Conv(h)`` and ``h``, zeros for the first layer."""
        if state is None:
            state = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[2:])
        return self.read(state), state

    def forward(self, x: Tensor, shortcut: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :class:`LayerAttention`; ``x``, the residual branch, is returned unchanged."""
        if not self.updates:
            return x, None
        if self.stride != 1:
            # As the released average pooling, and for odd sizes too.
            state = F.avg_pool2d(state, self.stride, ceil_mode=True, count_include_pad=False)
        return x, self.recur(torch.tanh(self.norm(state + self.aggregate(x))))

    def start_as_identity(self) -> None:
        """Make the layers read nothing from ``h``, with gradients that are not zero."""
        nn.init.zeros_(self.read.weight)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"channels={self.channels}, hidden_channels={self.hidden_channels}"
