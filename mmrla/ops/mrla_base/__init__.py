"""The retrieval of MRLA-base as one operation (Eq. 6 and 9, Algorithms 1 and 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmrla.ops.dispatch import Backend, Op, always
from mmrla.ops.mrla_base.naive import mrla_base_naive
from mmrla.ops.query_key import check_feature_map, check_head_channels


def _check(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], head_channels: int
) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(
            "keys and values must hold one tensor for each layer so far, at least one, got "
            f"{len(keys)} keys and {len(values)} values"
        )
    if query.dim() != 2:
        raise ValueError(f"query must be [B, C], got {tuple(query.shape)}")
    check_head_channels(query.shape[1], head_channels)
    for s, (key, value) in enumerate(zip(keys, values, strict=True)):
        check_feature_map(f"values[{s}]", value)
        if key.shape != query.shape or value.shape[:2] != query.shape:
            raise ValueError(
                f"keys[{s}] must be [B, C] and values[{s}] [B, C, H, W] with the query's B and C, "
                f"got query {tuple(query.shape)}, key {tuple(key.shape)}, "
                f"value {tuple(value.shape)}"
            )
        if value.shape != values[-1].shape:
            raise ValueError(
                "all values of a group must have one shape, got "
                f"values[{s}].shape={tuple(value.shape)} and "
                f"values[-1].shape={tuple(values[-1].shape)}"
            )
    devices = {str(t.device) for t in (query, *keys, *values)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(devices)}")


mrla_base = Op("mrla_base", _check, [Backend("naive", mrla_base_naive, always)])
"""``mrla_base(query, keys, values, head_channels)``.

``o_t = sum_s softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s``; shapes and errors as in
:func:`mmrla.ops.mrla_base.naive.mrla_base_naive`; ``backend=`` forces an implementation.
"""

__all__ = ["mrla_base"]
