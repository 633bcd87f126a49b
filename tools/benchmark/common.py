"""Backends by force, memory that is kept, and results as CSV and Markdown."""

from __future__ import annotations

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrla.ops.dispatch import ENV_VAR

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, object]


def device_name(device: torch.device) -> str:
    """``NVIDIA-H200``, or ``cpu-<kind>-<threads>threads``."""
    if device.type == "cuda":
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    kind = platform.processor() or platform.machine()
    return f"cpu-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}-{torch.get_num_threads()}threads"


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force a backend of mmrla's operations; None: whatever they choose."""
    before = os.environ.get(ENV_VAR)
    if name is None:
        os.environ.pop(ENV_VAR, None)
    else:
        os.environ[ENV_VAR] = name
    try:
        yield
    finally:
        os.environ.pop(ENV_VAR, None)
        if before is not None:
            os.environ[ENV_VAR] = before


def _is_from_a_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter cast or transposed, as autocast makes them."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")


def kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that a forward keeps, parameters and their casts left out."""
    ignored = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored and not _is_from_a_parameter(tensor):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # The graph holds what was kept until here, so that no address is used twice.
    del result
    return sum(kept.values())


def require_parity() -> None:
    """Run tests that compare the default backend with the naive one; leave unless they pass."""
    which = ["-k", "equal_plain or narrow or same_network"]
    tests = ["tests/ops/test_tails.py", "tests/models/test_fused_tail.py", *which]
    print(f"parity tests first: pytest {shlex.join(tests)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:])
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        sys.exit("error: parity tests fail; what is not right is not timed")


def save(part: str, rows: Sequence[Row], out: Path, device: torch.device) -> Path:
    """Write ``<part>_<device>_torch<version>.csv``; returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{part}_{device_name(device)}_torch{torch.__version__.split('+')[0]}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def markdown(rows: Sequence[Row]) -> str:
    """A table with a column for each key."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [
        f"| {' | '.join('' if v is None else str(v) for v in row.values())} |" for row in rows
    ]
    return "\n".join(lines)
