"""``mmrla check-gpu``: whether the fused operations are correct on this device, and how fast.

Triton's compiler, a driver or a device can break a kernel that is correct elsewhere. This command
compares every fused operation with plain torch in float64 on this device, times them and ResNet-50,
and prints a report to paste into an issue. It needs only torch and Triton; ResNet-50 is timed if
the mm packages are installed. Kernels take long to compile, so several processes share the
comparisons, and a crash of one does not affect the others.

Without a GPU, Triton's interpreter runs the kernels at small shapes. That tests the algorithms, but
not the compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mmrla.commands.gpu_comparison import Check, Outcome, checks_of, compare
from mmrla.commands.gpu_timing import network_rows, operation_rows
from mmrla.commands.timing import cpu_name
from mmrla.ops import fused
from mmrla.version import __version__

SECONDS = 100.0
"""Time limit of the comparisons on a GPU; twice as long in the interpreter. Remaining checks are
reported as not checked."""
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 if anything is wrong, else 0."""
    parser = argparse.ArgumentParser(
        "mmrla check-gpu",
        description="Compare the fused operations with plain torch in float64 on this machine's "
        "GPU, time them, and print a report. The status is 1 if anything is wrong. Without a GPU, "
        "Triton's interpreter runs the kernels at small shapes.",
    )
    parser.add_argument("--device", help="such as cuda:1, or cpu for the path without Triton")
    parser.add_argument("--no-times", action="store_true", help="compare only")
    parser.add_argument("--processes", type=int, help="that compare; 0: this one alone")
    # How this command calls itself for a share of the comparisons.
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="all", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.share:
        return _work(args.share, args.part, args.batch, torch.device(args.device), interpreted)

    name = args.device or ("cuda" if torch.cuda.is_available() else None)
    device = torch.device(name or "cpu")
    batch = args.batch or _batch(device)
    print(describe(device))
    if name is None:
        parts = ["interpreter"] if _triton_version() else ["cpu"]
        print(f"\nNo GPU is available to torch. {NO_GPU[parts[0]]}", flush=True)
    else:
        parts = ["all", "large"] if device.type == "cuda" else ["cpu"]
        if device.type == "cuda" and not fused.has_triton():
            print("\nTriton 3.4 or later is not usable here: the path without it is checked.")
    outcomes: list[Outcome] = []
    for part in parts:
        processes = _processes(device, args.processes, part)
        outcomes += _compare_all(checks_of(part, batch), part, batch, device, processes)
    print(f"\n{table_of_checks(outcomes)}\n\n{table_of_names(outcomes)}", flush=True)
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    timed = name is not None and not args.no_times
    wrong_times = timed and _print_times(device, batch)
    skipped = sum(1 for outcome in outcomes if outcome.note and not outcome.wrong)
    print(f"\n{len(outcomes) - skipped} checks, {len(wrong)} wrong, {skipped} not made.")
    for outcome in wrong:
        print(f"- WRONG: {outcome.check}: {outcome.explanation()}")
    return int(bool(wrong) or wrong_times)


NO_GPU = {
    "interpreter": "Triton's interpreter runs the kernels at small shapes: this checks the "
    "algorithms, not what a GPU would compute.",
    "cpu": "Triton is not installed either: the path that CPUs take is checked instead.",
}


def describe(device: torch.device) -> str:
    """Device and versions, one per line."""
    lines = [f"mmrla check-gpu, mmrla {__version__}", ""]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        lines.append(
            f"- device: {found.name}, capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} multiprocessors, {found.total_memory / GIB:.1f} GiB"
        )
    else:
        lines.append(f"- device: {device} ({cpu_name()})")
    lines += [
        f"- torch {torch.__version__}, Triton {_triton_version() or 'none'}, CUDA "
        f"{torch.version.cuda or torch.version.hip or 'none'}, cuDNN "
        f"{torch.backends.cudnn.version() or 'none'}",
        f"- Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPUs",
    ]
    return "\n".join(lines)


def _triton_version() -> str | None:
    try:
        from triton import __version__ as version
    except ImportError:
        return None
    return version


def _batch(device: torch.device) -> int:
    """Of ResNet-50, as large as fits."""
    if device.type != "cuda":
        return 2
    free = torch.cuda.mem_get_info(device)[0] / GIB
    return 256 if free > 60 else 64 if free > 14 else 16


def _processes(device: torch.device, asked: int | None, part: str) -> int:
    if asked is not None:
        return asked
    if part == "large":
        return 1
    cpus = max(1, (os.cpu_count() or 1) - 1)
    if device.type != "cuda":
        return min(4, cpus)
    # Odd, so that each process gets checks of both operations, which come in turns.
    return min(12, cpus, int(torch.cuda.mem_get_info(device)[0] / GIB / 5)) | 1


def _compare_all(
    checks: Sequence[Check], part: str, batch: int, device: torch.device, processes: int
) -> list[Outcome]:
    """Outcomes in the order of ``checks``, computed by this process or by others."""
    interpreted = part == "interpreter"
    if processes == 0 and not interpreted:
        return [_progress(compare(check, device), k, checks) for k, check in enumerate(checks)]
    processes = max(1, min(processes, len(checks)))
    found: dict[int, Outcome] = {}
    deadline = time.monotonic() + SECONDS * (2 if interpreted else 1)
    command = [sys.executable, "-m", "mmrla.commands.check_gpu", "--device", str(device),
               "--part", part, "--batch", str(batch)]  # fmt: skip
    env = dict(os.environ, TRITON_INTERPRET="1") if interpreted else dict(os.environ)

    def take(lines: Iterable[str]) -> None:
        for line in lines:
            if line.startswith("{"):  # others are warnings of libraries
                entry = json.loads(line)
                k = entry.pop("index")
                found[k] = _progress(Outcome(checks[k], **entry), k, checks)

    def share(k: int) -> None:
        mine = list(range(k, len(checks), processes))
        with (
            tempfile.TemporaryFile("w+") as messages,
            subprocess.Popen(
                [*command, "--share", f"{k}/{processes}"], env=env, text=True,
                stdout=subprocess.PIPE, stderr=messages,
            ) as process,
        ):  # fmt: skip
            timer = threading.Timer(max(1.0, deadline - time.monotonic()), process.kill)
            timer.start()
            take(process.stdout or ())
            status = process.wait()
            late = not timer.is_alive()
            timer.cancel()
            messages.seek(0)
            said = messages.read().strip().splitlines()[-1:] or ["no message"]
        left = [i for i in mine if i not in found]
        why = "no time was left" if late else "the process that was to make it had ended"
        for i in left:
            found[i] = Outcome(checks[i], {}, why)
        if left and not late:
            crash = f"its process ended with status {status}: {said[0]}"
            found[left[0]] = _progress(Outcome(checks[left[0]], {}, crash, True), left[0], checks)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(share, range(processes)))
    return [found[k] for k in range(len(checks))]


def _progress(outcome: Outcome, k: int, checks: Sequence[Check]) -> Outcome:
    print(
        f"check {k + 1} of {len(checks)}: {outcome.check}: {outcome}", file=sys.stderr, flush=True
    )
    return outcome


def _work(share: str, part: str, batch: int | None, device: torch.device, interpreted: bool) -> int:
    """Run every n-th check and print a line of JSON for each."""
    k, n = map(int, share.split("/"))
    if interpreted:
        fused.uses_triton = lambda z: z.dtype != torch.float64  # on the CPU, by the interpreter
    for index, check in list(enumerate(checks_of(part, batch or _batch(device))))[k::n]:
        outcome = compare(check, device)
        entry = dict(index=index, errors=outcome.errors, note=outcome.note, failed=outcome.failed)
        print(json.dumps(entry), flush=True)
    return 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table whose columns are the keys, padded so that it also reads as plain text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[str(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    padded = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {padded[0]} |", f"|{rule}|", *(f"| {line} |" for line in padded[1:])])


def table_of_checks(outcomes: Sequence[Outcome]) -> str:
    """A row per check: its worst relative error and the tensor it belongs to."""
    return markdown([{**outcome.check.columns(), **outcome.columns()} for outcome in outcomes])


def table_of_names(outcomes: Sequence[Outcome]) -> str:
    """The worst relative error of each output, statistic and gradient, by operation and dtype."""
    worst: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        column = f"{outcome.check.kind} {outcome.check.dtype}"
        for name, error in outcome.errors.items():
            row = worst.setdefault(name.split("[")[0], {})
            if not error <= row.get(column, -1.0):
                row[column] = error
    columns = sorted({column for row in worst.values() for column in row})
    return markdown(
        [
            {"relative error of": name} | {c: f"{row[c]:.1e}" if c in row else "" for c in columns}
            for name, row in worst.items()
        ]
    )


def _print_times(device: torch.device, batch: int) -> bool:
    """Print both tables of times; True if something failed."""
    failed = False
    for title, rows in _times(device, batch):
        print(f"\n{title}\n", flush=True)
        try:
            print(markdown(list(rows())), flush=True)
        except ImportError as error:
            print(f"not timed: the mm packages cannot be imported ({error})")
        except Exception as error:  # whatever a kernel may raise
            failed = True
            print(f"- WRONG: {type(error).__name__}: {error}")
    return failed


def _times(device: torch.device, batch: int) -> Iterator[tuple[str, Any]]:
    small = device.type != "cuda"
    print("timing the operations", file=sys.stderr, flush=True)
    yield (
        "Block ends, bfloat16, channels_last, medians in ms (wall time; sum of kernel times)",
        lambda: operation_rows(device, 2 if small else batch // 2, small),
    )
    print("timing ResNet-50", file=sys.stderr, flush=True)
    yield (
        f"ResNet-50, batch {batch}, bfloat16 autocast, channels_last, medians in ms",
        lambda: network_rows(device, batch, small),
    )


if __name__ == "__main__":
    sys.exit(main())
