"""The runner of compiled kernels finds each fault that it promises to find."""

from __future__ import annotations

import pytest
import torch

ttir = pytest.importorskip("tests.ops.ttir", exc_type=ImportError)
import triton  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

tl = triton.language


@triton.jit
def copies(x, out, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + shift, at < n, 0.0), at < n)


@triton.jit
def counts(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(out + at, at * n)


@triton.jit
def turns(x, out, barrier: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(out + at, tl.load(x + at))
    if barrier:
        tl.debug_barrier()
    tl.store(out + 16 + at, tl.load(out + 15 - at))


@triton.jit
def keeps_address(table, x, k):
    tl.store(table + k, x.to(tl.int64, bitcast=True))


@triton.jit
def adds_by_address(table, out, count, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(count):
        x = tl.load(table + k).to(tl.pointer_type(tl.bfloat16))
        total += tl.load(x + at, at < n, 0.0).to(tl.float32)
    tl.store(out + at, total, at < n)


def test_runs_what_the_interpreter_runs():
    x, out = torch.randn(100), torch.zeros(100)
    with ttir.launches_on_cpu() as log:
        copies[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, out, 100, 0, BLOCK=32)
    assert torch.equal(out, x)
    assert log.kernels == {"copies": 1}
    assert log.programs == {"copies": 4}


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda x: copies[(4,)](x, x.new_empty(100), 100, 1, BLOCK=32), "element 100 of x, .* 100"),
        (lambda x: copies[(4,)](x[:50], x, 100, -1, BLOCK=32), "element -1 of x"),
        (lambda x: copies[(4,)](x, x, 100, 5, BLOCK=32), "where another program .* reads"),
        (lambda x: copies[(4,)](x, x, 99, -1, BLOCK=32), "element -1"),
        (lambda x: copies[(3,)](x[5:], x[6:], 90, 0, BLOCK=32), "reads x where another program"),
        (lambda x: counts[(2,)](x.int(), 1, BLOCK=4), "another program of this launch wrote"),
        (lambda x: counts[(1,)](x.int(), 2**30, BLOCK=4), "32-bit integer overflows"),
    ],
)
def test_faults(launch, message):
    with ttir.launches_on_cpu(), pytest.raises(ttir.KernelFault, match=message) as caught:
        launch(torch.randn(100))
    assert "test_ttir.py:" in str(caught.value)


def test_strict_and_barriers():
    x, out = torch.randn(16), torch.zeros(32)
    with ttir.launches_on_cpu(strict=True):
        with pytest.raises(ttir.KernelFault, match="reads back out .* without a barrier"):
            turns[(1,)](x, out, False)
        turns[(1,)](x, out, True)
    assert torch.equal(out[16:], x.flip(0))
    with ttir.launches_on_cpu():
        turns[(1,)](x, out, False)


def test_addresses():
    def keep(table, k):
        x = torch.randn(40).bfloat16()[k:]
        keeps_address[(1,)](table, x, k)
        return x

    table, out = torch.zeros(4, dtype=torch.int64), torch.zeros(20)
    with ttir.launches_on_cpu():
        xs = [keep(table, k) for k in range(4)]
        adds_by_address[(1,)](table, out, 4, 20, BLOCK=32)
        torch.testing.assert_close(out, sum(x[:20].float() for x in xs))
        with pytest.raises(ttir.KernelFault, match="element 40 of x, whose storage has 40"):
            adds_by_address[(1,)](table, torch.zeros(64), 4, 64, BLOCK=64)
        with pytest.raises(ttir.KernelFault, match="not aligned"):
            adds_by_address[(1,)](table + 1, out, 4, 20, BLOCK=32)
        with pytest.raises(ttir.KernelFault, match="no known tensor's"):
            adds_by_address[(1,)](torch.full_like(table, 64), out, 4, 20, BLOCK=32)
        del xs[2]
        with pytest.raises(ttir.KernelFault, match="of x, which has been freed"):
            adds_by_address[(1,)](table, out, 4, 20, BLOCK=32)
    with ttir.launches_on_cpu(), pytest.raises(ttir.KernelFault, match="no known tensor's"):
        adds_by_address[(1,)](table[:2], out, 2, 20, BLOCK=32)


@triton.jit
def covers(x, out, flag, n, BLOCK: tl.constexpr):
    """Branches with results, 64 bits, two reductions, integers of all kinds."""
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at, at < n, -float("inf"))
    if flag > 1:  # noqa: SIM108
        far = tl.full((BLOCK,), 5_000_000_000, tl.int64)
    else:
        far = at.to(tl.int64)
    best, where = tl.max(v, 0, return_indices=True)
    tl.store(out, best)
    tl.store(out + 1, where.to(tl.float32))
    tl.store(out + 2, (-7 // n) + (-7 % n))
    tl.store(out + 3, tl.sum((far >> 1) * (at == 2), 0).to(tl.float32))
    tl.store(out + 4, tl.sum(tl.where(at < n, v, 0.0), 0))
    even, odd = tl.split(tl.reshape(tl.where(at < n, v, 0.0), (BLOCK // 2, 2)))
    tl.store(out + 5, tl.sum(even, 0))
    tl.store(out + 6, tl.sum(odd, 0))
    turned = tl.trans(tl.reshape(at, (BLOCK // 4, 4)))
    tl.store(out + 8 + tl.reshape(turned, (BLOCK,)), at.to(tl.bfloat16).to(tl.float32))


@pytest.mark.parametrize("flag", [1, 2])
def test_operations(flag):
    x, out = torch.randn(13), torch.zeros(40)
    with ttir.launches_on_cpu():
        covers[(1,)](x, out, flag, 13, BLOCK=32)
    far = 2_500_000_000 if flag == 2 else 1
    # Integers are divided towards zero, as in C.
    expected = torch.tensor([x.max(), x.argmax(), 0 - 7, far, x.sum(), x[::2].sum(), x[1::2].sum()])
    torch.testing.assert_close(out[:7], expected)
    assert torch.equal(out[8:].view(8, 4), torch.arange(32.0).view(4, 8).T)


@triton.jit
def old_moments(grad, x, out, height, width, BLOCK: tl.constexpr):
    """As ``_moments_kernel`` once was, which gave zeros for the bottom taps on a GPU."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    zero = tl.full((BLOCK,), 0.0, tl.float32)
    m0, m1, m2 = zero, zero, zero
    before = zero
    current = zero
    following = tl.load(grad + column, mask=inside, other=0.0)
    for row in range(-1, height + 1):
        here = tl.load(x + row * width + column, inside & (row >= 0) & (row < height), 0.0)
        m0 += following * here
        m1 += current * here
        m2 += before * here
        before = current
        current = following
        ahead = inside & (row + 2 < height)
        following = tl.load(grad + (row + 2) * width + column, mask=ahead, other=0.0)
    tl.store(out + column, m0, inside)
    tl.store(out + width + column, m1, inside)
    tl.store(out + 2 * width + column, m2, inside)


def test_a_name_that_is_not_carried():
    grad, x = torch.randn(7, 5), torch.randn(7, 5)
    products = [grad[1:] * x[:-1], grad * x, grad[:-1] * x[1:]]
    expected = torch.stack([product.sum(0) for product in products])
    interpreted, compiled = torch.zeros(3, 5), torch.zeros(3, 5)
    InterpretedFunction(old_moments.fn)[(1,)](grad, x, interpreted, 7, 5, BLOCK=8)
    torch.testing.assert_close(interpreted, expected)
    with ttir.launches_on_cpu(carries=False):
        old_moments[(1,)](grad, x, compiled, 7, 5, BLOCK=8)
    torch.testing.assert_close(compiled[:2], expected[:2])
    assert not compiled[2].any()
    with (
        ttir.launches_on_cpu(),
        pytest.raises(ttir.KernelFault, match="`before` is rebound in the loop at test_ttir.py"),
    ):
        old_moments[(1,)](grad, x, compiled, 7, 5, BLOCK=8)


@triton.jit
def nested(out, n, BLOCK: tl.constexpr):
    """Two names share a tensor, but only before a loop whose end tells them apart."""
    at = tl.arange(0, BLOCK)
    a = at
    b = at
    for j in range(n):
        for _ in range(n):
            a, b = b, a + 1
        a, b = a + j, b * 2
    tl.store(out + at, a)
    tl.store(out + BLOCK + at, b)


def test_loops_inside_loops_are_seen_as_they_are_compiled():
    out = torch.zeros(16, dtype=torch.int32)
    with ttir.launches_on_cpu():
        nested[(1,)](out, 3, BLOCK=8)
    a = b = torch.arange(8, dtype=torch.int32)
    for j in range(3):
        for _ in range(3):
            a, b = b, a + 1
        a, b = a + j, b * 2
    assert torch.equal(out, torch.cat([a, b]))
