"""Write model-index.yml and the metafiles that it names, which mim and model hubs read.

Everything comes from the configs; a test compares. No weights are published, so metrics are empty.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from tqdm import tqdm

from mmrla.analysis.naming import ATTENTIONS, PLUGINS, short_type
from mmrla.configs import ROOT, get_config, list_configs

HEADER = "# Made by tools/analysis/model_index.py from the configs. No weights are published yet.\n"
PAPER = dict(
    Title="Cross-Layer Retrospective Retrieving via Layer Attention",
    URL="https://openreview.net/forum?id=pvgEL1yS3Ql",
)
# The collection of each folder of configs/.
COLLECTIONS = {
    "": "COCO detectors with MRLA",
    "imagenet": "ImageNet classifiers with MRLA",
    "cifar": "CIFAR classifiers with MRLA",
    "ablation": "Ablations of MRLA",
    "bccd": "Detectors of blood cells with MRLA",
}
# By the last part of a config's name; the rest are COCO's.
DATASETS = {
    "in1k": "ImageNet-1k",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "bccd": "BCCD",
    "shapes": "generated shapes",
}


def architecture(model: Config) -> list[str]:
    """Detector, backbone, layer attention and plugins, as papers call them."""
    backbone = model.backbone
    found = [] if short_type(model) == "ImageClassifier" else [short_type(model)]
    found.append(short_type(backbone).removeprefix("MRLA"))
    if backbone.get("block") == "bottleneck":
        found.append("bottleneck")
    attention = backbone.get("layer_attention")
    kinds = [short_type(attention)] if attention else []
    kinds += [short_type(plugin.cfg) for plugin in backbone.get("plugins") or ()]
    names = [{**PLUGINS, **ATTENTIONS}.get(kind, kind) for kind in kinds]
    return found + list(dict.fromkeys(names))


def entry(name: str) -> dict[str, Any]:
    """The model of one config in a metafile.

    Args:
        name: As :func:`mmrla.list_configs` gives it.
    """
    folder, _, stem = name.rpartition("/")
    cfg = get_config(name)
    dataset = DATASETS.get(stem.rpartition("_")[2], "COCO 2017")
    tasks = ["Object Detection"]
    if short_type(cfg.model) == "ImageClassifier":
        tasks = ["Image Classification"]
    elif short_type(cfg.model) == "MaskRCNN":
        tasks.append("Instance Segmentation")
    return {
        "Name": stem,
        "In Collection": COLLECTIONS[folder],
        "Config": f"configs/{name}.py",
        "Metadata": {
            "Training Data": dataset,
            "Epochs": cfg.train_cfg.max_epochs,
            "Architecture": architecture(cfg.model),
        },
        "Results": [dict(Task=task, Dataset=dataset, Metrics={}) for task in tasks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    models: dict[str, list[dict[str, Any]]] = {folder: [] for folder in COLLECTIONS}
    for name in tqdm(list_configs(), unit="config"):
        models[name.rpartition("/")[0]].append(entry(name))
    paths = []
    for folder, title in COLLECTIONS.items():
        paths.append(str(Path("configs", folder, "metafile.yml")))
        content = {"Collections": [dict(Name=title, Paper=PAPER)], "Models": models[folder]}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        (ROOT / paths[-1]).write_text(HEADER + text)
    (ROOT / "model-index.yml").write_text(HEADER + yaml.safe_dump({"Import": paths}))


if __name__ == "__main__":
    main()
