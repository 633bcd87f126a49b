from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mmrla  # noqa: F401  # before mm packages, for which it stands in for mmcv's operations

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
# Ground truth and real images that may lie beside a checkout.
SHARED = Path(os.environ.get("MMRLA_SHARED", ROOT.parent / "shared"))

needs_new_compiler = pytest.mark.skipif(
    not hasattr(torch.library, "custom_op"), reason="torch.compile before torch 2.4"
)


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


def overlay_environment(folder: Path) -> Path:
    """The interpreter of an environment that lies over this one.

    What is installed here is seen from there and not installed again, torch above all, and nothing
    is written here.
    """
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


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value that is expected."""
    assert got.shape == expected.shape, f"{got.shape=} {expected.shape=}"
    scale = expected.abs().max().clamp(min=1e-30)
    return ((got.detach() - expected).abs().max() / scale).item()


def generated(key: str, shape: tuple[int, ...]) -> torch.Tensor:
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

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """What is named ``prefix:...``, under our key names."""
        found = {}
        for key, value in self.items():
            if key.startswith(f"{prefix}:"):
                name = from_released(key[len(prefix) + 1 :])
                found[name] = value.flatten() if name.endswith("lambda_t") else value
        return found

    def error(self, name: str, got: torch.Tensor) -> float:
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
