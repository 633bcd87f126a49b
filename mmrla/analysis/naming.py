"""Names of a config's network, as in papers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmengine.config import Config, ConfigDict
from torch import nn

from mmrla.layers import LayerAttention

# What a backbone's class is called, in the order of rows; other classes go by their own name.
BACKBONES = {
    "ResNet": "ResNet",
    "ResNet_CIFAR": "ResNet",
    "ResNetCIFAR": "ResNet",
    "ResNeXt": "ResNeXt",
    "EfficientNet": "EfficientNet",
    "VisionTransformer": "ViT",
    "DistilledVisionTransformer": "ViT",
    "CeiT": "CeiT",
    "PyramidVisionTransformerV2": "PVTv2",
    "DenseNet": "DenseNet",
}
SIZES = {"lite0": "Lite0", "tiny": "T", "small": "S", "base": "B", "large": "L", "huge": "H"}
DETECTORS = {
    "DeformableDETR": "Deformable DETR",
    "FasterRCNN": "Faster R-CNN",
    "MaskRCNN": "Mask R-CNN",
}
ATTENTIONS = {
    "": "",
    "MRLALight": "MRLA-light",
    "MRLABase": "MRLA-base",
    "MLA": "MLA",
    "LinearRLA": "linear RLA",
    "DWConv": "DWConv",
    "DIAUnit": "DIA",
    "RecurrentLayerAggregation": "RLA_g",
    "DLALight": "DLA-light",
    "DLABase": "DLA-base",
    "KCLA": "KCLA",
    "AttnRes": "AttnRes",
    "DenseFormer": "DenseFormer",
}
# Plugins: what the literature calls them; other classes go by their own name.
PLUGINS = {
    "AttentionAugmentedConv": "AA",
    "BridgeAttention": "BA",
    "ContextBlock": "GC",
    "DoubleAttention": "A2",
    "NonLocal2d": "NL",
}


def short_type(cfg: dict) -> str:
    """The class name of a part of a config, without its package."""
    kind = cfg["type"]
    return (kind if isinstance(kind, str) else kind.__name__).split(".")[-1]


def group_of(cfg: Config) -> str:
    """imagenet, cifar or coco, from the model and its training set."""
    if short_type(cfg.model) != "ImageClassifier":
        return "coco"
    dataset = cfg.get("test_dataloader", {}).get("dataset", {})
    return "cifar" if "CIFAR" in str(dataset.get("type")) else "imagenet"


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width: the test pipeline's crop, else the usual size of the group."""
    group = group_of(cfg)
    pipeline = cfg.get("test_dataloader", {}).get("dataset", {}).get("pipeline", ())
    crops = [step["crop_size"] for step in pipeline if "crop_size" in step]
    if crops and group != "coco":
        return (crops[-1], crops[-1]) if isinstance(crops[-1], int) else tuple(crops[-1])
    return {"imagenet": (224, 224), "cifar": (32, 32), "coco": (800, 1280)}[group]


def backbone_name(cfg: dict) -> str:
    """ResNet-50, ResNeXt-50 (32x4d), DeiT-T, ...: the class and its size."""
    kind = short_type(cfg).removeprefix("MRLA")
    name = BACKBONES.get(kind, kind)
    size = cfg.get("depth", cfg.get("arch", ""))
    if isinstance(size, str):
        family, _, size = size.rpartition("-")
        name = "DeiT" if family == "deit" else name
        size = SIZES.get(size, size.upper())
    elif isinstance(size, dict):
        size = "x".join(str(size.get(key, "?")) for key in ("num_layers", "embed_dims"))
    if kind == "ResNeXt":
        size = f"{size} ({cfg.get('groups', 32)}x{cfg.get('width_per_group', 4)}d)"
    if cfg.get("block") == "bottleneck":  # of a CIFAR ResNet, which may have basic blocks
        size = f"{size} (bottleneck)"
    if kind.startswith("Distilled"):
        size = f"{size} distilled"
    return f"{name}-{size}" if size else name


def attention_of(model: nn.Module) -> str:
    """The model's layer attention and plugins, such as ``MRLALight + ECA``, ``1 GC`` or nothing."""
    layers = [type(m).__name__ for m in model.modules() if isinstance(m, LayerAttention)]
    plugins = Counter(
        type(getattr(module, name)).__name__
        for module in model.modules()
        for name in getattr(module, "plugin_names", ())
    )
    within = [("1 " if n == 1 else "") + PLUGINS.get(kind, kind) for kind, n in plugins.items()]
    return " + ".join([*layers[:1], *within])


def options_of(backbone: ConfigDict) -> dict[str, Any]:
    """Options of a config's layer attention other than the type."""
    attention = backbone.get("layer_attention")
    if not attention:
        return {}
    found = {key: value for key, value in attention.items() if key != "type"}
    return found | {k: v for k, v in backbone.items() if k == "mrla_drop_path_rate"}
