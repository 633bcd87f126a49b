"""``mmrla predict`` against what mmdet and mmpretrain themselves find in the same images."""

from __future__ import annotations

import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmpretrain import ImageClassificationInferencer
from pycocotools.mask import decode

from mmrla.cli import main
from mmrla.datasets import generate_shapes
from tests.conftest import ROOT
from tests.helpers import DEMO, build, cfg_options, refusal, save_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("predict"), num_train=1, num_val=2)


def predict(config, checkpoint, *words: object) -> list[dict]:
    main(["predict", str(config), checkpoint, *map(str, words), "--json", "found.json"])
    with open("found.json") as file:
        return json.load(file)


def test_boxes_masks_and_pictures(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = save_weights(Config.fromfile(DEMO), tmp_path / "weights.pth")
    folders = [images / "train2017", images / "val2017"]  # whose files have the same names
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    assert len({path.name for path in files}) < len(files) == 3
    model = init_detector(str(DEMO), checkpoint, device="cpu")
    expected = [inference_detector(model, str(path)).pred_instances for path in files]
    threshold = expected[0].scores.sort(descending=True).values[4].item()

    found = predict(DEMO.stem, checkpoint, *folders, "--score-thr", threshold, "--out-dir", "out")
    assert [one["image"] for one in found] == [str(path) for path in files]
    for one, instances in zip(found, expected, strict=True):
        instances = instances[instances.scores >= threshold]
        objects = one["objects"]
        np.testing.assert_allclose([o["box"] for o in objects], instances.bboxes, atol=1e-3)
        np.testing.assert_allclose([o["score"] for o in objects], instances.scores, atol=1e-6)
        names = [("circle", "square", "triangle")[label] for label in instances.labels.tolist()]
        assert [o["name"] for o in objects] == names
        masks = np.stack([decode(o["mask"]) for o in objects])
        assert masks.shape[1:] == (one["height"], one["width"])
        assert (masks == instances.masks.numpy()).mean() > 0.9999
    assert len(found[0]["objects"]) == 5
    pictures = list((tmp_path / "out").iterdir())
    assert len(pictures) == 3
    printed = capsys.readouterr().out
    for picture in pictures:
        assert min(cv2.imread(str(picture)).shape[:2]) >= 480
        assert f"-> out/{picture.name}" in printed

    # at a threshold that nothing reaches: the image as it is
    predict(DEMO, checkpoint, files[0], "--score-thr", 1, "--out-dir", "none")
    (picture,) = (tmp_path / "none").iterdir()
    drawn, image = cv2.imread(str(picture)), cv2.imread(str(files[0]))
    size = drawn.shape[:2]
    np.testing.assert_array_equal(
        drawn, cv2.resize(image, size[::-1], interpolation=cv2.INTER_NEAREST)
    )


def test_a_classifier(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    options = {"model.backbone.depth": 18, "model.head.in_channels": 512}
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    cfg.model.backbone.init_cfg = None
    names = [f"animal {number}" for number in range(1000)]
    checkpoint = save_weights(cfg, tmp_path / "weights.pth", dataset_meta=dict(classes=names))
    image = next((images / "val2017").iterdir())
    (found,) = predict(config, checkpoint, image, *cfg_options(options))
    (expected,) = ImageClassificationInferencer(cfg, checkpoint, device="cpu")(str(image))
    best = np.argsort(expected["pred_scores"])[::-1][:5]
    assert [one["name"] for one in found["classes"]] == [names[label] for label in best]
    np.testing.assert_allclose(
        [one["score"] for one in found["classes"]], expected["pred_scores"][best], rtol=1e-4
    )
    (picture,) = (tmp_path / "work_dirs/predict").iterdir()
    plain = cv2.resize(cv2.imread(str(image)), cv2.imread(str(picture)).shape[1::-1])
    assert (cv2.imread(str(picture)) != plain).mean() > 0.01


def test_arrays_of_cifar_are_rgb(tmp_path, monkeypatch):
    """CIFAR's pipeline reads no file; the data set gives RGB, so a file must be turned."""
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs/cifar/resnet20_mrla-base_cifar10.py"
    cfg = Config.fromfile(config)
    checkpoint = save_weights(cfg, tmp_path / "weights.pth")
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    (found,) = predict(config, checkpoint, "image.png", "--out-dir", ".")
    np.testing.assert_array_equal(cv2.imread("image.png"), image)  # the picture is another file
    assert min(cv2.imread(f"{tmp_path.name}_image.png").shape[:2]) >= 480
    model = build(cfg.model, "mmpretrain").eval()
    model.load_state_dict(torch.load(checkpoint)["state_dict"])
    mean, std = (torch.tensor(cfg.data_preprocessor[key]) for key in ("mean", "std"))
    rgb = (torch.from_numpy(image[..., ::-1].copy()).float() - mean) / std
    scores = model(rgb.permute(2, 0, 1)[None]).softmax(1)[0]
    assert [one["label"] for one in found["classes"]] == scores.topk(5).indices.tolist()
    np.testing.assert_allclose(
        [one["score"] for one in found["classes"]], scores.topk(5).values.detach(), rtol=1e-4
    )
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
    assert [one["name"] for one in found["classes"]] == [
        classes[one["label"]] for one in found["classes"]
    ]


def test_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("text")
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((8, 8, 3), np.uint8))
    torch.save(dict(state_dict=dict(weight=torch.zeros(1))), tmp_path / "other.pth")
    for words, says in (
        (["weights.pth", "no/such*.jpg"], "IMAGE: nothing matches"),
        (["weights.pth", "text.png"], "not an image"),
        (["gone.pth", "image.png"], "no such checkpoint"),
        (["weights.pth", "image.png", "--score-thr", "30"], "--score-thr must be from 0 to 1"),
        (["other.pth", "image.png"], "no key matches the model"),
    ):
        assert says in refusal(capsys, "predict", DEMO, *words)
        assert not (tmp_path / "work_dirs").exists()


# --- mmrla test --tta: an image and its mirror image give the same, mirrored ---


BOXES = {"model.roi_head.mask_head": None, "test_evaluator.metric": "bbox"}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """Two images, the second the first one's mirror image, in which the shapes are not right."""
    root = generate_shapes(tmp_path_factory.mktemp("tta") / "data", num_train=1, num_val=2)
    first, second = sorted((root / "val2017").iterdir())
    cv2.imwrite(str(second), cv2.imread(str(first))[:, ::-1])
    return root


def predictions(mirrored, tmp_path, *words: str):
    cfg = Config.fromfile(DEMO)
    cfg.merge_from_dict(BOXES)
    weights = save_weights(cfg, tmp_path / "w.pth")
    out = tmp_path / "out.pkl"
    main(["test", str(DEMO), weights, "--data-root", str(mirrored), "--work-dir",
          str(tmp_path), "--out", str(out), *words, *cfg_options(BOXES),
          "test_dataloader.num_workers=0"])  # fmt: skip
    found = pickle.loads(out.read_bytes())
    return [one["pred_instances"] for one in sorted(found, key=lambda one: one["img_path"])]


def test_detections_mirror(mirrored, tmp_path):
    plain, mirror = predictions(mirrored, tmp_path, "--tta")
    assert len(plain["scores"]) > 10
    best = 10
    torch.testing.assert_close(plain["scores"][:best], mirror["scores"][:best])
    x1, y1, x2, y2 = mirror["bboxes"][:best].unbind(1)
    width = cv2.imread(str(next((mirrored / "val2017").iterdir()))).shape[1]
    expected = torch.stack((width - x2, y1, width - x1, y2), 1)
    torch.testing.assert_close(plain["bboxes"][:best], expected, atol=0.01, rtol=0)
    # which a single look at each image does not give
    cfg = Config.fromfile(DEMO)
    cfg.merge_from_dict(BOXES)
    model = init_detector(cfg, str(tmp_path / "w.pth"), device="cpu")
    one, two = (
        inference_detector(model, str(path)).pred_instances.scores[:best]
        for path in sorted((mirrored / "val2017").iterdir())
    )
    assert not torch.allclose(one, two)


def test_masks_are_refused(mirrored, tmp_path, capsys):
    (tmp_path / "w.pth").touch()
    words = ["test", DEMO, tmp_path / "w.pth", "--data-root", mirrored, "--tta"]
    assert "--cfg-options model.roi_head.mask_head=None" in refusal(capsys, *words)


def test_a_mirrored_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(0)).numpy()
    for split in ("train", "val", "test"):
        for label in "ab":
            (tmp_path / f"data/{split}/{label}").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f"data/{split}/a/0.png"), image)
        cv2.imwrite(str(tmp_path / f"data/{split}/b/1.png"), image[:, ::-1])
    config = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    cfg = Config.fromfile(config)
    options = {
        "model.backbone.depth": 18, "model.head.in_channels": 512, "model.head.num_classes": 2,
        "test_dataloader.dataset.metainfo.classes": "[a,b]", "test_dataloader.num_workers": 0,
    }  # fmt: skip
    cfg.merge_from_dict(options)
    save_weights(cfg, tmp_path / "w.pth")
    main(["test", str(config), "w.pth", "--data-root", "data", "--out", "out.pkl", "--work-dir",
          "run", "--tta", *cfg_options(options)])  # fmt: skip
    one, two = (found["pred_score"] for found in pickle.loads((tmp_path / "out.pkl").read_bytes()))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
