"""Figures of papers and model zoos, for comparison with ours in tables."""

from __future__ import annotations

from dataclasses import dataclass

# What MRLA adds to parameters (M) and FLOPs (B), from the abstract and section 4.1 of "Cross-Layer
# Retrospective Retrieving via Layer Attention", ICLR 2023. Where the text does not say which MRLA,
# parameters stand with both, and FLOPs with MRLA-light.
PAPER = {
    ("ResNet-50", "MRLALight"): ("+0.16", "+0.07"),
    ("ResNet-50", "MRLABase"): ("+0.16", ""),
    ("EfficientNet-B0", "MRLALight"): ("+0.01", ""),
    ("EfficientNet-B0", "MRLABase"): ("+0.01", ""),
    ("EfficientNet-B1", "MRLALight"): ("+0.02", ""),
    ("EfficientNet-B1", "MRLABase"): ("+0.02", ""),
    ("DeiT-T", "MRLALight"): ("+0.03", "+0.04"),
    ("DeiT-T", "MRLABase"): ("+0.03", ""),
    ("CeiT-T", "MRLALight"): ("+0.03", "+0.04"),
    ("CeiT-T", "MRLABase"): ("+0.03", ""),
}

TABLE_1 = "MRLA, table 1"


@dataclass(frozen=True)
class Published:
    """Figures as stated by a source, with its digits; None if it states none."""

    params: str | None = None
    gflops: str | None = None
    top1: str | None = None
    source: str = TABLE_1


# The order of rows, by what a config's name says behind the network; others follow by name.
ORDER = (
    "plain", "se", "eca", "cbam", "a2", "aa", "ba", "tdam", "nl", "gc1", "gc", "dia", "rla-g",
    "dla", "dla-base", "kcla", "mrla", "mrla-base", "mrla_se", "mrla_eca",
    "densenet121", "densenet161", "densenet169", "densenet201",
)  # fmt: skip
# Only what the text of the sources states. The accuracies are of the papers' own recipes.
PUBLISHED = {
    "se": Published("28.1", "4.1", "76.7"),
    "cbam": Published("28.1", "4.2", "77.3"),
    "a2": Published("34.6", "7.0", "77.0"),
    "aa": Published("27.1", "4.5", "77.7"),
    "nl": Published("29.0", "4.4", "77.2"),
    "gc1": Published("26.9", "4.1", "77.3"),
    "gc": Published("29.4", "4.2", "77.7"),
    "eca": Published("25.6", "4.1", "77.5"),
    "dia": Published("28.4", None, "77.2"),
    "rla-g": Published("24.67", "4.17", "77.17", "RLA-Net's repository"),
    # From the names of the checkpoints that the released detection configs ask for.
    "mrla": Published(top1="77.75", source="name of the authors' checkpoint"),
    "densenet121": Published("7.98", "2.88", "74.96", "mmpretrain's model zoo"),
    "densenet169": Published("14.15", "3.42", "76.08", "mmpretrain's model zoo"),
    "densenet201": Published("20.01", "4.37", "77.32", "mmpretrain's model zoo"),
    "densenet161": Published("28.68", "7.82", "77.61", "mmpretrain's model zoo"),
}
# Box AP on COCO by config: RLA-Net's paper, https://arxiv.org/abs/2110.11852.
PUBLISHED_AP = {
    "faster_rcnn_r50_rla-g_1x": "38.8",
    "mask_rcnn_r50_rla-g_1x": "39.5",
    "retinanet_r50_rla-g_1x": "37.9",
}
# Why ours is more than 1% away, by (name, column).
_NOTES = "[within_layer.md](within_layer.md)"
_MILLIONS = f"published 2^20 / 10^6 = 1.0486 times as large, see {_NOTES}"
_BILLIONS = f"counted otherwise, see {_NOTES}"
REASONS: dict[tuple[str, str], str] = {
    **{(name, "params"): _MILLIONS for name in ("a2", "aa", "nl", "gc1", "gc")},
    **{(name, "GFLOPs"): _BILLIONS for name in ("cbam", "a2", "aa", "nl", "gc")},
    ("rla-g", "params"): "published in units of 2^20",
    ("rla-g", "GFLOPs"): "published in units of 2^30",
}
