"""Sets in other formats become COCO's: boxes, polygons, EXIF turns, empty images, counts."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrla.cli import main
from mmrla.datasets import DataError
from mmrla.datasets.convert import convert_data
from mmrla.datasets.formats import recognise
from tests.conftest import SHARED
from tests.datasets.test_voc import write_voc
from tests.helpers import python, refusal

# One set in every format: shown 64 x 48, but "turned", which is stored so and shown 48 x 64.
BOLT, NUT = [10.0, 10.0, 30.0, 40.0], [5.0, 5.0, 30.0, 6.0, 20.0, 40.0]
SIZES = {"turned": (48, 64), "plain": (64, 48), "empty": (64, 48)}


def photos(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    for name in SIZES:
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = 6
        image.save(folder / f"{name}.jpg", exif=exif)


def yolo(root: Path) -> None:
    photos(root / "images/train")
    labels = root / "labels/train"
    labels.mkdir(parents=True)
    x, y, w, h = BOLT
    box = f"0 {(x + w / 2) / 48} {(y + h / 2) / 64} {w / 48} {h / 64}\n"
    (labels / "turned.txt").write_text(box)
    points = " ".join(str(v / (64, 48)[i % 2]) for i, v in enumerate(NUT))
    (labels / "plain.txt").write_text(f"1 {points}\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [bolt, nut]\n")


def roboflow_yolo(root: Path) -> None:
    yolo(root)
    (root / "train").mkdir()
    for name in ("images", "labels"):
        (root / name / "train").rename(root / "train" / name)
    (root / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: {0: bolt, 1: nut}\n")


def labelme(root: Path) -> None:
    photos(root)
    pairs = [NUT[i : i + 2] for i in (0, 2, 4)]
    x, y, w, h = BOLT
    shapes = {"turned": [("bolt", [[x + w, y + h], [x, y]], "rectangle")],
              "plain": [("nut", pairs, "polygon"), ("nut", [[3, 3]], "point")]}  # fmt: skip
    for name, (width, height) in SIZES.items():
        listed = [dict(label=label, points=points, shape_type=kind, group_id=None)
                  for label, points, kind in shapes.get(name, [])]  # fmt: skip
        content = dict(shapes=listed, imagePath=f"{name}.jpg", imageWidth=width,
                       imageHeight=height, imageData=None)  # fmt: skip
        (root / f"{name}.json").write_text(json.dumps(content))


def cvat(root: Path) -> None:
    photos(root / "images")
    (root / "annotations.xml").write_text(
        """<?xml version="1.0"?><annotations><meta><task><labels><label><name>bolt</name></label>
        <label><name>nut</name></label></labels></task></meta>
        <image id="0" name="turned.jpg" width="48" height="64">
        <box label="bolt" xtl="10" ytl="10" xbr="40" ybr="50"/></image>
        <image id="1" name="plain.jpg" width="64" height="48">
        <polygon label="nut" points="5,5;30,6;20,40"/><points label="nut" points="3,3"/></image>
        <image id="2" name="empty.jpg" width="64" height="48"/></annotations>"""
    )


def roboflow_coco(root: Path) -> None:
    photos(root / "train")
    categories = [dict(id=i, name=name, supercategory=above) for i, (name, above) in
                  enumerate([("parts", "none"), ("bolt", "parts"), ("nut", "parts")])]  # fmt: skip
    images = [dict(id=i, file_name=f"{name}.jpg", width=w, height=h)
              for i, (name, (w, h)) in enumerate(SIZES.items())]  # fmt: skip
    annotations = [
        dict(id=0, image_id=0, category_id=1, bbox=BOLT, area=1200, iscrowd=0, segmentation=[]),
        dict(id=1, image_id=1, category_id=2, bbox=[5, 5, 25, 35], area=430, iscrowd=0,
             segmentation=[NUT]),
    ]  # fmt: skip
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / "train/_annotations.coco.json").write_text(json.dumps(content))


def written(out: Path, split: str = "train") -> dict:
    return json.loads((out / f"annotations/instances_{split}2017.json").read_text())


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "make", [yolo, roboflow_yolo, labelme, cvat, roboflow_coco], ids=lambda make: make.__name__
)
def test_one_set_in_each_format(make, zipped, tmp_path, capsys):
    source = tmp_path / "in/mine"
    source.mkdir(parents=True)
    make(source)
    for path in [path for path in source.rglob("*.*") if path.is_file()]:  # as macOS does
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    if zipped:
        source = shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "in")
    assert main(["convert-data", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 classes: ['bolt', 'nut']" in said or "2 classes: ['nut', 'bolt']" in said
    assert "train: 3 images, 2 objects" in said
    assert "1 of 2 objects have a box and no polygon" in said
    assert ": 0 errors, 1 warnings" in said  # the empty image
    assert ("which this reader does not convert" in said) == (make in (labelme, cvat))
    content = written(tmp_path / "out")
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {names[a["category_id"]]: a for a in content["annotations"]}
    turned = images[found["bolt"]["image_id"]]
    assert (turned["file_name"], turned["width"], turned["height"]) == ("turned.jpg", 48, 64)
    assert found["bolt"]["bbox"] == pytest.approx(BOLT, abs=2e-3)
    assert found["nut"]["bbox"] == pytest.approx([5, 5, 25, 35], abs=2e-3)
    assert found["nut"]["segmentation"][0] == pytest.approx(NUT, abs=2e-3)
    assert found["nut"]["area"] == pytest.approx(430, abs=0.2)  # half of 25 * 35 - 15 * 1
    for image in images.values():
        assert (tmp_path / "out/train2017" / image["file_name"]).stat().st_size > 100


def test_roboflows_splits_are_read_once_and_from_the_folder_itself(tmp_path):
    yolo(tmp_path / "in")
    for split in ("train", "valid"):
        for kind in ("images", "labels"):
            shutil.copytree(tmp_path / f"in/{kind}/train", tmp_path / f"robo/{split}/{kind}")
    photos(tmp_path / "train/images/foreign")  # what ../train/images leads to
    (tmp_path / "robo/data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\nnames: [bolt, nut]\n"
    )
    done = convert_data(tmp_path / "robo", tmp_path / "out")
    assert done.counts == {"train": (3, 2), "val": (3, 2)}
    assert written(tmp_path / "out")["images"][0]["file_name"] == "empty.jpg"


def test_yolo_labels_beside_the_images_below_a_folder_called_images(tmp_path):
    yolo(tmp_path / "in")
    flat = tmp_path / "images/mine"
    shutil.copytree(tmp_path / "in/images/train", flat)
    shutil.copytree(tmp_path / "in/labels/train", flat, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "in/labels/train", tmp_path / "labels/mine")
    (tmp_path / "labels/mine/empty.txt").write_text("0 0.5 0.5 0.5 0.5\n")  # of another dataset
    (flat / "classes.txt").write_text("bolt\nnut\n")
    assert convert_data(flat, tmp_path / "out").counts == {"train": (3, 2)}


def test_coco_splits_in_any_case_and_other_names(tmp_path):
    roboflow_coco(tmp_path / "in")
    root = tmp_path / "coco"
    for split in ("Train", "Validation", "mine_test2017"):
        shutil.copytree(tmp_path / "in/train", root / "images" / split)
        file = root / f"images/{split}/_annotations.coco.json"
        (root / "annotations").mkdir(exist_ok=True)
        file.rename(root / f"annotations/instances_{split}.json")
    counts = convert_data(root, tmp_path / "out").counts
    assert counts == dict.fromkeys(("train", "val", "test"), (3, 2))
    (root / "annotations/instances_Train.json").rename(root / "annotations/instances_minival.json")
    with pytest.raises(DataError, match="instances_minival.json: 'minival' is none of train, val"):
        convert_data(root, tmp_path / "new")
    for split in ("Validation", "mine_test2017"):
        (root / f"annotations/instances_{split}.json").unlink()
    (root / "images/Train").rename(root / "minival")
    assert convert_data(root, tmp_path / "new").counts == {"train": (3, 2)}


def test_coco_files_by_the_names_of_their_folders_alone(tmp_path):
    roboflow_coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    content = json.loads((tmp_path / "train/_annotations.coco.json").read_text())
    (tmp_path / "train/_annotations.coco.json").unlink()
    for record in content["annotations"]:
        record.update(name="mine", image=3)  # keys of other tools
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    for split in ("train", "val"):
        (tmp_path / f"annotations/cells_{split}.json").write_text(json.dumps(content))
    assert convert_data(tmp_path, tmp_path / "out").counts == {"train": (3, 2), "val": (3, 2)}
    assert all(one["name"] == "mine" for one in written(tmp_path / "out")["annotations"])


def test_voc_trainval_without_the_images_of_val(tmp_path):
    for name in ("a", "b"):
        write_voc(tmp_path / "in", name, [("RBC", (5, 6, 50, 40), 0)])
    (tmp_path / "in/ImageSets/Main/trainval.txt").write_text("a\nb\n")
    (tmp_path / "in/ImageSets/Main/val.txt").write_text("a\n")
    counts = convert_data(tmp_path / "in", tmp_path / "out").counts
    assert counts == {"val": (1, 1), "train": (1, 1)}
    assert [image["file_name"] for image in written(tmp_path / "out")["images"]] == ["b.jpg"]


def test_text_files_are_in_utf8(tmp_path, monkeypatch):
    yolo(tmp_path / "in")
    (tmp_path / "in/data.yaml").unlink()
    classes, label = tmp_path / "in/classes.txt", tmp_path / "in/labels/train/plain.txt"
    for path, text in ((classes, "größe\r\nnut\r\n"), (label, label.read_text())):
        path.write_text(text, encoding="utf-8-sig")
    done = convert_data(tmp_path / "in", tmp_path / "val", val=0.34)
    assert done.classes == ["größe", "nut"]
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    code = "from mmrla.cli import main; main(['convert-data', 'in', 'out', '--val', '0.34']); " \
           "main(['new-config', 'out', 'new.py'])"  # fmt: skip
    assert "classes: ['gr\\xf6\\xdfe', 'nut']" in python("-X", "utf8=0", "-c", code, cwd=tmp_path)
    assert written(tmp_path / "out") == written(tmp_path / "val")
    assert "classes=('größe', 'nut')" in (tmp_path / "new.py").read_text(encoding="utf-8")
    classes.write_text("größe\n", encoding="latin1")
    with pytest.raises(DataError, match=r"in/classes.txt: not in UTF-8"):
        convert_data(tmp_path / "in", tmp_path / "new")


def test_yolo_lists_of_images_in_any_folder(tmp_path):
    yolo(tmp_path / "in/data")
    shutil.copytree(tmp_path / "in/data", tmp_path / "far")
    (tmp_path / "in/data.yaml").write_text("path: data\ntrain: train.txt\nnames: [bolt, nut]\n")
    far = tmp_path / "far/images/train/turned.jpg"
    (tmp_path / "in/data/train.txt").write_text(f"./images/train/plain.jpg\n{far}\n")
    assert convert_data(tmp_path / "in", tmp_path / "out").counts == {"train": (2, 2)}
    names = [image["file_name"] for image in written(tmp_path / "out")["images"]]
    assert names == ["data/images/train/plain.jpg", "turned.jpg"]


def test_what_is_missing_or_damaged_is_found_before_anything_is_written(tmp_path, capsys):
    cvat(tmp_path / "in")
    (tmp_path / "in/images/empty.jpg").unlink()
    damaged = Path(shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "in"))
    content = bytearray(damaged.read_bytes())
    content[content.index(b"turned.jpg") + 1000] ^= 255
    damaged.write_bytes(content)
    for source, message in (
        (tmp_path / "in", "no such image: "), (damaged, "mine.zip: damaged, or no zip"),
    ):  # fmt: skip
        assert message in refusal(capsys, "convert-data", source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_real_voc_keeps_every_box(tmp_path, capsys):
    """Against the XML files, by another reader; BCCD is recognised by the check as well."""
    source = SHARED / "data/bccd"
    if not source.is_dir():
        pytest.skip(f"no real VOC folder: {source} is absent")
    done = convert_data(source, tmp_path / "out", link=True)
    assert done.format == "Pascal VOC"
    for split in ("train", "val", "test"):
        content = written(tmp_path / "out", split)
        names = {c["id"]: c["name"] for c in content["categories"]}
        got = Counter(names[a["category_id"]] for a in content["annotations"])
        stems = (source / f"ImageSets/Main/{split}.txt").read_text().split()
        trees = [ElementTree.parse(source / f"Annotations/{stem}.xml") for stem in stems]
        expected = Counter(one.findtext("name") for tree in trees for one in tree.iter("object"))
        assert got == expected
        assert done.counts[split] == (len(stems), expected.total())
    assert (tmp_path / "out/train2017").is_dir()
    main(["check-data", str(source), "--limit", "1"])
    said = capsys.readouterr().out
    assert said.count("ImageSets/Main/") >= 3
    assert "no set in" not in said


def test_validation_images_are_split_off(tmp_path):
    yolo(tmp_path / "in")
    for name in ("a", "b"):
        convert_data(tmp_path / "in", tmp_path / name, val=0.34, seed=1)
    train, val = (written(tmp_path / "a", split) for split in ("train", "val"))
    assert [len(content["images"]) for content in (train, val)] == [2, 1]
    assert len(train["annotations"]) + len(val["annotations"]) == 2
    assert val == written(tmp_path / "b", "val")
    for content in (train, val):
        ids = {image["id"] for image in content["images"]}
        assert {a["image_id"] for a in content["annotations"]} <= ids
    kept = {path.name for path in (tmp_path / "a/val2017").iterdir()}
    assert kept == {image["file_name"] for image in val["images"]}


def test_what_is_wrong_is_said(tmp_path, capsys):
    yolo(tmp_path / "in")
    assert recognise(tmp_path / "in") == "yolo"
    label = tmp_path / "in/labels/train/plain.txt"
    label.write_text("7 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match=r"plain.txt:1: needs a class from 0 to 1"):
        convert_data(tmp_path / "in", tmp_path / "out")
    label.unlink()
    convert_data(tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_data(tmp_path / "in", tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    for argv, message in (
        (["convert-data", tmp_path / "nothing", tmp_path / "new"], "in no format that is known"),
        (["convert-data", tmp_path / "gone", tmp_path / "new"], "no such file"),
        (["convert-data", tmp_path / "in", tmp_path / "new", "--val", "1"], "val must be"),
        (["check-data", tmp_path / "in"], "in YOLO's format"),
    ):
        assert message in refusal(capsys, *argv)
    assert not (tmp_path / "new").exists()
