"""Every way by which mmengine fills a model: what fits is loaded, and nothing is not enough."""

from __future__ import annotations

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.models.backbones import pvt
from mmengine.runner import load_checkpoint
from mmpretrain import get_model
from torch import nn

import mmrla
from mmrla.checkpoints.files import CheckpointError
from tests.helpers import same
from tests.networks import Detector, Neck


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A detector of one's own with its checkpoint."""
    detector = Detector()
    for parameter in detector.parameters():
        nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("own") / "detector.pth"
    torch.save({"state_dict": detector.state_dict(), "meta": {}}, path)
    return detector, str(path)


def started(**init_cfgs) -> Detector:
    model = Detector(classes=5, **init_cfgs)
    model.init_weights()
    return model


@pytest.mark.parametrize("extra", [{}, {"prefix": None}])
def test_parts_find_themselves_in_a_whole_detector(trained, extra):
    """Backbone, neck and a head two levels down, none of them told its prefix."""
    source, path = trained
    init = dict(type="Pretrained", checkpoint=path, **extra)
    neck = [dict(type="Constant", val=1, layer="Conv2d"), init]
    model = started(backbone=init, neck_init=neck, bbox_head=init)
    assert same(model.backbone, source.backbone)
    assert same(model.neck, source.neck)
    assert same(model.roi_head.bbox_head.shared, source.roi_head.bbox_head.shared)
    assert model.roi_head.bbox_head.fc_cls.weight.shape == (5, 8)


def test_an_override_and_a_whole_model(trained, tmp_path):
    source, path = trained
    override = dict(type="Pretrained", checkpoint=path, name="neck")
    model = started(init_cfg=dict(type="Constant", val=1, layer=[], override=override))
    assert same(model.neck, source.neck)
    assert not same(model.backbone, source.backbone)
    model = Detector(init_cfg=dict(type="Pretrained", checkpoint=path))
    model.init_weights()
    assert same(model, source)
    # a bare backbone's file, as others save it
    torch.save({"model": source.backbone.state_dict()}, tmp_path / "backbone.pth")
    model = Detector()
    load_checkpoint(model, str(tmp_path / "backbone.pth"))
    assert same(model.backbone, source.backbone)


NOTHING = "nothing of the checkpoint was loaded"


@pytest.fixture
def other(tmp_path) -> str:
    """A checkpoint of which nothing fits."""
    encoder = {"encoder.weight": torch.ones(2), "encoder.bias": torch.ones(2)}
    torch.save({"state_dict": encoder}, tmp_path / "other.pth")
    return str(tmp_path / "other.pth")


def test_nothing_loaded_is_an_error(trained, other, tmp_path):
    """By init_cfg, with a wrong prefix, by load_checkpoint, with wrong keys or shapes."""
    _, path = trained
    shapes = str(tmp_path / "shapes.pth")
    torch.save({f"neck.{k}": v[..., None] for k, v in Neck().state_dict().items()}, shapes)
    init = dict(type="Pretrained", checkpoint=other)
    begin = rf"MRLAResNet: {NOTHING}: 0 tensors loaded(.|\n)*begin with encoder.weight"
    with pytest.raises(CheckpointError, match=begin):
        started(backbone=init)
    with pytest.raises(CheckpointError, match="detector.pth: no key begins with prefix='nek"):
        started(neck_init=dict(init, checkpoint=path, prefix="nek"))
    wrong = dict(revise_keys=[(r"^(\w+)\.", r"wrong_\1.")])
    for file, how in ((path, wrong), (shapes, {}), (other, {})):
        with pytest.raises(CheckpointError, match=NOTHING):
            load_checkpoint(Detector(), file, **how)


def test_two_that_fit_are_not_chosen_from(trained, tmp_path):
    source, _ = trained
    state = {f"{p}.{k}": v for p in ("teacher", "student") for k, v in source.state_dict().items()}
    torch.save(state, tmp_path / "semi.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "semi.pth"))
    with pytest.raises(CheckpointError, match=r"teacher.backbone.' and under 'student.backbone.'"):
        started(backbone=init)
    model = started(backbone=init | dict(prefix="student.backbone."))
    assert same(model.backbone, source.backbone)
    # strict loads are torch's own affair
    with pytest.raises(RuntimeError, match="do not match exactly"):
        load_checkpoint(Detector(), init["checkpoint"], strict=True)


def test_mmdet_and_mmpretrain_load_by_it(other):
    """Whose functions took their copies of mmengine's when they were imported."""
    with pytest.raises(CheckpointError, match=f"RetinaNet: {NOTHING}"):
        init_detector(mmrla.config_path("retinanet_r50_mrla_1x"), other, device="cpu")
    with pytest.raises(CheckpointError, match=f"ImageClassifier: {NOTHING}"):
        get_model("resnet110-bottleneck_mrla_cifar10", pretrained=other)
    with pytest.raises(CheckpointError, match=f"Linear: {NOTHING}"):
        pvt.load_state_dict(nn.Linear(1, 1), {"encoder.weight": torch.ones(2)})
