"""Multi-head recurrent layer attention.

Paper: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql. If the paper and its released code differ, the released
behaviour is the default here; see each class.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmrla.layers.layer_attention import Retrieval
from mmrla.layers.query_key_value import QueryKeyValue
from mmrla.ops import (
    BaseGroup,
    BaseWeights,
    LightWeights,
    Op,
    mrla_base,
    mrla_base_tail,
    mrla_light,
    mrla_light_tail,
    query_key,
)
from mmrla.ops.checks import VALUE_ACTS
from mmrla.ops.reference import gated_value


class MRLALight(QueryKeyValue):
    """MRLA-light (Eq. 8 and 10): linear in depth.

    ``o_t = lambda_t * o_{t-1} + sigmoid(<q_t, k_t>_head / sqrt(d_k)) * DWConv3x3(x_t)``

    Args:
        channels: C of the layer before it.
        head_channels: d_k, channels of one head, which divides C; ``'all'``: C, one head; 1: CRLA.
        kernel_size: Of the Conv1D of query and key, odd. Default: from C as in ECA-Net.
        recurrence: What is used as ``o_{t-1}``. ``'shortcut'`` (the released code): the layer's
            identity branch, which a group's first layer has too. ``'output'`` (literal Eq. 8): the
            previous layer's o, zero in a group's first layer. None: nothing, so no previous
            information and no lambda.
        value_act: ``'gelu'`` applies it to the value, as vision transformers do (Algorithm 4);
            None, nothing.
        fixed_lambda: A constant value of all of lambda_t, which is then not learned.
        projection: ``'conv1d'`` or ``'fc'``, see :class:`QueryKeyValue`.
        value_conv: Whether the value is convolved, see :class:`QueryKeyValue`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: As :class:`QueryKeyValue`; an unknown ``recurrence`` or ``value_act``, or a
            ``fixed_lambda`` without recurrence.
    """

    RECURRENCES = ("shortcut", "output", None)
    lambda_t: Tensor | None
    scores_sum_to_one = False
    tail_op: Op | None = mrla_light_tail

    def __init__(
        self, channels: int, head_channels: int | str = 32, kernel_size: int | None = None,
        recurrence: str | None = "shortcut", value_act: str | None = None,
        fixed_lambda: float | None = None, projection: str = "conv1d", value_conv: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(channels, head_channels, kernel_size, projection, value_conv)
        if recurrence not in self.RECURRENCES:
            raise ValueError(f"recurrence must be one of {self.RECURRENCES}, got {recurrence!r}")
        if value_act not in VALUE_ACTS:
            raise ValueError(f"value_act must be one of {VALUE_ACTS}, got {value_act!r}")
        self.recurrence = recurrence
        self.uses_shortcut = recurrence == "shortcut"
        if fixed_lambda is not None:
            if isinstance(fixed_lambda, bool) or not isinstance(fixed_lambda, (int, float)):
                raise TypeError(f"fixed_lambda must be a number or None, got {fixed_lambda!r}")
            if not math.isfinite(fixed_lambda):
                raise ValueError(f"fixed_lambda must be finite, got {fixed_lambda!r}")
            if recurrence is None:
                raise ValueError(
                    f"fixed_lambda needs a recurrence, got {fixed_lambda=} with recurrence=None"
                )
        self.value_act = value_act
        self.fixed_lambda = fixed_lambda
        if recurrence is None:
            self.lambda_t = None
        elif fixed_lambda is None:
            self.lambda_t = nn.Parameter(torch.randn(channels))
        else:
            fixed = torch.full((channels,), float(fixed_lambda))
            self.register_buffer("lambda_t", fixed, persistent=False)

    def forward(
        self, x: Tensor, shortcut: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`LayerAttention`; the state is ``o_t`` with ``'output'``, else None."""
        previous = shortcut if self.uses_shortcut else state
        lambda_t = self.lambda_t
        if previous is None and self.fixed_lambda is None and lambda_t is not None:
            # Nothing to add yet. A zero that takes no memory keeps lambda_t in the graph, so that
            # DDP sees every parameter used.
            previous = x.new_zeros(1).expand_as(x)
        lambda_t = None if previous is None else lambda_t
        if self.calls_parts:
            o = gated_value(
                *self.query_key_of(x), self.value_of(x), previous, lambda_t, self.head_channels,
                self.value_act,
            )  # fmt: skip
        else:
            o = mrla_light(
                x, previous, self.query.weight, self.key.weight, self.value_weight, lambda_t,
                self.head_channels, self.value_act,
            )  # fmt: skip
        return o, (o if self.recurrence == "output" else None)

    @property
    def scores_label(self) -> str:
        """See :class:`LayerAttention`."""
        label = "mean |beta x gate| of a head's channels"
        # What is drawn holds for Eq. 8; the released recurrence is another one.
        return label + (", shortcut read as previous o" if self.uses_shortcut else "")

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: Any, memory: Tensor | None = None
    ) -> Retrieval:
        """The weights of Eq. 8, unrolled: ``o_t = sum_s beta_{t-s} * gate_s * V_s``.

        ``beta_{t-s} = lambda_t * ... * lambda_{s+1}`` (1 for s = t) has one signed value per
        channel; ``memory`` holds these weights, ``[B, C, t]``. A head's score is the mean of their
        absolute values over its channels. They do not sum to one.

        With ``recurrence='output'`` this is exactly what ``forward`` computes. With ``'shortcut'``
        only the last weight, the gate of the layer's own value, is exact: lambda multiplies the
        layer's shortcut, which contains the previous layer's normalised o and that layer's own
        output. The weights then show how much of earlier layers lambda passes on if the shortcut is
        treated as the previous o, as in the paper; the group's first shortcut has no score.

        Args:
            x: As in :meth:`forward`.
            shortcut: Unused.
            state: Unused.
            memory: The previous layer's weights, ``[B, C, t - 1]``.
        """
        query, key = map(self.heads, query_key(x, self.query.weight, self.key.weight))
        gate = torch.sigmoid((query * key).sum(-1) / math.sqrt(self.head_channels))
        weights = gate.repeat_interleave(self.head_channels, dim=1)[..., None]
        if memory is not None:
            # Without a recurrence nothing of earlier layers comes through.
            scale = 0 if self.lambda_t is None else self.lambda_t.to(weights.dtype)[:, None]
            weights = torch.cat([scale * memory, weights], dim=-1)
        scores = weights.abs().unflatten(1, (-1, self.head_channels)).mean(2)
        return Retrieval(query, scores, weights)

    def fuses_tail(
        self, z: Tensor, norm: nn.Module, out_norm: nn.Module, act: type[nn.Module] = nn.Identity
    ) -> bool:
        """See :class:`LayerAttention`; only with the shortcut and without ``value_act``."""
        fits = self.uses_shortcut and self.value_act is None
        return fits and super().fuses_tail(z, norm, out_norm, act)

    def tail_weights(self, query: Tensor, key: Tensor, value: Tensor) -> LightWeights:
        """See :class:`QueryKeyValue`."""
        assert self.lambda_t is not None
        return LightWeights(query, key, value, self.lambda_t, self.head_channels)

    def run_tail(self, state: None, *args: Any) -> tuple[Tensor, None]:
        """See :class:`QueryKeyValue`."""
        return mrla_light_tail(*args), None

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        shown = f"{super().extra_repr()}, recurrence={self.recurrence!r}"
        return shown if self.fixed_lambda is None else f"{shown}, fixed_lambda={self.fixed_lambda}"


class MRLABase(QueryKeyValue):
    """MRLA-base (Eq. 6 and 9): attention over all layers of the group so far.

    ``o_t = sum_{s<=t} softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s``; keys and values of earlier
    layers are reused unchanged.

    Args:
        channels: C of the layer before it; the same in a whole group.
        head_channels: d_k, channels of one head, which divides C; ``'all'``: C, one head. 16 in
            the released code, 32 in the paper.
        kernel_size: Of the Conv1D of query and key, odd. Default: from C as in ECA-Net.
        recompute_values: Keep no value for backward if the end of a residual block runs as one
            fused operation: backward recomputes each, so only one group's values exist at a time.
            This trades time for memory. It has no effect with ``with_cp`` or inside torch.compile,
            which decides itself what to keep.
        projection: ``'conv1d'`` or ``'fc'``, see :class:`QueryKeyValue`.
        value_conv: Whether the value is convolved, see :class:`QueryKeyValue`.

    Raises:
        TypeError: As :class:`QueryKeyValue`.
        ValueError: As :class:`QueryKeyValue`.
    """

    tail_op: Op | None = mrla_base_tail

    def __init__(
        self, channels: int, head_channels: int | str = 16, kernel_size: int | None = None,
        recompute_values: bool = False, projection: str = "conv1d", value_conv: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(channels, head_channels, kernel_size, projection, value_conv)
        self.recompute_values = recompute_values

    def forward(
        self, x: Tensor, shortcut: Tensor, state: BaseGroup | None
    ) -> tuple[Tensor, BaseGroup]:
        """See :class:`LayerAttention`; the state holds the keys and values of the group."""
        query, key = self.query_key_of(x)
        state = (BaseGroup() if state is None else state).with_layer(key, self.value_of(x))
        return mrla_base(query, state.keys, state.values, self.head_channels), state

    def retrieval(
        self, x: Tensor, shortcut: Tensor, state: BaseGroup | None, memory: None = None
    ) -> Retrieval:
        """See :class:`LayerAttention`; the scores are the softmax of Eq. 9."""
        query, key = query_key(x, self.query.weight, self.key.weight)
        keys = (key,) if state is None else (*state.keys, key)
        return self.softmax_retrieval(query, keys)

    def tail_weights(self, query: Tensor, key: Tensor, value: Tensor) -> BaseWeights:
        """See :class:`QueryKeyValue`."""
        return BaseWeights(query, key, value, self.head_channels)

    def run_tail(self, state: BaseGroup | None, *args: Any) -> tuple[Tensor, BaseGroup]:
        """See :class:`QueryKeyValue`."""
        group = BaseGroup() if state is None else state
        return mrla_base_tail(*args, group, self.recompute_values)
