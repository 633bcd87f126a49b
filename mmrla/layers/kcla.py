"""Key-correlated layer attention (KCLA): linear in depth, with a fixed-size state across stages.

Paper: Enhancing Layer Interaction Using Key-Correlated Layer Attention,
https://arxiv.org/abs/2606.28405; code https://github.com/bgx666/KCLA. For each head h of layer t,
with ``q_t = Conv1D(GAP(x_t))`` and ``k_t = Conv1D'(GAP(x_t))``:
``e_t = exp(min(||k_t|| / n_h, 10))``, ``u_t = u_{t-1} + e_t x_t``, ``z_t = z_{t-1} + e_t``,
``o_t = sigmoid(W_h (q_t . k_t / ||k_t||)) * DWConv3x3(u_t / (z_t + 1e-3))``, W_h over the heads.
``1 / n_h`` is fixed, log-uniform from 0.7 to 1 / 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmrla.layers.checks import check_bool
from mmrla.layers.layer_attention import OpenReLU, Retrieval
from mmrla.layers.query_key_value import QueryKeyValue
from mmrla.ops.kcla import (
    EPS,
    KCLAState,
    KCLAWeights,
    along_key,
    check_state,
    factors_of,
    kcla_tail,
    layer_weight,
)
from mmrla.ops.reference import channel_means, per_channel


class KCLA(QueryKeyValue):
    """Key-correlated layer attention; the host adds ``ReLU(BN(o_t))`` with ``mrla_act_cfg``.

    Between two stages ``u / z`` goes through a 1x1 convolution with one group per head and a norm,
    and gets its own key and therefore its own weight: ``x' = BN(Conv1x1(u / z))``, ``z = e'``,
    ``u = e' x'``. If no state arrives, the layer begins a group.

    Args:
        channels: C of the layer before it.
        head_channels: d_k, channels of one head, which divides C; ``'all'``: C, one head. Default
            64, as on ImageNet; 16 on CIFAR.
        kernel_size: Of the Conv1D of query and key, odd. Default: from C as in ECA-Net.
        spans_stages: Whether the state crosses from stage to stage, which ResNet hosts do. False:
            each stage begins a group, in any host.

    Raises:
        TypeError: As :class:`QueryKeyValue`, or ``spans_stages`` is not a bool.
        ValueError: As :class:`QueryKeyValue`.
    """

    scores_sum_to_one = False
    spans_stages = True
    tail_op = kcla_tail
    tail_act = OpenReLU
    key_norms: Tensor

    def __init__(
        self,
        channels: int,
        head_channels: int | str = 64,
        kernel_size: int | None = None,
        spans_stages: bool = True,
    ) -> None:
        super().__init__(channels, head_channels, kernel_size)
        check_bool("spans_stages", spans_stages)
        self.spans_stages = spans_stages
        heads = channels // self.head_channels
        self.gate = nn.Linear(heads, heads, bias=False)
        for layer in (self.query, self.key, self.gate):
            nn.init.xavier_uniform_(layer.weight)
        steps = [2 * h / max(heads - 1, 1) - 1 for h in range(heads)]
        norms = torch.tensor([0.7**step for step in steps])
        self.register_buffer("key_norms", norms, persistent=False)
        self.crossing: nn.Module | None = None
        self.crossing_key: nn.Conv1d | None = None

    def cross(self, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        """See :class:`LayerAttention`."""
        groups = math.gcd(self.channels // self.head_channels, channels)
        conv = nn.Conv2d(channels, self.channels, 1, stride, groups=groups, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.crossing = nn.Sequential(conv, norm(self.channels))
        kernel = self.key.weight.shape[-1]
        self.crossing_key = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        nn.init.xavier_uniform_(self.crossing_key.weight)

    def crossed(self, state: KCLAState | None, crossing: Any) -> KCLAState | None:
        """The state of the previous layer, converted to this stage if it is from another one."""
        if state is None or crossing is None or self.crossing_key is None:
            return state
        mean = crossing(state.mean)
        key = self.called(self.crossing_key, channel_means(mean))
        return KCLAState(mean, layer_weight(key, self.key_norms))

    def forward(
        self, x: Tensor, shortcut: Tensor, state: KCLAState | None
    ) -> tuple[Tensor, KCLAState]:
        """See :class:`LayerAttention`; the state is ``u / z`` and ``z``."""
        state = self.crossed(state, self.crossing)
        check_state(x, state, self.head_channels)
        weight, logits, _ = self._weight_and_logits(x)
        earlier = None if state is None else state.weight
        share, factor, total = factors_of(weight, logits, earlier)
        mean = x
        if state is not None:
            mean = state.mean.to(x.dtype)
            mean = mean + per_channel(share, self.head_channels).to(x.dtype) * (x - mean)
        value = self.value_of(mean)
        o = per_channel(factor, self.head_channels).to(value.dtype) * value
        return o, KCLAState(mean, total)

    def _weight_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's weight and its gate's logits, ``[B, heads]``, and the query, ``[B, C]``."""
        query, key = self.query_key_of(x)
        logits = self.called(self.gate, along_key(query, key, self.head_channels))
        return layer_weight(key, self.key_norms), logits, query

    @property
    def scores_label(self) -> str:
        """See :class:`LayerAttention`."""
        return "gate x share of the layer"

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: KCLAState | None, memory: Tensor | None = None
    ) -> Retrieval:
        """``sigmoid(...) * e_s / (z_t + 1e-3)``, the weight of ``DWConv3x3(x_s)`` in ``o_t``.

        For the stage's own layers: the state that crossed into it is one map with the remaining
        weight.

        Args:
            x: As in :meth:`forward`.
            shortcut: Unused.
            state: As in :meth:`forward`.
            memory: ``e_s`` of the stage's layers before, ``[B, heads, t - 1]``.
        """
        # On copies of the buffers: the statistics of its norm count a batch once.
        crossing = self.crossing and _without_traces(self.crossing)
        state = self.crossed(state, crossing)
        weight, logits, query = self._weight_and_logits(x)
        earlier = None if state is None else state.weight
        *_, total = factors_of(weight, logits, earlier)
        weights = weight[..., None]
        if memory is not None:
            weights = torch.cat([memory, weights], dim=-1)
        scores = (torch.sigmoid(logits) / (total + EPS))[..., None] * weights
        return Retrieval(self.heads(query), scores, weights)

    def tail_weights(self, query: Tensor, key: Tensor, value: Tensor) -> KCLAWeights:
        """See :class:`QueryKeyValue`."""
        return KCLAWeights(query, key, value, self.gate.weight, self.key_norms, self.head_channels)

    def run_tail(self, state: KCLAState | None, *args: Any) -> tuple[Tensor, KCLAState]:
        """See :class:`QueryKeyValue`."""
        return kcla_tail(*args, self.crossed(state, self.crossing))

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{super().extra_repr()}, spans_stages={self.spans_stages}"


def _without_traces(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Call ``module`` without changing its buffers."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return lambda x: functional_call(module, buffers, (x,))
