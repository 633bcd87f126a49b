"""Shared parts of the analysis commands: options, images and result files."""

from __future__ import annotations

import argparse
import csv
import glob
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrla.analysis.modules import layer_attentions
from mmrla.analysis.pages import columns_of
from mmrla.datasets.images import IMAGE_SUFFIXES, images_in
from mmrla.engine.network import Network, build_network, share_weights
from mmrla.engine.run.config import OptionAction


def add_subcommand(commands: Any, run: Callable[[argparse.Namespace], Any]) -> Any:
    """Add a subcommand of the name of a function, which its ``args.run`` is.

    Args:
        commands: As :meth:`argparse.ArgumentParser.add_subparsers` gives it.
        run: The function; its docstring describes the command.

    Returns:
        The subcommand's parser.
    """
    text = inspect.getdoc(run) or ""
    name = run.__name__.replace("_", "-")
    parser = commands.add_parser(name, help=text.splitlines()[0], description=text)
    parser.set_defaults(run=run)
    return parser


def add_network_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Config, checkpoint, and how the network is built and where it runs."""
    parser.add_argument("config", help="config of a classifier or a detector")
    parser.add_argument("checkpoint", nargs="?", help="its weights; default: random weights")
    add_run_arguments(parser, device)


def add_run_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """How a network is built, where it runs unless it always does on the CPU, where results go."""
    parser.add_argument(
        "--cfg-options", nargs="+", action=OptionAction, metavar="KEY=VALUE",
        help="override settings of the config, such as model.backbone.depth=18",
    )  # fmt: skip
    if device:
        parser.add_argument(
            "--device", default="auto", help="cpu, cuda, ...; default: a GPU if any"
        )
    parser.add_argument("--seed", type=int, default=0, help="of random weights; default 0")
    parser.add_argument(
        "--out", type=Path, default=Path("work_dirs/analysis"), help="folder for what is written"
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """The images a command uses, and their size in the network."""
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="files, folders or globs"
    )
    parser.add_argument("--max-images", type=int, help="use at most this many images")
    parser.add_argument(
        "--size",
        type=int,
        help="side of the crop that a classifier sees, shorter side of a detector's image; "
        "default: as the config's test pipeline",
    )


def add_beside_arguments(parser: argparse.ArgumentParser) -> None:
    """Other networks to draw next to a config's own."""
    parser.add_argument(
        "--plain-checkpoint",
        help="weights of the same network without layer attention, which is drawn first; it is "
        "left out where only the other has a checkpoint",
    )
    parser.add_argument(
        "--beside", nargs="+", action="append", default=[], metavar="FILE",
        help="another config and its checkpoint, if any; several times for several",
    )  # fmt: skip


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name; ``'auto'``: a GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: no such device here ({reason})") from error
    return device


def find_images(
    patterns: Sequence[str], limit: int | None = None, option: str = "--images"
) -> list[Path]:
    """Files, images below folders, and matches of globs, each once; at most ``limit`` of them.

    Raises:
        FileNotFoundError: A pattern matches nothing, or a folder contains no image.
        ValueError: A ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--max-images must be at least 1, got {limit}")
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = images_in(path)
            if not files:
                raise FileNotFoundError(
                    f"{option}: no image ({', '.join(IMAGE_SUFFIXES)}) below {path.absolute()}"
                )
        elif path.is_file():
            files = [path]
        else:
            files = [
                Path(f) for f in sorted(glob.glob(pattern, recursive=True)) if Path(f).is_file()
            ]
            if not files:
                raise FileNotFoundError(f"{option}: nothing matches {path.absolute()}")
        found.update(dict.fromkeys(files))
    return list(found)[:limit]


def network_of(args: argparse.Namespace) -> tuple[Network, list[Path]]:
    """The network and the images of a command's options.

    Raises:
        FileNotFoundError: No such config, checkpoint or image.
        ValueError: See :func:`build_network`, :func:`choose_device`, :func:`find_images`.
    """
    images = find_images(args.images, args.max_images)
    network = build_network(
        args.config, args.checkpoint, options=args.cfg_options, seed=args.seed,
        device=choose_device(args.device), size=args.size,
    )  # fmt: skip
    return network, images


def networks_of(
    args: argparse.Namespace, need_head: bool = False
) -> tuple[Network, dict[str, Network]]:
    """The networks of a command that compares several.

    The plain host comes first: with the same random weights if there is no checkpoint, else with
    ``--plain-checkpoint``, else not at all, with a message.

    Returns:
        The command's own network; and all networks by a short name, in the order of columns.

    Raises:
        FileNotFoundError: No such config or checkpoint.
        ValueError: See :func:`build_network`; or a ``--plain-checkpoint`` without a checkpoint.
    """
    common = dict(
        seed=args.seed, device=choose_device(args.device), size=args.size, need_head=need_head,
    )  # fmt: skip
    own = build_network(args.config, args.checkpoint, options=args.cfg_options, **common)
    found: dict[str, Network] = {}
    if args.checkpoint is None and args.plain_checkpoint is not None:
        raise ValueError(
            "--plain-checkpoint without a checkpoint of the network itself would compare trained "
            "with random weights"
        )
    if args.checkpoint is not None and args.plain_checkpoint is None:
        print("no --plain-checkpoint: the plain network is left out")
    elif layer_attentions(own.model):
        found["plain"] = build_network(
            args.config, args.plain_checkpoint, options=args.cfg_options, plain=True, **common
        )
        if args.checkpoint is None:
            share_weights(own.model, found["plain"].model)
    others = []
    for files in args.beside:
        if len(files) > 2:
            raise ValueError(f"--beside takes a config and a checkpoint, got {' '.join(files)}")
        others.append(build_network(*files, options=args.cfg_options, **common))
    for network in (own, *others):
        named = f"{network.label} ({network.name}"
        labels = chain([network.label, f"{named})"], (f"{named}, {number})" for number in count(2)))
        found[next(label for label in labels if label not in found)] = network
    return own, found


def describe(own: Network, networks: Mapping[str, Network]) -> str:
    """Text about these networks for a figure's title: a line each, or one if weights are equal."""
    if len({network.weights for network in networks.values()}) == 1:
        return own.title
    return "\n".join(f"{label}: {network.title}" for label, network in networks.items())


def save_numbers(path: str | Path, **arrays: Any) -> Path:
    """Write arrays as NPZ, folders made as needed; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows, whose keys are the columns, folders made as needed; returns the path.

    A cell is empty if its row lacks the key.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)
    return path
