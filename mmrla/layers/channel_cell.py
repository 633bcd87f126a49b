"""The recurrent cells over channels of DIANet and of dynamic layer attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrla.layers.checks import check_count

CellState = tuple[Tensor, Tensor]
"""Hidden and cell state, ``[B, C]`` each."""


def pooled(x: Tensor) -> Tensor:
    """``GAP(x)``, ``[B, C]``, in the dtype of ``x``."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ChannelCell(nn.Module):
    """An LSTM-like cell whose gates come from bottlenecks as narrow as in an SE block.

    ``gates = W2 relu(W1 y) + U2 relu(U1 h)``; ``c' = sigmoid(f) * c + sigmoid(i) * tanh(g)``;
    ``h' = sigmoid(c')``, times ``sigmoid(o)`` with an output gate. The hidden state is a sigmoid
    instead of an LSTM's tanh, because it scales channels.

    Args:
        channels: C.
        reduction: The bottlenecks have ``C // reduction`` channels.
        output_gate: Whether there is a gate o, as in the DIA unit but not in the dynamic sharing
            unit.

    Raises:
        TypeError: ``reduction`` is not an int.
        ValueError: It is not from 1 to C.
    """

    def __init__(self, channels: int, reduction: int, output_gate: bool) -> None:
        super().__init__()
        check_count("reduction", reduction)
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be from 1 to {channels=}, got {reduction=}")
        self.output_gate = output_gate
        self.from_input = self._bottleneck(channels, reduction)
        self.from_hidden = self._bottleneck(channels, reduction)

    def _bottleneck(self, channels: int, reduction: int) -> nn.Sequential:
        gates = 4 if self.output_gate else 3
        middle = channels // reduction
        return nn.Sequential(
            nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, gates * channels)
        )

    def forward(self, y: Tensor, state: CellState | None) -> CellState:
        """Map the channel means ``[B, C]`` and the state, None for zeros, to the new state."""
        hidden, cell = (torch.zeros_like(y),) * 2 if state is None else state
        gates = self.from_input(y) + self.from_hidden(hidden)
        write, forget, candidate, *output = gates.chunk(4 if self.output_gate else 3, dim=1)
        cell = forget.sigmoid() * cell + write.sigmoid() * candidate.tanh()
        hidden = cell.sigmoid()
        return (output[0].sigmoid() * hidden if output else hidden), cell
