"""Draw what the class token of a vision transformer attends to, plain beside MRLA.

Fig. 7 of the MRLA paper: single heads of the last block. With --query the attention of one patch,
which a red box marks, as in that figure.
"""

from __future__ import annotations

import argparse

import cv2
import numpy as np
from tqdm import tqdm

from mmrla.analysis.figures import overlay_figure, save
from mmrla.analysis.token_attention import record_token_attention
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
    parser.add_argument("--layer", type=int, default=-1, help="block; default: the last")
    parser.add_argument("--heads", nargs="+", type=int, help="these; default: 3, spread evenly")
    parser.add_argument(
        "--query", nargs=2, type=int, metavar=("ROW", "COLUMN"),
        help="attention of this patch; default: of the class token",
    )  # fmt: skip
    return parser.parse_args()


def heads_of(network: Network, layer: int, asked: list[int] | None) -> list[int]:
    """The heads to draw.

    Raises:
        ValueError: There is no such head.
    """
    count = network.backbone.layers[layer].attn.num_heads
    if asked is None:
        return sorted({round(i) for i in np.linspace(0, count - 1, min(3, count))})
    for head in asked:
        if not 0 <= head < count:
            raise ValueError(f"--heads: {network.name} has {count}, 0 to {count - 1}, got {head}")
    return asked


def main() -> None:
    args = parse_args()
    with exit_with_message():
        images = find_images(args.images, args.max_images)
        networks = networks_of(args)
        for network in networks.values():
            with record_token_attention(network.backbone, args.layer):
                pass  # refuses what it cannot record
        heads = [heads_of(network, args.layer, args.heads) for network in networks.values()]
        columns = [(label, f"head {head}") for label, own in zip(networks, heads, strict=True)
                   for head in own]  # fmt: skip
        rows, boxes = [], []
        numbers: dict[str, object] = {}
        for index, path in enumerate(tqdm(images, unit="image")):
            picture, maps, box = None, [], None
            for (label, network), own in zip(networks.items(), heads, strict=True):
                inputs, shown = network.read(path)
                with record_token_attention(network.backbone, args.layer) as rec:
                    network.features(inputs)
                found = rec.of_patch(*args.query) if args.query else rec.of_token(0)
                values = found[0].numpy()
                numbers[f"{label}/{index}"] = values
                height, width = inputs.shape[-2:]
                for head in own:
                    # Padding lies right of and below the image.
                    large = cv2.resize(values[head], (width, height))
                    maps.append((large / values[head].max())[: shown.shape[0], : shown.shape[1]])
                if picture is None:
                    picture = shown
                    if args.query:
                        step = height / values.shape[1], width / values.shape[2]
                        row, column = args.query
                        box = column * step[1], row * step[0], step[1], step[0]
            rows.append((path.name, picture, maps))
            boxes.append(box)
        first = list(networks.values())[-1 - len(args.beside)]
        blocks = len(first.backbone.layers)
        what = f"patch {tuple(args.query)}" if args.query else "the class token"
        title = f"What {what} attends to in layers.{args.layer % blocks}\n{describe(networks)}"
        figure = overlay_figure(rows, columns, "attention (1: most)", title, boxes=boxes)
        stem = args.out / f"class_attention_{first.stem}"
        print(save(figure, f"{stem}.png"))
        print(
            save_numbers(
                f"{stem}.npz",
                images=np.array(list(map(str, images))),
                title=title,
                networks=np.array([f"{label}: {n.title}" for label, n in networks.items()]),
                **numbers,
            )
        )


if __name__ == "__main__":
    main()
