"""Networks as ONNX: onnxruntime computes what torch computes."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding

from mmrla.cli import main
from mmrla.engine.export import Flat, _pad_same, export_onnx, exportable, onnx_error
from mmrla.engine.network import build_network
from tests.conftest import ROOT
from tests.helpers import cfg_options, refusal

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

CIFAR = "configs/cifar/resnet20_mrla_cifar10.py"
# Two stages of two blocks: exporting takes long.
SHORT = {
    "model.backbone": dict(
        _delete_=True, type="mmrla.MRLAResNet", depth=18, num_stages=2, strides=(1, 2),
        dilations=(1, 1), out_indices=(1,), stem_channels=16, base_channels=16,
        layer_attention=dict(type="MRLALight", head_channels=8),
    ),
    "model.head.in_channels": 32,
}  # fmt: skip
BASE = {"model.backbone.layer_attention": dict(_delete_=True, type="MRLABase", head_channels=16)}
R18 = {"model.backbone.depth": 18}
DETECTOR = {**R18, "model.neck.in_channels": [64, 128, 256, 512]}


def network(config: str, **kwargs):
    return build_network(str(ROOT / config), **kwargs)


def test_a_classifier_at_any_size(tmp_path):
    """The size it was recorded with, odd and not square ones, and a batch."""
    flat = exportable(network(CIFAR, options=SHORT), "model")
    path = export_onnx(flat, tmp_path / "net.onnx", (32, 40))
    sizes = [(32, 40), (33, 47), (64, 32)]
    assert max(onnx_error(path, flat, sizes)) < 1e-5
    assert max(onnx_error(path, flat, sizes[1:2], batch=3)) < 1e-5
    # Random weights that are other ones than those of the file are told apart.
    other = exportable(network(CIFAR, options=SHORT, seed=1), "model")
    assert max(onnx_error(path, other, sizes[:1])) > 1e-2


ALL_STAGES = {**R18, "model.backbone.out_indices": (0, 1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [("resnet50_mrla", ALL_STAGES), ("resnet50_mrla", {**ALL_STAGES, **BASE}),
     ("pvtv2-b0_mrla", {"model.backbone.out_indices": (0, 1, 2, 3)}),
     ("efficientnet-b0_mrla", {"model.backbone.out_indices": (2, 3, 4, 6)}),
     ("efficientnet-b0_mrla-base", {"model.backbone.arch": "lite0",
                                    "model.backbone.out_indices": (2, 3, 4, 6)})],
    ids=["light", "base", "pvtv2", "efficientnet", "lite0-base"],
)  # fmt: skip
def test_backbones_at_any_size(config, options, tmp_path):
    flat = exportable(network(f"configs/imagenet/{config}_in1k.py", options=options), "backbone")
    assert len(flat(torch.zeros(1, 3, 64, 64))) == 4
    path = export_onnx(flat, tmp_path / "backbone.onnx", (64, 96))
    assert max(onnx_error(path, flat, [(64, 96), (224, 160), (75, 101)], batch=2)) < 1e-5


def test_same_padding_is_exported_without_branches(tmp_path):
    """At even and odd sizes it is mmcv's, also where it has to leave the work to mmcv's."""
    grid = itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2), (6, 7, 8, 13))
    for kernel, stride, dilation, size in grid:
        conv = Conv2dAdaptivePadding(2, 3, (kernel, 3), (stride, 2), dilation=(dilation, 1))
        x = torch.randn(2, 2, size, 15 - size)
        assert torch.equal(_pad_same(conv, x), conv(x)), (kernel, stride, dilation, size)
    net = torch.nn.Sequential(
        Conv2dAdaptivePadding(3, 4, 5, 2), torch.nn.ReLU(), Conv2dAdaptivePadding(4, 4, 3),
        Conv2dAdaptivePadding(4, 4, 3, 2, groups=4),
    )  # fmt: skip
    flat = Flat(net, net).eval()
    path = export_onnx(flat, tmp_path / "net.onnx", (32, 40))
    assert max(onnx_error(path, flat, [(32, 40), (33, 46), (29, 31), (34, 35)], batch=3)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mrla", "mrla-base"])
@pytest.mark.parametrize("host", ["deit-tiny", "pvtv2-b0", "ceit-tiny", "efficientnet-b0"])
def test_other_hosts_at_one_size(host, kind, tmp_path):
    name = f"{host}_{kind}"
    flat = exportable(network(f"configs/imagenet/{name}_in1k.py"), "backbone")
    path = export_onnx(flat, tmp_path / "net.onnx", (224, 224), dynamic=False)
    assert max(onnx_error(path, flat, [(224, 224)])) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "host"), [("deit-tiny", "MRLAVisionTransformer"), ("ceit-tiny", "MRLACeiT")]
)
def test_transformers_refuse_open_sizes(name, host, tmp_path, capfd):
    flat = exportable(network(f"configs/imagenet/{name}_mrla_in1k.py"), "model")
    message = rf"{host} cannot be .* left open; ask for one size \(--static\)\. torch says: \S+ "
    with pytest.raises(ValueError, match=message):
        export_onnx(flat, tmp_path / "net.onnx", (224, 224))
    assert "GraphModule" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_single_stage_detector_by_the_command(tmp_path, capsys):
    config = str(ROOT / "configs/retinanet_r50_mrla_1x.py")
    main(["export-onnx", config, "--part", "model", "--size", "128", "160", "--out",
          str(tmp_path), *cfg_options(DETECTOR)])  # fmt: skip
    assert (tmp_path / "retinanet_r50_mrla_1x_model.onnx").stat().st_size > 10**6
    printed = capsys.readouterr().out
    for size in ("128x160", "160x160", "128x224"):
        assert f"{size}: onnxruntime differs from torch by" in printed


@pytest.mark.slow
def test_a_classifier_in_int8(coco_mini, tmp_path, capsys):
    options = cfg_options({**R18, "model.head.in_channels": 512})
    command = ["export-onnx", str(ROOT / "configs/imagenet/resnet50_mrla_in1k.py"), "--static",
               "--int8", "--size", "64", "64", "--out", str(tmp_path)]  # fmt: skip
    photos = sorted(map(str, (coco_mini / "val2017").glob("*.jpg")))[:24]
    main([*command, "--images", *photos, *options])
    printed = capsys.readouterr().out
    assert "calibrated on 12 images" in printed
    found = re.search(r"on 12 others: .* differ by ([\d.]+)% .*, ([\d.]+) times", printed)
    assert 0 < float(found[1]) < 20
    whole, small = (tmp_path / f"resnet50_mrla_in1k_model{end}.onnx" for end in ("", "_int8"))
    assert small.stat().st_size < whole.stat().st_size / 3
    for arguments, message in (
        (["--images", photos[0]], "--int8 needs two --images or more"),
        (["--images", *photos, "--part", "backbone"], "--int8 is for classifiers"),
    ):
        assert message in refusal(capsys, *command, *arguments, *options)


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    two_stage = network("configs/mask_rcnn_r50_mrla_1x.py", options=DETECTOR)
    with pytest.raises(ValueError, match=r"MaskRCNN of mask_rcnn_r50_mrla_1x .*--part detector"):
        exportable(two_stage, "model")
    with pytest.raises(ValueError, match=r"part must be one of .*got 'neck'"):
        exportable(two_stage, "neck")
    flat = exportable(network(CIFAR), "backbone")
    with pytest.raises(ValueError, match=r"must end in \.onnx, got 'net\.pt'"):
        export_onnx(flat, tmp_path / "net.pt", (32, 32))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript.*mmrla\[onnx\]"):
        export_onnx(flat, tmp_path / "net.onnx", (32, 32))


def test_a_traced_backbone_computes_the_same():
    backbone = exportable(network(CIFAR), "backbone")
    with torch.no_grad():
        traced = torch.jit.trace(backbone, torch.rand(2, 3, 32, 32))
        x = torch.rand(1, 3, 40, 24)
        torch.testing.assert_close(traced(x), backbone(x))
