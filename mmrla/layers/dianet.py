"""DIANet's unit: channel attention by an LSTM that all layers of a group share.

Paper: DIANet: Dense-and-Implicit Attention Network, AAAI 2020, https://arxiv.org/abs/1905.10671.
With ``y_t = GAP(r_t)`` of the residual branch, ``(h_t, c_t) = DIA-LSTM(y_t, h_{t-1}, c_{t-1})`` and
``x_{t+1} = relu(h_t * r_t + x_t)``. The DIA-LSTM has bottlenecks for its gates and a sigmoid
instead of an LSTM's output tanh, see :class:`mmrla.layers.channel_cell.ChannelCell`.
"""

from __future__ import annotations

from torch import Tensor

from mmrla.layers.channel_cell import CellState, ChannelCell, pooled
from mmrla.layers.layer_attention import LayerAttention


class DIAUnit(LayerAttention):
    """DIANet's unit: scales the channels of each residual branch by the state of a shared LSTM.

    ``o_t = h_t * r_t`` with ``(h_t, c_t) = DIA-LSTM(GAP(r_t), h_{t-1}, c_{t-1})``, where ``r_t`` is
    the residual branch after its last norm. As its factors are below 1, a network that starts
    from plain weights does not start as the plain network.

    Args:
        channels: C of the layer whose branch it scales; the same in a whole group.
        reduction: The gates' bottlenecks have ``C // reduction`` channels. Default 20, which gives
            ResNet-50 the published 28.4 M parameters; 4 in the released CIFAR networks.

    Raises:
        ValueError: ``reduction`` is not from 1 to C.
    """

    placement = "branch"
    shared = ("cell",)
    starts_as_identity = False

    def __init__(self, channels: int, reduction: int = 20) -> None:
        super().__init__(channels)
        self.cell = ChannelCell(channels, reduction, output_gate=True)

    def forward(
        self, x: Tensor, shortcut: Tensor, state: CellState | None
    ) -> tuple[Tensor, CellState]:
        """See :class:`LayerAttention`; ``x`` is the residual branch, the state the LSTM's."""
        state = self.cell(pooled(x), state)
        return x * state[0].to(x.dtype)[:, :, None, None], state
