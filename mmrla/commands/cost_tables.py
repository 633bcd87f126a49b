"""Tables of what configs cost: those of docs/configs.md, and that of docs/attentions.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmrla.analysis import pages
from mmrla.analysis.naming import DETECTORS
from mmrla.analysis.published import ORDER, PAPER, PUBLISHED, REASONS, Published
from mmrla.commands.cost_counts import Row, link_of, measure, over_plain, timed_classifier, title_of
from mmrla.configs import ROOT
from mmrla.engine.network import without_layer_attention

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


_Cells = list[tuple[str, object]]
"""Of a row, each with its title."""


def _memory(row: Row) -> _Cells:
    ratio = f"{row.memory / row.plain.memory:.2f}" if row.plain and row.plain.memory else ""
    return [("kept for backward", f"{row.memory / 2**20:.1f} MiB"), ("over plain", ratio)]


def _classifier(row: Row, ablations: Sequence[Row]) -> _Cells:
    digits = 4 if row.group == "cifar" else 3
    added, added_macs, inside = "", "", ""
    if row.plain:
        added = f"{(row.whole.params - row.plain.whole.params) / 1e6:+.3f}"
        added_macs = f"{(row.whole.macs - row.plain.whole.macs) / 1e9:+.{digits}f}"
        inside = f"{row.whole.attention_macs / 1e9:.{digits}f}"
    names: _Cells = [("network", title_of(row))]
    params, macs = [], []
    if ablations:
        names = [("in the paper", _source(row)), ("network", _variant(row, ablations))]
    elif row.group == "imagenet":
        paper = PAPER.get((row.backbone, row.attention), ("", ""))
        params, macs = ([("in the paper", stated)] for stated in paper)
    return [
        *names,
        ("params", f"{row.whole.params / 1e6:.3f} M"),
        ("added, M", added),
        *params,
        ("GFLOPs", f"{row.whole.macs / 1e9:.{digits}f}"),
        ("added", added_macs),
        *macs,
        ("in the attention", inside),
        *_memory(row),
        ("config", link_of(row.config)),
    ]


def _detector(row: Row) -> _Cells:
    inside = f"{row.whole.attention_macs / 1e9:.2f}" if row.plain else ""
    return [
        ("backbone", title_of(row)),
        ("detector", DETECTORS.get(row.detector, row.detector)),
        ("schedule", row.schedule),
        ("params", f"{row.whole.params / 1e6:.2f} M"),
        ("GFLOPs", f"{row.whole.macs / 1e9:.1f}"),
        ("of the backbone", f"{row.backbone_macs / 1e9:.1f}"),
        ("in the attention", inside),
        *_memory(row),
        ("box AP", "not yet reproduced"),
        ("mask AP", "not yet reproduced" if row.detector == "MaskRCNN" else ""),
        ("config", link_of(row.config)),
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
    ablations = rows if any(row.group == "ablation" for row in rows) else ()
    cells = [_detector(r) if r.group == "coco" else _classifier(r, ablations) for r in rows]
    table = pages.markdown([[cell for _, cell in row] for row in cells], [t for t, _ in cells[0]])
    skipped: Counter[str] = sum((row.whole.skipped for row in rows), Counter())
    names = ", ".join(f"`{op}`" for op in sorted(skipped, key=str.lower))
    return f"{table}\n\nOperators that the counter has no rule for: {names or 'none'}."


def default_configs(groups: Iterable[str] = GROUPS) -> list[Path]:
    """All but the demo; of CIFAR those with 10 classes, as the others are the same networks."""
    folder = ROOT / "configs"
    patterns = [pattern for group in groups for pattern in GROUPS[group]]
    if "ablation" in groups:
        patterns += REFERENCES
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not path.name.startswith("demo"))


def write(
    group: str, table: str, page: Path = ROOT / "docs/configs.md", *, whole: bool = True
) -> None:
    """Write a group's table into its part of the page, or only the rows that ``table`` has.

    Links of ``table`` go from the checkout's root, those of the page from a folder in it.
    """
    pages.replace_part(page, group, table.replace("](configs/", "](../configs/"), whole=whole)


COMPARED = ("imagenet/resnet50_*_in1k.py", "imagenet/densenet*_in1k.py")
PLAIN = ROOT / "configs/imagenet/resnet50_plain_in1k.py"


def name_of(path: Path) -> str:
    """``eca`` of ``resnet50_eca_in1k.py``, ``densenet161`` of ``densenet161_in1k.py``."""
    stem = re.sub(r"_(in1k|cifar\d+)$", "", path.stem)
    return stem.removeprefix("resnet50_")


def compared_configs() -> list[Path]:
    """All ResNet-50 and DenseNet configs for ImageNet, in the order of rows."""

    def position(path: Path) -> tuple[int, str]:
        name = name_of(path)
        return (ORDER.index(name) if name in ORDER else len(ORDER), path.stem)

    found = (path for pattern in COMPARED for path in (ROOT / "configs").glob(pattern))
    return sorted(found, key=position)


def difference(name: str, params: int, macs: int) -> str:
    """Where ours is more than 1% away from what is published, and why."""
    published = PUBLISHED.get(name, Published())
    told = []
    for column, ours, stated in (
        ("params", params / 1e6, published.params),
        ("GFLOPs", macs / 1e9, published.gflops),
    ):
        off = ours / float(stated) - 1 if stated else 0.0
        if abs(off) > 0.01:
            reason = REASONS.get((name, column), "not explained yet")
            told.append(f"{column} {off:+.1%}: {reason}")
    return "; ".join(told)


def compare(
    paths: Sequence[Path],
    device: torch.device,
    rounds: int,
    batch: int,
    size: int,
    timed_size: int,
    own_host: bool = False,
) -> list[dict[str, Any]]:
    """A row for each config beside plain ResNet-50.

    Args:
        paths: Configs of classifiers.
        device: Where training step and inference are timed.
        rounds: Of each comparison; 0 leaves out timing.
        batch: Images of a timed step.
        size: Height and width of the image that parameters, multiply-adds and memory are counted
            with.
        timed_size: That of the timed ones.
        own_host: Beside the first config's network without layer attention instead.
    """
    plain_cfg = Config.fromfile(paths[0] if own_host else PLAIN)
    if own_host:
        plain_cfg.model = without_layer_attention(plain_cfg.model)
    plain_kept = measure(plain_cfg, plain_cfg.model, None, (size, size), {}).memory
    plain = timed_classifier(plain_cfg, device, batch, timed_size) if rounds else None
    rows = []
    for path in paths:
        cfg, name = Config.fromfile(path), name_of(path)
        counted = measure(cfg, cfg.model, path, (size, size), {})
        params, macs = counted.whole[:2]
        published = PUBLISHED.get(name, Published(source=""))
        row: dict[str, Any] = {
            "network": title_of(counted).removeprefix("ResNet-50 "),
            "params, M": f"{params / 1e6:.2f}",
            "published params, M": published.params,
            "GFLOPs": f"{macs / 1e9:.2f}",
            "published GFLOPs": published.gflops,
            "kept, MiB/image": f"{counted.memory / 2**20:.1f}",
            "kept over plain": f"{counted.memory / plain_kept:.2f}",
            "training step over plain": None,
            "inference over plain": None,
            "published top-1": published.top1,
            "source": published.source,
            "differs by more than 1%": difference(name, params, macs),
            "config": link_of(path, ROOT / "docs"),
        }
        if plain is not None and path.resolve() == PLAIN:
            row |= {"training step over plain": "1.00", "inference over plain": "1.00"}
        elif plain is not None:
            other = timed_classifier(cfg, device, batch, timed_size)
            for step, column in (("train_step", "training step"), ("infer", "inference")):
                row[f"{column} over plain"] = over_plain(other, plain, step, rounds)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows
