"""Write docs/model_zoo.md: cost, published and measured accuracy of the main configs in one table.

Parameters, multiply-adds and memory are counted, the training step is timed beside that of the
plain host, and what was measured comes from docs/results.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmrla.analysis.naming import DETECTORS, image_size
from mmrla.analysis.pages import last_values, markdown, replace_part, spread
from mmrla.analysis.published import PUBLISHED, PUBLISHED_AP, Published
from mmrla.cli import load_script
from mmrla.commands.cost_counts import (
    Row,
    link_of,
    measure_all,
    over_plain,
    timed_classifier,
    title_of,
)
from mmrla.commands.cost_tables import name_of
from mmrla.configs import ROOT
from mmrla.engine.network import without_layer_attention

# By part of the page; {} are the attentions, which the plain host of each stands above.
CONFIGS = {
    "imagenet": {
        "imagenet/resnet50_{}_in1k.py": "plain mrla mrla-base kcla dla rla-g dia",
        "imagenet/resnet101_{}_in1k.py": "mrla mrla-base kcla",
        "imagenet/resnext50-32x4d_{}_in1k.py": "mrla",
        "imagenet/efficientnet-b0_{}_in1k.py": "mrla mrla-base",
        "imagenet/deit-tiny_{}_in1k.py": "mrla mrla-base",
        "imagenet/deit-small_{}_in1k.py": "attnres attnres-block denseformer",
        "imagenet/ceit-tiny_{}_in1k.py": "mrla mrla-base",
        "imagenet/pvtv2-b0_{}_in1k.py": "mrla mrla-base",
    },
    "cifar": {
        "cifar/resnet20_{}_cifar10.py": "plain mrla mrla-base",
        "cifar/resnet56-bottleneck_{}_cifar10.py": "plain mrla mrla-base kcla dla",
        "cifar/vit_{}_cifar10.py": "plain attnres attnres-block denseformer",
    },
    "coco": {
        "faster_rcnn_r50_{}_1x.py": "mrla mrla-base kcla rla-g",
        "mask_rcnn_r50_{}_1x.py": "mrla mrla-base kcla rla-g",
        "retinanet_r50_{}_1x.py": "mrla mrla-base rla-g",
        "bccd/retinanet_efficientnet-lite0_{}_bccd.py": "mrla mrla-base",
    },
}


def paths_of(group: str) -> list[Path]:
    """The configs of one part of the page."""
    return [
        ROOT / "configs" / pattern.format(attention)
        for pattern, attentions in CONFIGS[group].items()
        for attention in attentions.split()
    ]


def measured(config: Path, record: Mapping[str, Any]) -> str:
    """What docs/results.json has of a config as it is: mean, spread and number of seeds."""
    for name, experiment in load_script("results.py").EXPERIMENTS.items():
        for row in experiment.rows:
            runs = record.get(name, {}).get(row.name, {})
            if ROOT / "configs" / row.config == config and not row.options and runs:
                title = next(iter(experiment.metrics.values()))
                return f"{title} {spread(list(last_values(runs).values()))} ({len(runs)})"
    return ""


def time_over_plain(config: Path, rounds: int) -> str:
    """Training step of a classifier over its plain host's, timed in turn."""
    cfg, plain = Config.fromfile(config), Config.fromfile(config)
    plain.model = without_layer_attention(plain.model)
    size = image_size(cfg)[0]
    batch = 32 if size < 64 else 4
    device = torch.device("cpu")
    other, beside = (timed_classifier(c, device, batch, size) for c in (cfg, plain))
    return over_plain(other, beside, "train_step", rounds)


def cells(row: Row, record: Mapping[str, Any], rounds: int, page: str) -> list[str]:
    """One line of the table; with no rounds, the time is the one that the page has."""
    link = link_of(row.config, ROOT / "docs")
    time = published = here = over = ""
    if row.config:
        top1 = PUBLISHED.get(name_of(row.config), Published()).top1
        published = top1 or PUBLISHED_AP.get(row.config.stem, "")
        here = measured(row.config, record)
    if row.plain:
        over = f" (x {row.memory / row.plain.memory:.2f})"
    if row.plain and row.config and row.group != "coco":
        found = re.search(rf"([\d.]+)(?: \|[^|\n]*){{2}} \| {re.escape(link)}", page)
        time = time_over_plain(row.config, rounds) if rounds else found[1] if found else ""
    detector = DETECTORS.get(row.detector, row.detector)
    return [
        f"{detector}, {title_of(row)}" if detector else title_of(row),
        f"{row.whole.params / 1e6:.2f}",
        f"{row.whole.macs / 1e9:.{3 if row.group == 'cifar' else 2}f}",
        f"{row.memory / 2**20:.1f}{over}",
        time,
        published,
        here,
        link,
    ]


TITLES = ["network", "params, M", "GFLOPs", "kept, MiB/image (over plain)", "step over plain",
          "published", "measured here (seeds)", "config"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each timing; 0: keep the page's")
    parser.add_argument("--groups", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--page", type=Path, default=ROOT / "docs/model_zoo.md")
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel("WARNING")
    record = json.loads((ROOT / "docs/results.json").read_text())
    page = args.page.read_text()
    for group in args.groups:
        rows = [cells(row, record, args.rounds, page) for row in measure_all(paths_of(group))]
        text = markdown(rows, TITLES)
        print(text, flush=True)
        replace_part(args.page, group, text)


if __name__ == "__main__":
    main()
