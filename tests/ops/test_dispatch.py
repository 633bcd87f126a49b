from __future__ import annotations

import subprocess
import sys

import pytest

from mmrla.ops import Backend, Op, mrla_light
from mmrla.ops.dispatch import always


@pytest.fixture
def op():
    def refuses_negative(value):
        return "the value is negative" if value < 0 else None

    def check(value):
        if not isinstance(value, int):
            raise TypeError(f"got {value!r}")

    return Op(
        "double",
        check,
        [
            Backend("fused", lambda value: ("fused", 2 * value), refuses_negative),
            Backend("naive", lambda value: ("naive", 2 * value), always),
        ],
    )


def test_takes_the_first_that_can_run_and_says_why(op, monkeypatch):
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    assert op(3) == ("fused", 6)
    assert op(-3) == ("naive", -6)
    assert op.select(-3).reason == "fused cannot run: the value is negative; naive can run"


def test_forced_backend_runs_or_raises(op, monkeypatch):
    monkeypatch.setenv("MMRLA_BACKEND", "naive")
    assert op(3) == ("naive", 6)
    assert op(3, backend="fused") == ("fused", 6)
    assert op.select(3).reason == "forced by the variable MMRLA_BACKEND"
    monkeypatch.setenv("MMRLA_BACKEND", "fused")
    with pytest.raises(RuntimeError, match="forces 'fused', which cannot run here: the value is n"):
        op(-3)
    monkeypatch.setenv("MMRLA_BACKEND", "quick")
    with pytest.raises(ValueError, match="no backend 'quick'.*allowed: 'fused', 'naive'"):
        op(3)


def test_check_comes_first(op):
    with pytest.raises(TypeError, match="got 'x'"):
        op("x")


def test_unavailable_backend_of_a_real_op():
    with pytest.raises(ValueError, match="mrla_light has no backend 'cuda'"):
        mrla_light.select(backend="cuda")


def test_ops_and_layers_need_torch_alone():
    """`import mmrla`, its ops and layers load none of the packages above their floor."""
    code = (
        # What torch itself loads, as Triton with some releases, does not count.
        "import sys, torch; roots = lambda: {name.split('.')[0] for name in sys.modules}; "
        "by_torch = roots(); import mmrla, mmrla.ops, mmrla.layers; "
        "bad = {'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'torchvision', 'triton'}; "
        "print(bad & (roots() - by_torch))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
