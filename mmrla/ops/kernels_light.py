"""MRLA-light's block end by Triton kernels: forward and backward on the host.

N is the size of a map, y and o are never stored (:mod:`mmrla.ops.kernels_light_attention`). Bytes
moved and launches, by the norms' statistics (the block's norm, the attention's):

=============== ============== ===============
norms           forward        backward
=============== ============== ===============
batch, batch    8 N, 5         17 N, 5
batch, frozen   6 N, 4         12 N, 4
frozen, batch   7 N, 4         13 N, 5
frozen, frozen  5 N, 3         8 N, 4
=============== ============== ===============
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmrla.ops.blocks import (
    Plan,
    aligned,
    buffer,
    channels_are_last,
    multiprocessors,
    plan_for,
    power_of_two,
)
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
"""Partial sums that such a program reads at once, if there are more than a few per channel."""
FEW = 4
FIELD_COUNT: int = FIELDS.value


class LightPlan(NamedTuple):
    """What follows from shape, layout and weights; worked out once."""

    plan: Plan
    heads: int
    gate_grid: tuple[int, int]
    gate_options: dict[str, int]
    """Compile-time constants of the gate's kernels."""
    chunks: int
    """Sums over pixels that gate_forward reads at once."""
    dot_chunks: int
    """Partial sums that gate_backward reads at once."""
    taps: int
    """Room for the taps of W_q, and of W_k."""
    dots: int
    """Rows of partial sums of the gate's gradient per sample."""
    kept: list[int]
    """Numbers of floats: both norms' coefficients, means, queries, keys, gate."""
    forward_scratch: list[int]
    """Partial sums of both norms, sums over pixels."""
    backward_scratch: list[int]
    """Partial sums of W_v and the norm, of the other norm, of lambda_t, dots, gradients of queries
    and keys, of taps."""
    grads: list[int]
    """Both norms' parameters, value, lambda_t, taps."""
    grad_views: list[int]
    """The same floats parameter by parameter, each after the floats that it leaves out."""


@functools.lru_cache(maxsize=4096)
def light_plan(
    shape: torch.Size, last: bool, sms: int, head_channels: int, query: int, key: int
) -> LightPlan:
    """See :class:`LightPlan`; ``query`` and ``key`` are kernel sizes."""
    plan = plan_for(*shape, last, sms)
    B, C, _, _ = shape
    heads = C // head_channels
    width = power_of_two(head_channels)
    heads_per_program = max(1, HEAD_CHANNELS // width)
    most = max(1, CHUNK_ELEMENTS // (heads_per_program * width))
    options = dict(HEADS=heads_per_program, WIDTH=width, QUERY=query, KEY=key)
    head_blocks = triton.cdiv(heads, heads_per_program)
    taps = power_of_two(max(query, key))
    walk, ring = plan.short_walk, plan.ring_walk
    dots = walk.groups * walk.strips
    chunks, dot_chunks = (min(most, FEW if n <= 2 * FEW else most) for n in (plan.chunks, dots))
    two, nine, one = aligned([2 * C, 9 * C, C])
    return LightPlan(
        plan, heads, (B, head_blocks), options, chunks, dot_chunks, taps, dots,
        kept=aligned([COEFFICIENTS * C, COEFFICIENTS * C, B * C, B * C, B * C, B * heads]),
        forward_scratch=aligned(
            [2 * C * plan.flat.programs, 2 * C * plan.walk.programs, B * C * plan.chunks]
        ),
        backward_scratch=aligned([
            (FIELD_COUNT + 2) * C * ring.programs, 2 * C * walk.programs, C * walk.programs,
            B * C * dots,
            B * C, B * C, 2 * taps * B * head_blocks,
        ]),
        grads=[two, two, nine, one, 2 * taps],
        grad_views=[
            0, C, 0, C, two - 2 * C, C, 0, C, two - 2 * C, 9 * C, nine - 9 * C, C,
            one - C, query, taps - query, key, taps - key,
        ],
    )  # fmt: skip


def light_plan_of(z: Tensor, w: LightWeights) -> LightPlan:
    """The plan for maps like ``z``."""
    return light_plan(
        z.shape, channels_are_last(z), multiprocessors(z.device), w.head_channels,
        w.query.shape[-1], w.key.shape[-1],
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
    light = light_plan_of(z, w)
    plan, heads, D = light.plan, light.heads, w.head_channels
    B, C, H, W = plan.sizes
    flat, walk = plan.flat, plan.walk
    kept = buffer(z.device, light.kept)
    coefficients, out_coefficients, means, queries, keys, gate = kept.split_with_sizes(light.kept)
    scratch = buffer(z.device, light.forward_scratch)
    part, out_part, sums = scratch.split_with_sizes(light.forward_scratch)
    if norm.batch:
        channel_sums[flat.grid](
            z, part, B, C, plan.pixels, plan.middle, flat.programs, **flat.options
        )
    pixel_sums[plan.chunk_grid](
        z, s, part, coefficients, *norm.tensors, sums,
        B, C, plan.pixels, plan.middle, plan.chunk_grid[0], flat.programs, plan.chunks, plan.chunk,
        plan.count, norm.momentum, norm.eps, BATCH=norm.batch, **flat.options,
    )  # fmt: skip
    gate_forward[light.gate_grid](
        sums, w.query, w.key, gate, means, queries, keys,
        z, s, coefficients, w.value, w.lambda_t, out_coefficients,
        C, H, W, heads, D, plan.chunks, D**-0.5,
        CHUNKS=light.chunks, KEEP=keep, OUT_BATCH=out_norm.batch, LAST=plan.last,
        **light.gate_options,
    )  # fmt: skip
    out = torch.empty_like(z)
    for mode in (OUT_SUMS, OUT) if out_norm.batch else (OUT,):
        attention[walk.grid](
            z, s, z, out, out_part, None, None, coefficients, gate, w.value, w.lambda_t, drop,
            out_part, *out_norm.tensors, out_coefficients, None,
            *walk.sizes, heads, D,
            walk.programs, plan.count, out_norm.momentum, out_norm.eps,
            MODE=mode.value, OUT_BATCH=out_norm.batch, KEEP=keep, **walk.options,
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
    light = light_plan_of(z, w)
    plan, heads, D = light.plan, light.heads, w.head_channels
    B, C, _, _ = plan.sizes
    flat, walk, ring = plan.flat, plan.short_walk, plan.ring_walk
    options, taps = light.gate_options, light.taps
    views = saved[0].split_with_sizes(light.kept)
    coefficients, out_coefficients, means, queries, keys, gate = views
    scratch = buffer(z.device, light.backward_scratch)
    views = scratch.split_with_sizes(light.backward_scratch)
    part, out_part, lambda_part, dots, grad_queries, grad_keys, tap_part = views
    grads = buffer(z.device, light.grads)
    views = grads.split_with_sizes(light.grads)
    grad_norm, grad_out_norm, grad_value, grad_lambda, grad_taps = views
    go = torch.empty_like(z) if out_norm.batch else grad
    gm = torch.empty_like(z)
    gs = go if norm.batch and out_norm.batch else torch.empty_like(z)
    for mode in (GRAD_SUMS, GRADS) if out_norm.batch else (GRADS,):
        attention[walk.grid](
            z, s, grad, go, out_part, lambda_part, dots, coefficients, gate, w.value, w.lambda_t,
            drop, out_part, None, None, None, None, out_coefficients, grad_out_norm,
            *walk.sizes, heads, D, walk.programs, plan.count, 0.0, 0.0,
            MODE=mode.value, OUT_BATCH=out_norm.batch, KEEP=True, **walk.options,
        )  # fmt: skip
    gate_backward[light.gate_grid](
        dots, means, queries, keys, grad_queries, grad_keys, tap_part,
        C, heads, D, light.dots, D**-0.5,
        CHUNKS=light.dot_chunks, TAPS=taps, **options,
    )  # fmt: skip
    input_grads[ring.grid](
        go, z, s, grad, gm, gs, part, coefficients, gate, w.value, w.lambda_t, drop,
        out_coefficients, grad_queries, grad_keys, w.query, w.key,
        *ring.sizes, heads, D,
        BATCH=norm.batch, OUT_BATCH=out_norm.batch,
        QUERY=options["QUERY"], KEY=options["KEY"], **ring.options,
    )  # fmt: skip
    parameters = (
        part, ring.programs, coefficients, grad_value, grad_lambda, grad_norm,
        None if out_norm.batch else out_part, walk.programs, out_coefficients, grad_out_norm,
        tap_part, B * light.gate_grid[1], grad_taps,
    )  # fmt: skip
    last = dict(
        FIELDS=FIELD_COUNT, TAPS=2 * taps, lambda_part=lambda_part, lambda_rows=walk.programs
    )
    if norm.batch:
        input_norm_grads[flat.grid](
            gm, z, go, gm, gs, w.lambda_t, drop, *parameters,
            B, C, plan.pixels, flat.programs, plan.count,
            OUT_BATCH=out_norm.batch, **last, **flat.options,
        )  # fmt: skip
    else:
        parameter_grads[(FIELD_COUNT + 4, flat.grid[1])](
            *parameters, C, ROWS=flat.options["ROWS"], BC=flat.options["BC"], **last
        )
    w1, b1, w2, b2, value, lambda_t, query, key = grads.split_with_sizes(light.grad_views)[1::2]
    return (
        gm, gs, w1, b1, query.view(w.query.shape), key.view(w.key.shape),
        value.view(w.value.shape), lambda_t, w2, b2,
    )  # fmt: skip
