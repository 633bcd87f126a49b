"""Measure the memory of layer attentions against the depth of their host.

The table of appendix B.2 of the MRLA paper: parameters, FLOPs and memory of MLA, MRLA-base and
MRLA-light beside the plain network. Measured are what a training forward keeps for backward, an
image, and on a GPU the peak of a training step, which is out of memory where it says so.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import math
from pathlib import Path

import torch
from mmengine.registry import DefaultScope
from torch import nn
from tqdm import tqdm

from mmrla.analysis import activation_memory, complexity
from mmrla.analysis.figures import memory_figure, save
from mmrla.engine.errors import exit_with_message
from mmrla.engine.inspection import add_run_arguments, choose_device, write_csv
from mmrla.engine.network import plain_model, read_config, seed_everything
from mmrla.registry import LAYER_ATTENTIONS, MODELS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
# Of the paper's table, in its order; taken by default as far as they are registered.
TYPES = ("MLA", "MRLABase", "MRLALight")
MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "config", nargs="?", default=str(CONFIG),
        help="of a network whose backbone takes depth; default: the ImageNet ResNet",
    )  # fmt: skip
    parser.add_argument("--depths", nargs="+", type=int, default=[50, 101, 152])
    parser.add_argument("--types", nargs="+", help=f"layer attentions; default: {' '.join(TYPES)}")
    parser.add_argument("--size", type=int, default=224, help="side of the image; default 224")
    parser.add_argument(
        "--batch", type=int, default=64, help="images a GPU, for the peak; default 64"
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast on the GPU")
    add_run_arguments(parser)
    return parser.parse_args()


def check_types(asked: list[str] | None) -> list[str]:
    """Names in the registry.

    Raises:
        ValueError: One is not there.
    """
    LAYER_ATTENTIONS.import_from_location()
    known = LAYER_ATTENTIONS.module_dict
    if asked is None:
        return [name for name in TYPES if name in known]
    for name in asked:
        if name not in known:
            raise ValueError(
                f"--types: unknown layer attention {name!r}; allowed: {', '.join(sorted(known))}"
            )
    return list(dict.fromkeys(asked))


def peak_of_step(model: nn.Module, image: torch.Tensor, amp: bool) -> float:
    """MiB that a training step (forward, backward, SGD) takes at most; inf: more than there is."""
    device = image.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
    model.train()
    try:
        for _ in range(2):  # the first makes momenta and workspaces
            torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                out = model(image)
            out[-1].float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MIB
    except torch.cuda.OutOfMemoryError:
        return math.inf


def main() -> None:
    args = parse_args()
    with exit_with_message():
        types = check_types(args.types)
        for name in ("batch", "size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        device = choose_device(args.device)
        cfg = read_config(args.config, args.cfg_options)
        backbone = plain_model(cfg.model).backbone
        backbone.pop("init_cfg", None)
        cls = MODELS.get(backbone.type)
        if "depth" not in inspect.signature(cls.__init__).parameters:
            raise ValueError(f"{args.config}: its backbone {cls.__name__} takes no depth")
        depths = sorted(set(args.depths))
        rows: list[dict] = []
        progress = tqdm([(d, t) for d in depths for t in ("plain", *types)], unit="network")
        for depth, name in progress:
            progress.set_postfix_str(f"{depth} {name}")
            rows.append(measure(copy.deepcopy(backbone), depth, name, device, args, cfg))
    stem = args.out / f"memory_vs_depth_{Path(args.config).stem}"
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    panels = {"kept for backward, MiB an image": lines(rows, "kept_mib_per_image")}
    if on:
        label = f"peak of a step, MiB, batch {args.batch}{', bfloat16' if args.amp else ''}"
        panels[label] = lines(rows, "peak_mib")
    title = f"{backbone.type.removeprefix('mmrla.')} at {args.size} px: memory against depth"
    figure = memory_figure(depths, panels, title + (f", {on}" if on else ""))
    print(table(rows))
    print(save(figure, f"{stem}.png"))
    print(write_csv(f"{stem}.csv", rows))


def measure(
    cfg: dict, depth: int, name: str, device: torch.device, args: argparse.Namespace, whole: dict
) -> dict:
    """A row: one backbone of a depth, with one layer attention or plain."""
    cfg["depth"] = depth
    cfg["layer_attention"] = None if name == "plain" else dict(type=name)
    seed_everything(args.seed)
    with DefaultScope.overwrite_default_scope(whole.get("default_scope", "mmengine")):
        model = MODELS.build(cfg).to(device)
    one = torch.rand(1, 3, args.size, args.size, device=device)
    found = complexity(model, one)
    peak: float | str = ""
    if device.type == "cuda":
        batch = torch.rand(args.batch, 3, args.size, args.size, device=device)
        peak = peak_of_step(model, batch, args.amp)
    # Two, because batch norm has to see more than one value a channel.
    kept = activation_memory(model, one.new_empty(2, *one.shape[1:])) / MIB
    row = {
        "depth": depth,
        "layer_attention": name,
        "params_m": round(found.params / 1e6, 3),
        "gflops": round(found.macs / 1e9, 3),
        "kept_mib_per_image": round(kept, 2),
        "peak_mib": round(peak, 1) if isinstance(peak, float) else peak,
        "batch": args.batch if peak != "" else "",
    }
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def lines(rows: list[dict], key: str) -> dict[str, list[float]]:
    """Values of a column along depth, by layer attention; what ran out of memory has no point."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = float(row[key])
        found.setdefault(row["layer_attention"], []).append(
            value if math.isfinite(value) else math.nan
        )
    return found


def table(rows: list[dict]) -> str:
    """The rows as text, one peak a GPU or the words for what did not fit."""
    text = [f"{'depth':>5}  {'':<12}{'params, M':>10}{'GFLOPs':>9}{'kept, MiB/image':>17}"
            f"{'peak, MiB/GPU':>16}"]  # fmt: skip
    for row in rows:
        peak = row["peak_mib"]
        peak = "no GPU" if peak == "" else "out of memory" if math.isinf(peak) else f"{peak:.0f}"
        text.append(
            f"{row['depth']:>5}  {row['layer_attention']:<12}{row['params_m']:>10.3f}"
            f"{row['gflops']:>9.3f}{row['kept_mib_per_image']:>17.1f}{peak:>16}"
        )
    return "\n".join(text)


if __name__ == "__main__":
    main()
