"""Draw the GFLOPs of layer attention against the input's resolution, beside its plain host.

Fig. 5 of the MRLA paper, there for CeiT-T + MRLA-light. GFLOPs are multiply-adds, as in
docs/configs.md; neither images nor weights change them.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from tqdm import tqdm

from mmrla.analysis import complexity
from mmrla.analysis.figures import flops_figure, save
from mmrla.analysis.modules import layer_attentions
from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import add_network_arguments, choose_device, write_csv
from mmrla.engine.network import build_network, share_weights

SIZES = (128, 160, 192, 224, 256, 288, 320, 352, 384)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_network_arguments(parser)
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=list(SIZES),
        help=f"sides of square images in px; default: {' '.join(map(str, SIZES))}",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with exit_with_message():
        sizes = sorted(set(args.sizes))
        if len(sizes) < 2 or sizes[0] < 1:
            raise ValueError(f"--sizes must be two or more sides above 0, got {args.sizes}")
        common = dict(options=args.cfg_options, seed=args.seed, device=choose_device(args.device))
        network = build_network(args.config, args.checkpoint, **common)
        if not layer_attentions(network.backbone):
            raise ValueError(f"{args.config}: the backbone has no layer attention to count")
        plain = build_network(args.config, plain=True, **common)
        share_weights(network.model, plain.model)
        rows = []
        for size in tqdm(sizes, unit="size"):
            image = torch.rand(1, 3, size, size, device=network.device)
            whole, host = complexity(network.backbone, image), complexity(plain.backbone, image)
            rows.append(
                {
                    "size": size,
                    "pixels": size**2,
                    "plain_gflops": host.macs / 1e9,
                    "whole_gflops": whole.macs / 1e9,
                    "added_gflops": (whole.macs - host.macs) / 1e9,
                    "inside_attention_gflops": whole.attention_macs / 1e9,
                }
            )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    # Least squares through pixels: 1 is a straight line.
    fit = np.corrcoef(columns["pixels"], columns["added_gflops"])[0, 1] ** 2
    attention = type(network.backbone.get_submodule(layer_attentions(network.backbone)[0])).__name__
    figure = flops_figure(
        sizes,
        {f"with {attention}": columns["whole_gflops"], "plain": columns["plain_gflops"]},
        {
            "added to the network, norms around it too": columns["added_gflops"],
            "inside the attention, element-wise too": columns["inside_attention_gflops"],
        },
        f"{network.name}: multiply-adds against resolution (linear in pixels: R² = {fit:.4f})",
    )
    stem = args.out / f"flops_vs_resolution_{network.stem}"
    print(save(figure, f"{stem}.png"))
    print(write_csv(f"{stem}.csv", rows))


if __name__ == "__main__":
    main()
