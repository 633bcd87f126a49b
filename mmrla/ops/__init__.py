"""Functions on tensors. This package imports only torch."""

from mmrla.ops import checks, fused, reference
from mmrla.ops.dispatch import Backend, Op, Selection, always
from mmrla.ops.linear_rla import linear_rla
from mmrla.ops.reference import (
    BaseGroup,
    BaseWeights,
    LightWeights,
    Norm,
    eca_kernel_size,
    query_key,
)

mrla_light = Op(
    "mrla_light", checks.check_light, [Backend("naive", reference.light_reference, always)]
)
"""``mrla_light(x, previous, query_weight, key_weight, value_weight, lambda_t, head_channels,
value_act=None)``.

``o = lambda_t * previous + sigmoid(<q, k>_head / sqrt(d_k)) * DWConv3x3(x)``; shapes and errors as
in :func:`mmrla.ops.reference.light_reference`.
"""

mrla_base = Op("mrla_base", checks.check_base, [Backend("naive", reference.base_reference, always)])
"""``mrla_base(query, keys, values, head_channels)``.

``o_t = sum_s softmax_s(<q_t, k_s>_head / sqrt(d_k)) * V_s``; shapes and errors as in
:func:`mmrla.ops.reference.base_reference`.
"""

mla = Op("mla", checks.check_mla, [Backend("naive", reference.mla_reference, always)])
"""``mla(features, query_weight, key_weight, value_weight, head_channels)``.

``o_t = sum_s softmax_s(<f_Q(X_t), f_K(X_s)>_head / sqrt(d_k)) * f_V(X_s)`` with one layer's f_Q,
f_K and f_V; shapes and errors as in :func:`mmrla.ops.reference.mla_reference`.
"""

mrla_light_tail = Op(
    "mrla_light_tail",
    checks.check_light_tail,
    [
        Backend("fused", fused.light_tail, fused.unsupported_reason),
        Backend("naive", reference.light_tail_reference, always),
    ],
)
"""``mrla_light_tail(z, shortcut, norm, weights, out_norm, drop=None)``.

``y = relu(norm(z) + shortcut)``, ``out = y + drop * out_norm(mrla_light(y, shortcut))``; arguments
and result as in :func:`mmrla.ops.reference.light_tail_reference`; ``backend=`` forces an
implementation.
"""

mrla_base_tail = Op(
    "mrla_base_tail",
    checks.check_base_tail,
    [
        Backend("fused", fused.base_tail, fused.unsupported_reason),
        Backend("naive", reference.base_tail_reference, always),
    ],
)
"""``mrla_base_tail(z, shortcut, norm, weights, out_norm, drop=None, group=BaseGroup(),
recompute=False)``.

``y = relu(norm(z) + shortcut)``, ``out = y + drop * out_norm(o)`` with o retrieved from the values
so far; arguments and result as in :func:`mmrla.ops.reference.base_tail_reference`.
"""

__all__ = [
    "Backend",
    "BaseGroup",
    "BaseWeights",
    "LightWeights",
    "Norm",
    "Op",
    "Selection",
    "eca_kernel_size",
    "linear_rla",
    "mla",
    "mrla_base",
    "mrla_base_tail",
    "mrla_light",
    "mrla_light_tail",
    "query_key",
]
