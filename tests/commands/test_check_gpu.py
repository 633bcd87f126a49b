"""``mmrla check-gpu`` on a CPU: what it compares, what it says, and its status."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from mmrla import cli
from mmrla.commands import check_gpu, gpu_comparison, gpu_timing
from mmrla.commands.gpu_comparison import Check, Outcome, checks_of, compare
from mmrla.models import MRLAResNet
from mmrla.ops import whole_map
from tests.conftest import ROOT
from tests.helpers import python

CPU = torch.device("cpu")
ALONE = ["--device", "cpu", "--processes", "0"]
LIGHT, BASE = (Check(kind, (2, 8, 5, 3), 4) for kind in ("light", "base"))


def fails(*args):
    raise RuntimeError("ptxas failed\nwith much text")


@pytest.fixture
def loses_taps(monkeypatch):
    """MRLA-light's backward loses the gradients of three taps of W_v."""
    real = whole_map.light_backward

    def light_backward(*args):
        grads = list(real(*args))
        grads[6] = grads[6].clone().view(-1, 9).index_fill_(1, torch.tensor([6, 7, 8]), 0.0)
        return tuple(grads)

    monkeypatch.setattr(whole_map, "light_backward", light_backward)


@pytest.mark.parametrize("processes", ["0", "1"])
def test_right_on_the_cpu(processes, capsys):
    """In this process, and in another."""
    words = ["--device", "cpu", "--processes", processes, "--no-times"]
    assert cli.main(["check-gpu", *words]) == 0
    out = capsys.readouterr()
    assert f"torch {torch.__version__}" in out.out
    assert "8 checks, 0 wrong, 0 not made" in out.out
    for name in ("out_norm.running_var", "grad of query", "grad of lambda_t"):
        (row,) = [line for line in out.out.splitlines() if line.startswith(f"| {name} ")]
        errors = [float(cell) for cell in row.split("|")[2:] if cell.strip()]
        assert errors
        assert all(error < 1e-2 for error in errors), row  # not so of nan
    assert "check 8 of 8" in out.err


@pytest.mark.usefixtures("loses_taps")
def test_a_wrong_gradient_is_named(capsys):
    assert check_gpu.main([*ALONE, "--no-times"]) == 1
    out = capsys.readouterr().out
    assert "8 checks, 3 wrong" in out
    wrong = [line for line in out.splitlines() if line.startswith("- WRONG")]
    assert all(": grad of value " in line and "light, float32" in line for line in wrong)
    # A repeated batch shows it too.
    assert list(compare(LIGHT._replace(copies=2), CPU).above) == ["grad of value"]


WITH_TORCH_ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmpretrain", "torchvision", "cv2",
                                  "numpy", "triton"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
from mmrla.commands.check_gpu import main
sys.exit(main(["--device", "cpu", "--processes", "0", "--no-times"]))
"""


def test_needs_torch_alone():
    printed = python("-c", WITH_TORCH_ALONE, cwd=ROOT)
    assert "8 checks, 0 wrong, 0 not made" in printed
    assert "Triton none" in printed


def test_processes_that_crash_or_are_late(monkeypatch):
    """The check that crashed is wrong; those after it, and late ones, were not made."""
    line = '{"errors": {"out": 1e-9}, "note": "", "failed": false, "index": %d}'
    script = "import sys, time; print(sys.argv[1]); sys.stdout.flush(); %s"
    real = subprocess.Popen

    def popen(command, **kwargs):
        k = int(command[-1].split("/")[0])
        end = ["sys.exit('illegal memory access')", "time.sleep(60)"][k]
        return real([sys.executable, "-c", script % end, line % k], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(check_gpu, "SECONDS", 3.0)
    found = check_gpu._compare_all(checks_of("cpu", 2)[:4], "cpu", 2, CPU, 2)
    results = [outcome.columns()["result"] for outcome in found]
    assert results == ["ok", "ok", "WRONG", "not checked"]
    assert "status 1: illegal memory access" in found[2].explanation()
    assert found[3].note == "no time was left"


@pytest.mark.parametrize("check", [LIGHT, BASE._replace(channels_last=True, layers=2)])
def test_a_repeated_batch_has_a_known_result(check):
    check = check._replace(drop=True, copies=3)
    errors = gpu_comparison.errors_of(check, CPU)
    assert errors.keys() == gpu_comparison.errors_of(check._replace(copies=1), CPU).keys()
    assert max(errors.values()) < 1e-5, errors


def test_what_raises_is_wrong(monkeypatch):
    monkeypatch.setattr(whole_map, "base_forward", fails)
    found = compare(BASE, CPU)
    assert found.wrong
    assert found.explanation() == "RuntimeError: ptxas failed"
    nan = Outcome(BASE, {"out": 0.0, "grad of z": math.nan})
    assert nan.wrong
    assert nan.columns()["of"] == "grad of z"


def test_the_checks_of_a_gpu(monkeypatch):
    """Layouts, dtypes, norms, ResNet-50 at its batch, more than 2**31 elements if they fit."""
    for kind in ("light", "base"):
        checks = [check for check in checks_of("all", 256) if check.kind == kind]
        assert {(c.dtype, c.channels_last) for c in checks} >= {
            (dtype, last) for dtype in gpu_comparison.LIMITS for last in (True, False)
        }
        assert len({c.batch for c in checks}) == 4
        assert {c.drop for c in checks} == {c.grad for c in checks} == {True, False}
        assert sum(c.shape[0] * c.copies == 256 for c in checks) == 8
        for check in [check for check in checks_of("large", 256) if check.kind == kind]:
            assert check.copies * math.prod(check.shape) > 2**31
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = compare(checks_of("large", 256)[0], torch.device("cuda"))
    assert not found.wrong
    assert found.note == "needs 45 GiB, 1 are free"


class Small(torch.nn.Conv2d):
    def __init__(self, backbone, channels):
        super().__init__(3, 2, 3)

    def forward(self, x, labels):
        return super().forward(x).mean() + labels[0] * 0


def test_times(monkeypatch, capsys):
    """The tables of times, with kernels' times as a GPU's profile gives them."""
    backbone = MRLAResNet(50, layer_attention=gpu_timing.ATTENTIONS["base"])
    loss = gpu_timing.Classifier(backbone, 2048)
    with torch.no_grad():
        assert loss(torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).isfinite()
    monkeypatch.setattr(gpu_timing, "Classifier", Small)
    monkeypatch.setattr(gpu_timing, "device_work", lambda step, device: (2e-3, 7))
    monkeypatch.setattr(gpu_timing, "peak_memory", lambda step, device: 2**20)
    monkeypatch.setattr(check_gpu, "checks_of", lambda part, batch: [])
    assert check_gpu.main(ALONE) == 0
    out = capsys.readouterr().out
    for name in ("plain", "light, fused", "base, naive", "light", "base"):
        assert any(f"| {name} " in line for line in out.splitlines()), name
    assert "training step, kernels over plain" in out
    assert "peak memory over plain" in out
    # Without mm packages, and with an error.
    monkeypatch.setattr(check_gpu, "operation_rows", lambda *args: iter([{"block end": "plain"}]))
    monkeypatch.setitem(sys.modules, "mmrla.models", None)
    assert check_gpu.main(ALONE) == 0
    assert "the mm packages cannot be imported" in capsys.readouterr().out
    monkeypatch.setattr(check_gpu, "operation_rows", fails)
    assert check_gpu.main(ALONE) == 1
    assert "- WRONG: RuntimeError: ptxas failed" in capsys.readouterr().out


def test_kernels_of_a_profile(monkeypatch):
    """Annotations span kernels, which count once."""

    def event(name, microseconds, device=DeviceType.CUDA, note=False):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, time_range=span, device_type=device,
                               is_user_annotation=note)  # fmt: skip

    events = [event("gemm", 10), event("gemm", 20), event("cudaLaunch", 5, DeviceType.CPU),
              event("Optimizer.step#SGD.step", 99), event("mine", 99, note=True)]  # fmt: skip
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    seconds, launches = gpu_timing.device_work(lambda: None, torch.device("cuda"))
    assert seconds == pytest.approx(30e-6)
    assert launches == 2


def test_without_a_gpu(monkeypatch, capsys):
    """The interpreter is asked, and its outcome is the status."""
    parts = []

    def compare_all(checks, part, *args):
        parts.append(part)
        return [Outcome(checks[0], {"out": 1.0})]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check_gpu, "_compare_all", compare_all)
    for version, said in (
        ("3.6.0", "No GPU is available to torch. Triton's interpreter"),
        (None, "Triton is not installed"),
    ):
        monkeypatch.setattr(check_gpu, "_triton_version", lambda version=version: version)
        assert check_gpu.main([]) == 1
        assert said in capsys.readouterr().out
    assert parts == ["interpreter", "cpu"]


@pytest.mark.parametrize("share", ["2/8", "6/8"], ids=["light", "base"])
def test_by_the_interpreter(share, monkeypatch):
    """One check of each operation; all of them take minutes."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ["--device", "cpu", "--part", "interpreter", "--batch", "2", "--share", share]
    printed = python("-m", "mmrla.commands.check_gpu", *words, cwd=ROOT)
    assert '"failed": false' in printed, printed
