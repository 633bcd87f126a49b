"""A process that has imported everything and forks one that trains for each line that it reads.

So a test can start, kill and resume runs of tools/train.py without waiting for imports. The runs
are processes of their own, leaders of their process groups.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.conftest import ROOT


class Zygote:
    """Used by tests, as a context manager."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.zygote"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, script: Path, *arguments: object, log: Path, **env: str) -> int:
        """The process id of a new run, which is its group's too."""
        request = dict(argv=[str(script), *map(str, arguments)], log=str(log), env=env)
        return self._ask(request)

    def wait(self, pid: int) -> int:
        """The exit status of a run, -9 where it was killed."""
        return self._ask(dict(wait=pid))

    def run(self, script: Path, *arguments: object, log: Path, **env: str) -> int:
        return self.wait(self.start(script, *arguments, log=log, **env))

    def alive(self, pid: int) -> bool:
        return self._ask(dict(alive=pid))

    def _ask(self, request: dict) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def kill(pid: int) -> None:
    """SIGKILL for a run and its dataloaders' workers."""
    os.killpg(pid, signal.SIGKILL)


def _child(argv: list[str], log: str, env: dict[str, str]) -> None:
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _main() -> None:
    # What imports print must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # mmrla first: it makes mmcv's operations available to mmdet.
    for name in ("mmrla.engine", "mmrla.models", "mmdet.datasets", "mmdet.evaluation",
                 "mmdet.models", "mmdet.visualization"):  # fmt: skip
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
