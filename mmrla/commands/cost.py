"""``mmrla cost``: what layer attention costs, counted and timed beside the plain network."""

from __future__ import annotations

import argparse
import copy
import gc
import glob
import inspect
import platform
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from tqdm import tqdm

from mmrla.analysis import complexity
from mmrla.analysis.figures import lines_figure, lines_of, save
from mmrla.analysis.modules import layer_attentions
from mmrla.analysis.pages import markdown, replace_part
from mmrla.commands import cost_tables as tables
from mmrla.commands.cost_counts import measure_all
from mmrla.commands.cost_depth import memory_row, memory_table
from mmrla.commands.cost_speed import MODES, Row, measure, measure_detector, measure_scaling
from mmrla.commands.cost_targets import device_name, draw, require_parity, targets
from mmrla.commands.timing import Timed, ratio, side_by_side
from mmrla.configs import ROOT
from mmrla.engine import inspection
from mmrla.engine import network as networks
from mmrla.engine.amp import warn_of_slow_bfloat16
from mmrla.engine.errors import exit_with_message, require_at_least
from mmrla.engine.layout import use_channels_last
from mmrla.registry import LAYER_ATTENTIONS, MODELS

# Of the paper's table, in its order; taken by default as far as they are registered.
TYPES = ("MLA", "MRLABase", "MRLALight")
SIZES = (128, 160, 192, 224, 256, 288, 320, 352, 384)
GROUPS = tuple(tables.GROUPS)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = ("float32", "bfloat16")
PARTS = ("models", "scaling", "detector")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        "mmrla cost", description="Count and time networks beside their plain hosts."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs = (flops, compare, memory, resolution, layout, speed)
    parsers = {run: inspection.add_subcommand(commands, run) for run in runs}
    own = {run: parser.add_argument for run, parser in parsers.items()}
    inspection.add_network_arguments(parsers[resolution])

    add = own[flops]
    add("configs", nargs="*", help="paths or globs; default: all of configs/ but the demo")
    add("--write", action="store_true", help="into docs/configs.md; with configs, their rows alone")
    add("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="tables; default: all")
    size = "of the image; default: the config's own, 800 1280 for detectors"
    add("--size", type=int, nargs=2, metavar=("H", "W"), help=size)

    add = own[compare]
    add("configs", nargs="*", type=Path, help=f"default: {' '.join(tables.COMPARED)}")
    add("--quick", action="store_true", help="one round on images of 64 x 64")
    add("--size", type=int, default=224, help="of the image that is counted with; default 224")
    add("--batch", type=int, help="of timed steps; default 2, on a GPU 128")
    host = "plain is the first config's network without its layer attention, not ResNet-50"
    add("--own-host", action="store_true", help=host)
    add("--note", default="", help="a sentence on how the machine was used")
    add("--write", action="store_true", help="the table into docs/attentions.md")

    add = own[memory]
    default = str(ROOT / "configs/imagenet/resnet50_mrla_in1k.py")
    add("config", nargs="?", default=default, help="its backbone takes depth; default: ResNet-50")
    add("--depths", nargs="+", type=int, default=[50, 101, 152])
    add("--types", nargs="+", help=f"layer attentions; default: {' '.join(TYPES)}")
    add("--batch", type=int, default=64, help="images a GPU, for the peak; default 64")
    add("--amp", action="store_true", help="bfloat16 autocast on the GPU")

    own[resolution]("--sizes", nargs="+", type=int, default=SIZES, help="px; default: 128 to 384")

    add = own[layout]
    add("configs", nargs="+", help="of classifiers or detectors")
    add("--batch", type=int, default=2, help="images in a batch; default 2")
    add("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)

    add = own[speed]
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--modes", nargs="+", choices=MODES, default=MODES, help="of models and detector")
    add("--quick", action="store_true", help="fewer depths, for a first look")
    add("--compiled", action="store_true", help="torch.compile too")

    for run, rounds in ((compare, 5), (layout, 7), (speed, 9)):
        own[run]("--rounds", type=int, default=rounds, help=f"of each timing; default {rounds}")
    for run in (memory, layout):
        own[run]("--size", type=int, default=224, help="side of the images; default 224")
        inspection.add_run_arguments(parsers[run])
    for run in (compare, speed):
        own[run]("--out", type=Path, default=ROOT / "work_dirs/benchmark")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure; exits with status 2 and one line if the input is wrong."""
    args = parse_args(argv)
    with exit_with_message():
        for path in args.run(args):
            print(path, flush=True)


def flops(args: argparse.Namespace) -> Iterator[str]:
    """Print what configs cost beside their plain hosts, or write it into docs/configs.md.

    Counts parameters, multiply-adds (GFLOPs) and the memory that a training step keeps for
    backward.
    """
    if args.write and args.size:
        raise ValueError("--write writes docs/configs.md, where configs have their own sizes")
    MMLogger.get_current_instance().setLevel("WARNING")  # it writes to stdout, as the tables do
    asked = tables.GROUPS if args.configs else args.groups
    paths = [Path(path) for pattern in args.configs for path in _matches(pattern)]
    paths = paths or tables.default_configs(asked)
    rows = measure_all(paths, tuple(args.size) if args.size else None)
    for group, own in tables.tables(rows).items():
        if group in asked:
            yield f"{tables.markdown(own)}\n"
            if args.write:
                tables.write(group, tables.markdown(own), whole=not args.configs)


def _matches(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(f"no config matches {pattern}")
    return found


def compare(args: argparse.Namespace) -> Iterator[Any]:
    """Compare attentions with plain ResNet-50 under one recipe, in one table.

    Parameters, multiply-adds and what a training step keeps for backward are counted; training step
    and inference are timed in one process, each network in turn with the plain one, as medians of
    ratios. Published figures are next to ours. Any classification config will do.
    """
    require_at_least(args, rounds=0, size=32, batch=2)
    missing = [str(path) for path in args.configs if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such config: {', '.join(missing)}")
    flags = [f"--rounds {args.rounds}", *["--quick"] * args.quick, *["--own-host"] * args.own_host]
    command = " ".join(["mmrla cost compare", *map(str, args.configs), *flags])
    MMLogger.get_current_instance().setLevel("WARNING")
    device = inspection.choose_device()
    batch = args.batch or (128 if device.type == "cuda" else 2)
    size, rounds = (64, min(args.rounds, 1)) if args.quick else (args.size, args.rounds)
    rows = tables.compare(
        args.configs or tables.compared_configs(), device, rounds, batch, args.size, size,
        own_host=args.own_host,
    )  # fmt: skip
    precision = "bfloat16 autocast" if device.type == "cuda" else "float32"
    timing = f"timed on batch {batch} of {size} x {size}, {rounds} rounds, {precision}"
    text = (
        f"{markdown(rows)}\n\n`{command}`; {device_name(device)}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; counted at {args.size} x "
        f"{args.size}, {timing if rounds else 'not timed'}." + f" {args.note}".rstrip()
    )
    yield f"\n{text}"
    yield save_rows("compare", rows, args.out, device)
    if args.write:
        replace_part(ROOT / "docs/attentions.md", "compare", text)


def save_rows(part: str, rows: Sequence[dict], out: Path, device: torch.device) -> Path:
    """Write ``<part>_<device>_torch<version>.csv``; returns its path."""
    version = torch.__version__.split("+")[0]
    return inspection.write_csv(out / f"{part}_{device_name(device)}_torch{version}.csv", rows)


def memory(args: argparse.Namespace) -> Iterator[Any]:
    """Measure the memory of layer attentions against the depth of their host.

    The table of appendix B.2 of the MRLA paper: parameters, FLOPs and memory of MLA, MRLA-base and
    MRLA-light beside the plain network. Measured are what a training forward keeps for backward, an
    image, and on a GPU the peak of a training step, which is out of memory where it says so.
    """
    types = _check_types(args.types)
    require_at_least(args, batch=1, size=1)
    device = inspection.choose_device(args.device)
    cfg = networks.read_config(args.config, args.cfg_options)
    backbone = networks.plain_model(cfg.model).backbone
    backbone.pop("init_cfg", None)
    cls = MODELS.get(backbone.type)
    if "depth" not in inspect.signature(cls.__init__).parameters:
        raise ValueError(f"{args.config}: its backbone {cls.__name__} takes no depth")
    cases = list(product(sorted(set(args.depths)), ("plain", *types)))
    scope = cfg.get("default_scope", "mmengine")
    rows = []
    for depth, name in (progress := tqdm(cases, unit="network")):
        progress.set_postfix_str(f"{depth} {name}")
        own = copy.deepcopy(backbone)
        own.update(depth=depth, layer_attention=None if name == "plain" else dict(type=name))
        networks.seed_everything(args.seed)
        with DefaultScope.overwrite_default_scope(scope):
            row = memory_row(MODELS.build(own).to(device), args.batch, args.size, args.amp)
        rows.append({"depth": depth, "layer_attention": name, **row})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    yield memory_table(rows)
    on = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    panels = {
        "kept for backward, MiB an image": lines_of(rows, "layer_attention", "kept_mib_per_image")
    }
    if on:
        label = f"peak of a step, MiB, batch {args.batch}{', bfloat16' if args.amp else ''}"
        panels[label] = lines_of(rows, "layer_attention", "peak_mib")
    title = f"{backbone.type.removeprefix('mmrla.')} at {args.size} px: memory against depth{on}"
    ticks = {row["depth"]: str(row["depth"]) for row in rows}
    figure = lines_figure(ticks, panels, "depth of the network, layers", title)
    stem = f"{args.out}/memory_vs_depth_{Path(args.config).stem}"
    yield save(figure, f"{stem}.png")
    yield inspection.write_csv(f"{stem}.csv", rows)


def _check_types(asked: list[str] | None) -> list[str]:
    """Names in the registry.

    Raises:
        ValueError: One is not there.
    """
    LAYER_ATTENTIONS.import_from_location()
    known = LAYER_ATTENTIONS.module_dict
    for name in asked or ():
        if name not in known:
            raise ValueError(
                f"--types: unknown layer attention {name!r}; allowed: {', '.join(sorted(known))}"
            )
    return list(dict.fromkeys(asked)) if asked else [name for name in TYPES if name in known]


def resolution(args: argparse.Namespace) -> Iterator[Path]:
    """Draw the GFLOPs of layer attention against the input's resolution, beside its plain host.

    Fig. 5 of the MRLA paper, there for CeiT-T + MRLA-light. GFLOPs are multiply-adds, as in
    docs/configs.md; neither images nor weights change them.
    """
    sizes = sorted(set(args.sizes))
    if len(sizes) < 2 or sizes[0] < 1:
        raise ValueError(f"--sizes must be two or more sides above 0, got {args.sizes}")
    common = dict(
        options=args.cfg_options, seed=args.seed, device=inspection.choose_device(args.device)
    )
    network = networks.build_network(args.config, args.checkpoint, **common)
    if not layer_attentions(network.backbone):
        raise ValueError(f"{args.config}: the backbone has no layer attention to count")
    plain = networks.build_network(args.config, plain=True, **common)
    networks.share_weights(network.model, plain.model)
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
    figure = lines_figure(
        {size**2: f"{size}²" for size in sizes},
        {
            "GFLOPs of the backbone": {
                f"with {network.label}": columns["whole_gflops"],
                "plain": columns["plain_gflops"],
            },
            "GFLOPs of layer attention": {
                "added to the network, norms around it too": columns["added_gflops"],
                "inside the attention, element-wise too": columns["inside_attention_gflops"],
            },
        },
        "input resolution, px (axis even in pixels)",
        f"{network.name}: multiply-adds against resolution (linear in pixels: R² = {fit:.4f})",
    )
    stem = f"{args.out}/flops_vs_resolution_{network.stem}"
    yield save(figure, f"{stem}.png")
    yield inspection.write_csv(f"{stem}.csv", rows)


def layout(args: argparse.Namespace) -> Iterator[Any]:
    """Time networks in NCHW and in channels_last, in float32 and in bfloat16 autocast.

    The whole network but a detector's heads, a training step (forward and backward) and inference.
    Layouts take turns in one process: a machine that slows down slows both.
    """
    require_at_least(args, batch=1, size=1, rounds=1)
    device = inspection.choose_device(args.device)
    if "bfloat16" in args.precisions:
        warn_of_slow_bfloat16()
    rows = []
    for config, precision in tqdm(list(product(args.configs, args.precisions)), unit="row"):
        timed: dict[str, Timed] = {}
        for name, memory_format in LAYOUTS.items():
            network = networks.build_network(
                config, options=args.cfg_options, seed=args.seed, device=device
            )
            if name == "channels_last":
                use_channels_last(network.model)
            images = torch.rand(args.batch, 3, args.size, args.size, device=device)
            images = images.to(memory_format=memory_format)

            def forward(model: Any = network.model, images: torch.Tensor = images) -> torch.Tensor:
                maps = networks.extract_features(model, images)
                return sum(out.float().square().mean() for out in maps)

            timed[name] = Timed(network.model, forward, device, precision == "bfloat16")
        row = dict(network=network.name, batch=args.batch, precision=precision)
        for what, step in (("train", "gradients"), ("infer", "infer")):
            steps = {name: getattr(one, step) for name, one in timed.items()}
            seconds = side_by_side(steps, args.rounds, device, warm_up=1)
            for name, spent in seconds.items():
                row[f"{what} {name} ms"] = round(1e3 * median(spent), 1)
            row[f"{what} ratio"] = round(ratio(seconds, "channels_last", "NCHW"), 2)
        rows.append(row)
    yield markdown(rows)
    yield inspection.write_csv(args.out / "layout_speed.csv", rows)


def speed(args: argparse.Namespace) -> Iterator[Any]:
    """Time MRLA beside the plain network: backbones, along depth, a detector.

    Runs tests of the backends' parity first and times nothing if one fails. Every comparison is
    side by side in one process; ratios are medians over rounds. Writes CSV files named by device
    and torch version, a Markdown table and pictures. On a CPU, OMP_NUM_THREADS=1 makes times
    steadier; operations on a GPU are timed by ``mmrla check-gpu``.
    """
    require_at_least(args, rounds=1)
    MMLogger.get_instance("mmrla", log_level="WARNING")
    require_parity()
    torch.backends.cudnn.benchmark = True
    device = inspection.choose_device()
    results: dict[str, list[Row]] = {}
    for part in args.parts:
        yield f"\n{part}"
        if part == "models":
            rows = measure(device, args.rounds, args.quick, args.compiled, args.modes)
        elif part == "scaling":
            rows = measure_scaling(device, args.rounds, args.quick)
        else:
            rows = measure_detector(device, args.rounds, args.modes)
        if not rows:
            yield f"nothing to measure on {device.type} in {', '.join(args.modes)}"
            continue
        results[part] = rows
        yield markdown(rows)
        yield save_rows(part, rows, args.out, device)
    if not results:
        return
    title = f"{device_name(device)}, torch {torch.__version__}"
    text = [f"# {title}", *(f"## {part}\n\n{markdown(rows)}" for part, rows in results.items())]
    if "models" in results:
        table = markdown(targets(results["models"], device))
        text.insert(1, f"## Targets\n\n{table}")
        yield f"\n{table}"
    (args.out / "benchmark.md").write_text("\n\n".join(text) + "\n")
    yield args.out / "benchmark.md"
    yield from draw(results, args.out, title)
