"""Each kind of bad data: found, and never trained on in silence."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS
from pycocotools import mask as mask_utils
from torch.utils.data import DataLoader

from mmrla.datasets.coco_check import check_coco, drop_bad, read_annotations
from mmrla.datasets.findings import ERRORS, FATAL, DataError, count_kinds
from mmrla.datasets.images import look_at
from mmrla.datasets.segmentations import segmentation_fault
from mmrla.engine.run.checks import check_config
from tests.datasets.bad_sets import (
    BROKEN,
    CASES,
    CLASSES,
    HEIGHT,
    WIDTH,
    Coco,
    cut,
    rle,
    write_image,
)  # fmt: skip
from tests.helpers import build
from tests.zygote import SERVER

LOAD = dict(type="LoadImageFromFile")
BOXES = dict(type="LoadAnnotations", with_bbox=True)
PACK = dict(type="PackDetInputs")
PIPELINE = [LOAD, dict(BOXES, with_mask=True), PACK]


def bad(root, *names: str) -> Coco:
    coco = Coco(root)
    for name in names:
        CASES[name].change(coco)
    return coco.write()


def check(coco: Coco, **kwargs):
    content = read_annotations(coco.ann_file)
    kwargs = dict(classes=CLASSES, need_masks=True, files="decode") | kwargs
    return content, check_coco(content, coco.ann_file, coco.folder, **kwargs)


def dataset_of(coco: Coco, kind: str = "mmrla.CheckedCocoDataset", **kwargs):
    cfg = dict(
        type=kind, data_root=str(coco.root), ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"), metainfo=dict(classes=CLASSES), pipeline=PIPELINE,
    )  # fmt: skip
    return build({**cfg, **kwargs}, "mmdet", DATASETS)


def held(dataset) -> dict:
    """What is trained on: boxes, labels and masks of each image, as the pipeline gives them."""
    found = {}
    for index in range(len(dataset)):
        data = dataset.prepare_data(index)
        if data is not None:
            sample = data["data_samples"]
            objects = sample.gt_instances
            found[sample.img_id] = (
                objects.bboxes.tensor.tolist(), objects.labels.tolist(),
                [int(mask.sum()) for mask in objects.masks.masks], len(sample.ignored_instances),
            )  # fmt: skip
    return found


def objects_in(dataset) -> int:
    return sum(len(dataset.get_data_info(i)["instances"]) for i in range(len(dataset)))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict:
    return held(dataset_of(Coco(tmp_path_factory.mktemp("clean")).write(), "CocoDataset"))


@pytest.mark.parametrize("name", CASES)
def test_found_and_skipped_or_raised(name, clean, tmp_path):
    """One finding of the right kind, and what is left is what a clean set has there."""
    case, coco = CASES[name], bad(tmp_path, name)
    content, findings = check(coco)
    assert count_kinds(findings) == case.found
    assert all("\n" not in str(finding) and len(str(finding)) < 600 for finding in findings)
    errors = [finding for finding in findings if finding.severity == "error"]
    left = drop_bad(content, errors)
    assert sorted(record["id"] for record in left["images"]) == sorted(case.images)
    assert len(content["annotations"]) - len(left["annotations"]) == case.gone
    again = check_coco(left, coco.ann_file, coco.folder, need_masks=True, files="decode")
    assert not [finding for finding in again if finding.severity == "error"]

    got = held(dataset_of(coco))
    # What is not in the list of images is neither trained on, nor is anything bad in the others.
    assert set(got) == set(case.images)
    for image in set(case.images) - {2, 3}:
        assert got[image] == clean[image], image
    for boxes, *_ in got.values():
        assert np.isfinite(boxes).all()
    objects = len(left["annotations"]) - case.found.get("marked-ignore", 0)
    assert sum(len(boxes) + ignored for boxes, _, _, ignored in got.values()) == objects

    kinds = [kind for kind in case.found if kind in ERRORS]
    assert bool(kinds) == bool(errors)
    if kinds:
        with pytest.raises(DataError, match=f"on_bad='raise'.*{kinds[0]}") as caught:
            dataset_of(coco, on_bad="raise", files="headers")
        assert str(coco.ann_file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_always_stops(name, tmp_path):
    change, text, kind = BROKEN[name]
    coco = Coco(tmp_path)
    change(coco)
    coco.write(text)
    assert kind in FATAL
    for on_bad in ("skip", "raise"):
        with pytest.raises(DataError, match="instances_train.json"):
            dataset_of(coco, on_bad=on_bad)
    if kind != "not-json":
        assert kind in count_kinds(check(coco)[1])


def test_images_read_as_stored(tmp_path):
    """If the pipeline leaves EXIF orientations alone, boxes as stored are right."""
    coco = bad(tmp_path, "turned by EXIF, annotated as stored")
    assert held(dataset_of(coco, "CocoDataset"))[2][0]  # in silence, and wrong
    strict = dict(on_bad="raise", files="headers")
    with pytest.raises(DataError, match="color_ignore_orientation.*exiftool"):
        dataset_of(coco, **strict)
    as_stored = [dict(LOAD, color_type="color_ignore_orientation"), *PIPELINE[1:]]
    dataset = dataset_of(coco, **strict, pipeline=as_stored)
    assert dataset.prepare_data(1)["inputs"].shape[1:] == (HEIGHT, WIDTH)
    assert count_kinds(check(coco, turns=False)[1]) == {}


@pytest.mark.parametrize("change", [dict(bbox=[0, 0, 0, 0]), dict(category_id=3)])
def test_nothing_to_train_on_behind_the_filters(change, tmp_path):
    """Crowds are left where all other objects are bad, or of no class."""
    coco = Coco(tmp_path)
    coco.annotations = coco.annotations[:4]
    for record in coco.annotations[:2]:
        record.update(iscrowd=1, category_id=1, segmentation=rle(compressed=False))
    for record in coco.annotations[2:]:
        record.update(change)
    coco.write()
    classes = dict(metainfo=dict(classes=("ant", "bee")))
    with pytest.raises(DataError, match="nothing to train on.*classes.*no crowd"):
        dataset_of(coco, **classes)
    dataset_of(coco, "CocoDataset", **classes)


def test_what_mmdet_would_train_on_in_silence(clean, tmp_path):
    """Why the check is there: labels and boxes that mmdet takes without a word."""
    coco = Coco(tmp_path / "order")
    coco.categories.reverse()
    wrong = held(dataset_of(coco.write(), "CocoDataset"))
    assert clean[1][0] == wrong[1][0]
    assert clean[1][1] == [2 - label for label in wrong[1][1]]  # ant is called cat
    assert 2 in held(dataset_of(bad(tmp_path / "path", "name that climbs out"), "CocoDataset"))


def test_a_clean_set_is_mmdets(clean, tmp_path, coco_mini):
    coco = Coco(tmp_path).write()
    assert held(dataset_of(coco)) == clean
    settings = dict(
        data_root=str(coco_mini), ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"), metainfo=None,
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
    )  # fmt: skip
    ours = dataset_of(coco, **settings, on_bad="raise", files="decode")
    plain = dataset_of(coco, "CocoDataset", **settings)
    assert len(ours) == len(plain) > 0
    assert all(ours.get_data_info(i) == plain.get_data_info(i) for i in range(len(ours)))


def test_counts_are_logged_and_a_bad_image_is_skipped_while_training(tmp_path, monkeypatch):
    coco = Coco(tmp_path)
    coco.annotations[4]["category_id"] = 99
    for name in ("zero-area box", "missing image"):
        CASES[name].change(coco)
    coco.write()
    lines: list[tuple[str, int | None]] = []

    def note(message, logger=None, level=logging.INFO):
        lines.append((message, level))

    monkeypatch.setattr("mmrla.datasets.checked_coco.print_log", note)
    dataset = dataset_of(coco)
    ((text, level),) = lines
    assert level == logging.WARNING
    assert "1 missing-image, 1 unknown-category, 1 zero-area" in text
    assert "left out 1 of 6 images and 3 of 12 annotations" in text
    cut(coco.image(5))  # after the start
    taken = [dataset[index]["data_samples"].img_id for index in range(len(dataset))]
    assert len(taken) == 5
    assert 5 not in taken
    assert dataset.skipped_images.item() == len(lines) - 1 >= 1
    assert "skipped an image while training, 1 so far: truncated-image" in lines[1][0]
    assert str(coco.image(5)) in lines[1][0]
    allow = ["zero-area", "missing-image", "unknown-category"]
    stopping = dataset_of(coco, on_bad="raise", allow=allow)
    with pytest.raises(DataError, match=rf"truncated-image: {coco.image(5)}"):
        [stopping[index] for index in range(3, len(stopping))]


MOSAIC = dict(type="Mosaic", img_scale=(HEIGHT, WIDTH))


def test_mosaics_of_a_set_with_a_truncated_image(tmp_path):
    """Another image takes its place among the four."""
    coco = Coco(tmp_path).write()
    inner = dataset_of(coco, pipeline=[LOAD, BOXES])
    pipeline = [MOSAIC, dict(type="MixUp", img_scale=(HEIGHT, WIDTH)), PACK]
    mixed = dict(type="MultiImageMixDataset", dataset=inner, pipeline=pipeline)
    mixed = build(mixed, "mmdet", DATASETS)
    cut(coco.image(5))
    for index in range(len(mixed)):
        sample = mixed[index]["data_samples"]
        assert len(sample.gt_instances.labels) == len(sample.gt_instances.bboxes) > 0
    assert mixed.dataset.skipped_images.item() >= 1


def test_mosaics_that_leave_masks_behind_are_refused():
    """mmdet's Mosaic moves no masks: IndexError, or masks of other objects."""
    inner = dict(type="CocoDataset", pipeline=PIPELINE[:2])
    outer = dict(type="MultiImageMixDataset", dataset=inner, pipeline=[MOSAIC, PACK])
    loader = dict(dataset=outer)
    cfg = Config(
        dict(model={}, train_dataloader=loader, train_cfg={}, optim_wrapper=dict(optimizer={}))
    )
    message = r"train_dataloader.dataset.pipeline\[0\]: Mosaic moves boxes .* CachedMosaic"
    with pytest.raises(ValueError, match=message):
        check_config(cfg, ["train"])
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline[0].type = "CachedMosaic"
    check_config(cfg, ["train"])
    dataset.pipeline[0].type = "Mosaic"
    dataset.dataset.pipeline[1].with_mask = False
    check_config(cfg, ["train"])


@pytest.mark.parametrize("method", ["fork", SERVER], ids=["fork", "forkserver"])
def test_processes_of_a_loader_count_together(method, tmp_path):
    coco = Coco(tmp_path).write()
    dataset = dataset_of(coco)
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
    with pytest.raises(DataError, match="evaluation needs every image"):
        dataset_of(bad(tmp_path / "missing", "missing image"), test_mode=True)
    dataset = dataset_of(bad(tmp_path / "truncated", "truncated JPEG"), test_mode=True)
    with pytest.raises(DataError, match="truncated-image"):
        [dataset[index] for index in range(len(dataset))]


def test_where_the_pipeline_fails_the_image_is_named(tmp_path):
    coco = bad(tmp_path, "image of 20000 x 10")
    resize = dict(type="Resize", scale=(64, 64), keep_ratio=True)
    dataset = dataset_of(coco, pipeline=[*PIPELINE[:2], resize, PACK])
    with pytest.raises(DataError, match=rf"{coco.image(2)}: the pipeline fails on it"):
        held(dataset)
    # What the configs of COCO say about size leaves it out before.
    assert len(dataset_of(coco, filter_cfg=dict(filter_empty_gt=True, min_size=32))) == 5


def test_masks_matter_only_where_they_are_learned(tmp_path):
    coco = Coco(tmp_path)
    CASES["no segmentation"].change(coco)
    coco.annotations[5]["segmentation"] = [[1, 2]]
    coco.write()
    assert objects_in(dataset_of(coco, pipeline=[LOAD, BOXES, PACK], on_bad="raise")) == 12
    assert objects_in(dataset_of(coco)) == 10


def test_processes_find_the_same(tmp_path):
    for number in range(80):
        write_image(tmp_path / f"{number}.jpg")
    (tmp_path / "7.jpg").write_bytes(b"")
    jobs = [(str(tmp_path / f"{n}.jpg"), (WIDTH, HEIGHT + (n == 70))) for n in range(80)]
    found = look_at(jobs, decode=False, workers=2)
    assert found == look_at(jobs, decode=True)
    kinds = {n: fault[0] for n, fault in enumerate(found) if fault}
    assert kinds == {7: "unreadable-image", 70: "size-mismatch"}


def test_arguments(tmp_path):
    coco = Coco(tmp_path).write()
    for argument, message in (
        (dict(on_bad="ignore"), "on_bad must be one of .* got 'ignore'"),
        (dict(files="all"), "files must be .* got 'all'"),
        (dict(allow=["zero"]), r"allow must name kinds of .* got \['zero'\]"),
        (dict(metainfo=dict(classes="ant")),
         r"metainfo.classes='ant' is a string: write \('ant',\)"),
        (dict(filter_cfg=dict(min_size=100)), "none of 6 images is left after filter_cfg"),
    ):  # fmt: skip
        error = DataError if "filter_cfg" in argument else ValueError
        with pytest.raises(error, match=message):
            dataset_of(coco, **argument)
    names = tmp_path / "names.txt"  # which mmengine reads
    names.write_text("ant\nbee\ncat\n")
    assert len(dataset_of(coco, metainfo=dict(classes=str(names)))) == 6


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
        for changed in (counts[:-1], counts + "1", counts[:-1] + "\x7f"):
            assert segmentation_fault({**good, "counts": changed}, image), counts
