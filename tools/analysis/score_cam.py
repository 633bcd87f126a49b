"""Draw where a classifier looks for its class at the end of stages, plain beside MRLA, by ScoreCAM.

Fig. 6 of the MRLA paper: ResNet-50 at the end of stages 3 and 4. A network runs once for each
channel of a layer and image: 3072 times an image for ResNet-50, minutes on a CPU.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS
from tqdm import tqdm

from mmrla.analysis.cam import Logits, feature_layer, score_cam
from mmrla.analysis.figures import overlay_figure, save
from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import (
    add_beside_arguments,
    add_image_arguments,
    add_network_arguments,
    describe,
    find_images,
    networks_of,
    save_numbers,
)
from mmrla.engine.network import Network


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_network_arguments(parser)
    add_image_arguments(parser)
    add_beside_arguments(parser)
    parser.add_argument(
        "--layers", nargs="+", help="of the backbone; default: the last two stages of a ResNet"
    )
    parser.add_argument("--target", type=int, help="class; default: what each network predicts")
    parser.add_argument("--batch-size", type=int, default=32, help="of masked images; default 32")
    return parser.parse_args()


def default_layers(network: Network) -> list[str]:
    """The last two stages."""
    stages = getattr(network.backbone, "res_layers", None)
    if not stages:
        raise ValueError(
            f"{type(network.backbone).__name__} is no ResNet: name the layers with --layers, such "
            "as layers.10 for a ViT"
        )
    return list(stages[-2:])


def class_names(network: Network) -> list[str] | None:
    """Names of the classes, where the config's dataset knows them."""
    dataset = network.cfg.test_dataloader.dataset
    cls = dataset.type
    if isinstance(cls, str):
        with DATASETS.switch_scope_and_registry(network.cfg.get("default_scope")) as registry:
            cls = registry.get(cls)
    known: Any = {**(getattr(cls, "METAINFO", None) or {}), **(dataset.get("metainfo") or {})}
    names = known.get("classes")
    count = network.model.head.num_classes
    return list(names) if isinstance(names, (list, tuple)) and len(names) == count else None


def main() -> None:
    args = parse_args()
    with exit_with_message():
        if args.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
        images = find_images(args.images, args.max_images)
        networks = networks_of(args, need_head=True)
        for network in networks.values():
            classes = getattr(getattr(network.model, "head", None), "num_classes", None)
            if classes is None or not hasattr(network.model, "extract_feat"):
                raise ValueError(
                    "ScoreCAM weighs maps by the score of a class: it takes a classifier, got "
                    f"{type(network.model).__name__} of {network.name}"
                )
            if args.target is not None and not 0 <= args.target < classes:
                raise ValueError(f"--target must be a class, 0 to {classes - 1}, got {args.target}")
        rows, notes, maps, targets = [], [], [], []
        own = list(networks.values())
        layers = [args.layers or default_layers(network) for network in own]
        columns = [(label, name) for label, names in zip(networks, layers, strict=True)
                   for name in names]  # fmt: skip
        progress = tqdm(total=len(images) * len(columns), unit="map")
        for path in images:
            found, words, classes = [], [], []
            picture = None
            for network, names in zip(own, layers, strict=True):
                inputs, shown = network.read(path)
                picture = shown if picture is None else picture
                with torch.no_grad():
                    scores = Logits(network.model)(inputs)[0].softmax(-1)
                target = int(scores.argmax()) if args.target is None else args.target
                labels = class_names(network)
                word = labels[target].split(",")[0] if labels else f"class {target}"
                word = textwrap.shorten(word, 20, placeholder="...")
                for name in names:
                    layer = feature_layer(network.model, name, inputs)
                    found.append(score_cam(network.model, layer, inputs, target, args.batch_size))
                    words.append(f"{word}, p = {scores[target]:.3f}")
                    classes.append(target)
                    progress.update()
            rows.append((path.name, picture, found))
            notes.append(words)
            maps.append(np.stack(found))
            targets.append(classes)
        progress.close()
        first = list(networks.values())[-1 - len(args.beside)]
        title = f"ScoreCAM\n{describe(networks)}"
        figure = overlay_figure(rows, columns, "contribution (1: most)", title, notes)
        stem = args.out / f"score_cam_{first.stem}"
        print(save(figure, f"{stem}.png"))
        print(
            save_numbers(
                f"{stem}.npz",
                maps=np.stack(maps),
                columns=np.array([" ".join(column) for column in columns]),
                targets=np.array(targets),
                images=np.array(list(map(str, images))),
                networks=np.array([network.title for network in own]),
            )
        )


if __name__ == "__main__":
    main()
