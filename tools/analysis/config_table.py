"""Print the README's table of configs as Markdown, or write it into the README.

Builds each detector of configs/ and counts parameters and multiply-adds on one image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import mmrla.registry  # noqa: F401
from mmrla.analysis import complexity

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- configs:begin -->", "<!-- configs:end -->"
DETECTORS = {"MaskRCNN": "Mask R-CNN", "FasterRCNN": "Faster R-CNN", "RetinaNet": "RetinaNet"}
ATTENTIONS = {None: "", "MRLALight": " + MRLA-light", "MRLABase": " + MRLA-base"}


class _Forward(nn.Module):
    """One forward without post-processing, which is what mmdet counts."""

    def __init__(self, detector: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        from mmdet.structures import DetDataSample

        self.sample = DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=size))

    def forward(self, x: Tensor) -> tuple:
        return self.detector(x, [self.sample], mode="tensor")


def row(path: Path, size: tuple[int, int]) -> str:
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    if "rpn" in cfg.model.test_cfg:
        # Suppress nothing, so that the heads see max_per_img = 1000 proposals whatever the weights.
        cfg.model.test_cfg.rpn.nms.iou_threshold = 1.0
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model).eval()
    for name, parameter in model.named_parameters():
        if "mrla" in name:
            # Untrained, they would make features grow with depth until proposals are lost.
            nn.init.zeros_(parameter)
    image = torch.rand(1, 3, *size)
    backbone = complexity(model.backbone, image)
    whole = complexity(_Forward(model, size), image)
    attention = (cfg.model.backbone.layer_attention or {}).get("type")
    cells = [
        f"ResNet-{cfg.model.backbone.depth}{ATTENTIONS[attention]}",
        DETECTORS[cfg.model.type],
        "1x",
        f"{whole.params / 1e6:.2f} M",
        f"{whole.macs / 1e9:.1f}",
        f"{backbone.macs / 1e9:.1f}",
        "not yet reproduced",
        "not yet reproduced" if cfg.model.type == "MaskRCNN" else "",
        f"[{path.name}](configs/{path.name})",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), metavar=("H", "W"))
    args = parser.parse_args()
    order = [
        f"{detector}_r{depth}{suffix}_1x.py"
        for detector in ("faster_rcnn", "mask_rcnn", "retinanet")
        for depth in (50, 101)
        for suffix in ("", "_mrla", "_mrla-base")
    ]
    titles = ["backbone", "detector", "schedule", "params", "GFLOPs", "of the backbone", "box AP",
              "mask AP", "config"]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in order:
        lines.append(row(ROOT / "configs" / name, tuple(args.size)))
        print(lines[-1], flush=True)
    if args.write:
        readme = ROOT / "README.md"
        text = readme.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
