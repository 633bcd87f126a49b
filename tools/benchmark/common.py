"""Timing side by side, and results as CSV, Markdown and pictures."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from mmrla.compat.heap import give_back_free_memory
from mmrla.ops.dispatch import ENV_VAR

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, object]


def device_name(device: torch.device) -> str:
    """``NVIDIA-H200``, or ``cpu-<kind>-<threads>threads``."""
    if device.type == "cuda":
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    kind = platform.processor() or platform.machine()
    return f"cpu-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}-{torch.get_num_threads()}threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def side_by_side(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs all of them, in turning order.

    A machine that slows down slows all of a round, so that ratios within rounds stand.
    """
    names = list(steps)
    for _ in range(warm_up):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Median over rounds of ``name`` over ``reference``."""
    return median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that a forward keeps, parameters left out."""
    ignored = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # The graph holds what was kept until here, so that no address is used twice.
    del result
    return sum(kept.values())


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a step needs at most above what is there before it; None where it is not known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the high-water mark can be started again
    except OSError:
        return None

    def read(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]

    # What earlier work freed may still be resident, and a step that reuses it would need none.
    give_back_free_memory()
    reset.write_text("5")
    before = read("VmRSS")
    step()
    return read("VmHWM") - before


def require_parity() -> None:
    """Run the tests that compare every backend with the plain one; leave unless they pass."""
    tests = ["tests/ops", "tests/models/test_fused_tail.py"]
    print(f"parity tests first: pytest {' '.join(tests)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *tests], cwd=ROOT,
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
