"""What MRLA costs beside the plain network: backbones, along depth, a detector's training step.

Every comparison is side by side in one process; ratios are medians over rounds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmrla.analysis.complexity import kept_for_backward
from mmrla.commands.timing import (
    ATTENTIONS,
    Classifier,
    Timed,
    device_work,
    peak_memory,
    ratio,
    side_by_side,
)
from mmrla.configs import ROOT
from mmrla.engine.amp import has_fast_bfloat16
from mmrla.engine.layout import use_channels_last
from mmrla.models import MRLAResNet, MRLAResNetCIFAR
from mmrla.models.backbones.mrla_resnet import MRLABottleneck

Row = dict[str, Any]
MIB = 2**20
MODES = ("float32-nchw", "float32-channels_last", "bfloat16-nchw", "bfloat16-channels_last")
# The layer attention, and what is forced: a backend, or torch.compile. Plain comes first.
VARIANTS = ("plain", "light", "light naive", "base", "base naive")
COMPILED = ("compiled", "reduce-overhead")
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


def variant(case: Case, name: str, device: torch.device) -> Timed:
    """A network in one case, with the backend that its name says."""
    torch.manual_seed(0)
    attention, _, how = name.partition(" ")
    model = _classifier(case.network, attention).to(device)
    x = torch.randn(case.batch, 3, case.size, case.size, device=device)
    if case.mode.endswith("channels_last"):
        use_channels_last(model)
        x = x.contiguous(memory_format=torch.channels_last)
    run: Callable[..., Tensor] = model
    if how in COMPILED:
        mode = "default" if how == "compiled" else how
        run = torch.compile(model, mode=mode, dynamic=False)
    labels = torch.randint(1000, (case.batch,), device=device)

    def forward() -> Tensor:
        if how == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return run(x, labels)

    backend = "naive" if how == "naive" else None
    return Timed(model, forward, device, case.mode.startswith("bfloat16"), backend)


def _references(name: str) -> dict[str, str]:
    """What a variant is compared with: the column's name and the variant's."""
    attention, _, how = name.partition(" ")
    compiled = how in COMPILED
    found = {"plain": f"plain {how}" if compiled else "plain"}
    if compiled:
        found["eager"] = attention
    elif name in ("light", "base"):
        found["naive"] = f"{name} naive"
    return found


def timed(
    label: str, variants: Mapping[str, Timed], rounds: int, warm_up: int = 2
) -> dict[str, Row]:
    """Columns of wall time by variant, of training or inference; on a GPU, of its kernels too."""
    steps = {n: one.train_step if label == "train" else one.infer for n, one in variants.items()}
    device = variants["plain"].device
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


def _memory(variants: Mapping[str, Timed], batch: int) -> dict[str, Row]:
    """Columns of memory by variant, whose first steps are behind them.

    A CPU's allocator keeps what was freed, so that its peak says nothing of one step; a captured
    graph keeps its memory from step to step.
    """
    rows: dict[str, Row] = {name: {} for name in variants}
    eager = {name: one for name, one in variants.items() if not name.endswith(COMPILED[1])}
    found = {"kept MiB/image": {name: kept(one) / batch for name, one in eager.items()}}
    if (device := variants["plain"].device).type == "cuda":
        found["peak MiB"] = {n: peak_memory(v.train_step, device) or 0 for n, v in eager.items()}
    for label, values in found.items():
        for name, row in rows.items():
            mine = values.get(name)
            row[label] = mine and round(mine / MIB, 1)
            row[f"{label.split()[0]} over plain"] = mine and round(mine / values["plain"], 3)
    return rows


def kept(one: Timed) -> int:
    """Bytes that a training forward keeps for backward."""
    one.model.train()
    return kept_for_backward(one.model, one.loss)


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
    rows: list[Row] = []
    for case in cases or (GPU_CASES if device.type == "cuda" else CPU_CASES):
        if case.mode not in modes or (quick and case.network == R101):
            continue
        torch._dynamo.reset()
        torch._dynamo.config.cache_size_limit = 64  # all variants share the code of forward
        variants = {n: variant(case, n, device) for n in _names(case, device, compiled)}
        setting = dict(network=case.network, batch=case.batch, mode=case.mode)
        note = remark(case.mode, device)
        most = min(rounds, FEW_ROUNDS) if note else rounds
        rows += [
            {**row, "remark": note}
            for row in _rows(setting, variants, most, case.network != R20, case.batch)
        ]
        del variants
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure_scaling(device: torch.device, rounds: int, quick: bool) -> list[Row]:
    """Training step and memory along depth, on the default backend and in plain torch."""
    batch, size, mode = 1, 128, "float32-nchw"
    if device.type == "cuda":
        batch, size, mode = 64, 224, "bfloat16-channels_last"
    rows: list[Row] = []
    for depth in (50, 101) if quick else (50, 101, 152, 305):
        case = Case(f"ResNet-{depth}", batch, size, mode)
        variants = {name: variant(case, name, device) for name in VARIANTS}
        rows += _rows(dict(depth=depth, image=size, batch=batch), variants, rounds, None, batch, 1)
    return rows


def measure_detector(device: torch.device, rounds: int, modes: Sequence[str] = MODES) -> list[Row]:
    """Mask R-CNN's training step with its own frozen stage and norms, on a generated image."""
    own, batch, size = ["float32-nchw"], 1, (320, 416)
    if device.type == "cuda":
        own, batch, size = ["float32-nchw", "bfloat16-channels_last"], 2, (800, 1216)
    rows: list[Row] = []
    for mode in (mode for mode in own if mode in modes):
        variants = {name: _timed_detector(name, mode, batch, size, device) for name in VARIANTS}
        setting = dict(detector="Mask R-CNN R50", image=f"{size[1]}x{size[0]}", batch=batch)
        rows += _rows({**setting, "mode": mode}, variants, rounds, warm_up=1)
    return rows


def _rows(
    setting: Row, variants: Mapping[str, Timed], rounds: int,
    inference: bool | None = None, batch: int = 0, warm_up: int = 2,
) -> list[Row]:  # fmt: skip
    """A row for each variant.

    Args:
        setting: The first columns.
        variants: By name, ``plain`` first.
        rounds: Of the timings.
        inference: Time it; False: leave its columns empty, None: out.
        batch: Number of images that memory is divided by; 0: do not measure memory.
        warm_up: Steps before the training steps that are timed.
    """
    train = timed("train", variants, rounds, warm_up)
    rows = {name: {**setting, "variant": name, **train[name]} for name in variants}
    memory = _memory(variants, batch) if batch else {}
    if inference:
        for name, row in timed("inference", variants, rounds).items():
            rows[name] |= row
    for name, row in rows.items():
        if inference is False:
            row |= {key.replace("train", "inference"): None for key in train[name]}
        row |= memory.get(name, {})
    return list(rows.values())


def _timed_detector(
    name: str, mode: str, batch: int, size: tuple[int, int], device: torch.device
) -> Timed:
    from mmdet.testing import demo_mm_inputs

    torch.manual_seed(0)
    attention, _, how = name.partition(" ")
    suffix = {"plain": "", "light": "_mrla", "base": "_mrla-base"}[attention]
    cfg = Config.fromfile(ROOT / f"configs/mask_rcnn_r50{suffix}_1x.py")
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
        model.init_weights()
    for key, parameter in model.named_parameters():
        if "bn_mrla" in key:
            nn.init.zeros_(parameter)  # as after a warm start
    model.to(device)
    if mode.endswith("channels_last"):
        use_channels_last(model)
    shapes = [(3, *size)] * batch
    data = demo_mm_inputs(batch, shapes, [8] * batch, 80, with_mask=True, device=device)
    data = model.data_preprocessor(data, True)

    def forward() -> Tensor:
        torch.manual_seed(0)  # the same proposals are drawn
        return model.parse_losses(model.loss(data["inputs"], data["data_samples"]))[0]

    return Timed(model, forward, device, mode.startswith("bfloat16"), how or None, lr=1e-5)
