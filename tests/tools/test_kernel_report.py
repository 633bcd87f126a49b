"""tools/benchmark/kernel_report.py reads off what compiled kernels cost."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import mmrla.ops
from mmrla.cli import load_script
from tests.ops.kernel_guards import jit_functions, triton_modules

triton = pytest.importorskip("triton", reason="no Triton")
ttir = pytest.importorskip("tests.ops.ttir", reason="another Triton", exc_type=ImportError)
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
tl = triton.language


kernel_report = load_script("benchmark/kernel_report.py")


@triton.jit
def adds(x, y, out, B, C, HW, programs, BP: tl.constexpr, BC: tl.constexpr):
    c = tl.arange(0, BC)[None, :]
    for n in range(tl.program_id(0), B * tl.cdiv(HW, BP), programs):
        p = (n * BP + tl.arange(0, BP))[:, None]
        ok = (p < B * HW) & (c < C)
        tl.store(out + p * C + c, tl.load(x + p * C + c, ok) + tl.load(y + p * C + c, ok), ok)


def test_a_known_kernel():
    maps = torch.empty(8, 64, 16, 16, device="meta", dtype=torch.bfloat16)
    with kernel_report.recorded() as launches:
        adds[(4, 1)](maps, maps, maps, 8, 64, 256, 4, BP=16, BC=64, num_warps=4)
    row = kernel_report.report(launches[0], maps.numel())
    assert (row["programs"], row["spilled"], row["budget"]) == ("4x1", 0, 14 * 3)
    # 8 values per thread of two maps in and one out
    assert (row["loads"], row["stores"]) == ("2x128", "1x128")
    assert 2 < row["per_element"] < 14
    assert row["bytes_ms"] == pytest.approx(1e3 * 3 * 2 * maps.numel() / 4.3e12, abs=1e-3)


def test_loops_count_as_often_as_they_run():
    branches = {4: 2, 6: 1, 9: 8}  # two loops inside each other, then one more
    code = [(16 * k, "FADD R0, R0, R1") for k in range(12)]
    for at, to in branches.items():
        code[at] = (16 * at, f"@P0 BRA {hex(16 * to)}")
    assert kernel_report.main_loop(code).cost([]) == 2
    assert kernel_report.main_loop(code[:7]).cost([5]) == 3 + 5 * 3
    assert kernel_report.main_loop(code[:2]).cost([5]) == 2


def test_compiled_loops_carry_their_names():
    """Every kernel is launched by some block, and TTIR's loops carry each name they rebind."""
    functions = {
        fn.fn for module in triton_modules(mmrla.ops) for fn in jit_functions(module).values()
    }
    called = {
        getattr(fn.__globals__.get(name), "fn", None)
        for fn in functions
        for name in fn.__code__.co_names
    }
    launched, dropped = set(), []
    for kind, (training, frozen) in product(("light", "base"), ((True, False), (True, True))):
        for launch in kernel_report.block_launches(kind, 7, 2, False, training, frozen)[-1]:
            launched.add(launch.fn.fn)
            dropped += ttir.compile_ttir(launch.fn, launch.args, launch.kwargs).dropped
    assert {fn.__name__ for fn in functions - called - launched} == set()
    assert dropped == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--nchw"]], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("kind", ["light", "base"])
def test_kernels_spill_a_few_registers_at_most(kind, layout, capsys):
    """Before and after their loops; what spilled inside one took 2,000 bytes and all the speed."""
    kernel_report.main([kind, "--heights", "14", *layout])
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    place = rows[0].index("spilled")
    spilled = {row[0].strip("| "): int(row[place]) for row in rows[1:] if row[place].isdigit()}
    assert len(spilled) > 5
    assert {name: count for name, count in spilled.items() if count > 64} == {}
    assert "in all" in out
