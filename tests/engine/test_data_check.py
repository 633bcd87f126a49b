"""Data roots and files that a config names: moved together, and missed by name."""

from __future__ import annotations

import json

import pytest
from mmengine.config import Config

from mmrla.engine import check_data, set_data_root
from mmrla.engine.data.config import check_evaluators, warn_of_unchecked
from mmrla.engine.run.checks import _check_initial_weights

DATASET = dict(
    type="CocoDataset", data_root="data/coco/", ann_file="annotations/a.json",
    data_prefix=dict(img="images/"),
)  # fmt: skip


def config(**changes):
    both = [dict(DATASET), dict(DATASET, data_root="data/coco")]
    loader = dict(dataset=dict(type="ConcatDataset", datasets=both))
    evaluator = dict(type="CocoMetric", ann_file="data/coco/annotations/a.json")
    cfg = dict(
        data_root="data/coco/",
        train_dataloader=dict(dataset=dict(type="RepeatDataset", times=2, dataset=dict(DATASET))),
        val_dataloader=loader, val_evaluator=evaluator, test_dataloader=loader,
        test_evaluator=[evaluator, dict(type="DumpResults", out_file_path="x.pkl")],
    )  # fmt: skip
    return Config({**cfg, **changes})


@pytest.fixture
def root(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/a.json").write_text("{}")
    (tmp_path / "images").mkdir()
    return tmp_path


def test_points_everything_at_the_root(root):
    cfg = config()
    set_data_root(cfg, root)
    new = f"{root}/"
    assert cfg.data_root == cfg.train_dataloader.dataset.dataset.data_root == new
    assert [d.data_root for d in cfg.val_dataloader.dataset.datasets] == [new, new]
    assert cfg.val_evaluator.ann_file == f"{new}annotations/a.json"
    assert cfg.test_evaluator[0].ann_file == f"{new}annotations/a.json"
    assert cfg.test_evaluator[1].out_file_path == "x.pkl"
    check_data(cfg)
    set_data_root(cfg, str(root))  # again: nothing to do
    assert cfg.test_evaluator[0].ann_file == f"{new}annotations/a.json"


@pytest.mark.parametrize("new", ["data", "data/coco/mine", "s3://bucket/coco"])
def test_a_root_above_or_below_the_old_one_or_remote(root, monkeypatch, new):
    (root / "data/coco/mine").mkdir(parents=True)
    monkeypatch.chdir(root)
    cfg = config()
    set_data_root(cfg, new)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator[0]):
        assert evaluator.ann_file == f"{new}/annotations/a.json"
    if "://" in new:
        check_data(cfg)  # left to its backend


def test_what_is_missing_is_named(root, monkeypatch, tmp_path_factory):
    cfg = config()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    place = "train_dataloader.dataset.dataset.data_root"
    with pytest.raises(FileNotFoundError, match=f"{place}: no such folder: /.*data/coco .*--data"):
        check_data(cfg)
    set_data_root(cfg, root)
    (root / "images").rmdir()
    with pytest.raises(FileNotFoundError, match=r"data_prefix.img: no such folder: .*/images"):
        check_data(cfg, ["val"])
    (root / "annotations/a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ann_file: no such annotation file: .*a.json"):
        check_data(cfg, ["test"])
    with pytest.raises(FileNotFoundError, match="--data-root: no such folder: /.*/nowhere"):
        set_data_root(cfg, "nowhere")


def test_paths_outside_of_the_root(root, tmp_path_factory):
    """Nobody can place an evaluator's; a data set's absolute path is not joined to the root."""
    cfg = config(val_evaluator=dict(type="CocoMetric", ann_file="/elsewhere/b.json"))
    with pytest.raises(ValueError, match=r"val_evaluator.ann_file='/elsewhere/b.json' is not in"):
        set_data_root(cfg, root)
    other = tmp_path_factory.mktemp("other") / "b.json"
    other.write_text("{}")
    cfg = config()
    set_data_root(cfg, root)
    cfg.train_dataloader.dataset.dataset.ann_file = str(other)
    check_data(cfg)


def wrapped(kind: str, *datasets: dict) -> dict:
    both = dict(type="ConcatDataset", datasets=list(datasets))
    return both if kind == "ConcatDataset" else dict(type=kind, dataset=both)


@pytest.mark.parametrize(
    "kind", ["ConcatDataset", "RepeatDataset", "ClassBalancedDataset", "MultiImageMixDataset"]
)
@pytest.mark.parametrize("other", ["data/mine", None])
def test_sets_in_two_folders_are_not_sent_to_one(root, kind, other):
    """One would be read twice, the other never."""
    for split in ("train", "val", "test"):
        both = wrapped(kind, DATASET, dict(DATASET, data_root=other, ann_file="b.json"))
        cfg = config(**{f"{split}_dataloader": dict(dataset=both)})
        before = cfg.copy().to_dict()
        message = (
            rf"different folders \(.*data/coco; .*{other or 'no root'}.*datasets\.1\.data_root="
        )
        with pytest.raises(ValueError, match=message):
            set_data_root(cfg, root)
        assert cfg.to_dict() == before
        # each set by itself, as the message says, is no matter of one root
        inner = cfg[f"{split}_dataloader"].dataset
        inner = inner if kind == "ConcatDataset" else inner.dataset
        inner.datasets[1].update(data_root="data/coco/")
        set_data_root(cfg, root)


def test_splits_in_two_folders_are_not_sent_to_one(root):
    cfg = config(test_dataloader=dict(dataset=dict(DATASET, data_root="data/mine/")))
    message = r"mine\).*train_dataloader.*data_root=... test_dataloader"
    with pytest.raises(ValueError, match=message):
        set_data_root(cfg, root)


def test_sets_without_a_root(root):
    """Their relative paths come to lie in the new one; absolute ones stay."""
    own = dict(DATASET, data_root=None)
    loader = dict(dataset=own)
    evaluator = dict(type="CocoMetric", ann_file="annotations/a.json")
    cfg = config(train_dataloader=loader, val_dataloader=loader, test_dataloader=loader,
                 val_evaluator=evaluator, test_evaluator=evaluator)  # fmt: skip
    set_data_root(cfg, root)
    assert cfg.val_dataloader.dataset.data_root == f"{root}/"
    assert cfg.val_evaluator.ann_file == f"{root}/annotations/a.json"
    absolute = dict(own, ann_file=f"{root}/annotations/a.json", data_prefix=dict(img=f"{root}/i"))
    mixed = wrapped("ConcatDataset", DATASET, absolute)
    set_data_root(config(train_dataloader=dict(dataset=mixed)), root)


def test_metrics_inside_an_evaluator(root):
    """mmdet's MultiDatasetsEvaluator, whose annotation files move and are looked for too."""
    metrics = [dict(type="CocoMetric", ann_file=f"data/coco/annotations/{n}.json") for n in "ab"]
    cfg = config(val_evaluator=dict(type="MultiDatasetsEvaluator", metrics=metrics))
    set_data_root(cfg, root)
    moved = [m.ann_file for m in cfg.val_evaluator.metrics]
    assert moved == [f"{root}/annotations/{n}.json" for n in "ab"]
    with pytest.raises(FileNotFoundError, match=r"val_evaluator.metrics\[1\].ann_file: no such"):
        check_data(cfg, ["val"])


# --- evaluators with other annotations than their data sets ---


def write(path, images, categories=("bolt", "nut")):
    images = [dict(id=i, file_name=name) for i, name in enumerate(images)]
    categories = [dict(id=i, name=name) for i, name in enumerate(categories)]
    path.write_text(json.dumps(dict(images=images, categories=categories, annotations=[])))


def evaluated(root, evaluator="own.json", kind="mmdet.CocoMetric", of="mmrla.CheckedCocoDataset"):
    dataset = dict(type=of, data_root=str(root), ann_file="own.json")
    loader = dict(dataset=dict(type="RepeatDataset", dataset=dataset))
    metric = dict(type=kind, ann_file=str(root / evaluator))
    return Config(dict(val_dataloader=loader, val_evaluator=[metric]))


def test_another_set_is_refused(tmp_path):
    write(tmp_path / "own.json", ["a.jpg", "b.jpg"])
    write(tmp_path / "more.json", ["x/a.jpg", "b.jpg", "c.jpg"])  # holds all of it
    write(tmp_path / "other.json", ["a.jpg", "z.jpg"])
    write(tmp_path / "fewer.json", ["a.jpg"])
    write(tmp_path / "swapped.json", ["a.jpg", "b.jpg"], ["nut", "bolt"])
    for evaluator in ("own.json", "more.json"):
        check_evaluators(evaluated(tmp_path, evaluator), ["train", "val", "test"])
    for evaluator, message in (
        ("other.json", r"image 1 is 'b.jpg' in .*own.json, and 'z.jpg' there"),
        ("fewer.json", r"image 1 is 'b.jpg' in .*, and missing there.*Set val_evaluator\[0\]"),
        ("swapped.json", "category 0 is 'bolt' in .*, and 'nut' there"),
    ):
        cfg = evaluated(tmp_path, evaluator)
        with pytest.raises(ValueError, match=message):
            check_evaluators(cfg, ["val"])
        check_evaluators(cfg, ["test"])  # which this run does not use
    # What is no COCO file is left alone.
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.txt").write_text("a")
    for change in (["broken.json"], ["other.txt"], ["other.json", "VOCMetric"]):
        check_evaluators(evaluated(tmp_path, *change), ["val"])


@pytest.mark.parametrize(
    ("kind", "said"),
    [("CocoDataset", 1), ("mmdet.CocoDataset", 1), ("mmrla.CheckedCocoDataset", 0), ("XML", 0)],
)
def test_a_set_that_nobody_checks_is_named(tmp_path, monkeypatch, kind, said):
    lines: list[str] = []
    monkeypatch.setattr("mmrla.engine.data.config.print_log", lambda text, **_: lines.append(text))
    warn_of_unchecked(evaluated(tmp_path, of=kind), ["train", "val", "test"])
    named = ["val_dataloader.dataset.dataset: type='mmrla.Chec" in line for line in lines]
    assert named == [True] * said


def test_weights_that_are_not_there_are_found_anywhere():
    none = dict(checkpoint="no.pth")
    for model, place in (
        (dict(init_cfg=[dict(type="Constant"), none]), r"init_cfg\[1\].c"),
        (dict(roi_head=dict(bbox_head=[{}, dict(init_cfg=none)])),
         r"roi_head.bbox_head\[1\].init_cfg.checkpoint"),
        (dict(teacher_ckpt="no.pth"), "teacher_ckpt"),
        (dict(backbone=dict(pretrained="no.pth")), "backbone.pretrained"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=rf"model.{place}.*: no such file: /.*no.pth"):
            _check_initial_weights(model, "model")
    _check_initial_weights(dict(pretrained="torchvision://resnet50", checkpoint=None), "model")
