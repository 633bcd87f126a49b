"""Draw how similar the queries of consecutive layers are, as histograms over heads and images.

Fig. 2b of the MRLA paper: the absolute cosine similarity, on which MRLA-light's approximation of
MRLA-base rests. The first layer of a stage is left out, as in the paper.
"""

from __future__ import annotations

import argparse

import numpy as np
from tqdm import tqdm

from mmrla.analysis import query_similarity, record_layer_attention
from mmrla.analysis.figures import save, similarity_figure
from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import (
    add_image_arguments,
    add_network_arguments,
    network_of,
    save_numbers,
    write_csv,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_network_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument("--bins", type=int, default=25, help="of [0, 1]; default 25")
    parser.add_argument(
        "--include-first", action="store_true",
        help="compare the first layer of a group too, which attends to itself alone",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_with_message():
        if args.bins < 1:
            raise ValueError(f"--bins must be at least 1, got {args.bins}")
        network, images = network_of(args)
        with record_layer_attention(network.model) as rec:
            for path in tqdm(images, unit="image"):
                network.features(network.read(path)[0])
        found = {
            group.name: query_similarity(group, args.include_first).numpy() for group in rec.groups
        }
        found = {name: values for name, values in found.items() if values.size}
        if not found:
            raise ValueError(
                "no two consecutive layers to compare: every group has one or two layers, and the "
                "first is left out; --include-first takes it too"
            )
        title = f"{network.title}, {len(images)} image" + "s" * (len(images) > 1)
        figure = similarity_figure(found, args.bins, f"Queries of consecutive layers\n{title}")
        stem = args.out / f"query_similarity_{network.stem}"
        written = [save(figure, f"{stem}.png")]
        names = np.array(list(map(str, images)))
        written.append(save_numbers(f"{stem}.npz", title=title, images=names, **found))
        edges = np.linspace(0, 1, args.bins + 1)
        rows = [
            {"group": name, "from": round(low, 6), "to": round(high, 6), "pairs": int(pairs)}
            for name, values in found.items()
            for low, high, pairs in zip(
                edges[:-1], edges[1:], np.histogram(values.clip(0, 1), edges)[0], strict=True
            )
        ]
        written.append(write_csv(f"{stem}.csv", rows))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
