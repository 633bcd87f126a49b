"""Whole backbones beside their plain host, along depth, and a detector's training step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import NamedTuple

import torch
from common import ROOT, Row, backend, kept_for_backward
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmrla.commands.gpu_timing import (
    ATTENTIONS,
    Classifier,
    device_work,
    peak_memory,
    ratio,
    side_by_side,
)
from mmrla.engine.amp import has_fast_bfloat16
from mmrla.engine.layout import use_channels_last
from mmrla.models import MRLAResNet, MRLAResNetCIFAR
from mmrla.models.backbones.mrla_resnet import MRLABottleneck

MIB = 2**20
MODES = ("float32-nchw", "float32-channels_last", "bfloat16-nchw", "bfloat16-channels_last")
# The layer attention, and what is forced: a backend, or torch.compile. Plain comes first.
VARIANTS = ("plain", "light", "light naive", "base", "base naive")
FEW_ROUNDS = 3  # where a step takes ten times as long as it should


class Case(NamedTuple):
    """A network on one batch, in one precision and layout."""

    network: str
    batch: int
    size: int
    mode: str


R20, R50, R101 = "ResNet-20", "ResNet-50", "ResNet-101"
CPU_CASES = [
    Case(R50, 2, 224, "float32-nchw"),
    Case(R50, 2, 224, "float32-channels_last"),
    Case(R50, 2, 224, "bfloat16-channels_last"),
    Case(R20, 128, 32, "float32-nchw"),
    Case(R20, 128, 32, "bfloat16-channels_last"),
    Case(R101, 2, 224, "float32-nchw"),
]
GPU_CASES = [
    Case(R50, 256, 224, "bfloat16-channels_last"),
    Case(R50, 256, 224, "bfloat16-nchw"),
    Case(R50, 8, 224, "bfloat16-channels_last"),
    Case(R101, 128, 224, "bfloat16-channels_last"),
]


class DeepResNet(MRLAResNet):
    """MRLAResNet with one more depth: 101 bottlenecks, 305 layers (304 is not 3 n + 2)."""

    arch_settings = {**MRLAResNet.arch_settings, 305: (MRLABottleneck, (3, 8, 87, 3))}


def _classifier(network: str, attention: str) -> Classifier:
    depth = int(network.split("-")[1])
    config = ATTENTIONS[attention]
    if depth == 20:
        config = config and {**config, "head_channels": 32}
        return Classifier(MRLAResNetCIFAR(depth, layer_attention=config), 64)
    return Classifier(DeepResNet(depth, layer_attention=config), 2048)


def remark(mode: str, device: torch.device) -> str:
    """What a reader of a row in this mode must know."""
    slow = device.type == "cpu" and mode.startswith("bfloat16") and not has_fast_bfloat16()
    return f"this CPU has no bfloat16 instructions; {FEW_ROUNDS} rounds at most" if slow else ""


class Variant:
    """A network in one case, with the backend it runs on."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        attention, _, how = name.partition(" ")
        self.forced = "naive" if how == "naive" else None
        self.graphed = how == "reduce-overhead"
        self.amp = case.mode.startswith("bfloat16")
        self.model = _classifier(case.network, attention).to(device)
        self.x = torch.randn(case.batch, 3, case.size, case.size, device=device)
        if case.mode.endswith("channels_last"):
            use_channels_last(self.model)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.run: Callable[[Tensor, Tensor], Tensor] = self.model
        if how in ("compiled", "reduce-overhead"):
            mode = "reduce-overhead" if self.graphed else "default"
            self.run = torch.compile(self.model, mode=mode, dynamic=False)
        self.labels = torch.randint(1000, (case.batch,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        """One forward."""
        if self.graphed:
            torch.compiler.cudagraph_mark_step_begin()
        autocast = torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.amp)
        with backend(self.forced), autocast:
            return self.run(self.x, self.labels)

    def train_step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
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


def _references(name: str) -> dict[str, str]:
    """What a variant is compared with: the column's name and the variant's."""
    attention, _, how = name.partition(" ")
    compiled = how in ("compiled", "reduce-overhead")
    found = {"plain": f"plain {how}" if compiled else "plain"}
    if compiled:
        found["eager"] = attention
    elif name in ("light", "base"):
        found["naive"] = f"{name} naive"
    return found


def timed(
    label: str,
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 2,
) -> dict[str, Row]:
    """Columns of wall time by variant; on a GPU, of its kernels too."""
    seconds = side_by_side(steps, rounds, device, warm_up)
    work = {name: device_work(step, device) for name, step in steps.items()}
    rows: dict[str, Row] = {}
    columns = dict.fromkeys(key for name in steps for key in _references(name))
    for name in steps:
        references = _references(name)
        row: Row = {f"{label} ms": round(1e3 * median(seconds[name]), 1)}
        for key in columns:
            other = references.get(key)
            row[f"{label} over {key}"] = other and round(ratio(seconds, name, other), 3)
        mine, plain = work[name], work[references["plain"]]
        if mine and plain:
            row[f"{label} kernels ms"] = round(1e3 * mine[0], 1)
            row[f"{label} kernels over plain"] = round(mine[0] / plain[0], 3)
            row[f"{label} launches"] = mine[1]
        rows[name] = row
    return rows


def _memory(variants: Mapping[str, Variant], batch: int, device: torch.device) -> dict[str, Row]:
    """Columns of memory by variant, whose first steps are behind them.

    A CPU's allocator keeps what was freed, so that its peak says nothing of one step; a captured
    graph keeps its memory from step to step.
    """
    rows: dict[str, Row] = {name: {} for name in variants}
    measures: list[tuple[str, int, Callable[[Variant], int | None]]]
    measures = [("kept MiB/image", batch, Variant.kept)]
    if device.type == "cuda":
        measures.append(("peak MiB", 1, lambda variant: peak_memory(variant.train_step, device)))
    for label, share, measure_one in measures:
        found = {n: None if v.graphed else measure_one(v) for n, v in variants.items()}
        for name, row in rows.items():
            mine, plain = found[name], found["plain"]
            row[label] = mine and round(mine / MIB / share, 1)
            row[f"{label.split()[0]} over plain"] = mine and plain and round(mine / plain, 3)
    return rows


def _names(case: Case, device: torch.device, compiled: bool) -> list[str]:
    """Variants of a case. Graphs hold their memory, and are for batches bound by launches."""
    if not compiled or case.network != R50:
        return list(VARIANTS)
    ways = ["compiled"]
    if device.type == "cuda" and case.batch <= 8:
        ways.append("reduce-overhead")
    return [*VARIANTS, *map(" ".join, product(ATTENTIONS, ways))]


def measure(
    device: torch.device,
    rounds: int,
    quick: bool = False,
    compiled: bool = False,
    modes: Sequence[str] = MODES,
    cases: Sequence[Case] | None = None,
) -> list[Row]:
    """Rows for every case in one of ``modes``, each variant over the plain host of its round."""
    cases = cases or (GPU_CASES if device.type == "cuda" else CPU_CASES)
    rows: list[Row] = []
    for case in cases:
        if case.mode in modes and not (quick and case.network == R101):
            rows += _case_rows(case, rounds, device, _names(case, device, compiled))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _case_rows(
    case: Case, rounds: int, device: torch.device, names: Sequence[str]
) -> Iterator[Row]:
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = 64  # all variants share the code of forward
    note = remark(case.mode, device)
    if note:
        rounds = min(rounds, FEW_ROUNDS)
    variants = {name: Variant(case, name, device) for name in names}
    train = timed("train", {n: v.train_step for n, v in variants.items()}, rounds, device)
    memory = _memory(variants, case.batch, device)
    infer: dict[str, Row] = {
        name: {key.replace("train", "inference"): None for key in row}
        for name, row in train.items()
    }
    if case.network != R20:
        infer = timed("inference", {n: v.infer for n, v in variants.items()}, rounds, device)
    for name in names:
        yield {
            "network": case.network,
            "batch": case.batch,
            "mode": case.mode,
            "variant": name,
            **train[name],
            **infer[name],
            **memory[name],
            "remark": note,
        }


def measure_scaling(device: torch.device, rounds: int, quick: bool) -> list[Row]:
    """Training step and memory along depth, on the default backend and in plain torch."""
    batch, size = (64, 224) if device.type == "cuda" else (1, 128)
    rows: list[Row] = []
    for depth in (50, 101) if quick else (50, 101, 152, 305):
        case = Case(f"ResNet-{depth}", batch, size, "float32-nchw")
        if device.type == "cuda":
            case = case._replace(mode="bfloat16-channels_last")
        variants = {name: Variant(case, name, device) for name in VARIANTS}
        steps = {name: variant.train_step for name, variant in variants.items()}
        train = timed("train", steps, rounds, device, warm_up=1)
        memory = _memory(variants, batch, device)
        for name in VARIANTS:
            setting = {"depth": depth, "variant": name, "image": size, "batch": batch}
            rows.append({**setting, **train[name], **memory[name]})
    return rows


def measure_detector(device: torch.device, rounds: int, modes: Sequence[str] = MODES) -> list[Row]:
    """Mask R-CNN's training step with its own frozen stage and norms, on a generated image."""
    own, batch, size = ["float32-nchw"], 1, (320, 416)
    if device.type == "cuda":
        own, batch, size = ["float32-nchw", "bfloat16-channels_last"], 2, (800, 1216)
    rows: list[Row] = []
    for mode in own:
        if mode not in modes:
            continue
        steps = {name: _detector_step(name, mode, batch, size, device) for name in VARIANTS}
        train = timed("train", steps, rounds, device, warm_up=1)
        image = f"{size[1]}x{size[0]}"
        setting = {"detector": "Mask R-CNN R50", "image": image, "batch": batch, "mode": mode}
        rows += [{**setting, "variant": name, **train[name]} for name in VARIANTS]
    return rows


def _detector(attention: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    suffix = {"plain": "", "light": "_mrla", "base": "_mrla-base"}[attention]
    cfg = Config.fromfile(ROOT / f"configs/mask_rcnn_r50{suffix}_1x.py")
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
        model.init_weights()
    for name, parameter in model.named_parameters():
        if "bn_mrla" in name:
            nn.init.zeros_(parameter)  # as after a warm start
    return model.to(device).train()


def _detector_step(
    name: str, mode: str, batch: int, size: tuple[int, int], device: torch.device
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
    attention, _, how = name.partition(" ")
    model = _detector(attention, device)
    if mode.endswith("channels_last"):
        use_channels_last(model)
        images = images.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mode.startswith("bfloat16"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5)

    def step() -> None:
        torch.manual_seed(0)  # the same proposals are drawn
        with backend(how or None), autocast:
            total, _ = model.parse_losses(model.loss(images, samples))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step
