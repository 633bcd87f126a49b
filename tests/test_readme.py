"""What README.md shows, as a newcomer would type it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


COMMANDS = [
    line.split("#")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if re.match(r"(tools/dist_|python tools/)", line)
]


def test_everything_it_names_is_there():
    for path in re.findall(r"(?:configs|tools|docs|requirements)/[\w./-]+\.(?:py|sh|md|txt)", TEXT):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"make ([a-z-]+)", TEXT):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    from mmrla.engine.launch import add_common_arguments  # noqa: F401

    options = set(re.findall(r"`(--[a-z-]+)", TEXT))
    helps = "".join(
        subprocess.check_output([sys.executable, ROOT / "tools" / tool, "--help"], text=True)
        for tool in ("train.py", "test.py", "train_cifar.py")
    )
    assert all(option in helps for option in options), options


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, coco_mini, tmp_path):
    """Each in a checkout with its data in data/, up to the point where training would start."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/coco").symlink_to(coco_mini)
    from mmpretrain.datasets import CIFAR10

    for split in ("train", "val", "test"):
        for label in range(1000):
            (tmp_path / "data/imagenet" / split / f"n{label:08d}").mkdir(parents=True)
        image = tmp_path / "data/imagenet" / split / "n00000000/0.JPEG"
        cv2.imwrite(str(image), np.zeros((32, 32, 3), np.uint8))
        for name in CIFAR10.METAINFO["classes"]:
            folder = tmp_path / "data/cifar10" / split / name
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.png"), np.zeros((32, 32, 3), np.uint8))
    work_dir = tmp_path / "work_dirs/mask_rcnn_r50_mrla_1x"
    work_dir.mkdir(parents=True)
    (work_dir / "epoch_12.pth").touch()
    done = subprocess.run(
        [*shlex.split(command.replace("python ", f"{sys.executable} ", 1)), "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_commands():
    assert len(COMMANDS) >= 3


def test_the_module_example_runs():
    (code,) = [b for b in blocks("python") if b.startswith("import torch")]
    scope: dict = {}
    exec(code, scope)
    assert [tuple(f.shape) for f in scope["features"]] == [(2, 2048, 7, 7)]
    assert "([2, 2048, 7, 7],)" in code


def test_the_configs_build(tmp_path):
    for code in blocks("python"):
        if "model = dict(" not in code:
            continue
        # _base_ is relative to configs/, which other tests list
        folder = tmp_path / "configs"
        if not folder.exists():
            folder.mkdir()
            for entry in (ROOT / "configs").iterdir():
                (folder / entry.name).symlink_to(entry)
        path = folder / "_readme_example.py"
        path.write_text(code)
        cfg = Config.fromfile(path)
        from mmengine.registry import MODELS, DefaultScope

        with DefaultScope.overwrite_default_scope("mmdet"):
            if "type" in cfg.model:
                cfg.model.backbone.init_cfg = None
                assert MODELS.build(cfg.model).roi_head.bbox_head.num_classes == 2
            else:
                backbone = MODELS.build(cfg.model.backbone)
                assert type(backbone).__name__ == "MRLAResNet"
