"""Names of all configs, what they say, and how tests read them."""

from __future__ import annotations

import copy
import functools
import runpy
from pathlib import Path

from mmengine.config import Config

import mmrla.registry  # noqa: F401
from tests.conftest import ROOT
from tests.helpers import build

CONFIGS = ROOT / "configs"
# Layer interactions beside MRLA: type, and reduction on ImageNet. A ReLU follows some norms.
INTERACTIONS = {
    "dia": ("DIAUnit", 20), "rla-g": ("RecurrentLayerAggregation", None), "dla": ("DLALight", 16),
    "dla-base": ("DLABase", 16), "kcla": ("KCLA", None),
}  # fmt: skip
WITH_RELU = ("dla-base", "kcla")
RELU = dict(type="ReLU")
# Within-layer attentions: how many plugins of which class ResNet-50, ResNet-56 of basic blocks and
# ResNet-56 of bottlenecks have.
WITHIN = {
    "se": ("SE", 16, 27, 18), "eca": ("ECA", 16, 27, 18), "cbam": ("CBAM", 16, 27, 18),
    "a2": ("DoubleAttention", 5, 5, 5), "aa": ("AttentionAugmentedConv", 13, 18, 12),
    "ba": ("BridgeAttention", 16, 27, 18), "tdam": ("TDAM", 9, 18, 12),
    "nl": ("NonLocal2d", 1, 1, 1), "gc": ("ContextBlock", 13, 27, 18),
    "gc1": ("ContextBlock", 1, 1, 1),
}  # fmt: skip
COMPOSED = ("mrla_se", "mrla_eca")
# In place of the residual stream.
STREAMS = {
    "attnres": dict(type="AttnRes"),
    "attnres-block": dict(type="AttnRes", block_size=4),
    "denseformer": dict(type="DenseFormer"),
}

COCO = [
    f"{detector}_r{depth}{suffix}_1x"
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet")
    for depth in (50, 101)
    for suffix in ("", "_mrla", "_mrla-base", "_rla-g")
    if depth == 50 or suffix != "_rla-g"
]
COCO += ["mask_rcnn_r50_kcla_1x", "faster_rcnn_r50_kcla_1x"]
WITHIN_COCO = [
    f"{detector}_r50_{name}_1x"
    for detector in ("mask_rcnn", "faster_rcnn", "retinanet")
    for name in ("se", "eca", "ba", "nl", "gc")
]
# Detectors of other families, with their own recipes: mmdet's config of each.
OTHERS = {
    **{f"atss_r50{kind}_1x": "atss/atss_r50_fpn_1x_coco" for kind in ("", "_mrla", "_mrla-base")},
    **{f"detr_r50{kind}_150e": "detr/detr_r50_8xb2-150e_coco" for kind in ("", "_mrla")},
    **{f"deformable-detr_r50{kind}_50e": "deformable_detr/deformable-detr_r50_16xb2-50e_coco"
       for kind in ("", "_mrla")},
}  # fmt: skip
TRANSFORMERS = [
    *(f"{d}_pvtv2-{b}_mrla_1x" for d in ("mask_rcnn", "retinanet") for b in ("b0", "b1")),
    "mask_rcnn_vit-t_mrla_sfp_1x",
]
DEMO = "demo_mask_rcnn_r18_mrla_shapes"
BOTH = ("resnet50", "resnet101", "efficientnet-b0", "efficientnet-b1", "deit-tiny", "deit-small",
        "deit-base", "ceit-tiny", "ceit-small", "pvtv2-b0", "pvtv2-b1")  # fmt: skip
IMAGENET = [
    *(f"{network}_mrla_in1k" for network in ("resnet152", "resnext50-32x4d", *BOTH)),
    *(f"{network}_mrla-base_in1k" for network in BOTH),
]
DEITS = [f"deit-{size}_{kind}_in1k" for size in ("tiny", "small") for kind in list(STREAMS)[:2]]
DEITS.append("deit-small_denseformer_in1k")
VITS = [f"vit_{kind}_cifar10" for kind in ("plain", *STREAMS)]
LITE = [f"retinanet_efficientnet-lite0{kind}_bccd" for kind in ("", "_mrla", "_mrla-base")]
DENSENETS = {f"densenet{depth}_in1k": width
             for depth, width in ((121, 1024), (161, 2208), (169, 1664), (201, 1920))}  # fmt: skip
COMPARED = ["resnet50_plain_in1k", *(f"resnet50_{name}_in1k" for name in INTERACTIONS),
            "resnet101_kcla_in1k", *DENSENETS]  # fmt: skip
CIFAR = {
    *(f"resnet{depth}{block}_{kind}_cifar{classes}"
      for depth in (20, 56, 110)
      for block, kinds in (("", ()), ("-bottleneck", ("dla", "dla-base")))
      for kind in ("plain", "mrla", "mrla-base", *kinds)
      for classes in (10, 100)),
    *(f"resnet56{block}_{n}_cifar10" for block in ("", "-bottleneck")
      for n in (*WITHIN, *COMPOSED, *INTERACTIONS)),
    *(f"resnet{depth}-bottleneck_kcla_cifar10" for depth in (20, 110)),
}  # fmt: skip

LIGHT = {"resnet50": dict(type="MRLALight", head_channels=32),
         "deit-tiny": dict(type="MRLALight", head_channels=16)}  # fmt: skip
BASE16 = dict(type="MRLABase", head_channels=16)
OFF = dict(mrla_drop_path_rate=0.0)


def ablation() -> dict[str, dict]:
    """What each backbone has other than that of MRLA-light's config."""
    found = {}
    sweeps = dict.fromkeys(LIGHT, (1, 4, 8, 64, "all"))
    sweeps["resnet50"] += (2, 16, 128, 256)
    sweeps["deit-tiny"] += (32,)
    for network, light in LIGHT.items():
        named = {
            "mla": dict(type="MLA", head_channels=light["head_channels"]),
            "dwconv": dict(type="DWConv"),
            "mrla_no-previous": dict(light, recurrence=None),
            "mrla_no-dwconv": dict(light, value_conv=False),
            "mrla_fc": dict(light, projection="fc"),
            "mrla_lambda1": dict(light, fixed_lambda=1),
        }
        for d in sweeps[network]:
            named[f"mrla_dk{'-all' if d == 'all' else d}"] = dict(light, head_channels=d)
        found |= {f"{network}_{k}": dict(layer_attention=cfg) for k, cfg in named.items()}
    more = {
        "linear-rla": dict(type="LinearRLA", head_channels=32),
        "linear-rla_dk1": dict(type="LinearRLA", head_channels=1),
        "mrla_output": dict(LIGHT["resnet50"], recurrence="output"),
        "mrla-base_dk32": dict(BASE16, head_channels=32),
    }
    found |= {f"resnet50_{k}": dict(layer_attention=cfg) for k, cfg in more.items()}
    found["resnet50_dwconv_sd"] = found["resnet50_dwconv"]
    found["resnet50_dwconv"] = found["resnet50_dwconv"] | OFF
    found["resnet50_mla_no-sd"] = found["resnet50_mla"] | OFF
    found["resnet50_mrla_no-sd"] = found["resnet50_mrla_no-sd_mixup-ls"] = OFF
    found["resnet50_mrla-base_no-sd"] = dict(layer_attention=BASE16) | OFF
    found["deit-tiny_mrla_sd"] = dict(mrla_drop_path_rate=None)
    return found


ABLATION = ablation()


@functools.cache
def read(path: Path) -> dict:
    """What ``Config.fromfile`` gives, with the configs that others inherit from read once."""
    own = {}
    if path.parent.name in ("ablation", "cifar"):
        own = runpy.run_path(str(path)) if '_base_ = "' in path.read_text() else {}
    own = {k: v for k, v in own.items() if k == "_base_" or not k.startswith("_")}
    if not own:
        return Config.fromfile(path).to_dict()
    base = Config(copy.deepcopy(read((path.parent / own.pop("_base_")).resolve())))
    base.merge_from_dict(own)
    return base.to_dict()


def load(name: str) -> Config:
    return Config(copy.deepcopy(read(CONFIGS / f"{name}.py")))


def without(cfg: Config, *keys: str) -> dict:
    """All of it but these keys of the backbone."""
    found = cfg.to_dict()
    for key in keys:
        found["model"]["backbone"].pop(key, None)
    return found


def holds(cfg, **expected) -> bool:
    return all(cfg[key] == value for key, value in expected.items())


def transform_types(cfg: Config) -> list[str]:
    return [t.type for t in cfg.train_dataloader.dataset.pipeline]


def plugins_of(model) -> list:
    return [getattr(m, n) for m in model.modules() for n in getattr(m, "plugin_names", ())]


def backbone_of(cfg: Config, **more):
    return build({**cfg.model.backbone, **more}, "mmpretrain")
