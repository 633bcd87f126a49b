"""mmrla's names, typed as users of mm packages do, each in a process that starts from nothing."""

from __future__ import annotations

import json
import re

import pytest

import mmrla
from mmrla.compat import ops_in_use
from tests.conftest import overlay_environment
from tests.helpers import python

# What a user runs; `told` collects what the tests compare.
LOOK_UP = """
import json, warnings
import mmrla
import mmpretrain
from mmengine import hub
from mmengine.config import Config
from mmengine.registry import MODELS
from mmdet.apis import DetInferencer, init_detector

warnings.simplefilter("ignore")
told = {"names": mmpretrain.list_models(), "ours": mmpretrain.list_models("*mrla*")}

def kind(model):
    backbone = model.backbone
    return [type(model).__module__, type(backbone).__name__, backbone.layer_attention["type"]]

def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except FileNotFoundError as error:
        return str(error)

classifier = mmpretrain.get_model("resnet50_mrla_in1k")
by_hub = hub.get_model("mmrla::imagenet/resnet50_mrla_in1k")
assert by_hub.state_dict().keys() == classifier.state_dict().keys()
small = dict(depth=18, init_cfg=None)
neck = dict(in_channels=[64, 128, 256, 512])
told["kinds"] = [kind(model) for model in (
    classifier,
    by_hub,
    mmpretrain.get_model("RetinaNet_R50_MRLA_1x", backbone=small, neck=neck),
    DetInferencer("mask_rcnn_r50_mrla_1x", device="cpu").model,
    init_detector("mine.py", device="cpu"),
)]
told["depth"] = Config.fromfile("mine.py").model.backbone.depth
told["config"] = hub.get_config("mmrla::retinanet_r50_mrla_1x.py").model.to_dict()
told["refusals"] = [
    refusal(mmpretrain.get_model, "resnet50_mrla_in1k", pretrained=True),
    refusal(mmpretrain.ImageClassificationInferencer, "resnet50_mrla_in1k"),
    refusal(hub.get_model, "mmrla::imagenet/resnet50_mrla_in1k", pretrained=True),
    refusal(hub.get_config, "mmrla::retinanet_r50_mrla_1x", pretrained=True),
    refusal(hub.get_config, "mmrla::retinanet_r50_mrla"),
]
new = Config.fromfile("new_style.py")
new.dump("dumped.py")
told["new"] = [new.optim_wrapper.optimizer.lr, Config.fromfile("dumped.py").model.backbone.type]
for cfg in (new, Config.fromfile("new_mmdet.py")):
    told["new"].append(kind(MODELS.build(cfg.model)))
print("told", json.dumps(told))
"""
MINE = """
_base_ = 'mmrla::retinanet_r50_mrla_1x.py'
model = dict(backbone=dict(depth=18), neck=dict(in_channels=[64, 128, 256, 512]))
"""
NEW_STYLE = """
from mmengine.config import read_base
with read_base():
    from mmrla.configs.mask_rcnn_r50_mrla_1x import *
from mmdet.models import FPN
from mmrla.models import MRLAResNeXt
model.backbone.update(type=MRLAResNeXt, depth=50, groups=32, width_per_group=4)
model.neck.update(type=FPN, num_outs=6)
optim_wrapper.optimizer.update(lr=0.5)
"""
# The wheels of mmdet come without its configs of the new style; this is the head of one.
MMDETS = """
from mmdet.models import FPN, RetinaNet, RetinaHead
from mmdet.models.backbones import ResNet
model = dict(
    type=RetinaNet,
    backbone=dict(type=ResNet, depth=50),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5),
    bbox_head=dict(type=RetinaHead, num_classes=2, in_channels=8, feat_channels=8))
"""
ON_MMDETS = """
from mmengine.config import read_base
with read_base():
    from .mmdets import *
from mmrla.models import MRLAResNet
model.update(backbone=dict(type=MRLAResNet, depth=18, out_indices=(0, 1, 2, 3),
                           layer_attention=dict(type='MRLABase', head_channels=32)))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("names")
    files = {"mine": MINE, "new_style": NEW_STYLE, "mmdets": MMDETS, "new_mmdet": ON_MMDETS}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    printed = python("-c", LOOK_UP, cwd=folder, both=True)
    assert "OneDL" not in printed
    assert printed.count("mmcv ops: mmrla's fallback") == (ops_in_use() == "fallback")
    return json.loads(re.search("^told (.*)", printed, re.M)[1])


def test_mmpretrain_lists_every_config_once(told):
    models = [name.rpartition("/")[2].lower() for name in mmrla.list_configs()]
    assert len(set(models)) == len(models)
    # Also with names of mmpretrain's own, among which ours must not hide any.
    assert set(models) <= set(told["names"])
    assert len(told["names"]) == len(set(told["names"])) > len(models) + 300
    assert set(told["ours"]) == {name for name in models if "mrla" in name}


def test_models_by_name(told):
    pretrain, det = "mmpretrain.models.classifiers.image", "mmdet.models.detectors"
    light = ["MRLAResNet", "MRLALight"]
    assert told["kinds"] == [
        [pretrain, *light], [pretrain, *light], [f"{det}.retinanet", *light],
        [f"{det}.mask_rcnn", *light], [f"{det}.retinanet", *light],
    ]  # fmt: skip
    assert told["depth"] == 18
    expected = mmrla.get_config("retinanet_r50_mrla_1x").model.to_dict()
    assert told["config"] == json.loads(json.dumps(expected))


def test_new_style_configs(told):
    """Those that inherit from mmrla's, in the old style, and those of mmdet with our classes."""
    on_ours = ["mmdet.models.detectors.mask_rcnn", "MRLAResNeXt", "MRLALight"]
    on_mmdets = ["mmdet.models.detectors.retinanet", "MRLAResNet", "MRLABase"]
    dumped = "mmrla.models.MRLAResNeXt"
    assert told["new"] == [0.5, dumped, on_ours, on_mmdets]


def test_no_random_weights_for_pretrained_ones(told):
    *unpublished, unknown = told["refusals"]
    for message in unpublished:
        assert "are published, so there is nothing to load for pretrained=True" in message
    assert "did you mean retinanet_r50_mrla_1x" in unknown


def test_programs_that_do_not_import_mmrla(tmp_path):
    """``python -m mmrla.startup``, in an environment over this one."""
    own = overlay_environment(tmp_path / "env")

    def run(*args: object, ok: bool = True) -> str:
        return python(*args, cwd=tmp_path, ok=ok, python=own)

    (tmp_path / "mine.py").write_text(MINE)
    code = (
        "from mmengine.config import Config; c = Config.fromfile('mine.py');"
        "print(c.model.backbone.depth)"
    )
    assert "please specify the package name and relative config path" in run("-c", code, ok=False)
    assert run("-m", "mmrla.startup", "on").startswith("on: ")
    assert run("-c", code).split() == ["18"]
    idle = "import sys; print({'torch', 'mmengine', 'numpy'} & set(sys.modules))"
    assert run("-c", idle).strip() == "set()"
    # As after pip uninstall: no word about it.
    hidden = "import sys; sys.exit('mmrla' in sys.modules)"
    (file,) = (tmp_path / "env").glob("lib/python*/site-packages/mmrla-startup.pth")
    file.write_text(file.read_text().replace("mmrla", "mmrla_gone"))
    assert python("-c", hidden, cwd=tmp_path, python=own, both=True) == ""
    assert run("-m", "mmrla.startup", "off").startswith("off: ")
    assert not file.exists()
