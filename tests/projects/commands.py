"""Commands of other projects, run as a user would."""

from __future__ import annotations

from pathlib import Path

import torch

from mmrla.compat import ops_in_use
from tests.helpers import python


def run(interpreter: object, *args: object, cwd: Path, ok: bool = True) -> str:
    return python(*args, cwd=cwd, ok=ok, both=True, python=interpreter)


def train(interpreter: object, module: str, config: str, cwd: Path, *, ok: bool = True) -> str:
    """Train into ``out`` by the script that a project installs; returns what it printed."""
    tool = f"import {module}; print({module}.__path__[0] + '/.mim/tools/train.py')"
    script = run(interpreter, "-c", tool, cwd=cwd).split()[-1]
    return run(interpreter, script, config, "--work-dir", "out", cwd=cwd, ok=ok)


def train_by_the_prefix_alone(
    interpreter: object, module: str, config: str, cwd: Path, *, needs_ops: bool
) -> str | None:
    """As :func:`train`, with a config that reaches mmrla by its prefix.

    None where that is too late, after seeing it fail: the project itself ``needs_ops`` of mmcv to
    be imported, and mmcv has none.
    """
    if needs_ops and ops_in_use() == "fallback":
        said = train(interpreter, module, config, cwd, ok=False)
        assert "No module named 'mmcv._ext'" in said
        return None
    return train(interpreter, module, config, cwd)


def check_layer_attentions(work_dir: Path, *names: str, part: str = ".mrla.") -> None:
    """Between two checkpoints, all weights of the layer attentions have moved."""
    before, after = (
        torch.load(work_dir / name, map_location="cpu", weights_only=False)["state_dict"]
        for name in names
    )
    ours = [k for k in after if part in k or ".mrla." in k]
    assert len([k for k in ours if k.endswith("mrla.query.weight")]) == 8
    still = [k for k in ours if torch.equal(before[k], after[k])]
    assert not still, still
