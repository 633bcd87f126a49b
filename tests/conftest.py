from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mmrla  # noqa: F401  # before mm packages, for which it stands in for mmcv's operations

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
# Ground truth and real images that may lie beside a checkout.
SHARED = Path(os.environ.get("MMRLA_SHARED", ROOT.parent / "shared"))

needs_new_compiler = pytest.mark.skipif(
    not hasattr(torch.library, "custom_op"), reason="torch.compile before torch 2.4"
)
# Half precisions on the CPU: for float16, torch 2.1 has neither autocast nor a batch norm there.
HALVES = (torch.bfloat16, torch.float16)[: 1 if torch.__version__.startswith("2.1.") else 2]


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    path = SHARED / "data" / "coco-mini"
    if not path.is_dir():
        pytest.skip(f"no real images: {path} is absent")
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_scope() -> Iterator[None]:
    """No test leaves mmengine's default scope, which is global, to the next."""
    yield
    registry = sys.modules.get("mmengine.registry")
    if registry is not None:
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """This process is a group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def overlay_environment(folder: Path) -> Path:
    """The interpreter of an environment that sees what is installed here and writes elsewhere."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    below = sysconfig.get_path("purelib")
    (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    return folder / "bin/python"


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def stable_id(value: object) -> str:
    """A test's name for an argument, the same in every process: without addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def flat(outputs: object) -> list[Tensor]:
    """The tensors of a network's outputs; a state that is None has none."""
    if outputs is None or isinstance(outputs, Tensor):
        return [] if outputs is None else [outputs]
    return [tensor for out in outputs for tensor in flat(out)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value that is expected."""
    assert got.shape == expected.shape, f"{got.shape=} {expected.shape=}"
    scale = expected.abs().max().clamp(min=1e-30)
    return ((got.detach() - expected).abs().max() / scale).item()


def kept_for_backward(run: Callable[[], object]) -> dict[int, int]:
    """Bytes of each storage that ``run()`` keeps for backward, by the storage's address."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # a node that held its own output would never be freed
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return {address: t.untyped_storage().nbytes() for address, t in saved.items()}


def compare(
    module: nn.Module,
    expected: Callable,
    *inputs: Tensor,
    limits: tuple[float, float, float] = (1e-10, 1e-9, 1e-9),
    zero: float = 1e-9,
) -> None:
    """Outputs and every gradient of ``module`` and of ``expected(*inputs, parameters)``, float64.

    ``limits`` are the relative errors of outputs, inputs' and parameters' gradients; ``zero`` is
    the absolute one of a parameter's gradient that is zero but for rounding.
    """
    module = module.double().train()
    mine, theirs = ([x.detach().double().requires_grad_() for x in inputs] for _ in range(2))
    weights = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    outs, wanted = flat(module(*mine)), flat(expected(*theirs, weights))
    probes = [torch.randn_like(o) for o in wanted]
    for got, want in zip(outs, wanted, strict=True):
        assert relative_error(got, want.detach()) < limits[0]
    torch.autograd.backward(outs, probes)
    torch.autograd.backward(wanted, probes)
    for x, y in zip(mine, theirs, strict=True):
        assert relative_error(x.grad, y.grad) < limits[1]
    for key, parameter in module.named_parameters():
        want = weights[key].grad
        want = torch.zeros_like(parameter) if want is None else want
        error = (parameter.grad - want).abs().max().item()
        assert error < max(limits[2] * want.abs().max().item(), zero), key


def generated(key: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a state-dict key under the rules of the goldens of whole networks."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    r = torch.randn(shape, generator=generator)
    if key.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if key.endswith(("running_mean", "bias")):
        return 0.1 * r
    if key.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * r
    if key.rsplit(".", 1)[-1].startswith("lambda"):
        return 0.3 * r
    if len(shape) >= 2:
        return r / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    return 0.1 * r


def filled(module: nn.Module) -> nn.Module:
    """With weights under which every part has an effect: zeros at the start would hide some."""
    state = module.state_dict()
    module.load_state_dict({k: generated(k, tuple(v.shape)) for k, v in state.items()})
    return module


def from_released(key: str) -> str:
    """The name here of a key of a released ResNet checkpoint."""
    for old, new in (
        (".mrla.mrla.Wq.", ".mrla.query."),
        (".mrla.mrla.Wk.", ".mrla.key."),
        (".mrla.mrla.Wv.", ".mrla.value."),
    ):
        key = f".{key}".replace(old, new)[1:]
    if key.startswith("stages."):
        _, stage, rest = key.split(".", 2)
        key = f"layer{int(stage) + 1}.{rest}"
    return key


class Golden(dict):
    """Arrays of a golden file as tensors, by name."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            super().__init__(
                {
                    k: torch.from_numpy(arrays[k])
                    for k in arrays.files
                    if arrays[k].dtype.kind != "U"
                }
            )
            self.names = {k: arrays[k] for k in arrays.files if arrays[k].dtype.kind == "U"}

    def group(self, prefix: str) -> dict[str, Tensor]:
        """What is named ``prefix:...``, under our key names."""
        found = {}
        for key, value in self.items():
            if key.startswith(f"{prefix}:"):
                name = from_released(key[len(prefix) + 1 :])
                found[name] = value.flatten() if name.endswith("lambda_t") else value
        return found

    def error(self, name: str, got: Tensor) -> float:
        """Relative error of ``got`` against the array ``name``, of which a fixture may hold only
        every n-th value."""
        expected = self[name]
        if got.shape != expected.shape:
            step = -(-got.numel() // expected.numel())
            got = got.detach().flatten()[::step]
        return relative_error(got, expected)


def golden(name: str, source: str) -> Golden:
    """A golden from ``tests/fixtures`` or, whole, from the shared folder."""
    if source == "fixture":
        return Golden(FIXTURES / f"{name}.npz")
    path = SHARED / "goldens" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no shared goldens: {path} is absent")
    return Golden(path)
