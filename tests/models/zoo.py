"""Small hosts, the plain networks they derive from, and layer attentions, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmpretrain.models import ResNet, ResNeXt
from mmpretrain.models.backbones import (
    DistilledVisionTransformer,
    EfficientNet,
    ResNet_CIFAR,
    VisionTransformer,
)
from torch import nn

from mmrla.layers import LayerAttention
from mmrla.models import (
    CeiT,
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAResNeXt,
    MRLAVisionTransformer,
)
from tests.conftest import flat

ARCH = dict(embed_dims=32, num_layers=5, num_heads=2, feedforward_channels=48)
VIT = dict(arch=ARCH, img_size=32, patch_size=8)
CEIT = dict(arch=ARCH, img_size=32, patch_size=2, stem_channels=8)
PVT = dict(embed_dims=16, num_layers=(2, 2, 1, 1))
SMALL = dict(stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3))
MAPS = dict(out_indices=(0, 1, 2, 3))
NARROW = dict(stem_channels=16, base_channels=16)
# Class, arguments, d_k.
HOSTS: dict[str, tuple[type, dict[str, Any], int]] = {
    "resnet": (MRLAResNet, dict(depth=18, **NARROW), 8),
    "resnext": (MRLAResNeXt, dict(depth=50, groups=2, width_per_group=8, stem_channels=16), 32),
    "resnet20": (MRLAResNetCIFAR, dict(depth=20), 32),
    "efficientnet": (MRLAEfficientNet, dict(arch="b0"), 8),
    "vit": (MRLAVisionTransformer, VIT, 16),
    "distilled": (MRLADistilledVisionTransformer, VIT, 16),
    "ceit": (MRLACeiT, CEIT, 16),
    "pvtv2": (MRLAPyramidVisionTransformerV2, PVT, 16),
}
# The same with other arguments.
VARIANTS = {
    "resnet50": (MRLAResNet, dict(depth=50, **SMALL), 8),
    "resnext50": (MRLAResNeXt, dict(depth=50, stem_channels=8, **MAPS), 8),
    "lite0": (MRLAEfficientNet, dict(arch="lite0", out_indices=(3, 6)), 8),
    "vit-featmap": (MRLAVisionTransformer, dict(VIT, out_type="featmap", with_cls_token=False), 16),
    "vit-pre-norm": (MRLAVisionTransformer, dict(VIT, pre_norm=True), 16),
    "vit-scaled": (MRLAVisionTransformer, dict(VIT, layer_scale_init_value=0.1), 16),
    "ceit-featmap": (MRLACeiT, dict(CEIT, out_type="featmap"), 16),
    "efficientnet-es": (MRLAEfficientNet, dict(arch="es"), 8),
}
EVERY = HOSTS | VARIANTS
# mmdet's PVTv2 imports only behind mmrla where mmcv has no compiled operations.
PLAIN = {
    MRLAResNet: ResNet, MRLAResNeXt: ResNeXt, MRLAEfficientNet: EfficientNet, MRLACeiT: CeiT,
    MRLAVisionTransformer: VisionTransformer,
    MRLADistilledVisionTransformer: DistilledVisionTransformer,
    MRLAPyramidVisionTransformerV2: MRLAPyramidVisionTransformerV2.__bases__[1],
}  # fmt: skip
# EfficientNet-Lite0, which mmpretrain lacks: kernel, width, squeeze, stride, expansion, kind.
LITE0 = [
    [[3, 32, 0, 2, 0, -1]],
    [[3, 16, 0, 1, 1, 0]],
    [[3, 24, 0, 2, 6, 0], [3, 24, 0, 1, 6, 0]],
    [[5, 40, 0, 2, 6, 0], [5, 40, 0, 1, 6, 0]],
    [[3, 80, 0, 2, 6, 0], *[[3, 80, 0, 1, 6, 0]] * 2, *[[5, 112, 0, 1, 6, 0]] * 3],
    [[5, 192, 0, 2, 6, 0], *[[5, 192, 0, 1, 6, 0]] * 3, [3, 320, 0, 1, 6, 0]],
    [[1, 1280, 0, 1, 0, -1]],
]
KINDS = ("MRLALight", "MRLABase")
# What any host takes; "light" and "base" with d_k of the host.
TYPES: dict[str, dict[str, Any]] = {
    "mla": dict(type="MLA"),
    "linear-rla": dict(type="LinearRLA"),
    "linear-rla-channels": dict(type="LinearRLA", head_channels=1),
    "dwconv": dict(type="DWConv"),
    "crla": dict(type="MRLALight", head_channels=1),
    "one-head": dict(type="MRLALight", head_channels="all"),
    "output": dict(type="MRLALight", recurrence="output"),
    "no-previous": dict(type="MRLALight", recurrence=None),
    "no-dwconv": dict(type="MRLALight", value_conv=False),
    "fc": dict(type="MRLALight", projection="fc"),
    "lambda-1": dict(type="MRLALight", fixed_lambda=1),
    "lambda-1-output": dict(type="MRLALight", fixed_lambda=1, recurrence="output"),
    "kcla": dict(type="KCLA", spans_stages=False),
    "base-no-dwconv-fc": dict(type="MRLABase", head_channels=8, projection="fc", value_conv=False),
}
MRLA = {"light": dict(type="MRLALight"), "base": dict(type="MRLABase")}
# What the ResNet hosts take besides.
INTERACTIONS: dict[str, dict[str, Any]] = {
    "dia": dict(type="DIAUnit", reduction=4),
    "rla": dict(type="RecurrentLayerAggregation", hidden_channels=6),
    "dla": dict(type="DLALight", head_channels=4, reduction=4),
    "dla-base": dict(type="DLABase", head_channels=4, reduction=4),
    "kcla-spanning": dict(type="KCLA", head_channels=4),
}
ATTENTIONS = MRLA | TYPES | INTERACTIONS
LIGHT, BASE = (dict(cfg, head_channels=8) for cfg in MRLA.values())
RELU = dict(type="ReLU")


def build(host: str, attention: str | dict | None, **more: Any) -> nn.Module:
    """A host with a layer attention (by name, or its config), or None for the plain network."""
    cls, kwargs, d = EVERY[host]
    cfg = ATTENTIONS[attention] if isinstance(attention, str) else attention
    # Hosts but ResNet and ResNeXt have a default of their own.
    if cfg is not None and "res" in host and cfg["type"] in (*KINDS, "MLA", "LinearRLA", "KCLA"):
        cfg = dict(head_channels=d) | cfg if "20" not in host else cfg
    return cls(**{**kwargs, **more}, layer_attention=cfg)


def plain(host: str) -> nn.Module:
    """The network that the host derives from, of mmpretrain or mmdet."""
    cls, kwargs, _ = EVERY[host]
    if host == "lite0":

        class Lite0(EfficientNet):
            layer_settings = {"b": LITE0}

        return Lite0("b0", out_indices=(3, 6), act_cfg=dict(type="ReLU6"))
    if host == "resnet20":

        class ResNet20(ResNet_CIFAR):
            arch_settings = {20: (ResNet_CIFAR.arch_settings[18][0], (3, 3, 3))}

        stages = dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,))
        return ResNet20(20, **NARROW, **stages)
    return PLAIN[cls](**kwargs)


def attentions(model: nn.Module) -> list[LayerAttention]:
    return [m for m in model.modules() if isinstance(m, LayerAttention)]


def step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Outputs of a forward, under autocast to ``dtype``, and a backward from all of them."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outs = flat(model(x))
    sum((o.float() * torch.randn_like(o.float())).sum() for o in outs).backward()
    return outs


def after_step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, the image's and parameters' gradients and the buffers, by name."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    outs = flat(model(x))
    sum(o.square().mean() for o in outs).backward()
    # Wrappers, as of DDP and torch.compile, have a prefix in their names.
    name = lambda key: key.removeprefix("module.").removeprefix("_orig_mod.")  # noqa: E731
    found = {f"out{i}": o.detach() for i, o in enumerate(outs)} | {"x": x.grad}
    found |= {name(k): p.grad for k, p in model.named_parameters() if p.grad is not None}
    return found | {name(k): b.double().clone() for k, b in model.named_buffers()}


def assert_same(
    got: dict,
    expected: dict,
    limit: float,
    without: tuple[str, ...] = (),
    floor: float = 1e-30,
) -> None:
    """Of two :func:`after_step`, relative to the largest value or ``floor``; 0 for bit for bit."""
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        if not any(part in key for part in without):
            error = (got[key].double() - want.double()).abs().max()
            assert error <= limit * want.abs().max().clamp(min=floor), key


def starting_from(state: dict, folder: Path, kind: str = "mmrla.WarmStart") -> dict[str, Any]:
    """The ``init_cfg`` that starts from a checkpoint with the state."""
    torch.save(state, folder / "weights.pth")
    return dict(type=kind, checkpoint=str(folder / "weights.pth"))


@contextlib.contextmanager
def weights_left_out() -> Iterator[None]:
    """Networks of which only names and shapes count are built without drawing weights."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("uniform_", "normal_"):
            patch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)
        yield


def count(cls: type, **kwargs: Any) -> int:
    """Parameters of a network."""
    with weights_left_out():
        return sum(p.numel() for p in cls(**kwargs).parameters())
