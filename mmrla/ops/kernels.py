"""Pieces of Triton kernels: norms and passes over whole maps, for both block ends.

A pass takes blocks of ``BP`` pixels and ``BC`` channels. Programs are persistent, here and in the
depthwise convs: about as many as the device runs at once, each looping over the batch. So there are
few partial sums, and the kernel that needs a total finishes it in its prologue, in a fixed order
and without atomics.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)

FACTOR = tl.constexpr(0)
OFFSET = tl.constexpr(1)
MEAN = tl.constexpr(2)
INVERSE_STD = tl.constexpr(3)
PIVOT = tl.constexpr(4)
"""Rows of a norm's coefficients ``[5, C]``: ``factor * x + offset`` normalises; sums for the
variance are taken around the pivot, a value of the map itself, so that they do not cancel."""
COEFFICIENTS = 5


@triton.jit
def over_channels(x, LAST: tl.constexpr):
    """A vector of channels, to broadcast over a block: its columns in channels_last, else rows."""
    return x[None, :] if LAST else x[:, None]


@triton.jit
def over_places(x, LAST: tl.constexpr):
    """A vector of pixels or lines, to broadcast over a block."""
    return x[:, None] if LAST else x[None, :]


@triton.jit
def sum_places(x, LAST: tl.constexpr):
    """A block summed over its pixels or lines: one value per channel."""
    return tl.sum(x, 0 if LAST else 1)


@triton.jit
def load_vector(x, c, kept, DEFAULT: tl.constexpr):
    """``x[c]`` in float32; ``DEFAULT`` if ``x`` is None."""
    if x is None:
        values = tl.full(c.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(x + c, kept, 0.0).to(tl.float32)
    return values


@triton.jit
def sum_rows(x, rows, row_stride, c, kept, ROWS: tl.constexpr):
    """The sum over ``rows`` rows of ``x[row * row_stride + c]``, ``ROWS`` at a time."""
    total = tl.zeros((ROWS, c.shape[0]), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + row * row_stride + c[None, :], (row < rows) & kept[None, :], 0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_row_pairs(x, rows, row_stride, C, c, kept, ROWS: tl.constexpr):
    """``sum_rows`` of x and of x + C, read together."""
    first_total = tl.zeros((ROWS, c.shape[0]), tl.float32)
    second_total = tl.zeros((ROWS, c.shape[0]), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = x + row * row_stride + c[None, :]
        ok = (row < rows) & kept[None, :]
        first_total += tl.load(at, ok, 0.0)
        second_total += tl.load(at + C, ok, 0.0)
    return tl.sum(first_total, 0), tl.sum(second_total, 0)


# ---- norms ---------------------------------------------------------------------------------------


@triton.jit
def finish_norm(
    part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps, coefficients,
    C, c, kept, first, BATCH: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A norm's factor and offset for some channels.

    With ``BATCH``, mean and variance come from ``part`` ``[rows, 2, C]``, the sums of ``x - pivot``
    and of its square; the programs with ``first`` move the running statistics, if there are any.
    Otherwise the running statistics are taken. With ``KEEP``, programs with ``first`` store the
    coefficients that backward needs.
    """
    if BATCH:
        total, squares = sum_row_pairs(part, rows, 2 * C, C, c, kept, ROWS)
        from_pivot = total / count
        var = tl.maximum(squares / count - from_pivot * from_pivot, 0.0, propagate_nan=NAN)
        mean = pivot + from_pivot
        if running_mean is not None and first:
            unbiased = var * (count / tl.maximum(count - 1.0, 1.0))
            old_mean = tl.load(running_mean + c, kept, 0.0).to(tl.float32)
            old_var = tl.load(running_var + c, kept, 0.0).to(tl.float32)
            tl.store(running_mean + c, old_mean + momentum * (mean - old_mean), kept)
            tl.store(running_var + c, old_var + momentum * (unbiased - old_var), kept)
    else:
        mean = load_vector(running_mean, c, kept, 0.0)
        var = load_vector(running_var, c, kept, 1.0)
    inverse = tl.rsqrt(var + eps)
    factor = inverse * load_vector(weight, c, kept, 1.0)
    offset = load_vector(bias, c, kept, 0.0) - mean * factor
    if KEEP and first:
        tl.store(coefficients + FACTOR * C + c, factor, kept)
        tl.store(coefficients + OFFSET * C + c, offset, kept)
        tl.store(coefficients + MEAN * C + c, mean, kept)
        tl.store(coefficients + INVERSE_STD * C + c, inverse, kept)
    return factor, offset


@triton.jit
def norm_backward(part, rows, row_stride, count, coefficients, C, c, kept, ROWS: tl.constexpr):
    """How a norm of batch statistics turns its output's gradient g into its input's.

    ``part``: rows of sums of g and, C further on, of ``g * (x - mean)``. Returns the factors of g,
    of x and the constant: ``grad_x = on_grad * g + on_x * x + constant``.
    """
    grad_bias, moment = sum_row_pairs(part, rows, row_stride, C, c, kept, ROWS)
    mean = tl.load(coefficients + MEAN * C + c, kept, 0.0)
    inverse = tl.load(coefficients + INVERSE_STD * C + c, kept, 0.0)
    on_grad = tl.load(coefficients + FACTOR * C + c, kept, 0.0)
    on_x = -on_grad * inverse * inverse * moment / count
    return on_grad, on_x, -on_grad * grad_bias / count - on_x * mean


@triton.jit
def norm_parameter_grads(
    part, rows, row_stride, coefficients, grads, C, c, kept, ROWS: tl.constexpr
):  # fmt: skip
    """Stores the gradients of a norm's weight and bias, ``[2, C]``, from ``part`` as above."""
    inverse = tl.load(coefficients + INVERSE_STD * C + c, kept, 0.0)
    grad_bias, moment = sum_row_pairs(part, rows, row_stride, C, c, kept, ROWS)
    tl.store(grads + c, moment * inverse, kept)
    tl.store(grads + C + c, grad_bias, kept)


# ---- flat passes ---------------------------------------------------------------------------------


@triton.jit
def pixel_block(p, HW, C, c, kept, LAST: tl.constexpr):
    """Offsets inside a sample of pixels ``p`` and channels ``c``, and which of them exist."""
    ok = over_places(p < HW, LAST) & over_channels(kept, LAST)
    at = over_places(p * C if LAST else p, LAST) + over_channels(c if LAST else c * HW, LAST)
    return at, ok


@triton.jit
def pivot_of(z, middle, HW, C, c, kept, LAST: tl.constexpr):
    """The first sample's value in the middle of the map: a norm's pivot."""
    return tl.load(z + (middle * C + c if LAST else middle + c * HW), kept, 0.0).to(tl.float32)


UNSPECIALISED = (
    "B", "HW", "middle", "programs", "rows", "chunks", "chunk", "out_rows", "tap_rows",
    "lambda_rows",
)  # fmt: skip
"""Integers whose divisibility buys nothing: one variant of a kernel for all."""


@triton.jit(do_not_specialize=UNSPECIALISED)
def channel_sums(
    z, part, B, C, HW, middle, programs,
    ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Sums for a norm's statistics: reads z (1 N).

    Writes ``part`` ``[programs, 2, C]``: sums of ``z - pivot`` and of its square.
    """
    HW = HW // UNIT * UNIT  # so that the compiler knows alignments
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    pivot = over_channels(pivot_of(z, middle, HW, C, c, kept, LAST), LAST)
    shape: tl.constexpr = (BP, BC) if LAST else (BC, BP)
    total = tl.zeros(shape, tl.float32)
    squares = tl.zeros(shape, tl.float32)
    blocks = tl.cdiv(HW, BP)
    for n in range(program, B * blocks, programs):
        base = (n // blocks).to(tl.int64) * C * HW
        at, ok = pixel_block((n % blocks) * BP + tl.arange(0, BP), HW, C, c, kept, LAST)
        x = tl.load(z + base + at, ok, 0.0).to(tl.float32)
        x = tl.where(ok, x - pivot, 0.0)
        total += x
        squares += x * x
    row = part + program * 2 * C + c
    tl.store(row, sum_places(total, LAST), kept)
    tl.store(row + C, sum_places(squares, LAST), kept)


@triton.jit(do_not_specialize=UNSPECIALISED)
def pixel_sums(
    z, s, part, coefficients, weight, bias, running_mean, running_var, sums,
    B, C, HW, middle, programs, rows, chunks, chunk, count, momentum, eps,
    BATCH: tl.constexpr, ROWS: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sums over pixels of ``y = relu(norm(z) + s)``: reads z and s (2 N).

    Finishes the norm's statistics from ``part`` (:func:`finish_norm`), stores its coefficients and
    moves its running statistics. Writes ``sums`` ``[B, chunks, C]``; a chunk is ``chunk`` blocks.
    """
    HW = HW // UNIT * UNIT
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    pivot = tl.zeros((BC,), tl.float32)
    if BATCH:
        pivot = pivot_of(z, middle, HW, C, c, kept, LAST)
    factor, offset = finish_norm(
        part, rows, pivot, count, weight, bias, running_mean, running_var, momentum, eps,
        coefficients, C, c, kept, program == 0, BATCH, True, ROWS,
    )  # fmt: skip
    factor = over_channels(factor, LAST)
    offset = over_channels(offset, LAST)
    for n in range(program, B * chunks, programs):
        base = (n // chunks).to(tl.int64) * C * HW
        total = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
        for k in range(chunk):
            p = ((n % chunks) * chunk + k) * BP + tl.arange(0, BP)
            at, ok = pixel_block(p, HW, C, c, kept, LAST)
            y = tl.load(z + base + at, ok, 0.0).to(tl.float32) * factor + offset
            y += tl.load(s + base + at, ok, 0.0).to(tl.float32)
            total += tl.where(ok, tl.maximum(y, 0.0, propagate_nan=NAN), 0.0)
        tl.store(sums + n * C + c, sum_places(total, LAST), kept)


# ---- the end of backward -------------------------------------------------------------------------


@triton.jit
def finish_parameters(
    job, part, rows, coefficients, grad_value, grad_lambda, grad_norm,
    out_part, out_rows, out_coefficients, grad_out_norm,
    tap_part, tap_rows, grad_taps, lambda_part, lambda_rows, C, c, kept,
    FIELDS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One of the ``FIELDS + 4`` sums of partial sums that finish the parameters' gradients.

    ``job`` says which: below ``FIELDS``, a tap of W_v; then the first norm, the norm of the
    attention's output (unless ``out_part`` is None), the taps of W_q and W_k, and lambda (unless
    ``lambda_part`` is None). ``part`` ``[rows, FIELDS + 2, C]``: fields, then the first norm's two
    sums; ``out_part`` ``[out_rows, 2, C]``: the other norm's; ``tap_part`` ``[tap_rows, TAPS]``:
    the query's and the key's taps, which the first channel block sums; ``lambda_part``
    ``[lambda_rows, C]``.
    """
    width = (FIELDS + 2) * C
    if job < FIELDS:
        total = sum_rows(part + job * C, rows, width, c, kept, ROWS)
        tl.store(grad_value + c * 9 + job, total, kept)
    elif job == FIELDS:
        norm_parameter_grads(part + job * C, rows, width, coefficients, grad_norm, C, c, kept, ROWS)
    elif job == FIELDS + 1:
        if out_part is not None:
            norm_parameter_grads(
                out_part, out_rows, 2 * C, out_coefficients, grad_out_norm, C, c, kept, ROWS
            )
    elif job == FIELDS + 2:
        if tl.program_id(1) == 0:
            tap = tl.arange(0, TAPS)
            total = sum_rows(tap_part, tap_rows, TAPS, tap, tap < TAPS, 8 * ROWS)  # short rows
            tl.store(grad_taps + tap, total)
    elif lambda_part is not None:
        tl.store(grad_lambda + c, sum_rows(lambda_part, lambda_rows, C, c, kept, ROWS), kept)


@triton.jit(do_not_specialize=UNSPECIALISED)
def parameter_grads(
    part, rows, coefficients, grad_value, grad_lambda, grad_norm,
    out_part, out_rows, out_coefficients, grad_out_norm, tap_part, tap_rows, grad_taps, C,
    FIELDS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
    lambda_part=None, lambda_rows=0,
):  # fmt: skip
    """All jobs of :func:`finish_parameters`, one per program; for a frozen first norm."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    finish_parameters(
        tl.program_id(0), part, rows, coefficients, grad_value, grad_lambda, grad_norm,
        out_part, out_rows, out_coefficients, grad_out_norm, tap_part, tap_rows, grad_taps,
        lambda_part, lambda_rows, C, c, c < C, FIELDS, TAPS, ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def input_norm_grads(
    gm, z, go, gz, gs, lambda_t, drop,
    part, rows, coefficients, grad_value, grad_lambda, grad_norm,
    out_part, out_rows, out_coefficients, grad_out_norm, tap_part, tap_rows, grad_taps,
    B, C, HW, programs, count,
    FIELDS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, OUT_BATCH: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
    lambda_part=None, lambda_rows=0,
):  # fmt: skip
    """Gradients of z and, if ``go`` is given, of the shortcut: reads gm, z, go, writes two (5 N).

    ``gm``: gradient of ``norm(z) + s`` without what s gets as the attention's previous output:
    ``gz`` = backward of the norm by the batch's statistics, ``gs = gm + lambda_t * go``. ``gz`` may
    be ``gm`` and ``gs`` may be ``go``. Without ``OUT_BATCH``, ``go`` is the gradient of the block's
    output, and the frozen norm's factor and ``drop`` are applied here. Each of the first programs
    also does some of the jobs of :func:`finish_parameters`.
    """
    HW = HW // UNIT * UNIT
    program = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = c < C
    for job in range(program, FIELDS + 4, programs):
        finish_parameters(
            job, part, rows, coefficients, grad_value, grad_lambda, grad_norm,
            out_part, out_rows, out_coefficients, grad_out_norm, tap_part, tap_rows, grad_taps,
            lambda_part, lambda_rows, C, c, kept, FIELDS, TAPS, ROWS,
        )  # fmt: skip
    on_grad, on_z, constant = norm_backward(
        part + FIELDS * C, rows, (FIELDS + 2) * C, count, coefficients, C, c, kept, ROWS
    )
    on_grad = over_channels(on_grad, LAST)
    on_z = over_channels(on_z, LAST)
    constant = over_channels(constant, LAST)
    previous = over_channels(load_vector(lambda_t, c, kept, 0.0), LAST)
    if go is not None and not OUT_BATCH:
        factor = tl.load(out_coefficients + FACTOR * C + c, kept, 0.0)
        previous = previous * over_channels(factor, LAST)
    blocks = tl.cdiv(HW, BP)
    for n in range(program, B * blocks, programs):
        sample = (n // blocks).to(tl.int64)
        at, ok = pixel_block((n % blocks) * BP + tl.arange(0, BP), HW, C, c, kept, LAST)
        base = sample * C * HW
        grad = tl.load(gm + base + at, ok, 0.0).to(tl.float32)
        values = tl.load(z + base + at, ok, 0.0).to(tl.float32)
        if go is not None:
            share = previous
            if not OUT_BATCH and drop is not None:
                share = previous * tl.load(drop + sample)
            attention = tl.load(go + base + at, ok, 0.0).to(tl.float32)
            tl.store(gs + base + at, (grad + share * attention).to(gs.dtype.element_ty), ok)
        grad = on_grad * grad + on_z * values + constant
        tl.store(gz + base + at, grad.to(gz.dtype.element_ty), ok)
