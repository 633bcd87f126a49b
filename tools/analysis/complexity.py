"""Print what configs cost beside their plain hosts as Markdown, or write it into docs/configs.md.

Counts parameters, multiply-adds (GFLOPs) and the memory that a training step keeps for backward.
"""

from __future__ import annotations

import argparse
import copy
import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from tqdm import tqdm

import mmrla.registry  # noqa: F401
from mmrla.analysis import Complexity, activation_memory, complexity
from mmrla.analysis.naming import (
    ATTENTIONS,
    BACKBONES,
    DETECTORS,
    attention_of,
    backbone_name,
    group_of,
    image_size,
    options_of,
    short_type,
)
from mmrla.analysis.pages import replace_part
from mmrla.analysis.published import PAPER
from mmrla.engine.network import without_layer_attention

ROOT = Path(__file__).resolve().parents[2]

# Tables of docs/configs.md, and what is in them.
GROUPS = {
    "imagenet": ("imagenet/*.py",),
    "cifar": ("cifar/*_cifar10.py",),
    "coco": ("*.py",),
    "ablation": ("ablation/*.py",),
}
# What the ablations are compared with stands in their table too.
REFERENCES = (
    *(f"imagenet/{n}_{kind}_in1k.py" for n in ("resnet50", "deit-tiny")
      for kind in ("mrla", "mrla-base")),
    "imagenet/resnet50_eca_in1k.py",
)  # fmt: skip


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
    if short_type(model) == "ImageClassifier":  # what only training sees
        found.pop("train_cfg", None)
        found.get("head", {}).pop("loss", None)
    backbone = found["backbone"]
    for key in [key for key in backbone if key.startswith("mrla_") or key == "init_cfg"]:
        del backbone[key]
    return json.dumps(found, sort_keys=True, default=str)


def build(model: ConfigDict, scope: str) -> nn.Module:
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
    group = group_of(cfg)
    built = build(model, cfg.get("default_scope", "mmengine"))
    image = torch.rand(1, 3, *size)
    backbone_macs = 0
    if group == "coco":
        whole = complexity(_Forward(built, size), image)
        key = json.dumps([model.backbone.to_dict(), size], default=str)
        if key not in cache:  # several detectors have the same
            part = built.backbone
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
        backbone=backbone_name(model.backbone),
        detector=short_type(model) if group == "coco" else "",
        attention=attention_of(built),
        options=options_of(model.backbone),
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
        at = size or image_size(cfg)
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
    families, attentions = list(BACKBONES.values()), list(ATTENTIONS)
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
    name = " + ".join([row.backbone, *(ATTENTIONS.get(part, part) for part in parts)])
    size = row.options.get("block_size")
    return f"{name}, blocks of {size}" if size else name


# How an option is named in a table; others go by their own name.
OPTIONS = {
    "head_channels": "d_k = {}",
    "recurrence": "previous: {}",
    "value_conv": "DWConv: {}",
    "projection": "query and key: {}",
    "fixed_lambda": "lambda = {}",
    "mrla_drop_path_rate": "stochastic depth {}",
}
WORDS = {None: "none", False: "no", True: "yes", "all": "C", "fc": "FC"}


def _variant(row: Row, rows: Sequence[Row] = ()) -> str:
    """A name that tells a network from others of the same type by its options.

    Where training alone sets it off from another of ``rows``, the config's name is in it too.
    """
    shown = []
    for key, value in row.options.items():
        if key == "mrla_drop_path_rate" and value is None:
            value = "as the layer"
        word = WORDS.get(value, value) if isinstance(value, (str, bool, type(None))) else value
        shown.append(OPTIONS.get(key, key + " = {}").format(word))
    name = ", ".join([title_of(row), *shown])
    if row.config and any(other is not row and _variant(other) == name for other in rows):
        name += f" ({row.config.stem.split('_', 1)[1].removesuffix('_in1k')})"
    return name


def _source(row: Row) -> str:
    """Where the paper has an ablation: what its config's first line says before the colon."""
    if row.config is None or row.group != "ablation":
        return ""
    return row.config.read_text().splitlines()[0].removeprefix("# ").split(": ")[0]


def link_of(row: Row) -> str:
    """The config as a link from the checkout's root."""
    if row.config is None:
        return ""
    path = row.config.resolve()
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"[{path.name}]({where.as_posix()})"


def _memory(row: Row) -> list[str]:
    ratio = f"{row.memory / row.plain.memory:.2f}" if row.plain and row.plain.memory else ""
    return [f"{row.memory / 2**20:.1f} MiB", ratio]


CLASSIFIER_TITLES = ["network", "params", "added, M", "GFLOPs", "added", "in the attention",
                     "kept for backward", "over plain", "config"]  # fmt: skip
DETECTOR_TITLES = ["backbone", "detector", "schedule", "params", "GFLOPs", "of the backbone",
                   "in the attention", "kept for backward", "over plain", "box AP", "mask AP",
                   "config"]  # fmt: skip


def _classifier(row: Row, ablations: Sequence[Row] = ()) -> list[str]:
    digits = 4 if row.group == "cifar" else 3
    added, added_macs, inside = "", "", ""
    if row.plain:
        added = f"{(row.whole.params - row.plain.whole.params) / 1e6:+.3f}"
        added_macs = f"{(row.whole.macs - row.plain.whole.macs) / 1e9:+.{digits}f}"
        inside = f"{row.whole.attention_macs / 1e9:.{digits}f}"
    with_paper = row.group == "imagenet" and not ablations
    paper = PAPER.get((row.backbone, row.attention), ("", "")) if with_paper else None
    return [
        *([_source(row), _variant(row, ablations)] if ablations else [title_of(row)]),
        f"{row.whole.params / 1e6:.3f} M",
        added,
        *([paper[0]] if paper else []),
        f"{row.whole.macs / 1e9:.{digits}f}",
        added_macs,
        *([paper[1]] if paper else []),
        inside,
        *_memory(row),
        link_of(row),
    ]


def _detector(row: Row) -> list[str]:
    return [
        title_of(row),
        DETECTORS.get(row.detector, row.detector),
        row.schedule,
        f"{row.whole.params / 1e6:.2f} M",
        f"{row.whole.macs / 1e9:.1f}",
        f"{row.backbone_macs / 1e9:.1f}",
        f"{row.whole.attention_macs / 1e9:.2f}" if row.plain else "",
        *_memory(row),
        "not yet reproduced",
        "not yet reproduced" if row.detector == "MaskRCNN" else "",
        link_of(row),
    ]


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by group, each with the plain hosts of its rows."""
    found: dict[str, list[Row]] = {}
    for group in GROUPS:
        own = [row for row in rows if row.group == group and (row.plain or row.config)]
        if group == "ablation" and own:
            references = {ROOT / "configs" / name for name in REFERENCES}
            own += [row for row in rows if row.config and row.config.resolve() in references]
        hosts = {id(row.plain) for row in own if row.plain}
        chosen = {id(row) for row in own} | hosts
        if chosen:
            found[group] = [row for row in rows if id(row) in chosen]
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table of one group, and the operators that no number in it holds."""
    titles = DETECTOR_TITLES if rows[0].group == "coco" else CLASSIFIER_TITLES
    ablation = any(row.group == "ablation" for row in rows)
    if ablation:
        titles = ["in the paper", *titles]
    elif rows[0].group == "imagenet":
        titles = [*titles[:3], "in the paper", *titles[3:5], "in the paper", *titles[5:]]
    ablations = rows if ablation else ()
    cells = [_detector(row) if row.group == "coco" else _classifier(row, ablations) for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [titles, *cells]]
    lines.insert(1, "|---" * len(titles) + "|")
    skipped: Counter[str] = sum((row.whole.skipped for row in rows), Counter())
    names = ", ".join(f"`{op}`" for op in sorted(skipped, key=str.lower))
    return "\n".join(
        [*lines, "", f"Operators that the counter has no rule for: {names or 'none'}."]
    )


def default_configs(groups: Iterable[str] = GROUPS) -> list[Path]:
    """All but the demo; of CIFAR those with 10 classes, as the others are the same networks."""
    folder = ROOT / "configs"
    patterns = [pattern for group in groups for pattern in GROUPS[group]]
    if "ablation" in groups:
        patterns += REFERENCES
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not path.name.startswith("demo"))


def _expand(patterns: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[Path]:
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            parser.error(f"no config matches {pattern}")
        yield from map(Path, found)


def write(
    group: str, table: str, page: Path = ROOT / "docs/configs.md", *, whole: bool = True
) -> None:
    """Write a group's table into its part of the page, or only the rows that ``table`` has.

    Links of ``table`` go from the checkout's root, those of the page from a folder in it.
    """
    replace_part(page, group, table.replace("](configs/", "](../configs/"), whole=whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "configs", nargs="*", help="paths or globs; default: all of configs/ but the demo"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="replace the tables in docs/configs.md; with configs, their rows alone",
    )
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP",
        help=f"without configs: the tables to make, of {', '.join(GROUPS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"),
        help="of the image; default: the test pipeline's crop, 32 32 for CIFAR, "
        "800 1280 for detectors",
    )  # fmt: skip
    args = parser.parse_args()
    if args.write and args.size:
        parser.error("--write writes docs/configs.md, where configs stand at their own sizes")
    MMLogger.get_current_instance().setLevel("WARNING")  # it writes to stdout, as the tables do
    asked = GROUPS if args.configs else args.groups
    paths = list(_expand(args.configs, parser)) if args.configs else default_configs(asked)
    rows = measure_all(paths, tuple(args.size) if args.size else None)
    for group, table in tables(rows).items():
        if group not in asked:
            continue
        print(markdown(table), end="\n\n", flush=True)
        if args.write:
            write(group, markdown(table), whole=not args.configs)


if __name__ == "__main__":
    main()
