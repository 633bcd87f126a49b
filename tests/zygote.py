"""Commands in processes forked from one that has imported everything, which takes ten seconds.

Each command leads a process group, so that tests can start, kill and resume it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.conftest import free_port

SERVER = multiprocessing.get_context("forkserver")
# mmrla first: it makes mmcv's operations available to mmdet.
SERVER.set_forkserver_preload([
    "mmrla.engine", "mmrla.models", "mmdet.datasets", "mmdet.evaluation", "mmdet.models",
    "mmdet.visualization", "mmpretrain.datasets", "mmpretrain.evaluation", "mmpretrain.models",
])  # fmt: skip


def start(
    *argv: object, log: Path, err: Path | None = None, cwd: Path | None = None,
    environ: Mapping[str, str] = os.environ, **env: str,
) -> BaseProcess:  # fmt: skip
    """Run a script, or ``-m`` and a module, with its arguments.

    ``log`` gets what it prints, stderr too without ``err``; ``env`` differs from ``environ``.
    """
    files, folder = [str(log), str(err or log)], str(cwd or os.getcwd())
    args = ([*map(str, argv)], files, folder, {**environ, **env})
    process = SERVER.Process(target=_child, args=args)
    process.start()
    return process


def wait(process: BaseProcess, timeout: float | None = None) -> int:
    """The exit status of a command, -9 if it was killed, which happens after ``timeout`` s."""
    process.join(timeout)
    # Also workers of dataloaders, which may outlive it.
    kill(process)
    process.join()
    return process.exitcode


def kill(process: BaseProcess) -> None:
    """SIGKILL for a command and its dataloaders' workers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def start_ranks(world: int, *argv: object, folder: Path, **env: object) -> list[BaseProcess]:
    """Start the processes of a distributed run, which log to ``folder``/rank<number>.log."""
    env |= dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [
        start(*argv, log=folder / f"rank{r}.log", RANK=str(r), LOCAL_RANK=str(r), **env)
        for r in range(world)
    ]


def run_ranks(world: int, *argv: object, folder: Path, **env: object) -> list[str]:
    """What each of them prints."""
    processes = start_ranks(world, *argv, folder=folder, **env)
    status = [wait(process, timeout=900) for process in processes]
    logs = [(folder / f"rank{rank}.log").read_text() for rank in range(world)]
    assert status == [0] * world, "\n".join(log[-3000:] for log in logs)
    return logs


def run_command(*argv: object, timeout: float = 900, **kwargs) -> subprocess.CompletedProcess:
    """``subprocess.run`` of a Python command as for :func:`start`; killed after ``timeout``.

    What a command imports, or when, takes a process that has not imported everything to test.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        status = wait(start(*argv, log=out, err=err, **kwargs), timeout)
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


def _child(argv: list[str], files: Sequence[str], cwd: str, env: dict[str, str]) -> None:
    os.setsid()
    for number, name in enumerate(files, 1):
        with open(name, "ab") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[:0] = [cwd, *paths]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[:0] = [str(Path(argv[0]).parent), *paths]
        runpy.run_path(argv[0], run_name="__main__")
