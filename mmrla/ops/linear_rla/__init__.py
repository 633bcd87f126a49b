"""Linear recurrent layer attention as one operation (appendix A.3 of the paper)."""

from __future__ import annotations

from torch import Tensor

from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.linear_rla.naive import LinearRLAState, linear_rla_naive
from mmrla.ops.memory import check_one_device
from mmrla.ops.query_key import check_feature_map, check_head_channels


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


linear_rla = Op("linear_rla", _check, [Backend("naive", linear_rla_naive, always)])
"""``linear_rla(query, key, value, state, head_channels)``.

``U_t = U_{t-1} + phi(K_t)^T V_t``, ``Z_t = Z_{t-1} + phi(K_t)^T``,
``o_t = phi(Q_t) U_t / (phi(Q_t) Z_t)``; shapes and errors as in
:func:`mmrla.ops.linear_rla.naive.linear_rla_naive`.
"""

__all__ = ["LinearRLAState", "linear_rla"]
