"""``mmrla figure``: the paper's figures of what networks attend to, for any config."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmrla.analysis import GroupRecord, figures, query_similarity, record_layer_attention
from mmrla.analysis.cam import Logits, feature_layer, score_cam
from mmrla.analysis.token_attention import record_token_attention
from mmrla.engine import inspection
from mmrla.engine.errors import exit_with_message, require_at_least
from mmrla.engine.network import Network


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        "mmrla figure", description="Draw what a config's network attends to, as in the paper."
    )
    commands = parser.add_subparsers(required=True, metavar="FIGURE")
    own = {
        run: inspection.add_subcommand(commands, run)
        for run in (maps, similarity, cam, class_token)
    }
    for one in own.values():
        inspection.add_network_arguments(one)
        inspection.add_image_arguments(one)
    for run in (cam, class_token):
        inspection.add_beside_arguments(own[run])
    for run in (maps, class_token):
        own[run].add_argument(
            "--heads", nargs="+", type=int, help="these; default: 3, spread evenly"
        )
    own[maps].add_argument(
        "--all-heads", action="store_true", help="besides, a picture of all heads for each group"
    )
    own[similarity].add_argument("--bins", type=int, default=25, help="of [0, 1]; default 25")
    own[similarity].add_argument(
        "--include-first", action="store_true",
        help="compare the first layer of a group too, which attends to itself alone",
    )  # fmt: skip
    own[cam].add_argument(
        "--layers", nargs="+", help="of the backbone; default: the last two stages of a ResNet"
    )
    own[cam].add_argument("--target", type=int, help="class; default: what each network predicts")
    own[cam].add_argument("--batch-size", type=int, default=32, help="masked images; default 32")
    own[class_token].add_argument("--layer", type=int, default=-1, help="block; default: the last")
    own[class_token].add_argument(
        "--query", nargs=2, type=int, metavar=("ROW", "COLUMN"),
        help="attention of this patch; default: of the class token",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw; exits with status 2 and one line if the input is wrong."""
    args = parse_args(argv)
    with exit_with_message():
        written = list(args.run(args))
    print("\n".join(map(str, written)))


def maps(args: argparse.Namespace) -> Iterator[Path]:
    """Draw how much each layer attends to the layers before it, per stage and head, as heat maps.

    Fig. 1a of the MRLA paper. MRLA-base: its softmax over layers. MRLA-light: its gates times the
    beta weights of Eq. 8, mean of absolute values over a head's channels.
    """
    network, images, groups = _record(args)
    title = f"{network.title}, mean of {_count(images)}"
    heads = args.heads or 3
    figure = figures.layer_attention_figure(groups, heads, f"What each layer attends to\n{title}")
    stem = f"{args.out}/attention_maps_{network.stem}"
    yield figures.save(figure, f"{stem}.png")
    for group in groups if args.all_heads else ():
        yield figures.save(
            figures.all_heads_figure(group, title), f"{stem}_{group.name.replace(' ', '_')}.png"
        )
    numbers: dict[str, Any] = {}
    for group in groups:
        numbers[f"{group.name}/scores"] = group.scores.numpy()
        numbers[f"{group.name}/layers"] = np.array(group.layers)
        numbers[f"{group.name}/sources"] = np.array(group.sources)
    numbers |= dict(images=_names(images), scores_are=groups[0].label)
    yield inspection.save_numbers(f"{stem}.npz", title=title, **numbers)


def similarity(args: argparse.Namespace) -> Iterator[Path]:
    """Draw how similar the queries of consecutive layers are, as histograms over heads and images.

    Fig. 2b of the MRLA paper: the absolute cosine similarity, on which MRLA-light's approximation
    of MRLA-base rests. The first layer of a stage is left out, as in the paper.
    """
    require_at_least(args, bins=1)
    network, images, groups = _record(args)
    found = {group.name: query_similarity(group, args.include_first).numpy() for group in groups}
    found = {name: values for name, values in found.items() if values.size}
    if not found:
        raise ValueError(
            "no two consecutive layers to compare: every group has one or two layers, and the "
            "first is left out; --include-first takes it too"
        )
    title = f"{network.title}, {_count(images)}"
    stem = f"{args.out}/query_similarity_{network.stem}"
    figure = figures.similarity_figure(found, args.bins, f"Queries of consecutive layers\n{title}")
    yield figures.save(figure, f"{stem}.png")
    yield inspection.save_numbers(f"{stem}.npz", title=title, images=_names(images), **found)
    edges = np.linspace(0, 1, args.bins + 1)
    rows = [
        {"group": name, "from": round(low, 6), "to": round(high, 6), "pairs": int(pairs)}
        for name, values in found.items()
        for low, high, pairs in zip(
            edges[:-1], edges[1:], np.histogram(values, edges)[0], strict=True
        )
    ]
    yield inspection.write_csv(f"{stem}.csv", rows)


def _record(args: argparse.Namespace) -> tuple[Network, list[Path], list[GroupRecord]]:
    """What a network attends to in a command's images."""
    network, images = inspection.network_of(args)
    with record_layer_attention(network.model) as rec:
        for path in tqdm(images, unit="image"):
            network.features(network.read(path)[0])
    return network, images, rec.groups


def _count(images: Sequence[Path]) -> str:
    return f"{len(images)} image" + "s" * (len(images) > 1)


def _names(images: Sequence[Path]) -> np.ndarray:
    return np.array(list(map(str, images)))


def cam(args: argparse.Namespace) -> Iterator[Path]:
    """Draw where a classifier looks for its class at the end of stages, plain beside MRLA.

    Fig. 6 of the MRLA paper, by ScoreCAM: ResNet-50 at the end of stages 3 and 4. A network runs
    once for each channel of a layer and image: 3072 times an image for ResNet-50, minutes on a CPU.
    """
    require_at_least(args, batch_size=1)
    images = inspection.find_images(args.images, args.max_images)
    own, networks = inspection.networks_of(args, need_head=True)
    for network in networks.values():
        classes = getattr(getattr(network.model, "head", None), "num_classes", None)
        if classes is None or not hasattr(network.model, "extract_feat"):
            raise ValueError(
                "ScoreCAM weighs maps by the score of a class: it takes a classifier, got "
                f"{type(network.model).__name__} of {network.name}"
            )
        if args.target is not None and not 0 <= args.target < classes:
            raise ValueError(f"--target must be a class, 0 to {classes - 1}, got {args.target}")
    layers = {label: args.layers or _last_stages(one) for label, one in networks.items()}
    targets: list[list[int]] = [[] for _ in images]

    def draw(label: str, index: int, inputs: Tensor, shown: np.ndarray) -> Iterator[_Map]:
        network = networks[label]
        with torch.no_grad():
            scores = Logits(network.model)(inputs)[0].softmax(-1)
        target = int(scores.argmax()) if args.target is None else args.target
        names = network.dataset_meta.get("classes") or ()
        known = len(names) == network.model.head.num_classes
        word = names[target].split(",")[0] if known else f"class {target}"
        word = textwrap.shorten(word, 20, placeholder="...")
        for name in layers[label]:
            layer = feature_layer(network.model, name, inputs)
            targets[index].append(target)
            values = score_cam(network.model, layer, inputs, target, args.batch_size)
            yield values, f"{word}, p = {scores[target]:.3f}"

    rows, notes = _overlays(images, networks, draw)
    columns = [(label, name) for label, names in layers.items() for name in names]
    title = f"ScoreCAM\n{inspection.describe(own, networks)}"
    figure = figures.overlay_figure(rows, columns, "contribution (1: most)", title, notes)
    stem = f"{args.out}/score_cam_{own.stem}"
    yield figures.save(figure, f"{stem}.png")
    yield inspection.save_numbers(
        f"{stem}.npz",
        maps=np.stack([np.stack(maps) for _, _, maps in rows]),
        columns=np.array([" ".join(column) for column in columns]),
        targets=np.array(targets),
        images=_names(images),
        networks=np.array([network.title for network in networks.values()]),
    )


def class_token(args: argparse.Namespace) -> Iterator[Path]:
    """Draw what the class token of a vision transformer attends to, plain beside MRLA.

    Fig. 7 of the MRLA paper: single heads of the last block. With --query the attention of one
    patch, which a red box marks, as in that figure.
    """
    images = inspection.find_images(args.images, args.max_images)
    own, networks = inspection.networks_of(args)
    for network in networks.values():
        with record_token_attention(network.backbone, args.layer):
            pass  # refuses what it cannot record
    blocks: Any = {label: network.backbone.layers for label, network in networks.items()}
    counts = {label: layers[args.layer].attn.num_heads for label, layers in blocks.items()}
    heads = dict(zip(networks, figures.choose_heads(counts, args.heads or 3), strict=True))
    numbers: dict[str, Any] = {}
    boxes: dict[int, tuple[float, float, float, float]] = {}

    def draw(label: str, index: int, inputs: Tensor, shown: np.ndarray) -> Iterator[_Map]:
        network = networks[label]
        with record_token_attention(network.backbone, args.layer) as rec:
            network.features(inputs)
        found = rec.of_patch(*args.query) if args.query else rec.of_token(0)
        values = numbers[f"{label}/{index}"] = found[0].numpy()
        height, width = inputs.shape[-2:]
        if args.query:
            (row, column), size = args.query, (height / values.shape[1], width / values.shape[2])
            boxes.setdefault(index, (column * size[1], row * size[0], size[1], size[0]))
        for head in heads[label]:
            large = cv2.resize(values[head], (width, height)) / values[head].max()
            # Padding is right of and below the image.
            yield large[: shown.shape[0], : shown.shape[1]], ""

    rows, _ = _overlays(images, networks, draw)
    columns = [(label, f"head {head}") for label, chosen in heads.items() for head in chosen]
    what = f"patch {tuple(args.query)}" if args.query else "the class token"
    title = f"What {what} attends to in layers.{args.layer % len(own.model.backbone.layers)}"
    title += f"\n{inspection.describe(own, networks)}"
    marks = [boxes.get(index) for index in range(len(rows))]
    figure = figures.overlay_figure(rows, columns, "attention (1: most)", title, boxes=marks)
    stem = f"{args.out}/class_attention_{own.stem}"
    yield figures.save(figure, f"{stem}.png")
    names = np.array([f"{label}: {network.title}" for label, network in networks.items()])
    yield inspection.save_numbers(
        f"{stem}.npz", images=_names(images), title=title, networks=names, **numbers
    )


_Map = tuple[np.ndarray, str]  # in [0, 1], and a note below it


def _overlays(
    images: Sequence[Path],
    networks: dict[str, Network],
    draw: Callable[[str, int, Tensor, np.ndarray], Iterator[_Map]],
) -> tuple[list[tuple[str, np.ndarray, list[np.ndarray]]], list[list[str]]]:
    """The rows of an overlay figure and the notes below its maps.

    Args:
        images: A row for each.
        networks: The columns, by label.
        draw: Takes label, number of the image, input of the network, and the image as it sees it.
    """
    rows, notes = [], []
    for index, path in enumerate(tqdm(images, unit="image")):
        read = {label: network.read(path) for label, network in networks.items()}
        found = [one for label, seen in read.items() for one in draw(label, index, *seen)]
        rows.append((path.name, next(iter(read.values()))[1], [values for values, _ in found]))
        notes.append([note for _, note in found])
    return rows, notes


def _last_stages(network: Network) -> list[str]:
    stages = getattr(network.backbone, "res_layers", None)
    if not stages:
        raise ValueError(
            f"{type(network.backbone).__name__} is no ResNet: name the layers with --layers, such "
            "as layers.10 for a ViT"
        )
    return list(stages[-2:])
