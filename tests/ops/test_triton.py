"""Triton's kernels: in its interpreter against plain torch, and compiled without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from mmrla.ops.triton_support import triton_is_recent

from mmrla.ops import mrla_base, mrla_light, passes
from tests.conftest import ROOT
from tests.ops.fused_cases import Tail, base_args, close, feature_map, gradients, light_args

triton = pytest.importorskip("triton", reason="no Triton")
if not triton_is_recent():
    pytest.skip("Triton is older than 3", allow_module_level=True)
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETS, reason="run by test_in_the_interpreter")
SHAPES = [((2, 24, 7, 7), 8), ((1, 5, 1, 1), 5), ((1, 6, 13, 17), 3), ((1, 72, 2, 3), 24),
          ((1, 2, 20, 3), 1)]  # fmt: skip


@pytest.fixture
def by_triton(monkeypatch):
    """Sends tensors of the CPU to the kernels, which the interpreter runs; counts the launches."""
    from mmrla.ops.depthwise import kernels

    from mmrla.ops import depthwise, passes_triton

    launches = []

    def spy(module, name):
        fn = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (launches.append(name), fn(*a, **k))[1])

    for module, names in ((kernels, ["stencil", "moments"]),
                          (passes_triton, ["affine_add", "dot", "weighted_sum"])):  # fmt: skip
        for name in names:
            spy(module, name)
    take = lambda x: x.dtype != torch.float64  # noqa: E731
    monkeypatch.setattr(depthwise, "use_triton", take)
    monkeypatch.setattr(passes, "use_triton", take)
    return launches


def test_in_the_interpreter():
    """Triton reads the variable when it is imported, so a process of its own."""
    if INTERPRETS:
        pytest.skip("is in it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = dict(os.environ, TRITON_INTERPRET="1")
    found = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


def widened(args):
    return [a.detach().double().requires_grad_() if torch.is_tensor(a) else a for a in args]


@interpreter
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "mixed"])
@pytest.mark.parametrize(("shape", "head_channels"), SHAPES)
def test_light(shape, head_channels, layout, by_triton):
    layout = "nchw" if layout == "mixed" and shape[0] == 1 else layout
    args = light_args(shape, head_channels, layout, torch.float32)
    wide = widened(args)
    out, expected = mrla_light(*args), mrla_light(*wide, backend="naive")
    close([out.double()], [expected], 1e-5)
    got = gradients([out], args[:6])
    close([g.double() for g in got], gradients([expected], wide[:6]), 1e-4)
    assert {"stencil", "moments"} <= set(by_triton)


@interpreter
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_base(layout, by_triton):
    query, keys, values = base_args(11, (2, 6, 3, 5), layout, torch.float32)
    wide = widened([query, *keys, *values])
    out = mrla_base(query, keys, values, 3)
    expected = mrla_base(wide[0], wide[1:12], wide[12:], 3, backend="naive")
    close([out.double()], [expected], 1e-5)
    got = gradients([out], [query, *keys, *values])
    close([g.double() for g in got], gradients([expected], wide), 1e-4)
    assert {"weighted_sum", "dot", "affine_add"} <= set(by_triton)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kind", ["light", "base"])
def test_tail(kind, layout, dtype, by_triton):
    running = (True, True) if layout == "nchw" else (False, False)
    tail = Tail(kind, (2, 8, 5, 6), 4, layout, dtype, running, scale=True)
    outs, _ = tail.run("fused")
    wide = widened(tail.leaves)
    expected, _ = tail.run("naive", wide)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    close([o.double() for o in outs], expected, tolerance)
    got = gradients(outs, tail.leaves)
    for mine, theirs in zip(got, gradients(expected, wide), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * (theirs.norm() + 0.1)
    assert {"stencil", "moments", "affine_add"} <= set(by_triton)


@interpreter
@pytest.mark.parametrize("layers", [3, 11])
def test_weighted_sum_with_bias_and_residual(layers, by_triton):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        maps = [feature_map((2, 6, 3, 5), "nchw", dtype, i).detach() for i in range(layers)]
        # The residual may lie in memory otherwise than the values.
        residual = feature_map((2, 6, 3, 5), "channels_last", dtype).detach()
        weights, bias = torch.randn(layers, 2, 6), torch.randn(2, 6)
        got = passes.weighted_sum(maps, weights, bias, residual)
        expected = sum(m.double() * w[..., None, None] for m, w in zip(maps, weights, strict=True))
        expected = expected + bias[..., None, None] + residual
        close([got.double()], [expected], tolerance)
    assert "weighted_sum" in by_triton


@interpreter
def test_half_precision(by_triton):
    for dtype in (torch.float16, torch.bfloat16):
        args = light_args((2, 8, 5, 6), 4, "channels_last", dtype)
        wide = widened(args)
        out, expected = mrla_light(*args), mrla_light(*wide, backend="naive")
        close([out.double()], [expected], 1e-2)
        got = gradients([out], args[:6])
        close([g.double() for g in got], gradients([expected], wide[:6]), 2e-2)


@interpreter
def test_relu_keeps_nan(by_triton):
    from mmrla.ops import passes_triton

    x = feature_map((1, 2, 2, 2), dtype=torch.float32).detach()
    x[0, 0, 0, 0] = float("nan")
    out = passes_triton.affine_add(x, torch.ones(2), None, None, torch.empty_like(x), relu=True)
    assert torch.equal(out.isnan(), x.isnan())
    assert (out.nan_to_num() >= 0).all()


@pytest.mark.skipif(INTERPRETS, reason="the interpreter compiles nothing")
def test_kernels_compile_for_a_gpu_that_is_not_here():
    from mmrla.ops.depthwise import kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmrla.ops import passes_triton

    def build(fn, **constants):
        types = {}
        for name in fn.arg_names:
            if name in constants:
                types[name] = "constexpr"
            elif name.endswith("_ptr") or (name[0] == "v" and name[1:].isdigit()):
                wide = name in ("taps_ptr", "scale_ptr", "bias_ptr", "factor_ptr", "shift_ptr",
                                "weight_ptr")  # fmt: skip
                types[name] = "*fp32" if wide else "*bf16"
            else:
                types[name] = "i32"
        try:
            source = ASTSource(fn=fn, signature=types, constexprs=constants)
        except TypeError:
            pytest.skip("this Triton describes sources otherwise")
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(built.asm["cubin"]) > 0

    block = dict(rows=16, block_w=8, block_c=64)
    build(kernels._stencil_kernel, has_add=True, has_bias=True, has_residual=True, x_c=1, add_c=1,
          res_c=1, out_c=1, **block)  # fmt: skip
    build(kernels._moments_kernel, x_c=1, grad_c=1, **block)
    block = dict(block_p=16, block_c=64)
    build(passes_triton._affine_kernel, has_shift=True, has_add=True, relu=True, **block)
    build(passes_triton._dot_kernel, steps=8, **block)
    build(passes_triton._weighted_sum_kernel, count=8, has_bias=True, has_start=True, **block)
