"""Draw how much each layer attends to the layers before it, per stage and head, as heat maps.

Fig. 1a of the MRLA paper. MRLA-base: its softmax over layers. MRLA-light: its gates times the beta
weights of Eq. 8, mean of absolute values over a head's channels.
"""

from __future__ import annotations

import argparse

import numpy as np
from tqdm import tqdm

from mmrla.analysis import record_layer_attention
from mmrla.analysis.figures import all_heads_figure, layer_attention_figure, save
from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import (
    add_image_arguments,
    add_network_arguments,
    network_of,
    save_numbers,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_network_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument("--heads", nargs="+", type=int, help="these; default: 3, spread evenly")
    parser.add_argument(
        "--all-heads", action="store_true", help="besides, a picture of all heads for each group"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_with_message():
        network, images = network_of(args)
        with record_layer_attention(network.model) as rec:
            for path in tqdm(images, unit="image"):
                network.features(network.read(path)[0])
        groups = rec.groups
        count = f"mean of {len(images)} image" + "s" * (len(images) > 1)
        title = f"{network.title}, {count}"
        figure = layer_attention_figure(
            groups, args.heads or 3, f"What each layer attends to\n{title}"
        )
        stem = args.out / f"attention_maps_{network.stem}"
        written = [save(figure, f"{stem}.png")]
        if args.all_heads:
            for group in tqdm(groups, unit="group"):
                name = group.name.replace(" ", "_")
                written.append(save(all_heads_figure(group, title), f"{stem}_{name}.png"))
        numbers: dict[str, object] = {}
        for group in groups:
            numbers[f"{group.name}/scores"] = group.scores.numpy()
            numbers[f"{group.name}/layers"] = np.array(group.layers)
            numbers[f"{group.name}/sources"] = np.array(group.sources)
        numbers |= dict(images=np.array(list(map(str, images))), scores_are=groups[0].label)
        written.append(save_numbers(f"{stem}.npz", title=title, **numbers))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
