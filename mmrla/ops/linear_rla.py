"""Linear recurrent layer attention as one operation (appendix A.3 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrla.ops.checks import check_feature_map, check_head_channels, check_one_device
from mmrla.ops.dispatch import Backend, Op, always

LinearRLAState = tuple[Tensor, Tensor]
"""``U_t``, ``[B, C / d_k, d_k, d_k, H, W]``, and ``Z_t``, ``[B, C / d_k, d_k]``."""


def feature_map_of(x: Tensor) -> Tensor:
    """``phi(x) = elu(x) + 1``, as ``exp(min(x, 0)) + max(x, 0)``.

    The same function, but positive where ``elu(x) + 1`` rounds to zero, so that the following
    quotient is defined.
    """
    return x.clamp(max=0).exp() + x.relu()


def linear_rla_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearRLAState | None,
    head_channels: int,
) -> tuple[Tensor, LinearRLAState]:
    """One step of the recurrence of A.3, for each head of d_k channels.

    ``U_t = U_{t-1} + phi(k_t)^T V_t``, ``Z_t = Z_{t-1} + phi(k_t)``,
    ``o_t = phi(q_t) U_t / (phi(q_t) Z_t)``. The state does not grow along a group of layers, but is
    d_k times as large as a value. It is kept in float32 or wider, also under autocast.

    Args:
        query: The layer's query, ``[B, C]``.
        key: Its key, ``[B, C]``.
        value: Its value, ``[B, C, H, W]``.
        state: State from the previous layer, None for a group's first.
        head_channels: d_k; divides C. C is one head, 1 is channel-wise.

    Returns:
        o_t, shaped like ``value`` and in its dtype, and the new state.
    """
    dtype = torch.promote_types(value.dtype, query.dtype)
    heads = (-1, head_channels)
    with torch.autocast(value.device.type, enabled=False):
        phi_query = feature_map_of(query.to(dtype)).unflatten(1, heads)
        phi_key = feature_map_of(key.to(dtype)).unflatten(1, heads)
        values = value.to(dtype).unflatten(1, heads).flatten(3).flatten(2)  # [B, heads, d_k * H*W]
        rows, column = values.flatten(0, 1)[:, None], phi_key.flatten(0, 1)[:, :, None]
        if state is None:
            u, z = torch.bmm(column, rows), phi_key
        else:
            u = torch.baddbmm(state[0].to(dtype).flatten(3).flatten(0, 1), column, rows)
            z = state[1] + phi_key
        numerator = torch.bmm(phi_query.flatten(0, 1)[:, None], u)
        # All of phi underflows if queries or keys are far below zero: nothing is retrieved then.
        total = (phi_query * z).sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        o = numerator.reshape(values.shape) / total
    shape = (*z.shape, head_channels, *value.shape[2:])
    return o.reshape(value.shape).to(value.dtype), (u.reshape(shape), z)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearRLAState | None,
    head_channels: int,
) -> None:
    check_feature_map("value", value)
    batch, channels, *size = value.shape
    check_head_channels(channels, head_channels)
    for name, x in (("query", query), ("key", key)):
        if x.shape != (batch, channels):
            raise ValueError(
                f"{name} must be [B, C] with the value's B and C, got {tuple(x.shape)} and "
                f"value.shape={tuple(value.shape)}"
            )
    if state is not None:
        heads = (batch, channels // head_channels)
        shapes = ((*heads, head_channels, head_channels, *size), (*heads, head_channels))
        for name, x, shape in zip(("U", "Z"), state, shapes, strict=True):
            if x.shape != shape:
                raise ValueError(
                    f"{name} of the state must be {list(shape)} for {head_channels=} and "
                    f"value.shape={tuple(value.shape)}, got {tuple(x.shape)}"
                )
    check_one_device(query, key, value, *(state or ()))


linear_rla = Op("linear_rla", _check, [Backend("naive", linear_rla_reference, always)])
"""``linear_rla(query, key, value, state, head_channels)``.

``U_t = U_{t-1} + phi(K_t)^T V_t``, ``Z_t = Z_{t-1} + phi(K_t)^T``,
``o_t = phi(Q_t) U_t / (phi(Q_t) Z_t)``; shapes and errors as in
:func:`mmrla.ops.linear_rla.linear_rla_reference`.
"""
