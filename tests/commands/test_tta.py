"""``mmrla test --tta``: an image and its mirror image give the same, mirrored."""

from __future__ import annotations

import pickle

import cv2
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config

from mmrla.cli import main
from mmrla.datasets import generate_shapes
from tests.conftest import ROOT
from tests.helpers import DEMO, refusal, save_weights

BOXES = {"model.roi_head.mask_head": None, "test_evaluator.metric": "bbox"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images, the second the first one's mirror image, in which the shapes are not right."""
    root = generate_shapes(tmp_path_factory.mktemp("tta") / "data", num_train=1, num_val=2)
    first, second = sorted((root / "val2017").iterdir())
    cv2.imwrite(str(second), cv2.imread(str(first))[:, ::-1])
    return root


def predictions(data, tmp_path, *words: str):
    cfg = Config.fromfile(DEMO)
    cfg.merge_from_dict(BOXES)
    weights = save_weights(cfg, tmp_path / "w.pth")
    options = [f"{key}={value}" for key, value in BOXES.items()]
    out = tmp_path / "out.pkl"
    main(["test", str(DEMO), weights, "--data-root", str(data), "--work-dir",
          str(tmp_path), "--out", str(out), *words, "--cfg-options", *options,
          "test_dataloader.num_workers=0"])  # fmt: skip
    found = pickle.loads(out.read_bytes())
    return [one["pred_instances"] for one in sorted(found, key=lambda one: one["img_path"])]


def test_detections_mirror(data, tmp_path):
    plain, mirror = predictions(data, tmp_path, "--tta")
    assert len(plain["scores"]) > 10
    best = 10
    torch.testing.assert_close(plain["scores"][:best], mirror["scores"][:best])
    x1, y1, x2, y2 = mirror["bboxes"][:best].unbind(1)
    width = cv2.imread(str(next((data / "val2017").iterdir()))).shape[1]
    expected = torch.stack((width - x2, y1, width - x1, y2), 1)
    torch.testing.assert_close(plain["bboxes"][:best], expected, atol=0.01, rtol=0)
    # which a single look at each image does not give
    cfg = Config.fromfile(DEMO)
    cfg.merge_from_dict(BOXES)
    model = init_detector(cfg, str(tmp_path / "w.pth"), device="cpu")
    one, two = (
        inference_detector(model, str(path)).pred_instances.scores[:best]
        for path in sorted((data / "val2017").iterdir())
    )
    assert not torch.allclose(one, two)


def test_masks_are_refused(data, tmp_path, capsys):
    (tmp_path / "w.pth").touch()
    words = ["test", DEMO, tmp_path / "w.pth", "--data-root", data, "--tta"]
    assert "--cfg-options model.roi_head.mask_head=None" in refusal(capsys, *words)


def test_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(0)).numpy()
    for split in ("train", "val", "test"):
        for label in "ab":
            (tmp_path / f"data/{split}/{label}").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f"data/{split}/a/0.png"), image)
        cv2.imwrite(str(tmp_path / f"data/{split}/b/1.png"), image[:, ::-1])
    config = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    cfg = Config.fromfile(config)
    options = {"model.backbone.depth": 18, "model.head.in_channels": 512,
               "model.head.num_classes": 2}  # fmt: skip
    cfg.merge_from_dict(options)
    save_weights(cfg, tmp_path / "w.pth")
    words = [f"{key}={value}" for key, value in options.items()]
    words += ["test_dataloader.dataset.metainfo.classes=[a,b]", "test_dataloader.num_workers=0"]
    main(["test", str(config), "w.pth", "--data-root", "data", "--out", "out.pkl", "--work-dir",
          "run", "--tta", "--cfg-options", *words])  # fmt: skip
    one, two = (found["pred_score"] for found in pickle.loads((tmp_path / "out.pkl").read_bytes()))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
