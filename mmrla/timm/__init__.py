"""Networks of `timm <https://huggingface.co/docs/timm>`_ with a layer attention, by name.

``import mmrla.timm`` registers them: ``timm.create_model('resnet50_mrla_light')``. It needs torch
and timm, but no OpenMMLab packages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

try:
    import timm  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "mmrla.timm needs timm, which is not installed: pip install 'timm>=1.0.31', or mmrla with "
        "its extra, mmrla[timm]",
        name="timm",
    ) from _error

from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    register_model,
)
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import checkpoint_filter_fn

from mmrla.timm.common import with_own_attention
from mmrla.timm.resnet import MRLABasicBlock, MRLABottleneck, MRLAResNet
from mmrla.timm.vision_transformer import MRLAVisionTransformer, MRLAVisionTransformerDistilled
from mmrla.timm.weights import from_mmrla, to_mmrla

__all__ = [
    "MRLABasicBlock", "MRLABottleneck", "MRLAResNet", "MRLAVisionTransformer",
    "MRLAVisionTransformerDistilled", "from_mmrla", "to_mmrla",
]  # fmt: skip

ATTENTIONS = {"mrla_light": "MRLALight", "mrla_base": "MRLABase"}
"""Suffixes of registered names, and their layer attentions."""

default_cfgs: dict[str, DefaultCfg] = {}
"""Sources of the plain networks' weights, by registered name; read by timm's register_model."""

_D = dict(stem_width=32, stem_type="deep", avg_down=True)
_DEPTHS: dict[int, tuple[type, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)), 152: (Bottleneck, (3, 8, 36, 3)),
}  # fmt: skip
# timm's name: depth and further arguments, as in timm.models.resnet.
_RESNETS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"resnet{depth}": (depth, {}) for depth in _DEPTHS},
    **{f"resnet{depth}d": (depth, _D) for depth in _DEPTHS},
    "wide_resnet50_2": (50, dict(base_width=128)),
    "wide_resnet101_2": (101, dict(base_width=128)),
    "resnext50_32x4d": (50, dict(cardinality=32, base_width=4)),
    "resnext50d_32x4d": (50, dict(cardinality=32, base_width=4, **_D)),
    "resnext101_32x4d": (101, dict(cardinality=32, base_width=4)),
    "resnext101_32x8d": (101, dict(cardinality=32, base_width=8)),
    "resnext101_64x4d": (101, dict(cardinality=64, base_width=4)),
}
_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}
_DEIT3 = dict(no_embed_class=True, init_values=1e-6)
# timm's name: size and further arguments, as in timm.models.vision_transformer and deit.
_VITS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"vit_{size}_patch16_{side}": (size, {}) for size in _SIZES for side in (224, 384)},
    **{f"deit_{size}_patch16_224": (size, {}) for size in ("tiny", "small", "base")},
    "deit_base_patch16_384": ("base", {}),
    **{f"deit_{size}_distilled_patch16_224": (size, {}) for size in ("tiny", "small", "base")},
    "deit_base_distilled_patch16_384": ("base", {}),
    **{f"deit3_{size}_patch16_{side}": (size, _DEIT3)
       for size in ("small", "base", "large") for side in (224, 384)},
}  # fmt: skip


def _register(plain: str, suffix: str, create: Callable[..., Any]) -> None:
    """Register a network under a name, with the sources of the plain network's weights."""
    name = f"{plain}_{suffix}"
    cfgs = {key.partition(".")[2]: cfg for key, cfg in get_arch_pretrained_cfgs(plain).items()}
    default_cfgs[name] = DefaultCfg(
        deque(cfgs), cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values())
    )

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        kwargs.setdefault("layer_attention", ATTENTIONS[suffix])
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = (
        f"timm's {plain} with {ATTENTIONS[suffix]}, or what ``layer_attention`` says, after each "
        f"layer; ``pretrained=True`` starts from timm's weights of {plain}."
    )
    globals()[name] = register_model(entrypoint)


def _resnet(depth: int, arguments: dict[str, Any]) -> Callable[..., Any]:
    block, layers = _DEPTHS[depth]

    def create(name: str, pretrained: bool, **kwargs: Any) -> Any:
        kwargs = {**dict(block=block, layers=layers), **arguments, **kwargs}
        return build_model_with_cfg(
            MRLAResNet, name, pretrained, pretrained_filter_fn=with_own_attention, **kwargs
        )

    return create


def _vit(size: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    def weights_of(state: dict[str, Any], model: Any) -> dict[str, Any]:
        adapt = "deit" in model.pretrained_cfg["architecture"]
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=adapt)
        return with_own_attention(state, model)

    def create(name: str, pretrained: bool, **kwargs: Any) -> Any:
        if kwargs.get("feature_cls") not in (None, "getter"):
            raise ValueError(
                f"feature_cls must be 'getter', got {kwargs['feature_cls']!r}: others would take "
                "features before the layer attention"
            )
        distilled = "distilled" in name
        kwargs = {**dict(patch_size=16), **_SIZES[size], **arguments, **kwargs}
        return build_model_with_cfg(
            MRLAVisionTransformerDistilled if distilled else MRLAVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=weights_of,
            feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
            **kwargs,
        )

    return create


for _suffix in ATTENTIONS:
    for _plain, _row in _RESNETS.items():
        _register(_plain, _suffix, _resnet(*_row))
    for _plain, _found in _VITS.items():
        _register(_plain, _suffix, _vit(*_found))
