"""(b) Whole backbones beside their plain host, (c) along depth, (d) a detector's training step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F
from common import ROOT, Row, backend, kept_for_backward, peak_memory, ratio, side_by_side
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmrla.models import MRLAResNet
from mmrla.models.backbones.mrla_resnet import MRLABottleneck

ATTENTIONS: dict[str, dict | None] = {
    "plain": None,
    "light": dict(type="MRLALight", head_channels=32),
    "base": dict(type="MRLABase", head_channels=16),
}
MIB = 2**20


class DeepResNet(MRLAResNet):
    """MRLAResNet with one more depth: 101 bottlenecks, 305 layers (304 is not 3 n + 2)."""

    arch_settings = {**MRLAResNet.arch_settings, 305: (MRLABottleneck, (3, 8, 87, 3))}


class Classifier(nn.Module):
    """Backbone, average and loss: what a training step runs."""

    def __init__(self, depth: int, layer_attention: dict | None) -> None:
        super().__init__()
        self.backbone = DeepResNet(depth, layer_attention=layer_attention)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of images ``[B, 3, H, W]`` and labels ``[B]``."""
        return F.cross_entropy(self.fc(self.backbone(x)[-1].mean((2, 3))).float(), labels)


class Variant:
    """A network with the backend it runs on."""

    def __init__(
        self, depth: int, attention: str, forced: str | None, device: torch.device,
        batch: int, size: int, compiled: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        parts = (attention, forced, "compiled" if compiled else None)
        self.name = " ".join(part for part in parts if part)
        self.forced, self.device = forced, device
        model = Classifier(depth, ATTENTIONS[attention]).to(device)
        self.amp = device.type == "cuda"
        if self.amp:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self.run: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        self.x = torch.randn(batch, 3, size, size, device=device)
        self.x = self.x.contiguous(memory_format=torch.channels_last) if self.amp else self.x
        self.labels = torch.randint(1000, (batch,), device=device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        """One forward."""
        with backend(self.forced), torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.amp
        ):  # fmt: skip
            return self.run(self.x, self.labels)

    def train_step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        with backend(self.forced):
            loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        """One forward in evaluation mode."""
        self.model.eval()
        self.loss()

    def kept(self) -> int:
        """Bytes that a training forward keeps for backward."""
        self.model.train()
        return kept_for_backward(self.model, self.loss)


def _variants(depth: int, device: torch.device, batch: int, size: int) -> list[Variant]:
    """The plain network, then each layer attention on each backend."""
    kinds = [("plain", None), *product(("light", "base"), ("naive", "fused"))]
    return [Variant(depth, attention, forced, device, batch, size) for attention, forced in kinds]


def measure(
    device: torch.device, rounds: int, quick: bool, compiled: bool, depths=(50, 101)
) -> list[Row]:
    """Rows for ResNet-50 and ResNet-101, each variant over the plain host of its round."""
    batch, size = (256, 224) if device.type == "cuda" else (2, 224)
    rows: list[Row] = []
    for depth in depths[:1] if quick else depths:
        variants = _variants(depth, device, batch, size)
        if compiled and depth == 50:
            for attention, forced in (("plain", None), ("light", "naive"), ("light", "fused")):
                variants.append(Variant(depth, attention, forced, device, batch, size, True))
        kept = [v.kept() if "compiled" not in v.name else None for v in variants]
        for variant in variants:
            variant.train_step()  # caches and momenta are there before memory is measured
        # A CPU's allocator keeps what was freed, so that its peak says nothing of one step.
        on_gpu = device.type == "cuda"
        peaks = [peak_memory(v.train_step, device) if on_gpu else None for v in variants]
        train = side_by_side({v.name: v.train_step for v in variants}, rounds, device)
        infer = side_by_side({v.name: v.infer for v in variants}, rounds, device)
        for variant, kept_bytes, peak in zip(variants, kept, peaks, strict=True):
            name = variant.name
            rows.append(
                {
                    "network": f"ResNet-{depth}",
                    "variant": name,
                    "batch": batch,
                    "train step ms": round(1e3 * median(train[name]), 1),
                    "over plain": round(ratio(train, name, "plain"), 3),
                    "forward images/s": round(batch / median(infer[name]), 1),
                    "forward over plain": round(ratio(infer, name, "plain"), 3),
                    "kept MiB/image": kept_bytes and round(kept_bytes / MIB / batch, 1),
                    "kept over plain": kept_bytes and round(kept_bytes / (kept[0] or 1), 3),
                    "peak MiB": peak and round(peak / MIB),
                }
            )
    return rows


def measure_scaling(device: torch.device, rounds: int, quick: bool) -> list[Row]:
    """Training step and memory along depth, fused and plain torch."""
    batch = 64 if device.type == "cuda" else 1
    size = 224 if device.type == "cuda" else 128
    rows: list[Row] = []
    for depth in (50, 101) if quick else (50, 101, 152, 305):
        variants = _variants(depth, device, batch, size)
        kept = [v.kept() for v in variants]
        train = side_by_side({v.name: v.train_step for v in variants}, rounds, device, warm_up=1)
        for variant, kept_bytes in zip(variants, kept, strict=True):
            rows.append(
                {
                    "depth": depth,
                    "variant": variant.name,
                    "image": size,
                    "batch": batch,
                    "train step ms": round(1e3 * median(train[variant.name]), 1),
                    "over plain": round(ratio(train, variant.name, "plain"), 3),
                    "kept MiB/image": round(kept_bytes / MIB / batch, 1),
                    "kept over plain": round(kept_bytes / kept[0], 3),
                }
            )
    return rows


def measure_detector(device: torch.device, rounds: int, quick: bool) -> list[Row]:
    """Mask R-CNN's training step with its own frozen stage and norms, on a generated image."""
    batch, size = (2, (800, 1216)) if device.type == "cuda" else (1, (320, 416))
    steps: dict[str, Callable[[], object]] = {}
    forced = {"plain": None, "light naive": "naive", "light fused": "fused",
              "base naive": "naive", "base fused": "fused"}  # fmt: skip
    for name, force in forced.items():
        suffix = {"plain": "", "light": "_mrla", "base": "_mrla-base"}[name.split()[0]]
        torch.manual_seed(0)
        model = _detector(Config.fromfile(ROOT / f"configs/mask_rcnn_r50{suffix}_1x.py"), device)
        steps[name] = _detector_step(model, batch, size, device, force)
    train = side_by_side(steps, rounds, device, warm_up=1)
    return [
        {
            "detector": "Mask R-CNN R50",
            "variant": name,
            "image": f"{size[1]}x{size[0]}",
            "batch": batch,
            "train step ms": round(1e3 * median(train[name]), 1),
            "over plain": round(ratio(train, name, "plain"), 3),
        }
        for name in steps
    ]


def _detector(cfg: Config, device: torch.device) -> nn.Module:
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
        model.init_weights()
    for name, parameter in model.named_parameters():
        if "bn_mrla" in name:
            nn.init.zeros_(parameter)  # as after a warm start
    return model.to(device).train()


def _detector_step(
    model: nn.Module, batch: int, size: tuple[int, int], device: torch.device, forced: str | None
) -> Callable[[], object]:
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(batch):
        corners = torch.rand(8, 2, generator=generator) * 0.6
        boxes = torch.cat([corners, corners + 0.3], 1) * torch.tensor([width, height] * 2)
        masks = np.zeros((8, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes.to(device),
            labels=torch.randint(80, (8,), generator=generator).to(device),
            masks=BitmapMasks(masks, height, width),
        )
        samples.append(sample)
    images = torch.randn(batch, 3, height, width, generator=generator).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5)

    def step() -> None:
        torch.manual_seed(0)  # the same proposals are drawn
        with backend(forced):
            losses = model.loss(images, samples)
            total, _ = model.parse_losses(losses)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

    return step
