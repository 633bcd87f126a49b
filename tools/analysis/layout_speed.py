"""Time networks in NCHW and in channels_last, in float32 and in bfloat16 autocast.

The whole network but a detector's heads, a training step (forward and backward) and inference.
Layouts take turns in one process: a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
from tqdm import tqdm

from mmrla.engine.amp import warn_of_slow_bfloat16
from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import add_run_arguments, choose_device, write_csv
from mmrla.engine.layout import use_channels_last
from mmrla.engine.network import Network, build_network, extract_features

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = ("float32", "bfloat16")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", help="of classifiers or detectors")
    parser.add_argument("--size", type=int, default=224, help="side of the images; default 224")
    parser.add_argument("--batch", type=int, default=2, help="images in a batch; default 2")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    add_run_arguments(parser)
    return parser.parse_args()


class Timed:
    """A network in one layout and precision, on one batch."""

    def __init__(
        self, network: Network, layout: str, precision: str, batch: int, size: int
    ) -> None:
        self.model, self.device = network.model, network.device
        self.amp = precision == "bfloat16"
        if layout == "channels_last":
            use_channels_last(self.model)
        images = torch.rand(batch, 3, size, size, device=self.device)
        self.images = images.to(memory_format=LAYOUTS[layout])

    def train(self) -> None:
        """Forward and backward."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        sum(out.float().square().mean() for out in self._features()).backward()

    @torch.no_grad()
    def infer(self) -> None:
        """One forward in evaluation mode."""
        self.model.eval()
        self._features()

    def _features(self) -> tuple[torch.Tensor, ...]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return extract_features(self.model, self.images)


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def measure(networks: dict[str, Network], precision: str, args: argparse.Namespace) -> dict:
    """Medians of each layout, and the median over rounds of channels_last over NCHW."""
    timed = {
        layout: Timed(network, layout, precision, args.batch, args.size)
        for layout, network in networks.items()
    }
    row: dict[str, object] = {}
    for what in ("train", "infer"):
        found: dict[str, list[float]] = {layout: [] for layout in timed}
        for turn in range(-1, args.rounds):  # the first is thrown away
            order = list(timed) if turn % 2 else list(timed)[::-1]
            for layout in order:
                spent = milliseconds(getattr(timed[layout], what), timed[layout].device)
                if turn >= 0:
                    found[layout].append(spent)
        for layout, spent in found.items():
            row[f"{what} {layout} ms"] = round(median(spent), 1)
        pairs = zip(found["channels_last"], found["NCHW"], strict=True)
        row[f"{what} ratio"] = round(median(a / b for a, b in pairs), 2)
    return row


def main() -> None:
    args = parse_args()
    rows = []
    with exit_with_message():
        for name in ("batch", "size", "rounds"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        device = choose_device(args.device)
        if "bfloat16" in args.precisions:
            warn_of_slow_bfloat16()
        for config, precision in tqdm(list(product(args.configs, args.precisions)), unit="row"):
            networks = {
                layout: build_network(
                    config, options=args.cfg_options, seed=args.seed, device=device
                )
                for layout in LAYOUTS
            }
            row = dict(network=networks["NCHW"].name, batch=args.batch, precision=precision)
            rows.append({**row, **measure(networks, precision, args)})
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    print(write_csv(args.out / "layout_speed.csv", rows))


if __name__ == "__main__":
    main()
