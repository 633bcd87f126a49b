"""Kernels are compared with plain torch before a process uses them."""

from __future__ import annotations

import warnings

import pytest
import torch

from mmrla.ops import fused, mrla_base_tail, mrla_light_tail, reference, verify
from mmrla.ops.reference import BaseWeights, LightWeights
from mmrla.ops.verify import Case

ttir = pytest.importorskip("tests.ops.ttir", exc_type=ImportError)
from mmrla.ops import blocks, kernels_base, kernels_light  # noqa: E402
from tests.ops.test_ttir import old_moments  # noqa: E402


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Compiled kernels are for tensors of the CPU, and nothing was checked before."""
    monkeypatch.delenv("MMRLA_BACKEND", raising=False)
    monkeypatch.setattr(fused, "uses_triton", lambda z: z.dtype != torch.float64)
    monkeypatch.setattr(verify, "_reasons", {})
    monkeypatch.setattr(verify, "_failed", {})
    with ttir.launches_on_cpu() as log:
        yield log


def step(kind, backend=None, layers=1, grad=True):
    """Outputs and gradients of a small case by name."""
    case = Case(kind, (1, 8, 4, 3), 4, torch.float32, torch.device("cpu"), layers=layers)

    def base(*args):
        return mrla_base_tail(*args, backend=backend)

    return case.run(lambda *a: mrla_light_tail(*a, backend=backend), base, False, grad)


def lose_the_bottom_taps(monkeypatch):
    """The value's gradient as a kernel gives it that lost a variable between its loop's steps."""
    own = kernels_light.light_backward

    def faulty(grad, z, s, norm, w, out_norm, drop, saved):
        found = list(own(grad, z, s, norm, w, out_norm, drop, saved))
        _, channels, height, width = z.shape
        norm = norm._replace(running_mean=None, running_var=None)
        y = reference.residual_relu(z.clone(), s, norm)
        rows = torch.zeros(channels, 3, width)
        with ttir.launches_on_cpu(carries=False):
            for c in range(channels):
                maps = (grad[0, c].contiguous(), y[0, c].contiguous(), rows[c])
                old_moments[(1,)](*maps, height, width, BLOCK=4)
        # A row of taps for which the kernel summed nothing has no gradient.
        summed = (rows.abs().sum(2) > 0).float()
        assert summed[:, :2].any()
        found[6] = (found[6].view(channels, 3, 3) * summed[:, :, None]).view_as(found[6])
        return tuple(found)

    monkeypatch.setattr(kernels_light, "light_backward", faulty)


@pytest.mark.parametrize(("kind", "layers"), [(LightWeights, 1), (BaseWeights, 3)], ids=str)
def test_right_kernels_run_and_are_checked_once(kind, layers, on_a_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = step(kind, layers=layers)
        first = sum(on_a_gpu.kernels.values())
        step(kind, layers=layers)
    second = sum(on_a_gpu.kernels.values()) - first
    assert 0 < second < first  # the check launched the rest
    assert set(verify._reasons.values()) == {None}
    expected = step(kind, "naive", layers)
    for name, x in expected.items():
        assert (got[name] - x).norm() <= 1e-4 * x.norm() + 1e-4, name


def test_a_lost_variable_is_caught(on_a_gpu, monkeypatch):
    lose_the_bottom_taps(monkeypatch)
    with pytest.warns(UserWarning, match="differ from plain torch") as caught:
        got = step(LightWeights)
    (message,) = [str(w.message) for w in caught if "mrla_light_tail" in str(w.message)]
    for part in ("grad of value 0.", "attention", f"torch {torch.__version__}", "Triton 3.", "cpu"):
        assert part in message, message
    assert "grad of z" not in message
    # Plain torch runs instead, without another word, for the rest of the process.
    expected = step(LightWeights, "naive")
    assert all(torch.equal(got[name], x) for name, x in expected.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(LightWeights)
        assert "differ from plain torch" in verify.reason_against(*light_arguments(9))
    with pytest.raises(
        RuntimeError, match="forces 'fused', which cannot run here: mrla_light_tail"
    ):
        step(LightWeights, "fused")
    # The other operation's kernels are used.
    step(BaseWeights)


def light_arguments(width):
    case = Case(LightWeights, (1, 8, 4, width), 4, torch.float32, torch.device("cpu"))
    found = []
    case.run(lambda *a: (found.extend(a), a[0])[1], None, False, False)
    return found


def test_a_kernel_that_fails_is_caught(on_a_gpu, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernels_base, "base_forward", broken)
    with pytest.warns(UserWarning, match="its kernels fail .* RuntimeError: out of resource"):
        got = step(BaseWeights, layers=2, grad=False)
    expected = step(BaseWeights, "naive", 2, False)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


def test_too_little_memory_for_the_check(on_a_gpu, monkeypatch):
    """It is made with fewer samples, and raises as any operation does if that is too much."""
    shapes = []
    own = verify._compare

    def compare(case, grad):
        shapes.append(case.shape)
        if len(shapes) == 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return own(case, grad)

    monkeypatch.setattr(verify, "_compare", compare)
    monkeypatch.setattr(verify, "_part", lambda *args: (1, 8, 2, 3))
    assert verify.reason_against(*light_arguments(3)) is None
    assert shapes == [(1, 8, 2, 3), (1, 8, 4, 3)]


def test_nan_is_an_error(on_a_gpu, monkeypatch):
    own = kernels_light.light_forward
    monkeypatch.setattr(
        kernels_light, "light_forward", lambda *a: (own(*a)[0].fill_(torch.nan), own(*a)[1])
    )
    with pytest.warns(UserWarning, match="out nan"):
        step(LightWeights, grad=False)


def test_nothing_is_checked_while_a_graph_is_captured(on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    args = light_arguments(3)
    assert "run a step before that" in mrla_light_tail.select(*args).reason
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mrla_light_tail.select(*args).backend.name == "fused"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert mrla_light_tail.select(*args).backend.name == "fused"


def test_the_check_leaves_random_numbers_and_grad_mode_alone(on_a_gpu):
    args = light_arguments(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        verify.reason_against(*args)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("last", [False, True])
def test_the_same_variants_with_fewer_samples(last):
    """Of ResNet-50's maps, a detector's, and small ones."""
    cpu = torch.device("cpu")
    for shape in [(256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7),
                  (2, 256, 200, 304), (128, 16, 32, 32), (5, 8, 1, 1)]:  # fmt: skip
        part = verify._part(torch.Size(shape), last, cpu)
        assert part[1:] == shape[1:]
        assert verify._variant(part, last, cpu) == verify._variant(shape, last, cpu), (shape, part)
    assert blocks.multiprocessors(cpu) == 132


def test_groups_hold_layers_that_ran_otherwise(on_a_gpu):
    """A layer in plain torch, then fused ones: its value's gradient goes through autograd."""
    case = Case(BaseWeights, (1, 8, 4, 3), 4, torch.float32, torch.device("cpu"), layers=3)
    turn = iter(["naive", "fused", "fused"] * 2)
    mixed = case.run(None, lambda *a: mrla_base_tail(*a, backend=next(turn)), False)
    expected = case.run(None, reference.base_tail_reference, True)
    for name, x in expected.items():
        assert (mixed[name].double() - x).norm() <= 1e-4 * x.norm() + 1e-4, name
