"""Each kind of bad data: found, and never trained on in silence."""

from __future__ import annotations

import json
import logging
import pickle
from typing import NamedTuple

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from pycocotools import mask as mask_utils

from mmrla.cli import main
from mmrla.datasets.coco_check import check_coco, drop_bad, read_annotations
from mmrla.datasets.findings import ERRORS, FATAL, DataError, count_kinds
from mmrla.datasets.images import look_at
from mmrla.datasets.segmentations import segmentation_fault
from mmrla.engine.run.checks import check_config
from tests.datasets.bad_sets import BROKEN, CASES, CLASSES, HEIGHT, WIDTH, Coco, rle, write_image

PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]


def check(coco: Coco, **kwargs):
    content = read_annotations(coco.ann_file)
    kwargs = dict(classes=CLASSES, need_masks=True, files="decode") | kwargs
    return content, check_coco(content, coco.ann_file, coco.folder, **kwargs)


def build(coco: Coco, kind: str = "mmrla.CheckedCocoDataset", **kwargs):
    cfg = dict(
        type=kind,
        data_root=str(coco.root),
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=CLASSES),
        pipeline=PIPELINE,
    )
    with DefaultScope.overwrite_default_scope("mmdet"):
        return DATASETS.build({**cfg, **kwargs})


def held(dataset) -> dict:
    """What is trained on: boxes, labels and masks of each image, as the pipeline gives them."""
    found = {}
    for index in range(len(dataset)):
        data = dataset.prepare_data(index)
        if data is not None:
            sample = data["data_samples"]
            found[sample.img_id] = (
                sample.gt_instances.bboxes.tensor.tolist(),
                sample.gt_instances.labels.tolist(),
                [int(mask.sum()) for mask in sample.gt_instances.masks.masks],
                len(sample.ignored_instances),
            )
    return found


@pytest.mark.parametrize("name", CASES)
def test_found_and_skipped(name, tmp_path):
    """One finding of the right kind, and what is left is what a clean set has there."""
    case = CASES[name]
    coco = Coco(tmp_path)
    whole = held(build(Coco(tmp_path / "clean").write(), "CocoDataset"))
    case.change(coco)
    coco.write()
    content, findings = check(coco)
    assert count_kinds(findings) == case.found
    assert all("\n" not in str(finding) and len(str(finding)) < 600 for finding in findings)
    errors = [finding for finding in findings if finding.severity == "error"]
    left = drop_bad(content, errors)
    assert sorted(record["id"] for record in left["images"]) == sorted(case.images)
    assert len(content["annotations"]) - len(left["annotations"]) == case.gone
    again = check_coco(left, coco.ann_file, coco.folder, need_masks=True, files="decode")
    assert not [finding for finding in again if finding.severity == "error"]

    dataset = build(coco)
    got = held(dataset)
    # What is not in the list of images is neither trained on, nor is anything bad in the others.
    assert set(got) == set(case.images)
    for image in set(case.images) - {2, 3}:
        assert got[image] == whole[image], image
    for boxes, *_ in got.values():
        assert np.isfinite(boxes).all()
    objects = len(left["annotations"]) - case.found.get("marked-ignore", 0)
    assert sum(len(boxes) + ignored for boxes, _, _, ignored in got.values()) == objects


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if set(c.found) & set(ERRORS)])
def test_raise_stops_with_the_finding(name, tmp_path):
    coco = Coco(tmp_path)
    CASES[name].change(coco)
    coco.write()
    kind = next(kind for kind in CASES[name].found if kind in ERRORS)
    with pytest.raises(DataError, match=f"on_bad='raise'.*{kind}") as caught:
        build(coco, on_bad="raise", files="headers")
    assert str(coco.ann_file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("on_bad", ["skip", "raise"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_always_stops(name, on_bad, tmp_path):
    change, text, kind = BROKEN[name]
    coco = Coco(tmp_path)
    change(coco)
    coco.write(text)
    assert kind in FATAL
    with pytest.raises(DataError, match="instances_train.json"):
        build(coco, on_bad=on_bad)
    if kind != "not-json":
        assert kind in count_kinds(check(coco)[1])


def test_images_read_as_stored(tmp_path):
    """Where the pipeline leaves EXIF orientations alone, boxes as stored are right."""
    coco = Coco(tmp_path)
    CASES["turned by EXIF, annotated as stored"].change(coco)
    coco.write()
    assert held(build(coco, "CocoDataset"))[2][0]  # in silence, and wrong
    with pytest.raises(DataError, match="color_ignore_orientation.*exiftool"):
        build(coco, on_bad="raise", files="headers")
    as_stored = [dict(PIPELINE[0], color_type="color_ignore_orientation"), *PIPELINE[1:]]
    dataset = build(coco, on_bad="raise", files="headers", pipeline=as_stored)
    assert dataset.prepare_data(1)["inputs"].shape[1:] == (HEIGHT, WIDTH)
    assert count_kinds(check(coco, turns=False)[1]) == {}


def test_nothing_to_train_on_behind_the_filters(tmp_path):
    """Crowds are left where all other objects are bad, or of no class."""
    for number, change in enumerate((dict(bbox=[0, 0, 0, 0]), dict(category_id=3))):
        coco = Coco(tmp_path / str(number))
        coco.annotations = coco.annotations[:4]
        for record in coco.annotations[:2]:
            record.update(iscrowd=1, category_id=1, segmentation=rle(compressed=False))
        for record in coco.annotations[2:]:
            record.update(change)
        coco.write()
        with pytest.raises(DataError, match="nothing to train on.*classes.*no crowd"):
            build(coco, metainfo=dict(classes=("ant", "bee")))
        build(coco, "CocoDataset", metainfo=dict(classes=("ant", "bee")))


def test_one_class_without_its_comma(tmp_path):
    coco = Coco(tmp_path).write()
    with pytest.raises(ValueError, match=r"metainfo.classes='ant' is a string: write \('ant',\)"):
        build(coco, metainfo=dict(classes="ant"))
    names = tmp_path / "names.txt"  # which mmengine reads
    names.write_text("ant\nbee\ncat\n")
    assert len(build(coco, metainfo=dict(classes=str(names)))) == 6


def test_what_mmdet_would_train_on_in_silence(tmp_path):
    """Why the check is there: labels and boxes that mmdet takes without a word."""
    change, *_ = BROKEN["categories in another order"]
    coco = Coco(tmp_path / "order")
    change(coco)
    right, wrong = (
        held(build(Coco(tmp_path / "a").write())),
        held(build(coco.write(), "CocoDataset")),
    )
    assert right[1][0] == wrong[1][0]
    assert right[1][1] == [2 - label for label in wrong[1][1]]  # ant is called cat
    coco = Coco(tmp_path / "path")
    CASES["name that climbs out"].change(coco)
    assert 2 in held(build(coco.write(), "CocoDataset"))


def test_a_clean_set_is_mmdets(tmp_path, coco_mini):
    coco = Coco(tmp_path).write()
    assert held(build(coco)) == held(build(coco, "CocoDataset"))
    settings = dict(
        data_root=str(coco_mini),
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        metainfo=None,
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
    )
    ours = build(coco, **settings, on_bad="raise", files="decode")
    plain = build(coco, "CocoDataset", **settings)
    assert len(ours) > 0
    assert [ours.get_data_info(i) for i in range(len(ours))] == [
        plain.get_data_info(i) for i in range(len(plain))
    ]


def test_counts_are_logged_and_a_bad_image_is_skipped_while_training(tmp_path, monkeypatch):
    coco = Coco(tmp_path)
    for name in ("zero-area box", "missing image"):
        CASES[name].change(coco)
    coco.annotations[4]["category_id"] = 99
    coco.write()
    lines: list[tuple[str, int | None]] = []

    def note(message, logger=None, level=logging.INFO):
        lines.append((message, level))

    monkeypatch.setattr("mmrla.datasets.checked_coco.print_log", note)
    dataset = build(coco)
    ((text, level),) = lines
    assert level == logging.WARNING
    assert "1 missing-image, 1 unknown-category, 1 zero-area" in text
    assert "left out 1 of 6 images and 3 of 12 annotations" in text
    whole = coco.image(5).read_bytes()
    coco.image(5).write_bytes(whole[: len(whole) // 2])  # after the start
    taken = [dataset[index]["data_samples"].img_id for index in range(len(dataset))]
    assert len(taken) == 5
    assert 5 not in taken
    assert dataset.skipped_images.item() == len(lines) - 1 >= 1
    assert "skipped an image while training, 1 so far: truncated-image" in lines[1][0]
    assert str(coco.image(5)) in lines[1][0]
    stopping = build(coco, on_bad="raise", allow=["zero-area", "missing-image", "unknown-category"])
    with pytest.raises(DataError, match=rf"truncated-image: {coco.image(5)}"):
        [stopping[index] for index in range(3, len(stopping))]


MOSAIC = dict(type="Mosaic", img_scale=(HEIGHT, WIDTH))


def test_mosaics_of_a_set_with_a_truncated_image(tmp_path):
    """Another image takes its place among the four."""
    coco = Coco(tmp_path).write()
    whole = coco.image(5).read_bytes()
    boxes = [PIPELINE[0], dict(type="LoadAnnotations", with_bbox=True)]
    with DefaultScope.overwrite_default_scope("mmdet"):
        mixed = DATASETS.build(
            dict(type="MultiImageMixDataset", dataset=build(coco, pipeline=boxes),
                 pipeline=[MOSAIC, dict(type="MixUp", img_scale=(HEIGHT, WIDTH)), PIPELINE[-1]])
        )  # fmt: skip
    coco.image(5).write_bytes(whole[: len(whole) // 2])
    for index in range(len(mixed)):
        sample = mixed[index]["data_samples"]
        assert len(sample.gt_instances.labels) == len(sample.gt_instances.bboxes) > 0
    assert mixed.dataset.skipped_images.item() >= 1


def test_mosaics_that_leave_masks_behind_are_refused():
    """mmdet's Mosaic moves no masks: IndexError, or masks of other objects."""
    inner = dict(type="CocoDataset", pipeline=PIPELINE[:2])
    outer = dict(type="MultiImageMixDataset", dataset=inner, pipeline=[MOSAIC, PIPELINE[-1]])
    cfg = Config(
        dict(model={}, train_dataloader=dict(dataset=outer), train_cfg={},
             optim_wrapper=dict(optimizer={}))
    )  # fmt: skip
    message = r"train_dataloader.dataset.pipeline\[0\]: Mosaic moves boxes .* CachedMosaic"
    with pytest.raises(ValueError, match=message):
        check_config(cfg, ["train"])
    cfg.train_dataloader.dataset.pipeline[0].type = "CachedMosaic"
    check_config(cfg, ["train"])
    cfg.train_dataloader.dataset.pipeline[0].type = "Mosaic"
    cfg.train_dataloader.dataset.dataset.pipeline[1].with_mask = False
    check_config(cfg, ["train"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_a_loader_count_together(method, tmp_path):
    from torch.utils.data import DataLoader

    coco = Coco(tmp_path).write()
    dataset = build(coco)
    for number in (2, 4):
        coco.image(number).write_bytes(b"\xff\xd8\xff")
    loader = DataLoader(
        dataset, num_workers=2, batch_size=None, multiprocessing_context=method, collate_fn=_same
    )
    assert len([data for data in loader if data]) == 6
    assert dataset.skipped_images.item() >= 2
    assert pickle.loads(pickle.dumps(dataset)).on_bad == "skip"


def _same(data):
    return data


def test_evaluation_needs_every_image(tmp_path):
    coco = Coco(tmp_path)
    CASES["missing image"].change(coco)
    with pytest.raises(DataError, match="evaluation needs every image"):
        build(coco.write(), test_mode=True)
    coco = Coco(tmp_path / "truncated")
    CASES["truncated JPEG"].change(coco)
    dataset = build(coco.write(), test_mode=True)
    with pytest.raises(DataError, match="truncated-image"):
        [dataset[index] for index in range(len(dataset))]


def test_where_the_pipeline_fails_the_image_is_named(tmp_path):
    coco = Coco(tmp_path)
    CASES["image of 20000 x 10"].change(coco)
    resize = dict(type="Resize", scale=(64, 64), keep_ratio=True)
    dataset = build(coco.write(), pipeline=[*PIPELINE[:2], resize, PIPELINE[2]])
    with pytest.raises(DataError, match=rf"{coco.image(2)}: the pipeline fails on it"):
        held(dataset)
    # What the configs of COCO say about size leaves it out before.
    assert len(build(coco, filter_cfg=dict(filter_empty_gt=True, min_size=32))) == 5


def test_masks_matter_only_where_they_are_learned(tmp_path):
    coco = Coco(tmp_path)
    CASES["no segmentation"].change(coco)
    coco.annotations[5]["segmentation"] = [[1, 2]]
    coco.write()
    boxes = [PIPELINE[0], dict(type="LoadAnnotations", with_bbox=True), PIPELINE[2]]
    dataset = build(coco, pipeline=boxes, on_bad="raise")
    assert sum(len(dataset.get_data_info(i)["instances"]) for i in range(len(dataset))) == 12
    dataset = build(coco)
    assert sum(len(dataset.get_data_info(i)["instances"]) for i in range(len(dataset))) == 10


def test_processes_find_the_same(tmp_path):
    for number in range(80):
        write_image(tmp_path / f"{number}.jpg")
    (tmp_path / "7.jpg").write_bytes(b"")
    jobs = [(str(tmp_path / f"{n}.jpg"), (WIDTH, HEIGHT + (n == 70))) for n in range(80)]
    found = look_at(jobs, decode=False, workers=2)
    assert found == look_at(jobs, decode=True)
    assert {n: fault[0] for n, fault in enumerate(found) if fault} == {
        7: "unreadable-image",
        70: "size-mismatch",
    }


def test_arguments(tmp_path):
    coco = Coco(tmp_path).write()
    for argument, message in (
        (dict(on_bad="ignore"), "on_bad must be one of .* got 'ignore'"),
        (dict(files="all"), "files must be .* got 'all'"),
        (dict(allow=["zero"]), r"allow must name kinds of .* got \['zero'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            build(coco, **argument)
    with pytest.raises(DataError, match="none of 6 images is left after filter_cfg"):
        build(coco, filter_cfg=dict(min_size=100))


def test_compressed_rles_are_read_as_pycocotools_reads_them():
    """Of random masks; and no cut or changed text is taken for one of the right size."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 400, 2).tolist()
        mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        counts = mask_utils.encode(mask)["counts"].decode()
        image = dict(height=height, width=width)
        good = dict(size=[height, width], counts=counts)
        assert segmentation_fault(good, image) is None
        for bad in (counts[:-1], counts + "1", counts[:-1] + "\x7f"):
            assert segmentation_fault({**good, "counts": bad}, image), counts


# --- the command ---


class Done(NamedTuple):
    returncode: int
    stdout: str


@pytest.fixture
def run(capsys):
    """``mmrla check-data``, in this process."""

    def command(*words: object) -> Done:
        capsys.readouterr()
        returncode = main(["check-data", *map(str, words)])
        return Done(returncode, capsys.readouterr().out)

    return command


def everything(root) -> Coco:
    coco = Coco(root)
    for name in ("missing image", "RLEs and polygons", "marked ignore"):
        CASES[name].change(coco)
    coco.annotations[7]["category_id"] = 99
    coco.annotations[8]["bbox"] = [4, 6, 0, 20]
    whole = coco.image(6).read_bytes()
    coco.image(6).write_bytes(whole[: len(whole) // 2])
    return coco.write()


def test_command(tmp_path, run):
    coco = everything(tmp_path / "bad")
    before = {path: path.read_bytes() for path in (tmp_path / "bad").rglob("*") if path.is_file()}
    out = tmp_path / "report.json"
    done = run(coco.root, "--json", out, "--workers", 2)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "4 errors, 2 warnings" in lines[0]
    (found,) = json.loads(out.read_text())["sets"]
    assert found["counts"] == {
        "missing-image": 1,
        "truncated-image": 1,
        "unknown-category": 1,
        "zero-area": 1,
        "mixed-segmentation": 1,
        "marked-ignore": 1,
    }
    for finding in found["findings"]:
        assert f"  {finding['severity']}: {finding['kind']}: {finding['text']}" in lines
    assert {f["image_id"] for f in found["findings"] if f["severity"] == "error"} == {2, 4, 5, 6}
    # Nothing is written but the report.
    after = {path: path.read_bytes() for path in (tmp_path / "bad").rglob("*") if path.is_file()}
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "report.json"]
    allowed = ["missing-image", "truncated-image", "unknown-category", "zero-area"]
    done = run("--ann", coco.ann_file, "--images", coco.folder, "--allow", *allowed)
    assert done.returncode == 0
    assert "0 errors" in done.stdout


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
    done = run("--config", config)
    assert done.returncode == 1
    assert "(train_dataloader.dataset.dataset, val_dataloader.dataset): 1 errors" in done.stdout
    assert "class-order: label 1 would be category 'bee' and is called 'cat'" in done.stdout
    order = 'val_dataloader.dataset.metainfo.classes="(ant,bee,cat)"'
    done = run("--config", config, "--cfg-options", order.replace("(", "[").replace(")", "]"))
    assert "(val_dataloader.dataset): 0 errors, 0 warnings" in done.stdout


def test_a_config_of_many_kinds_of_sets(tmp_path, run, capsys):
    """What is not checked is named, with its type and why; what reads COCO or VOC is checked."""
    coco = Coco(tmp_path / "set").write()
    voc = tmp_path / "voc"
    write_image(voc / "JPEGImages/a.jpg", HEIGHT, WIDTH)
    (voc / "Annotations").mkdir()
    (voc / "Annotations/a.xml").write_text(
        f"<a><size><width>{WIDTH + 1}</width><height>{HEIGHT}</height></size>"
        "<object><name>a</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>"
        "</bndbox></object></a>"
    )
    for name in ("ImageSets/Main/train.txt", "mine.txt"):
        (voc / name).parent.mkdir(parents=True, exist_ok=True)
        (voc / name).write_text("a\n")
    config = tmp_path / "config.py"
    config.write_text(
        f"coco = dict(data_root={str(coco.root)!r}, data_prefix=dict(img='train/'),\n"
        f"    ann_file={str(coco.ann_file)!r}, metainfo=dict(classes={CLASSES}))\n"
        f"voc = dict(type='XMLDataset', data_root={str(voc)!r}, metainfo=dict(classes=('a',)),\n"
        "    data_prefix=dict(sub_data_root=''))\n"
        "sets = [dict(coco, type='CityscapesDataset'), dict(coco, type='LVISV1Dataset'),\n"
        "    dict(voc, ann_file='ImageSets/Main/train.txt'), dict(voc, ann_file='mine.txt'),\n"
        "    dict(coco, type='CocoDataset', data_prefix=dict(img='s3://a/'))]\n"
        "train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=sets))\n"
    )
    done = run("--config", config, "--json", tmp_path / "out.json")
    assert done.returncode == 1
    assert "datasets[0]): 0 errors" in done.stdout
    assert "datasets[2]): 1 errors" in done.stdout
    assert "size-mismatch" in done.stdout
    place = "train_dataloader.dataset.datasets"
    wanted = {
        f"{place}[1] (LVISV1Dataset)": "annotations of this type are not known to the check",
        f"{place}[3] (XMLDataset)": "its list is not below ImageSets/ beside Annotations/ and "
        "JPEGImages/",
        f"{place}[4] (CocoDataset)": "it is not in a local folder",
    }
    assert json.loads((tmp_path / "out.json").read_text())["not_checked"] == wanted
    for where, reason in wanted.items():
        assert f"not checked: {where}: {reason}\n" in done.stdout
    lvis = "train_dataloader.dataset={'type': 'LVISV1Dataset', '_delete_': True}"
    with pytest.raises(SystemExit) as caught:
        main(["check-data", "--config", str(config), "--cfg-options", lvis])
    assert caught.value.code == 2
    message = "dataset (LVISV1Dataset): annotations of this type are not known"
    assert message in capsys.readouterr().err


def test_command_on_class_folders(tmp_path, run):
    for split in ("train", "val"):
        for name in CLASSES:
            write_image(tmp_path / split / name / "1.jpg")
    assert run(tmp_path).returncode == 0
    (tmp_path / "val/bee/2.png").touch()
    (tmp_path / "val/none").mkdir()
    done = run(tmp_path)
    assert done.returncode == 1
    assert f"unreadable-image: {tmp_path}/val/bee/2.png: the file is empty" in done.stdout
    assert f"warning: empty-folder: {tmp_path}/val/none" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name DIR, --config CONFIG, or --ann FILE --images DIR"),
        (["nowhere"], "no such folder: "),
        (["."], "no set in "),
        (["--ann", "a.json"], "--ann FILE and --images DIR go together"),
        (["--config", "mask_rcnn_r50_mrla_2x"], "no such config: "),
        ([".", "--workers", "0"], "--workers must be at least 1, got 0"),
        ([".", "--json", "no/where.json"], "--json: no such folder: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_usage(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["check-data", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
