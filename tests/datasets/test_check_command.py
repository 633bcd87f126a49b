"""``mmrla check-data``: what it finds, prints and writes."""

from __future__ import annotations

import json

import pytest

from mmrla.cli import main
from tests.datasets.bad_sets import CASES, CLASSES, HEIGHT, WIDTH, Coco, cut, write_image
from tests.datasets.test_voc import write_voc
from tests.helpers import files_in, refusal


@pytest.fixture
def run(capsys):
    """``mmrla check-data``: its status and what it printed."""

    def command(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["check-data", *map(str, words)])
        return status, capsys.readouterr().out

    return command


def test_command(tmp_path, run):
    coco = Coco(tmp_path / "bad")
    for name in ("missing image", "RLEs and polygons", "marked ignore"):
        CASES[name].change(coco)
    coco.annotations[7]["category_id"] = 99
    coco.annotations[8]["bbox"] = [4, 6, 0, 20]
    cut(coco.image(6))
    coco.write()
    before = files_in(coco.root)
    out = tmp_path / "report.json"
    status, printed = run(coco.root, "--json", out, "--workers", 2)
    assert status == 1
    lines = printed.splitlines()
    assert "4 errors, 2 warnings" in lines[0]
    (found,) = json.loads(out.read_text())["sets"]
    errors = ["missing-image", "truncated-image", "unknown-category", "zero-area"]
    assert found["counts"] == dict.fromkeys([*errors, "mixed-segmentation", "marked-ignore"], 1)
    for finding in found["findings"]:
        assert f"  {finding['severity']}: {finding['kind']}: {finding['text']}" in lines
    assert {f["image_id"] for f in found["findings"] if f["severity"] == "error"} == {2, 4, 5, 6}
    # Nothing is written but the report.
    assert files_in(coco.root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "report.json"]
    status, printed = run("--ann", coco.ann_file, "--images", coco.folder, "--allow", *errors)
    assert status == 0
    assert "0 errors" in printed


def test_command_with_a_config(tmp_path, run):
    """The classes are the config's, and masks matter if it loads them."""
    coco = Coco(tmp_path / "set")
    CASES["no segmentation"].change(coco)
    coco.write()
    config = tmp_path / "config.py"
    config.write_text(
        f"dataset = dict(type='CocoDataset', data_root={str(coco.root)!r},\n"
        "    ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'),\n"
        "    metainfo=dict(classes=('ant', 'cat', 'bee')),\n"
        "    pipeline=[dict(type='LoadAnnotations', with_bbox=True)])\n"
        "train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset))\n"
        "val_dataloader = dict(dataset=dataset)\n"
    )
    status, printed = run("--config", config)
    assert status == 1
    assert "(train_dataloader.dataset.dataset, val_dataloader.dataset): 1 errors" in printed
    assert "class-order: label 1 would be category 'bee' and is called 'cat'" in printed
    order = 'val_dataloader.dataset.metainfo.classes="[ant,bee,cat]"'
    _, printed = run("--config", config, "--cfg-options", order)
    assert "(val_dataloader.dataset): 0 errors, 0 warnings" in printed


def test_a_config_of_many_kinds_of_sets(tmp_path, run, capsys):
    """What is not checked is named, with its type and why; what reads COCO or VOC is checked."""
    coco = Coco(tmp_path / "set").write()
    voc = tmp_path / "voc"
    write_voc(voc, "a", [("RBC", (2, 2, 9, 9), None)], (WIDTH, HEIGHT), said=(WIDTH + 1, HEIGHT))
    for name in ("ImageSets/Main/train.txt", "mine.txt"):
        (voc / name).write_text("a\n")
    config = tmp_path / "config.py"
    config.write_text(
        f"coco = dict(data_root={str(coco.root)!r}, data_prefix=dict(img='train/'),\n"
        f"    ann_file={str(coco.ann_file)!r}, metainfo=dict(classes={CLASSES}))\n"
        f"voc = dict(type='XMLDataset', data_root={str(voc)!r}, metainfo=dict(classes=('RBC',)),\n"
        "    data_prefix=dict(sub_data_root=''))\n"
        "sets = [dict(coco, type='CityscapesDataset'), dict(coco, type='LVISV1Dataset'),\n"
        "    dict(voc, ann_file='ImageSets/Main/train.txt'), dict(voc, ann_file='mine.txt'),\n"
        "    dict(coco, type='CocoDataset', data_prefix=dict(img='s3://a/'))]\n"
        "train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=sets))\n"
    )
    status, printed = run("--config", config, "--json", tmp_path / "out.json")
    assert status == 1
    for text in ("datasets[0]): 0 errors", "datasets[2]): 1 errors", "size-mismatch"):
        assert text in printed
    place = "train_dataloader.dataset.datasets"
    wanted = {
        f"{place}[1] (LVISV1Dataset)": "annotations of this type are not known to the check",
        f"{place}[3] (XMLDataset)": "its list is not below ImageSets/ beside Annotations/ and "
        "JPEGImages/",
        f"{place}[4] (CocoDataset)": "it is not in a local folder",
    }
    assert json.loads((tmp_path / "out.json").read_text())["not_checked"] == wanted
    for where, reason in wanted.items():
        assert f"not checked: {where}: {reason}\n" in printed
    lvis = "train_dataloader.dataset={'type': 'LVISV1Dataset', '_delete_': True}"
    message = "dataset (LVISV1Dataset): annotations of this type are not known"
    assert message in refusal(capsys, "check-data", "--config", config, "--cfg-options", lvis)


def test_command_on_class_folders(tmp_path, run):
    for split in ("train", "val"):
        for name in CLASSES:
            write_image(tmp_path / split / name / "1.jpg")
    assert run(tmp_path)[0] == 0
    (tmp_path / "val/bee/2.png").touch()
    (tmp_path / "val/none").mkdir()
    status, printed = run(tmp_path)
    assert status == 1
    assert f"unreadable-image: {tmp_path}/val/bee/2.png: the file is empty" in printed
    assert f"warning: empty-folder: {tmp_path}/val/none" in printed


def test_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ([], "name DIR, --config CONFIG, or --ann FILE --images DIR"),
        (["nowhere"], "no such folder: "),
        (["."], "no set in "),
        (["--ann", "a.json"], "--ann FILE and --images DIR go together"),
        (["--config", "mask_rcnn_r50_mrla_2x"], "no such config: "),
        ([".", "--cfg-options", "a=b"], "name it with --config"),
        ([".", "--workers", "0"], "--workers must be at least 1, got 0"),
        ([".", "--json", "no/where.json"], "--json: no such folder: "),
    ):
        assert message in refusal(capsys, "check-data", *words)
