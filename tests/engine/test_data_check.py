from __future__ import annotations

import pytest
from mmengine.config import Config

from mmrla.engine import check_data, set_data_root


def config(**changes):
    dataset = dict(
        type="CocoDataset",
        data_root="data/coco/",
        ann_file="annotations/a.json",
        data_prefix=dict(img="images/"),
    )
    loader = dict(dataset=dict(type="RepeatDataset", times=2, dataset=dataset))
    both = dict(
        dataset=dict(
            type="ConcatDataset", datasets=[dict(dataset), dict(dataset, data_root="data/coco")]
        )
    )
    evaluator = dict(type="CocoMetric", ann_file="data/coco/annotations/a.json")
    cfg = dict(
        data_root="data/coco/",
        train_dataloader=loader,
        val_dataloader=both,
        val_evaluator=evaluator,
        test_dataloader=both,
        test_evaluator=[evaluator, dict(type="DumpResults", out_file_path="x.pkl")],
    )
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


@pytest.mark.parametrize("new", ["data", "data/coco/mine"])
def test_a_root_above_or_below_the_old_one(root, monkeypatch, new):
    (root / "data/coco/mine").mkdir(parents=True)
    monkeypatch.chdir(root)
    cfg = config()
    set_data_root(cfg, new)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator[0]):
        assert evaluator.ann_file == f"{new}/annotations/a.json"


def test_what_is_missing_is_named(root, monkeypatch, tmp_path_factory):
    cfg = config()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(
        FileNotFoundError,
        match=r"train_dataloader.dataset.dataset.data_root: no such folder: /.*data/coco .*--data",
    ):
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


def test_an_evaluator_nobody_can_place_is_an_error(root):
    cfg = config(val_evaluator=dict(type="CocoMetric", ann_file="/elsewhere/b.json"))
    with pytest.raises(ValueError, match=r"val_evaluator.ann_file='/elsewhere/b.json' is not in"):
        set_data_root(cfg, root)


def test_absolute_paths_are_not_joined_to_the_root(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "b.json"
    other.write_text("{}")
    cfg = config()
    set_data_root(cfg, root)
    cfg.train_dataloader.dataset.dataset.ann_file = str(other)
    check_data(cfg)


def test_remote_data_is_left_to_its_backend():
    cfg = config()
    set_data_root(cfg, "s3://bucket/coco")
    assert cfg.val_evaluator.ann_file == "s3://bucket/coco/annotations/a.json"
    check_data(cfg)


def wrapped(kind: str, *datasets: dict) -> dict:
    if kind in ("ConcatDataset", "mmdet.ConcatDataset"):
        return dict(type=kind, datasets=list(datasets))
    return dict(type=kind, dataset=dict(type="ConcatDataset", datasets=list(datasets)))


@pytest.mark.parametrize(
    "kind", ["ConcatDataset", "RepeatDataset", "ClassBalancedDataset", "MultiImageMixDataset"]
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("other", ["data/mine", None])
def test_sets_in_two_folders_are_not_sent_to_one(root, kind, split, other):
    """One would be read twice, the other never."""
    first = dict(config().train_dataloader.dataset.dataset)
    both = wrapped(kind, first, dict(first, data_root=other, ann_file="b.json"))
    cfg = config(**{f"{split}_dataloader": dict(dataset=both)})
    before = cfg.copy().to_dict()
    message = rf"different folders \(.*data/coco; .*{other or 'no root'}.*datasets\.1\.data_root="
    with pytest.raises(ValueError, match=message):
        set_data_root(cfg, root)
    assert cfg.to_dict() == before
    # each set by itself, as the message says, is no matter of one root
    inner = cfg[f"{split}_dataloader"].dataset
    inner = inner if kind == "ConcatDataset" else inner.dataset
    inner.datasets[1].update(data_root="data/coco/")
    set_data_root(cfg, root)


def test_splits_in_two_folders_are_not_sent_to_one(root):
    mine = dict(config().train_dataloader.dataset.dataset, data_root="data/mine/")
    cfg = config(test_dataloader=dict(dataset=mine))
    with pytest.raises(
        ValueError, match=r"mine\).*train_dataloader.*data_root=... test_dataloader"
    ):
        set_data_root(cfg, root)


def test_sets_without_a_root(root):
    """Their relative paths come to lie in the new one; absolute ones stay."""
    own = dict(config().train_dataloader.dataset.dataset, data_root=None)
    loader = dict(dataset=own)
    evaluator = dict(type="CocoMetric", ann_file="annotations/a.json")
    cfg = config(train_dataloader=loader, val_dataloader=loader, test_dataloader=loader,
                 val_evaluator=evaluator, test_evaluator=evaluator)  # fmt: skip
    set_data_root(cfg, root)
    assert cfg.val_dataloader.dataset.data_root == f"{root}/"
    assert cfg.val_evaluator.ann_file == f"{root}/annotations/a.json"
    absolute = dict(own, ann_file=f"{root}/annotations/a.json", data_prefix=dict(img=f"{root}/i"))
    mixed = wrapped("ConcatDataset", config().train_dataloader.dataset.dataset, absolute)
    set_data_root(config(train_dataloader=dict(dataset=mixed)), root)


def test_metrics_inside_an_evaluator(root):
    """mmdet's MultiDatasetsEvaluator, whose annotation files move and are looked for too."""
    metrics = [dict(type="CocoMetric", ann_file="data/coco/annotations/a.json"),
               dict(type="CocoMetric", ann_file="data/coco/annotations/b.json")]  # fmt: skip
    cfg = config(val_evaluator=dict(type="MultiDatasetsEvaluator", metrics=metrics))
    set_data_root(cfg, root)
    assert [m.ann_file for m in cfg.val_evaluator.metrics] == [
        f"{root}/annotations/a.json", f"{root}/annotations/b.json"
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"val_evaluator.metrics\[1\].ann_file: no such"):
        check_data(cfg, ["val"])
