"""Commands of other projects, run as a user would."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mmrla.compat import ops_in_use
from tests.conftest import ROOT


def run(*command: object, cwd: Path, ok: bool = True) -> str:
    """Run a command with this checkout importable; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, printed[-4000:]
    return printed


def train(python: object, module: str, config: str, cwd: Path, *, ok: bool = True) -> str:
    """Train into ``out`` by the script that a project installs; returns what it printed."""
    tool = f"import {module}; print({module}.__path__[0] + '/.mim/tools/train.py')"
    script = run(python, "-c", tool, cwd=cwd).split()[-1]
    return run(python, script, config, "--work-dir", "out", cwd=cwd, ok=ok)


def train_by_the_prefix_alone(
    python: object, module: str, config: str, cwd: Path, *, needs_ops: bool
) -> str | None:
    """As :func:`train`, with a config that reaches mmrla by its prefix.

    None where that is too late, after seeing it fail: the project itself ``needs_ops`` of mmcv to
    be imported, and mmcv has none.
    """
    if needs_ops and ops_in_use() == "fallback":
        assert "No module named 'mmcv._ext'" in train(python, module, config, cwd, ok=False)
        return None
    return train(python, module, config, cwd)
