"""Detectors with boxes as ONNX against what ``mmrla predict`` finds in the same photographs."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools.mask import decode

from mmrla.cli import main
from mmrla.engine.detection_graph import DetectorGraph, boxes_in_file, detection_errors, fit_image
from mmrla.engine.network import build_network
from tests.conftest import ROOT
from tests.helpers import cfg_options

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

SIZE = (128, 160)
SMALL = {
    "model.backbone.depth": 18,
    "model.neck.in_channels": [64, 128, 256, 512],
    "test_dataloader.dataset.pipeline.1.scale": (160, 128),
}
ONE = {"test_cfg.rcnn.score_thr": 0.02, "roi_head.bbox_head.num_classes": 5}
DETECTORS = {
    "retinanet_r50_mrla_1x": {"test_cfg.score_thr": 0.02, "bbox_head.num_classes": 5},
    "faster_rcnn_r50_mrla_1x": ONE,
    "mask_rcnn_r50_mrla_1x": {**ONE, "roi_head.mask_head.num_classes": 5},
}


def options(name: str) -> dict:
    return SMALL | {f"model.{key}": value for key, value in DETECTORS[name].items()}


LAST = {  # the standard deviation that their outputs get
    "retina_cls": 1.0, "rpn_cls": 1.0, "fc_cls": 1.0, "conv_logits": 1.0,
    "retina_reg": 0.3, "rpn_reg": 0.3, "fc_reg": 1.0,
}  # fmt: skip


def detector(name: str, photo):
    """Random weights whose scores and boxes differ from place to place, as trained ones' do."""
    network = build_network(str(ROOT / f"configs/{name}.py"), options=options(name))
    inputs = fit_image(network, photo, SIZE)["images"]
    graph = DetectorGraph(network)
    handles: dict = {}

    def scale(layer, args, output):
        handles.pop(layer.name).remove()  # the levels of a pyramid share a layer
        layer.weight.data.mul_(LAST[layer.name] / output.std())

    for key, layer in network.model.named_modules():
        if (key_end := key.rpartition(".")[2]) in LAST:
            layer.name = key_end
            handles[key_end] = layer.register_forward_hook(scale)
            with torch.no_grad():
                graph(inputs, torch.tensor(SIZE))
    return network


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_those_of_predict(name, coco_mini, tmp_path, monkeypatch, capsys):
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    # What predict pads to this size by itself.
    files = [file for file in sorted((coco_mini / "val2017").iterdir())
             if cv2.imread(str(file)).shape[:2] == (480, 640)][:3]  # fmt: skip
    network = detector(name, files[0])
    torch.save(dict(state_dict=network.model.state_dict()), "weights.pth")
    words = [str(ROOT / f"configs/{name}.py"), "weights.pth"]
    changed = cfg_options(options(name))
    main(["export-onnx", *words, "--size", *map(str, SIZE), "--out", "onnx", *changed,
          "--images", *map(str, files)])  # fmt: skip
    assert capsys.readouterr().out.count("0 without a partner") == len(files)
    path = f"onnx/{name}_detector.onnx"

    main(["predict", *words, *map(str, files), "--json", "found.json", "--score-thr", "0",
          *changed])  # fmt: skip
    with open("found.json") as file:
        predicted = json.load(file)
    session = onnxruntime.InferenceSession(path)
    for file, one in zip(files, predicted, strict=True):
        inputs = fit_image(network, file, SIZE)
        outputs = session.run(None, {key: inputs[key].numpy() for key in ("images", "image_shape")})
        assert [len(output) for output in outputs[:3]] == [100] * 3
        boxes, scores, labels, *masks = boxes_in_file(outputs, inputs)
        objects = one["objects"]
        assert len(objects) == len(boxes) >= 20
        np.testing.assert_allclose(boxes, [o["box"] for o in objects], atol=0.5)
        np.testing.assert_allclose(scores, [o["score"] for o in objects], atol=1e-3)
        assert labels.tolist() == [o["label"] for o in objects]
        assert np.ptp(scores.numpy()) > 0.01
        assert bool(masks) == ("mask" in objects[0])
        if masks:
            assert np.mean([decode(o["mask"]).mean() for o in objects]) > 1e-3

    # A portrait, which the graph sees with more zeros: mmdet on the same padded image. And other
    # weights are told apart.
    turned = cv2.rotate(cv2.imread(str(files[0])), cv2.ROTATE_90_CLOCKWISE)
    cv2.imwrite("portrait.png", turned)
    (error,) = detection_errors(path, network, SIZE, ["portrait.png"])
    assert error["count"] >= 10
    assert error["unmatched"] == 0
    assert error["box"] < 0.5
    assert max(error["score"], error.get("mask", 0)) < 1e-3
    torch.nn.init.normal_(network.model.backbone.conv1.weight)
    (error,) = detection_errors(path, network, SIZE, ["portrait.png"])
    assert error["unmatched"] > 10


def test_a_detector_of_another_kind_is_refused():
    network = build_network(str(ROOT / "configs/retinanet_r50_mrla_1x.py"), options=SMALL | {
        "model.test_cfg.nms.type": "soft_nms"})  # fmt: skip
    with pytest.raises(ValueError, match=r"RetinaNet of .*its NMS is soft_nms.*--part backbone"):
        DetectorGraph(network)
