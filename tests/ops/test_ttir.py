"""The runner of compiled kernels finds each fault that it promises to find."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton")
ttir = pytest.importorskip("tests.ops.ttir", reason="another Triton", exc_type=ImportError)
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

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
