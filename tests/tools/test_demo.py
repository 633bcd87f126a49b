"""`make demo` at a shortened length: that it learns, not how fast."""

from __future__ import annotations

import re

import cv2
import pytest

from mmrla.engine.report import newest, read_scalars
from tests.conftest import ROOT
from tests.helpers import python
from tests.tools.test_tools import one_error, run


def test_an_empty_set_is_refused(tmp_path):
    assert "num_train" in one_error(
        run(ROOT / "tools/demo.py", "--num-train", 0, cwd=tmp_path, ok=False)
    )


@pytest.mark.slow
def test_demo_learns(tmp_path):
    out = tmp_path / "demo"
    said = python(
        ROOT / "tools/demo.py", "--work-dir", out, "--epochs", 2, "--num-val", 40, "--pictures", 2,
        cwd=tmp_path,
    )  # fmt: skip
    # The table of the last lines, in percent: 40 % of the way to the full demo's AP.
    table = said.split("AP in percent on 40 validation images")[1]
    ap = {kind: float(value) for kind, value in re.findall(r"^(box|mask) +([\d.]+)", table, re.M)}
    assert ap["box"] > 10
    assert ap["mask"] > 10
    losses = [r["loss"] for r in read_scalars(newest(out, "train/*/vis_data/scalars.json"))
              if "loss" in r]  # fmt: skip
    assert losses[-1] < 0.7 * losses[0]
    for picture in [out / "curve.png", *(out / "pictures").iterdir()]:
        pixels = cv2.imread(str(picture))
        assert min(pixels.shape[:2]) >= 400
        assert pixels.std() > 5
    assert len(list((out / "pictures").iterdir())) == 2
    assert (out / "train/epoch_2.pth").is_file()
