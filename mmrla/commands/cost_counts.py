"""What the networks of configs cost, beside their plain hosts: counted, and timed in turn."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from tqdm import tqdm

import mmrla.registry  # noqa: F401
from mmrla.analysis import naming
from mmrla.analysis.complexity import Complexity, activation_memory, complexity
from mmrla.commands.timing import Timed, ratio, side_by_side
from mmrla.configs import ROOT
from mmrla.engine.network import without_layer_attention


class _Forward(nn.Module):
    """One forward of a detector without post-processing, which is what mmdet counts."""

    def __init__(self, detector: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        from mmdet.structures import DetDataSample

        self.sample = DetDataSample(metainfo=dict(img_shape=size, batch_input_shape=size))

    def forward(self, x: Tensor) -> tuple:
        return self.detector(x, [self.sample], mode="tensor")


def network(model: ConfigDict) -> str:
    """The same text for configs whose plain hosts are the same network."""
    found = without_layer_attention(model).to_dict()
    found.pop("data_preprocessor", None)
    if naming.short_type(model) == "ImageClassifier":  # what only training sees
        found.pop("train_cfg", None)
        found.get("head", {}).pop("loss", None)
    backbone = found["backbone"]
    for key in [key for key in backbone if key.startswith("mrla_") or key == "init_cfg"]:
        del backbone[key]
    return json.dumps(found, sort_keys=True, default=str)


def build(model: ConfigDict, scope: str) -> nn.Module:
    """A config's network, whose heads see as many proposals whatever its weights."""
    model = copy.deepcopy(model)
    if "rpn" in (model.get("test_cfg") or {}):
        # Suppress nothing, so that the heads see max_per_img = 1000 proposals whatever the weights.
        model.test_cfg.rpn.nms.iou_threshold = 1.0
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(model)
    for name, parameter in built.named_parameters():
        if "mrla" in name:
            # Untrained, they would make features grow with depth until proposals are lost.
            nn.init.zeros_(parameter)
    return built


@dataclass
class Row:
    """What was counted of one network."""

    group: str
    backbone: str
    detector: str
    attention: str
    options: dict[str, Any]
    """Of the layer attention and its stochastic depth, as the config says."""
    config: Path | None
    schedule: str
    network: str
    whole: Complexity
    backbone_macs: int
    memory: int
    plain: Row | None = None
    """None for a plain network."""


def measure(
    cfg: Config, model: ConfigDict, path: Path | None, size: tuple[int, int], cache: dict
) -> Row:
    """Build ``model``, which is that of ``cfg`` or its plain host, and count it."""
    group = naming.group_of(cfg)
    built = build(model, cfg.get("default_scope", "mmengine"))
    image = torch.rand(1, 3, *size)
    backbone_macs = 0
    if group == "coco":
        whole = complexity(_Forward(built, size), image)
        key = json.dumps([model.backbone.to_dict(), size], default=str)
        if key not in cache:  # several detectors have the same
            part: Any = built.backbone
            # Two images, because batch norm has to see more than one value a channel.
            pair = image.new_empty(2, 3, *size)
            cache[key] = complexity(part, image).macs, activation_memory(part, pair)
        backbone_macs, memory = cache[key]
    else:
        whole = complexity(built, image)
        memory = activation_memory(built, image.new_empty(2, 3, *size))
    schedule = re.search(r"_(\d+[xe])(_|$)", path.stem) if path else None
    if path is not None and path.resolve().parent.name == "ablation":
        group = "ablation"
    return Row(
        group=group,
        backbone=naming.backbone_name(model.backbone),
        detector=naming.short_type(model) if group == "coco" else "",
        attention=naming.attention_of(built),
        options=naming.options_of(model.backbone),
        config=path,
        schedule=schedule[1] if schedule else "",
        network=network(model),
        whole=whole,
        backbone_macs=backbone_macs,
        memory=memory,
    )


def measure_all(paths: Iterable[Path], size: tuple[int, int] | None = None) -> list[Row]:
    """A row for each config and for its plain host, in the order of a table."""
    hosts: dict[Any, Row] = {}
    rows: list[Row] = []
    cache: dict[str, tuple[int, int]] = {}
    for path in (progress := tqdm(list(paths), unit="config")):
        progress.set_postfix_str(path.name)
        torch.manual_seed(0)  # proposals depend on the weights
        cfg = Config.fromfile(path)
        at = size or naming.image_size(cfg)
        key = network(cfg.model), at
        row = measure(cfg, cfg.model, path, at, cache)
        if not row.attention:
            hosts.setdefault(key, row).config = path
            continue
        if key not in hosts:
            hosts[key] = measure(cfg, without_layer_attention(cfg.model), None, at, cache)
            hosts[key].schedule = row.schedule
        row.plain = hosts[key]
        rows.append(row)
    return sorted([*rows, *hosts.values()], key=position)


def position(row: Row) -> tuple:
    """Detector, family, size, then the plain network before its layer attentions."""
    families, attentions = list(naming.BACKBONES.values()), list(naming.ATTENTIONS)
    family = row.backbone.replace("DeiT", "ViT").split("-")[0]
    return (
        row.detector,
        families.index(family) if family in families else len(families),
        (row.plain or row).whole.params,
        row.network,
        attentions.index(row.attention) if row.attention in attentions else len(attentions),
        row.config is not None and row.group == "ablation",
        [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(row.config))],
    )


def title_of(row: Row) -> str:
    """The network as tables call it."""
    parts = row.attention.split(" + ") if row.attention else []
    name = " + ".join([row.backbone, *(naming.ATTENTIONS.get(part, part) for part in parts)])
    size = row.options.get("block_size")
    return f"{name}, blocks of {size}" if size else name


def link_of(path: Path | None, base: Path = ROOT) -> str:
    """A Markdown link to a config, from a file in ``base``."""
    if path is None:
        return ""
    where = path.resolve()
    if where.is_relative_to(ROOT):
        where = Path(os.path.relpath(where, base))
    return f"[{path.name}]({where.as_posix()})"


def timed_classifier(cfg: Config, device: torch.device, batch: int, size: int) -> Timed:
    """A config's classifier on a batch of noise: on a GPU in channels_last and bfloat16."""
    torch.manual_seed(0)
    amp = device.type == "cuda"
    layout = torch.channels_last if amp else torch.contiguous_format
    model: Any = build(cfg.model, cfg.get("default_scope", "mmpretrain"))
    model.to(device, memory_format=layout)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    labels = torch.randint(cfg.model.head.num_classes, (batch,), device=device)
    return Timed(model, lambda: F.cross_entropy(model(x).float(), labels), device, amp)


def over_plain(other: Timed, plain: Timed, step: str, rounds: int) -> str:
    """The time of a method of :class:`Timed` over the plain network's, timed in turn."""
    steps = {"plain": getattr(plain, step), "other": getattr(other, step)}
    seconds = side_by_side(steps, rounds, plain.device, warm_up=1)
    return f"{ratio(seconds, 'other', 'plain'):.2f}"
