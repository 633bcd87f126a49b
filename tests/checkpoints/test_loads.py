"""Every way by which mmengine fills a model: what fits is loaded, and nothing is not enough."""

from __future__ import annotations

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from torch import nn

from mmrla.checkpoints.files import CheckpointError
from mmrla.models import MRLAResNet

LIGHT = dict(type="MRLALight", head_channels=4)


class Neck(BaseModule):
    def __init__(self, init_cfg=None) -> None:
        super().__init__(init_cfg)
        self.lateral = nn.Conv2d(64, 8, 1)
        self.norm = nn.BatchNorm2d(8)


class Head(BaseModule):
    def __init__(self, classes, init_cfg=None) -> None:
        super().__init__(init_cfg)
        self.shared = nn.Linear(8, 8)
        self.fc_cls = nn.Linear(8, classes)


class RoIHead(BaseModule):
    def __init__(self, classes, init_cfg=None) -> None:
        super().__init__()
        self.bbox_head = Head(classes, init_cfg)


class Detector(BaseModule):
    def __init__(self, classes=3, attention=LIGHT, init_cfg=None, **init_cfgs) -> None:
        super().__init__(init_cfg)
        self.backbone = MRLAResNet(
            18, stem_channels=8, base_channels=8, layer_attention=attention,
            init_cfg=init_cfgs.get("backbone"),
        )  # fmt: skip
        self.neck = Neck(init_cfgs.get("neck"))
        self.roi_head = RoIHead(classes, init_cfgs.get("bbox_head"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A detector of one's own with its checkpoint."""
    detector = Detector()
    for parameter in detector.parameters():
        nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("own") / "detector.pth"
    torch.save({"state_dict": detector.state_dict(), "meta": {}}, path)
    return detector, str(path)


def same(part: nn.Module, of: nn.Module) -> bool:
    theirs = of.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in part.state_dict().items())


@pytest.mark.parametrize("extra", [{}, {"prefix": None}])
def test_parts_find_themselves_in_a_whole_detector(trained, extra):
    """Backbone, neck and a head two levels down, none of them told its prefix."""
    source, path = trained
    init = dict(type="Pretrained", checkpoint=path, **extra)
    neck = [dict(type="Constant", val=1, layer="Conv2d"), init]
    model = Detector(classes=5, backbone=init, neck=neck, bbox_head=init)
    model.init_weights()
    assert same(model.backbone, source.backbone)
    assert same(model.neck, source.neck)
    assert same(model.roi_head.bbox_head.shared, source.roi_head.bbox_head.shared)
    assert model.roi_head.bbox_head.fc_cls.weight.shape == (5, 8)


def test_an_override_and_a_whole_model(trained, tmp_path):
    source, path = trained
    override = dict(type="Pretrained", checkpoint=path, name="neck")
    model = Detector(init_cfg=dict(type="Constant", val=1, layer=[], override=override))
    model.init_weights()
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


@pytest.mark.parametrize("way", ["init_cfg", "load_checkpoint", "revise_keys", "shapes", "prefix"])
def test_nothing_loaded_is_an_error(way, trained, tmp_path):
    _, path = trained
    other = str(tmp_path / "other.pth")
    torch.save({"state_dict": {"encoder.weight": torch.ones(2), "encoder.bias": torch.ones(2)}},
               other)  # fmt: skip
    torch.save({f"neck.{k}": v[..., None] for k, v in Neck().state_dict().items()},
               tmp_path / "shapes.pth")  # fmt: skip
    message = "nothing of the checkpoint was loaded"
    if way == "init_cfg":
        model = Detector(backbone=dict(type="Pretrained", checkpoint=other))
        load = model.init_weights
        message = rf"MRLAResNet: {message}: 0 tensors loaded(.|\n)*begin with encoder.weight"
    elif way == "prefix":
        model = Detector(neck=dict(type="Pretrained", checkpoint=path, prefix="nek"))
        load = model.init_weights
        message = "detector.pth: no key begins with prefix='nek"
    elif way == "revise_keys":
        keys = [(r"^(\w+)\.", r"wrong_\1.")]
        load = lambda: load_checkpoint(Detector(), path, revise_keys=keys)  # noqa: E731
    else:
        name = {"shapes": str(tmp_path / "shapes.pth")}.get(way, other)
        load = lambda: load_checkpoint(Detector(), name)  # noqa: E731
    with pytest.raises(CheckpointError, match=message):
        load()


def test_two_that_fit_are_not_chosen_from(trained, tmp_path):
    source, _ = trained
    state = {f"{p}.{k}": v for p in ("teacher", "student") for k, v in source.state_dict().items()}
    torch.save(state, tmp_path / "semi.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "semi.pth"))
    with pytest.raises(CheckpointError, match=r"teacher.backbone.' and under 'student.backbone.'"):
        Detector(backbone=init).init_weights()
    model = Detector(backbone=init | dict(prefix="student.backbone."))
    model.init_weights()
    assert same(model.backbone, source.backbone)
    # strict loads are torch's own affair
    with pytest.raises(RuntimeError, match="do not match exactly"):
        load_checkpoint(Detector(), init["checkpoint"], strict=True)


def test_mmdet_and_mmpretrain_load_by_it(trained, tmp_path):
    """Whose functions took their copies of mmengine's when they were imported."""
    from mmdet.apis import init_detector
    from mmdet.models.backbones import pvt
    from mmpretrain import get_model

    import mmrla

    torch.save({"state_dict": {"encoder.weight": torch.ones(2)}}, tmp_path / "other.pth")
    other = str(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="RetinaNet: nothing of the checkpoint was loaded"):
        init_detector(mmrla.config_path("retinanet_r50_mrla_1x"), other, device="cpu")
    with pytest.raises(CheckpointError, match="ImageClassifier: nothing of the checkpoint was"):
        get_model("resnet110-bottleneck_mrla_cifar10", pretrained=other)
    with pytest.raises(CheckpointError, match="Linear: nothing of the checkpoint was loaded"):
        pvt.load_state_dict(nn.Linear(1, 1), {"encoder.weight": torch.ones(2)})
