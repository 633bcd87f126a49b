from __future__ import annotations

import pytest

from mmrla.engine.report import ap_table, newest, plot_run


def test_ap_table():
    metrics = {"coco/bbox_mAP": 0.4567, "coco/bbox_mAP_50": 1.0, "coco/bbox_mAP_l": -1.0}
    lines = ap_table(metrics).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert lines[1].split() == ["box", "45.7", "100.0", "-", "-", "-", "-"]
    assert len(lines) == 2  # no masks were evaluated


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*.json in /"):
        newest(tmp_path, "*.json")
    with pytest.raises(ValueError, match="nothing was trained"):
        plot_run([{"coco/bbox_mAP": 0.1, "step": 1}], tmp_path / "curve.png")
