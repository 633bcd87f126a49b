"""``mmrla run``: mmdet's analysis tools, as mmdet installs them, where mmcv has no operations."""

from __future__ import annotations

import json
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from mmrla.cli import main
from mmrla.commands.run import find_script
from mmrla.datasets import generate_shapes
from tests.helpers import DEMO, refusal


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images, and as predictions their ground truth without masks."""
    home = tmp_path_factory.mktemp("run")
    root = generate_shapes(home / "data", num_train=2, num_val=3)
    truth = json.loads((root / "annotations/instances_val2017.json").read_text())
    found = []
    for image in truth["images"]:
        own = [one for one in truth["annotations"] if one["image_id"] == image["id"]]
        boxes = torch.tensor([one["bbox"] for one in own])
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] for one in own])
        first = min(category["id"] for category in truth["categories"])
        found.append(dict(
            img_id=image["id"], img_path=str(root / "val2017" / image["file_name"]),
            ori_shape=(image["height"], image["width"]),
            pred_instances=dict(bboxes=boxes, labels=labels - first, scores=torch.ones(len(own))),
        ))  # fmt: skip
    (home / "found.pkl").write_bytes(pickle.dumps(found))
    return home


def options(home) -> list[str]:
    roots = [f"{split}_dataloader.dataset.data_root={home}/data" for split in ("train", "test")]
    ann_file = f"{home}/data/annotations/instances_val2017.json"
    files = [f"{split}_evaluator.ann_file={ann_file}" for split in ("val", "test")]
    return ["--cfg-options", *roots, *files]


def run(tool, *words: object) -> None:
    before = sys.argv, list(sys.path)
    main(["run", f"mmdet:analysis_tools/{tool}.py", str(DEMO), *map(str, words)])
    assert (sys.argv, sys.path) == before


def test_confusion_matrix(data, monkeypatch):
    pyplot.switch_backend("Agg")
    shown = []
    draw = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, x, *a, **k: shown.append(x) or draw(self, x, *a, **k)
    )
    run("confusion_matrix", data / "found.pkl", data / "matrix", *options(data))
    assert (data / "matrix/confusion_matrix.png").stat().st_size > 10_000
    # Percent by true class; the last row, things that are not there, was never predicted.
    (matrix,) = shown
    present = matrix.sum(1) > 0
    assert present.sum() >= 2
    np.testing.assert_array_equal(matrix[present], 100 * np.eye(len(matrix))[present])


def test_result_analysis(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("analyze_results", data / "found.pkl", tmp_path / "out", "--topk", 1, *options(data))
    good, bad = (list((tmp_path / "out" / name).iterdir()) for name in ("good", "bad"))
    assert len(good) == len(bad) == 1
    assert "_1.0" in good[0].name  # the precision of an image whose every box is right


def test_dataset_browsing(data, tmp_path):
    run("browse_dataset", "--output-dir", tmp_path, "--not-show", *options(data))
    names = sorted(path.name for path in (data / "data/train2017").iterdir())
    assert [path.stem for path in sorted(tmp_path.iterdir())] == [n.split(".")[0] for n in names]


def test_scripts_of_ones_own(tmp_path, capsys):
    (tmp_path / "beside.py").write_text("value = 3")
    (tmp_path / "own.py").write_text(
        "import sys, beside\n"
        "from mmcv.ops import nms\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], beside.value)\n"
        "    sys.exit(4)\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "own.py"), "--dry-run", "a b"])
    assert stopped.value.code == 4
    assert capsys.readouterr().out.strip() == "['--dry-run', 'a b'] 3"


def test_what_is_not_there(capsys):
    for script, message in (
        ("nowhere.py", "no such script: /.*nowhere.py"),
        ("nopackage:a.py", "no such package: 'nopackage'"),
        ("mmdet:confusion.py", "it has: .*analysis_tools/confusion_matrix.py, .*train.py"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_script(script)
        assert re.search(message, refusal(capsys, "run", script))
