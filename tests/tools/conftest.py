"""Commands run in the process of the test, by their files."""

from __future__ import annotations

import csv

import cv2
import numpy as np
import pytest

from mmrla.cli import main
from tests.helpers import refusal


@pytest.fixture
def images(coco_mini):
    return sorted((coco_mini / "val2017").glob("*.jpg"))[:2]


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Run a command in this process; its numbers by what their file ends in."""
    # Loggers made here keep the stream that capsys gave them, which is closed for later tests.
    monkeypatch.setattr("logging.raiseExceptions", False)

    def command(name, *args, fails=None):
        group = "cost" if name in ("resolution", "memory") else "figure"
        argv = [group, name, *map(str, args), "--out", str(tmp_path), "--device", "cpu"]
        if fails is not None:
            error = refusal(capsys, *argv)
            assert "Traceback" not in error
            assert fails in error, error
            return None
        main(argv)
        written = [w for w in capsys.readouterr().out.splitlines() if w.startswith(str(tmp_path))]
        found = {}
        for file in map(str, written):
            if file.endswith(".png"):
                picture = cv2.imread(file)
                assert min(picture.shape[:2]) > 300
                assert picture.std() > 10  # not blank
            elif file.endswith(".npz"):
                with np.load(file) as arrays:
                    found["npz"] = dict(arrays)
            else:
                with open(file, newline="") as lines:
                    found["csv"] = list(csv.DictReader(lines))
        found["png"] = sum(file.endswith(".png") for file in written)
        return found

    return command
