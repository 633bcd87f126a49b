"""FasterCocoMetric against mmdet's CocoMetric, on real annotations; and tables and curves."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmengine.config import Config
from pycocotools.coco import COCO

from mmrla.engine import FasterCocoMetric
from mmrla.engine.report import ap_table, newest, plot_run
from mmrla.registry import METRICS
from tests.conftest import ROOT
from tests.helpers import build


@pytest.fixture(scope="module")
def ann_file(coco_mini) -> str:
    pytest.importorskip("faster_coco_eval")
    return str(coco_mini / "annotations/instances_val2017.json")


@pytest.fixture(scope="module")
def predictions(ann_file):
    """Ground truth moved about, with some objects missed, doubled or of another class."""
    coco = COCO(ann_file)
    rng = np.random.default_rng(0)
    categories = sorted(coco.cats)
    samples = []
    for image_id in sorted(coco.imgs):
        image = coco.imgs[image_id]
        boxes, labels, scores, masks = [], [], [], []
        for ann in coco.imgToAnns[image_id]:
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = np.array(ann["bbox"]) * (1 + rng.normal(0, 0.06, 4))
                boxes.append([x, y, x + w, y + h])
                right = rng.random() < 0.8
                label = categories.index(ann["category_id"])
                labels.append(label if right else rng.integers(len(categories)))
                scores.append(round(rng.random(), 2))  # ties too
                shift = int(rng.integers(0, 6))
                masks.append(np.roll(coco.annToMask(ann), shift, axis=1).astype(bool))
        shape = (0, image["height"], image["width"])
        instances = dict(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(labels, dtype=torch.long),
            scores=torch.tensor(scores, dtype=torch.float32),
            masks=torch.from_numpy(np.stack(masks) if masks else np.zeros(shape, bool)),
        )
        samples.append(dict(img_id=image_id, ori_shape=shape[1:], pred_instances=instances))
    return samples


def fed(cls, ann_file, samples, **kwargs):
    metric = cls(ann_file=ann_file, metric=["bbox", "segm"], **kwargs)
    names = [c["name"] for c in metric._coco_api.dataset["categories"]]
    metric.dataset_meta = dict(classes=tuple(names))
    for sample in samples:
        metric.process({}, [sample])
    return metric


def evaluate(cls, ann_file, samples, monkeypatch):
    """The metrics, and the evaluators' whole tables of precision and recall."""
    metric = fed(cls, ann_file, samples, classwise=True)
    tables = []
    evaluator = coco_metric.COCOeval if cls is CocoMetric else metric._evaluator
    summarize = evaluator.summarize

    def keep(self, *args, **kwargs):
        summarize(self, *args, **kwargs)
        tables.append((self.eval["precision"], self.eval["recall"], np.array(self.stats)))

    monkeypatch.setattr(evaluator, "summarize", keep)
    return metric.evaluate(size=len(samples)), tables


def test_equals_pycocotools_to_the_last_digit(ann_file, predictions, monkeypatch):
    expected, tables = evaluate(CocoMetric, ann_file, predictions, monkeypatch)
    before = coco_metric.COCOeval
    found, own = evaluate(FasterCocoMetric, ann_file, predictions, monkeypatch)
    assert coco_metric.COCOeval is before
    assert 0.1 < expected["coco/bbox_mAP"] < 0.95
    assert expected["coco/segm_mAP"] != expected["coco/bbox_mAP"]
    # Per-class AP too; a class without objects has none on either side.
    assert found.keys() == expected.keys()
    np.testing.assert_equal(found, expected)
    for (precision, recall, stats), (p, r, s) in zip(tables, own, strict=True):
        # pycocotools adds the spacing of 1 to a denominator: the last bit of a double.
        np.testing.assert_allclose(np.reshape(p, precision.shape), precision, rtol=0, atol=3e-16)
        np.testing.assert_array_equal(np.reshape(r, recall.shape), recall)
        np.testing.assert_allclose(s[: len(stats)], stats, rtol=0, atol=1e-15)


@pytest.mark.parametrize("cls", [CocoMetric, FasterCocoMetric])
def test_format_only_writes_results_and_evaluates_nothing(cls, ann_file, predictions, tmp_path):
    samples, prefix = predictions[:5], str(tmp_path / "results")
    metric = fed(cls, ann_file, samples, format_only=True, outfile_prefix=prefix)
    assert metric.evaluate(size=5) == {}
    written = json.loads((tmp_path / "results.bbox.json").read_text())
    assert len(written) == sum(len(s["pred_instances"]["scores"]) for s in samples)
    assert written[0].keys() == {"image_id", "bbox", "score", "category_id"}
    assert "segmentation" in json.loads((tmp_path / "results.segm.json").read_text())[0]


def test_is_a_switch_of_any_config_and_says_what_it_cannot_do(ann_file, monkeypatch):
    cfg = Config.fromfile(ROOT / "configs/mask_rcnn_r50_mrla_1x.py")
    cfg.merge_from_dict({"val_evaluator.type": "mmrla.FasterCocoMetric"})
    cfg.val_evaluator.ann_file = ann_file
    assert isinstance(build(cfg.val_evaluator, "mmdet", METRICS), FasterCocoMetric)
    with pytest.raises(ValueError, match="use_mp_eval"):
        FasterCocoMetric(use_mp_eval=True)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ModuleNotFoundError, match="mmrla\\[fast-eval\\]"):
        FasterCocoMetric()


def test_tables_and_curves_of_a_run(tmp_path):
    metrics = {"coco/bbox_mAP": 0.4567, "coco/bbox_mAP_50": 1.0, "coco/bbox_mAP_l": -1.0}
    lines = ap_table(metrics).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert lines[1].split() == ["box", "45.7", "100.0", "-", "-", "-", "-"]
    assert len(lines) == 2  # no masks were evaluated
    with pytest.raises(FileNotFoundError, match=r"no \*.json in /"):
        newest(tmp_path, "*.json")
    with pytest.raises(ValueError, match="nothing was trained"):
        plot_run([{"coco/bbox_mAP": 0.1, "step": 1}], tmp_path / "curve.png")
