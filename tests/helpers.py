"""Set-up that tests of several folders share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmrla.cli import main
from tests.conftest import ROOT
from tests.conftest import filled as filled

DEMO = ROOT / "configs/demo_mask_rcnn_r18_mrla_shapes.py"


def refusal(capsys: Any, *argv: object) -> str:
    """What ``mmrla ARGV`` prints as it stops because of wrong input."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, argv)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def python(
    *args: object, cwd: Path, ok: bool = True, both: bool = False, path: object = ROOT,
    python: object = sys.executable,
) -> str:  # fmt: skip
    """Start an interpreter that imports from ``path``; its output, with errors too if not ok."""
    done = subprocess.run(
        [str(python), *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False,
        timeout=7200, env={**os.environ, "PYTHONPATH": str(path)},
    )  # fmt: skip
    assert (done.returncode == 0) == ok, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr if both or not ok else done.stdout


def cfg_options(changes: dict) -> list[str]:
    """What a command is told so that it changes its config."""
    return ["--cfg-options", *(f"{key}={value}" for key, value in changes.items())]


def build(cfg: Any, scope: str, registry: Any = MODELS) -> Any:
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(cfg)


def classifier(
    backbone: dict, channels: int = 2048, head: str = "LinearClsHead", classes: int = 1000
) -> Any:
    """mmpretrain's, around a backbone that puts out maps, or tokens for a head of a ViT."""
    neck = None if "Vision" in head else dict(type="GlobalAveragePooling")
    head = dict(type=head, num_classes=classes, in_channels=channels)
    cfg = dict(type="ImageClassifier", backbone=backbone, neck=neck, head=head)
    return build(cfg, "mmpretrain")


def save_weights(cfg: Any, path: Path, **meta: object) -> str:
    """A checkpoint of a config's network with random weights."""
    torch.manual_seed(0)
    model = dict(cfg.model)
    if "data_preprocessor" in cfg:
        model["data_preprocessor"] = cfg.data_preprocessor
    state = build(model, cfg.default_scope).state_dict()
    torch.save(dict(state_dict=state, meta=meta), path)
    return str(path)


def files_in(folder: Path) -> dict[str, bytes]:
    """What all files below a folder hold, by their paths from there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(a: Any, b: Any, prefix: str = "") -> bool:
    """Whether what ``a`` holds, a module or its state, is in ``b`` under the prefix."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return all(torch.equal(a[k], b[f"{prefix}{k}"]) for k in a)


def assert_equal(got: dict, expected: dict, prefix: str = "") -> None:
    """The same keys, with the prefix in ``got``, and the same values."""
    assert got.keys() == {f"{prefix}{k}" for k in expected}
    assert same(expected, got, prefix)
