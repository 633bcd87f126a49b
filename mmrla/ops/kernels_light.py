"""MRLA-light's block end by Triton kernels: forward and backward on the host.

N is the size of a map, y and o are never stored (:mod:`mmrla.ops.kernels_light_attention`). Bytes
moved and launches, by the norms' statistics (the block's norm, the attention's):

=============== ============== ===============
norms           forward        backward
=============== ============== ===============
batch, batch    8 N, 5         17 N, 5
batch, frozen   6 N, 4         13 N, 4
frozen, batch   7 N, 4         13 N, 5
frozen, frozen  5 N, 3         8 N, 4
=============== ============== ===============
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrla.ops.blocks import Plan, plan_of, power_of_two
from mmrla.ops.kernels import (
    COEFFICIENTS,
    channel_sums,
    input_norm_grads,
    parameter_grads,
    pixel_sums,
)
from mmrla.ops.kernels_light_attention import (
    GRAD_SUMS,
    GRADS,
    OUT,
    OUT_SUMS,
    attention,
    gate_backward,
    gate_forward,
)
from mmrla.ops.kernels_light_grads import FIELDS, input_grads
from mmrla.ops.reference import LightWeights, Norm

HEAD_CHANNELS = 128
"""Channels per program of the gate's kernels, if a head has no more."""
CHUNK_ELEMENTS = 4096
"""Partial sums that such a program reads at once."""


def floats(device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    """Float32 vectors cut from one allocation, each at a multiple of 16 bytes."""
    rounded = [-(-size // 4) * 4 for size in sizes]
    return torch.empty(sum(rounded), dtype=torch.float32, device=device).split(rounded)


def kept_sizes(plan: Plan, head_channels: int) -> tuple[int, ...]:
    """Sizes of what forward keeps.

    Both norms' coefficients, means, queries, keys and the gate.
    """
    B, C, _, _ = plan.sizes
    return COEFFICIENTS * C, COEFFICIENTS * C, B * C, B * C, B * C, B * (C // head_channels)


def split_kept(kept: Tensor, plan: Plan, head_channels: int) -> tuple[Tensor, ...]:
    """The views of :func:`kept_sizes`."""
    return kept.split([-(-size // 4) * 4 for size in kept_sizes(plan, head_channels)])


def head_options(w: LightWeights) -> dict[str, int]:
    """Compile-time constants of the gate's kernels."""
    width = power_of_two(w.head_channels)
    heads = max(1, HEAD_CHANNELS // width)
    return dict(
        D=w.head_channels, HEADS=heads, WIDTH=width,
        CHUNKS=max(1, CHUNK_ELEMENTS // (heads * width)),
        QUERY=w.query.shape[-1], KEY=w.key.shape[-1],
    )  # fmt: skip


def light_forward(
    z: Tensor,
    s: Tensor,
    norm: Norm,
    w: LightWeights,
    out_norm: Norm,
    drop: Tensor | None,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``out`` of :func:`mmrla.ops.reference.light_tail_reference`, and what backward needs.

    Args:
        z: ``[B, C, H, W]``, dense in channels_last or NCHW.
        s: The shortcut, like ``z``.
        norm: Moves its running statistics if it takes the batch's.
        w: The layer's weights.
        out_norm: As ``norm``.
        drop: ``[B]`` in float32, or None.
        keep: Whether backward will run.

    Returns:
        ``out``, and a tuple for :func:`light_backward`: empty without ``keep``.
    """
    plan = plan_of(z)
    B, C, H, W = plan.sizes
    flat, walk = plan.flat, plan.walk
    D = w.head_channels
    heads = C // D
    kept = torch.empty(
        sum(-(-size // 4) * 4 for size in kept_sizes(plan, D)),
        dtype=torch.float32, device=z.device,
    )  # fmt: skip
    coefficients, out_coefficients, means, queries, keys, gate = split_kept(kept, plan, D)
    part, out_part, sums = floats(
        z.device, flat.programs * 2 * C, walk.programs * 2 * C, B * plan.chunks * C
    )
    if norm.batch:
        channel_sums[flat.grid](
            z, part, B, C, plan.pixels, plan.middle, flat.programs, **flat.options
        )
    pixel_sums[plan.chunk_grid](
        z, s, part, coefficients, *norm.tensors, sums,
        B, C, plan.pixels, plan.middle, plan.chunk_grid[0], flat.programs, plan.chunks, plan.chunk,
        plan.count, norm.momentum, norm.eps, BATCH=norm.batch, **flat.options,
    )  # fmt: skip
    options = head_options(w)
    gate_forward[(B, -(-heads // options["HEADS"]))](
        sums, w.query, w.key, gate, means, queries, keys,
        z, s, coefficients, w.value, w.lambda_t, out_coefficients,
        C, H, W, heads, plan.chunks, D**-0.5,
        KEEP=keep, OUT_BATCH=out_norm.batch, LAST=plan.last, **options,
    )  # fmt: skip
    out = torch.empty_like(z)
    for mode in (OUT_SUMS, OUT) if out_norm.batch else (OUT,):
        attention[walk.grid](
            z, s, z, out, out_part, None, coefficients, gate, w.value, w.lambda_t, drop,
            out_part, *out_norm.tensors, out_coefficients, None,
            *walk.sizes, heads,
            walk.programs, plan.count, out_norm.momentum, out_norm.eps,
            MODE=mode.value, OUT_BATCH=out_norm.batch, KEEP=keep, D=D, **walk.options,
        )  # fmt: skip
    return out, (kept,) if keep else ()


def light_backward(
    grad: Tensor,
    z: Tensor,
    s: Tensor,
    norm: Norm,
    w: LightWeights,
    out_norm: Norm,
    drop: Tensor | None,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients of z, s and the parameters.

    Args:
        grad: Gradient of ``out``, like ``z``.
        z: As in :func:`light_forward`, like all that follow.
        s: The shortcut.
        norm: The block's.
        w: The layer's weights.
        out_norm: The attention's.
        drop: ``[B]`` in float32, or None.
        saved: What forward returned.

    Returns:
        Gradients of z and s like those, and in float32 those of the norm's weight and bias, of
        query, key, value and lambda_t and of the other norm's weight and bias.
    """
    plan = plan_of(z)
    B, C, _, _ = plan.sizes
    flat, walk, ring = plan.flat, plan.short_walk, plan.ring_walk
    D = w.head_channels
    heads = C // D
    options = head_options(w)
    head_blocks = -(-heads // options["HEADS"])
    taps = power_of_two(max(options["QUERY"], options["KEY"]))
    rows = walk.groups * walk.strips
    coefficients, out_coefficients, means, queries, keys, gate = split_kept(saved[0], plan, D)
    fields = FIELDS.value + 2
    part, out_part, dots, grad_queries, grad_keys, tap_part = floats(
        z.device, ring.programs * fields * C, walk.programs * 2 * C, B * rows * C, B * C, B * C,
        B * head_blocks * 2 * taps,
    )  # fmt: skip
    grad_norm, grad_value, grad_lambda, grad_out_norm, grad_taps = floats(
        z.device, 2 * C, 9 * C, C, 2 * C, 2 * taps
    )
    go = torch.empty_like(z) if out_norm.batch else grad
    gm = torch.empty_like(z)
    gs = go if norm.batch and out_norm.batch else torch.empty_like(z)
    for mode in (GRAD_SUMS, GRADS) if out_norm.batch else (GRADS,):
        attention[walk.grid](
            z, s, grad, go, out_part, dots, coefficients, gate, w.value, w.lambda_t, drop,
            out_part, None, None, None, None, out_coefficients, grad_out_norm,
            *walk.sizes, heads, walk.programs, plan.count, 0.0, 0.0,
            MODE=mode.value, OUT_BATCH=out_norm.batch, KEEP=True, D=D, **walk.options,
        )  # fmt: skip
    gate_backward[(B, head_blocks)](
        dots, means, queries, keys, grad_queries, grad_keys, tap_part,
        C, heads, rows, D**-0.5, TAPS=taps, **options,
    )  # fmt: skip
    input_grads[ring.grid](
        go, z, s, grad, gm, gs, part, coefficients, gate, w.value, w.lambda_t, drop,
        out_coefficients, grad_queries, grad_keys, w.query, w.key,
        *ring.sizes, heads,
        BATCH=norm.batch, OUT_BATCH=out_norm.batch, D=D,
        QUERY=options["QUERY"], KEY=options["KEY"], **ring.options,
    )  # fmt: skip
    parameters = (
        part, ring.programs, coefficients, grad_value, grad_lambda, grad_norm,
        None if out_norm.batch else out_part, walk.programs, out_coefficients, grad_out_norm,
        tap_part, B * head_blocks, grad_taps,
    )  # fmt: skip
    constants = dict(FIELDS=FIELDS.value, TAPS=2 * taps)
    if norm.batch:
        input_norm_grads[flat.grid](
            gm, z, go, gm, gs, w.lambda_t, drop, *parameters,
            B, C, plan.pixels, flat.programs, plan.count,
            OUT_BATCH=out_norm.batch, **constants, **flat.options,
        )  # fmt: skip
    else:
        parameter_grads[(FIELDS.value + 3, flat.grid[1])](
            *parameters, C, ROWS=flat.options["ROWS"], BC=flat.options["BC"], **constants
        )
    return (
        gm, gs, grad_norm[:C], grad_norm[C : 2 * C],
        grad_taps[: w.query.shape[-1]].view(w.query.shape),
        grad_taps[taps : taps + w.key.shape[-1]].view(w.key.shape),
        grad_value[: 9 * C].view(w.value.shape), grad_lambda[:C],
        grad_out_norm[:C], grad_out_norm[C : 2 * C],
    )  # fmt: skip
