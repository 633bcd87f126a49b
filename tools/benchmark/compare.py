"""Attentions side by side with plain ResNet-50 under one recipe, as one table.

Parameters, multiply-adds and what a training step keeps for backward are counted; training step and
inference are timed in one process, each network in turn with the plain one, as medians of ratios.
Published figures stand beside ours. Any classification config will do.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, Row, device_name, markdown, save
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import mmrla.registry  # noqa: F401
from mmrla.analysis import activation_memory, complexity
from mmrla.analysis.pages import replace_part
from mmrla.analysis.published import PUBLISHED, REASONS, Published
from mmrla.commands.gpu_timing import ratio, side_by_side
from mmrla.engine.network import without_layer_attention

DEFAULTS = ("imagenet/resnet50_*_in1k.py", "imagenet/densenet*_in1k.py")
PLAIN = ROOT / "configs/imagenet/resnet50_plain_in1k.py"
# What a config's name says behind the network, in the order of rows; others follow by name.
NAMES = {
    "plain": "ResNet-50",
    "se": "+ SE",
    "eca": "+ ECA",
    "cbam": "+ CBAM",
    "a2": "+ A2",
    "aa": "+ AA",
    "ba": "+ BA",
    "tdam": "+ TDAM",
    "nl": "+ 1 NL",
    "gc1": "+ 1 GC",
    "gc": "+ all GC",
    "dia": "+ DIA",
    "rla-g": "+ RLA_g",
    "dla": "+ DLA-light",
    "dla-base": "+ DLA-base",
    "kcla": "+ KCLA",
    "mrla": "+ MRLA-light",
    "mrla-base": "+ MRLA-base",
    "mrla_se": "+ MRLA-light + SE",
    "mrla_eca": "+ MRLA-light + ECA",
    "densenet121": "DenseNet-121",
    "densenet161": "DenseNet-161",
    "densenet169": "DenseNet-169",
    "densenet201": "DenseNet-201",
}


TOLERANCE = 0.01


def name_of(path: Path) -> str:
    """``eca`` of ``resnet50_eca_in1k.py``, ``densenet161`` of ``densenet161_in1k.py``."""
    stem = re.sub(r"_(in1k|cifar\d+)$", "", path.stem)
    return stem.removeprefix("resnet50_")


def _position(path: Path) -> tuple[int, str]:
    name, names = name_of(path), list(NAMES)
    return (names.index(name) if name in names else len(names), path.stem)


def default_configs() -> list[Path]:
    """All ResNet-50 and DenseNet configs for ImageNet."""
    found = (path for pattern in DEFAULTS for path in (ROOT / "configs").glob(pattern))
    return sorted(found, key=_position)


class Classifier(nn.Module):
    """A config's classifier, from images to class scores."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
            self.model = MODELS.build(copy.deepcopy(cfg.model))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images ``[B, 3, H, W]``."""
        return self.model(x, mode="tensor")


class Timed:
    """What is timed of a network, on one batch."""

    def __init__(self, cfg: Config, device: torch.device, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.device, self.amp = device, device.type == "cuda"
        layout = torch.channels_last if self.amp else torch.contiguous_format
        self.model = Classifier(cfg).to(device, memory_format=layout)
        self.x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
        self.labels = torch.randint(cfg.model.head.num_classes, (batch,), device=device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=1e-4, momentum=0.9)

    def _scores(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(self.x)

    def train_step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self._scores().float(), self.labels).backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        """One forward in evaluation mode."""
        self.model.eval()
        self._scores()


def over_plain(other: Timed, plain: Timed, step: str, rounds: int) -> str:
    """The time of a method of :class:`Timed` over the plain network's, timed in turn."""
    steps = {"plain": getattr(plain, step), "other": getattr(other, step)}
    seconds = side_by_side(steps, rounds, plain.device, warm_up=1)
    return f"{ratio(seconds, 'other', 'plain'):.2f}"


def count(cfg: Config, size: int) -> tuple[int, int, int]:
    """Parameters, multiply-adds, and bytes an image that a training step keeps for backward."""
    model = Classifier(cfg)
    found = complexity(model, torch.rand(1, 3, size, size))
    return found.params, found.macs, activation_memory(model, torch.empty(2, 3, size, size))


def difference(name: str, params: int, macs: int) -> str:
    """Where ours is more than 1% away from what is published, and why."""
    published = PUBLISHED.get(name, Published())
    told = []
    for column, ours, stated in (
        ("params", params / 1e6, published.params),
        ("GFLOPs", macs / 1e9, published.gflops),
    ):
        if stated is None:
            continue
        if abs(ours / float(stated) - 1) > TOLERANCE:
            reason = REASONS.get((name, column), "not explained yet")
            told.append(f"{column} {ours / float(stated) - 1:+.1%}: {reason}")
    return "; ".join(told)


def link_of(path: Path, base: Path) -> str:
    """A Markdown link to a config from a file in ``base``."""
    return f"[{path.name}]({Path(os.path.relpath(path, base)).as_posix()})"


def compare(
    paths: Sequence[Path],
    device: torch.device,
    rounds: int,
    batch: int,
    size: int,
    timed_size: int,
    base: Path = ROOT / "docs",
    own_host: bool = False,
) -> list[Row]:
    """A row for each config beside plain ResNet-50.

    Args:
        paths: Configs of classifiers.
        device: Where training step and inference are timed.
        rounds: Of each comparison; 0 leaves out timing.
        batch: Images of a timed step.
        size: Height and width of the image that parameters, multiply-adds and memory are counted
            with.
        timed_size: That of the timed ones.
        base: Links are relative to this folder.
        own_host: Beside the first config's network without layer attention instead.
    """
    plain_cfg = Config.fromfile(paths[0] if own_host else PLAIN)
    if own_host:
        plain_cfg.model = without_layer_attention(plain_cfg.model)
    plain_kept = count(plain_cfg, size)[2]
    plain = Timed(plain_cfg, device, batch, timed_size) if rounds else None
    rows: list[Row] = []
    for path in paths:
        cfg, name = Config.fromfile(path), name_of(path)
        params, macs, kept = count(cfg, size)
        published = PUBLISHED.get(name, Published(source=""))
        row: dict[str, Any] = {
            "network": NAMES.get(name, name),
            "params, M": f"{params / 1e6:.2f}",
            "published params, M": published.params,
            "GFLOPs": f"{macs / 1e9:.2f}",
            "published GFLOPs": published.gflops,
            "kept, MiB/image": f"{kept / 2**20:.1f}",
            "kept over plain": f"{kept / plain_kept:.2f}",
            "training step over plain": None,
            "inference over plain": None,
            "published top-1": published.top1,
            "source": published.source,
            "differs by more than 1%": difference(name, params, macs),
            "config": link_of(path, base),
        }
        if plain is not None and path.resolve() == PLAIN:
            row |= {"training step over plain": "1.00", "inference over plain": "1.00"}
        elif plain is not None:
            other = Timed(cfg, device, batch, timed_size)
            for step, column in (("train_step", "training step"), ("infer", "inference")):
                row[f"{column} over plain"] = over_plain(other, plain, step, rounds)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def conditions(args: argparse.Namespace, device: torch.device, batch: int, size: int) -> str:
    """What a table was measured with."""
    timing = "not timed"
    if args.rounds:
        timing = f"timed on batch {batch} of {size} x {size}, {args.rounds} rounds, " + (
            "bfloat16 autocast" if device.type == "cuda" else "float32"
        )
    return (
        f"`{args.command}`; {device_name(device)}, Python {platform.python_version()}, torch "
        f"{torch.__version__}; counted at {args.size} x {args.size}, {timing}."
        + (f" {args.note}" if args.note else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help=f"default: {' '.join(DEFAULTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="of each timing; 0: do not time")
    parser.add_argument("--quick", action="store_true", help="one round on images of 64 x 64")
    parser.add_argument("--size", type=int, default=224, help="of the image that is counted with")
    parser.add_argument("--batch", type=int, help="of timed steps; default 2, on a GPU 128")
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs/benchmark")
    parser.add_argument(
        "--own-host", action="store_true",
        help="plain is the first config's network without its layer attention, not ResNet-50",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="a sentence on how the machine was used")
    parser.add_argument("--write", action="store_true", help="the table into docs/attentions.md")
    args = parser.parse_args()
    for name, least in (("rounds", 0), ("size", 32), ("batch", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    missing = [str(path) for path in args.configs if not path.is_file()]
    if missing:
        parser.error(f"no such config: {', '.join(missing)}")
    args.command = "python tools/benchmark/compare.py"
    if args.configs:
        args.command += f" {' '.join(map(str, args.configs))}"
    args.command += f" --rounds {args.rounds}" + (" --quick" if args.quick else "")
    args.command += " --own-host" if args.own_host else ""
    if args.quick:
        args.rounds = min(args.rounds, 1)
    MMLogger.get_current_instance().setLevel("WARNING")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or (128 if device.type == "cuda" else 2)
    timed_size = 64 if args.quick else args.size
    docs = ROOT / "docs/attentions.md"
    rows = compare(
        args.configs or default_configs(), device, args.rounds, batch, args.size, timed_size,
        own_host=args.own_host,
    )  # fmt: skip
    text = f"{markdown(rows)}\n\n{conditions(args, device, batch, timed_size)}"
    print(f"\n{text}")
    print(save("compare", rows, args.out, device))
    if args.write:
        replace_part(docs, "compare", text)


if __name__ == "__main__":
    main()
