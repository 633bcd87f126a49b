"""A process that has imported everything, which takes ten seconds, and forks one per command.

Each command leads a process group, so that tests can start, kill and resume it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.conftest import ROOT, free_port


class Zygote:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(
        self, *argv: object, log: Path, err: Path | None = None, cwd: Path | None = None,
        environ: Mapping[str, str] = os.environ, **env: str,
    ) -> int:  # fmt: skip
        """Run a script, or ``-m`` and a module, with arguments; returns the id of its group.

        ``log`` gets what it prints, stderr too without ``err``; ``env`` differs from ``environ``.
        """
        files = [str(log), str(err or log)]
        cwd = str(cwd or os.getcwd())
        return self._ask(dict(argv=[*map(str, argv)], files=files, cwd=cwd, env={**environ, **env}))

    def wait(self, pid: int, timeout: float | None = None) -> int:
        """The exit status of a command, -9 if it was killed, which happens after ``timeout`` s."""
        return self._ask(dict(wait=pid), pid, timeout)

    def run(self, *argv: object, log: Path, **kwargs: object) -> int:
        return self.wait(self.start(*argv, log=log, **kwargs))

    def start_ranks(self, world: int, *argv: object, folder: Path, **env: str) -> list[int]:
        """Start the processes of a distributed run, which log to ``folder``/rank<number>.log."""
        env |= dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return [
            self.start(*argv, log=folder / f"rank{r}.log", RANK=str(r), LOCAL_RANK=str(r), **env)
            for r in range(world)
        ]

    def run_ranks(self, world: int, *argv: object, folder: Path, **env: str) -> list[str]:
        """What each of them prints."""
        pids = self.start_ranks(world, *argv, folder=folder, **env)
        status = [self.wait(pid, timeout=600) for pid in pids]
        logs = [(folder / f"rank{rank}.log").read_text() for rank in range(world)]
        assert status == [0] * world, "\n".join(log[-3000:] for log in logs)
        return logs

    def alive(self, pid: int) -> bool:
        return self._ask(dict(alive=pid))

    def _ask(self, request: dict, pid: int = 0, timeout: float | None = None) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            kill(pid)
        return json.loads(self._process.stdout.readline())


@functools.cache
def shared_zygote() -> Zygote:
    """This process's. It ends with it, when its standard input closes."""
    return Zygote()


def run_command(
    *argv: object,
    cwd: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    timeout: float = 900,
    **env: str,
) -> subprocess.CompletedProcess:
    """``subprocess.run`` of a Python command as for :meth:`Zygote.start`; killed after ``timeout``.

    What a command imports, or when, takes a process that has not imported everything to test.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        zygote = shared_zygote()
        pid = zygote.start(*argv, log=out, err=err, cwd=cwd, environ=environ, **env)
        status = zygote.wait(pid, timeout)
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


def kill(pid: int) -> None:
    """SIGKILL for a command and its dataloaders' workers."""
    os.killpg(pid, signal.SIGKILL)


def _child(argv: list[str], files: Sequence[str], cwd: str, env: dict[str, str]) -> None:
    os.setsid()
    for number, name in enumerate(files, 1):
        with open(name, "ab") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[:0] = [cwd, *paths]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[:0] = [str(Path(argv[0]).parent), *paths]
        runpy.run_path(argv[0], run_name="__main__")


def _main() -> None:
    # What imports print must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # mmrla first: it makes mmcv's operations available to mmdet.
    for name in ("mmrla.engine", "mmrla.models", "mmdet.datasets", "mmdet.evaluation",
                 "mmdet.models", "mmdet.visualization", "mmpretrain.datasets",
                 "mmpretrain.evaluation", "mmpretrain.models"):  # fmt: skip
        importlib.import_module(name)
    known: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            if pid not in known:
                known[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(ProcessLookupError):
                kill(pid)  # workers of dataloaders: os._exit below leaves them alone
            answer: object = known[pid]
        elif "alive" in request:
            pid = request["alive"]
            if pid not in known:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    known[pid] = os.waitstatus_to_exitcode(status)
            answer = pid not in known
        else:
            answer = os.fork()
            if answer == 0:
                status = 1
                try:
                    _child(**request)
                    status = 0
                except SystemExit as exit_:
                    status = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
                    if isinstance(exit_.code, str):
                        print(exit_.code, file=sys.stderr)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
