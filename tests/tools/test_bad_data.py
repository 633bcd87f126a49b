"""Training on bad data: skipped with a count in the log, or one line and no run."""

from __future__ import annotations

import json
import re

import pytest

from mmrla.datasets import generate_shapes
from tests.conftest import ROOT
from tests.helpers import DEMO
from tests.tools.test_tools import losses, one_error, run

SHORT = ["train_cfg.max_epochs=1", "train_cfg.val_interval=2", "default_hooks.logger.interval=1"]


def train(data, work_dir, *options: str, ok: bool = True):
    return run(
        ROOT / "tools/train.py", DEMO, "--data-root", data, "--work-dir", work_dir,
        "--cfg-options", *SHORT, "param_scheduler.1.end=1", *options, ok=ok,
    )  # fmt: skip


@pytest.mark.slow
def test_training_skips_and_counts_or_stops(tmp_path):
    data = generate_shapes(tmp_path / "data", num_train=12, num_val=1)
    image = data / "train2017/000000000003.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])

    done = train(data, tmp_path / "stops", ok=False)
    message = one_error(done)
    assert f"truncated-image: {image}" in message
    assert not list((tmp_path / "stops").glob("*.pth"))

    # What can be known before the first step stops before it.
    ann_file = data / "annotations/instances_train2017.json"
    content = json.loads(ann_file.read_text())
    content["annotations"][0]["category_id"] = 9
    ann_file.write_text(json.dumps(content))
    done = train(data, tmp_path / "stops", ok=False)
    assert "1 unknown-category: unknown-category: annotation 1 of image 1" in one_error(done)
    assert not losses(done.stdout + done.stderr)

    done = train(data, tmp_path / "skips", "train_dataloader.dataset.on_bad=skip")
    log = done.stdout + done.stderr
    assert len(losses(log)) == 3
    assert "1 unknown-category; left out 0 of 12 images and 1 of " in log
    skipped = re.findall(r"skipped an image while training, (\d) so far: truncated-image", log)
    assert skipped[0] == "1"
