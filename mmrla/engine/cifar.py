"""CIFAR training with the data on the device: a run takes minutes on a GPU.

The network, optimizer and schedule come from a config of ``configs/cifar``; only the work that
mmengine's runner does image by image in Python is done here: shuffling, crops and flips.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, DefaultScope
from torch import Tensor

import mmrla
from mmrla.analysis.pages import spread
from mmrla.datasets.cifar import as_arrays


class Split(NamedTuple):
    """Images ``[N, 3, 32, 32]`` of uint8 in RGB, and labels ``[N]``."""

    images: Tensor
    labels: Tensor


def load_split(dataset_cfg: dict, device: torch.device, count: int | None = None) -> Split:
    """Read a config's dataset onto the device: all, or the same ``count`` images each time.

    Raises:
        ValueError: There are fewer than ``count``.
    """
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        images, labels = as_arrays(DATASETS.build(dataset_cfg))
    if count is not None:
        if count > len(labels):
            raise ValueError(f"asked for {count} images, the dataset has {len(labels)}")
        drawn = np.random.default_rng(0).permutation(len(labels))[:count]
        images, labels = images[drawn], labels[drawn]
    return Split(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device),
        torch.from_numpy(labels).to(device),
    )


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by its own offset, padded with zeros, and mirror it if ``flips`` is set.

    Args:
        images: ``[B, C, H, W]``.
        offsets: ``[B, 2]``, y and x of each crop in the padded image, 0 ... 2 * padding.
        flips: ``[B]`` of bool.
        padding: Pixels of zeros on each side.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = offsets[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)
    index = torch.arange(batch, device=images.device)[:, None, None]
    # Advanced indices apart from each other: their dimensions come first.
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _schedules_of(cfg: Config) -> list[Any]:
    """The schedules of a config of CIFAR.

    Raises:
        ValueError: The dataset is not CIFAR, or one of them is not by epochs.
    """
    dataset, schedules = cfg.train_dataloader.dataset, cfg.param_scheduler
    schedules = schedules if isinstance(schedules, list) else [schedules]
    by_epochs = all(s.get("by_epoch", True) for s in schedules)
    if "CIFAR" not in str(dataset.get("type")) or not by_epochs:
        raise ValueError(
            f"{cfg.filename}: not a config of CIFAR whose learning rate follows epochs, got "
            f"dataset {dataset.get('type')!r} and param_scheduler {cfg.param_scheduler!r}"
        )
    return schedules


class Trainer:
    """One network of a CIFAR config on one device.

    Args:
        cfg: The config.
        seed: For weights, shuffling, augmentation and drop path.
        device: Where everything runs.
        epochs: Overrides the config; the learning-rate schedule is scaled in proportion.
        amp: bfloat16 autocast.
        compiled: torch.compile the step, with CUDA graphs on a GPU.
        channels_last: The layout of images and weights; False: NCHW.
        steps: Per epoch, needed for a schedule by iterations (``convert_to_iter_based``).

    Raises:
        ValueError: The dataset is not CIFAR, or the schedule is not one by epochs.
    """

    def __init__(
        self, cfg: Config, seed: int, device: torch.device, epochs: int | None = None,
        amp: bool = False, compiled: bool = False, channels_last: bool = True, steps: int = 1,
    ) -> None:  # fmt: skip
        self.cfg, self.seed, self.device, self.amp = cfg, seed, device, amp
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        schedules = _schedules_of(cfg)
        full = cfg.train_cfg.max_epochs
        self.epochs = epochs or full
        torch.manual_seed(seed)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            model = MODELS.build(dict(cfg.model, data_preprocessor=None))
            model.init_weights()
        self.model = model.to(device=device, memory_format=self.layout)
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper).optimizer
        self.schedulers = [self._scheduler(s, self.epochs / full, steps) for s in schedules]
        statistics = cfg.data_preprocessor
        self.mean = torch.tensor(statistics.mean, device=device)[:, None, None]
        self.std = torch.tensor(statistics.std, device=device)[:, None, None]
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self._loss = torch.compile(self._eager_loss, mode=mode) if compiled else self._eager_loss

    def _scheduler(self, cfg: dict, share: float, steps: int) -> Any:
        """Build a schedule with the config's times multiplied by ``share``."""
        cfg = {"end": self.cfg.train_cfg.max_epochs, **cfg}
        for key in {"begin", "end", "T_max", "milestones"} & cfg.keys():
            # Halves up, so that two steps of a short schedule stay two.
            cfg[key] = (np.array(cfg[key]) * share + 0.5).astype(int).tolist()
        if cfg.get("convert_to_iter_based"):
            cfg["epoch_length"] = steps
        return PARAM_SCHEDULERS.build({**cfg, "optimizer": self.optimizer})

    def _logits(self, images: Tensor) -> Tensor:
        inputs = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(inputs, mode="tensor").float()

    def _eager_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(images), labels)

    def _batches(self, data: Split, epoch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Its own generator: all networks of a seed see the same batches, whatever they draw.
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(data.labels), generator=generator)
        offsets = torch.randint(9, (len(order), 2), generator=generator).to(self.device)
        flips = (torch.rand(len(order), generator=generator) < 0.5).to(self.device)
        order = order.to(self.device)
        # The rest of an epoch is left out: a compiled step wants one shape.
        for start in range(0, len(order) - size + 1, size):
            part = order[start : start + size]
            at = slice(start, start + size)
            images = crop_and_flip(data.images[part], offsets[at], flips[at])
            yield images, data.labels[part]

    def train_epoch(self, data: Split, epoch: int) -> float:
        """One epoch; returns the mean loss."""
        self.model.train()
        losses = []
        for images, labels in self._batches(data, epoch, self.cfg.train_dataloader.batch_size):
            loss = self._loss(images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach().clone())
            self._step(by_epoch=False)
        self._step(by_epoch=True)
        if not losses:
            raise ValueError(
                f"{len(data.labels)} training images do not make one batch of "
                f"{self.cfg.train_dataloader.batch_size}"
            )
        return torch.stack(losses).mean().item()

    def _step(self, by_epoch: bool) -> None:
        for scheduler in self.schedulers:
            if scheduler.by_epoch is by_epoch:
                scheduler.step()

    @torch.no_grad()
    def accuracy(self, data: Split) -> float:
        """Top-1 accuracy in percent."""
        self.model.eval()
        right = torch.zeros((), device=self.device)
        for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True):
            right += (self._logits(images).argmax(1) == labels).sum()
        return 100 * right.item() / len(data.labels)


def run(
    cfg: Config, log: Path, seed: int, device: torch.device, epochs: int | None = None,
    amp: bool = False, compiled: bool = False, channels_last: bool = True,
    images: int | None = None, name: str | None = None, eval_interval: int = 1,
) -> None:  # fmt: skip
    """Train one network with one seed and write the settings and each epoch as a line of JSON.

    A finished log of the same settings is kept, so an interrupted series can continue; one of other
    settings is a ValueError. Arguments up to ``channels_last`` are those of :class:`Trainer`;
    ``images`` is the number to train on, ``name`` the network's in the log, and the last epoch
    always has an accuracy.

    Raises:
        ValueError: The log is of other settings.
    """
    _schedules_of(cfg)  # before any data are read
    epochs = epochs or cfg.train_cfg.max_epochs
    settings = dict(
        config=name or Path(cfg.filename).stem, images=images, seed=seed, epochs=epochs, amp=amp,
        compiled=compiled, channels_last=channels_last,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(), torch=torch.__version__, mmrla=mmrla.__version__,
        config_and_data=_digest(cfg),
    )  # fmt: skip
    if log.exists():
        lines = read_log(log)
        # What earlier logs do not tell had one value, or cannot be known.
        earlier = dict(
            channels_last=True, images=None, compiled=False,
            config_and_data=settings["config_and_data"],
        )  # fmt: skip
        if lines and earlier | lines[0] != settings:
            raise ValueError(f"{log} has other settings, {lines[0]}; these are {settings}")
        if len(lines) == 1 + epochs:
            return
    if compiled:
        # torch.compile gives up a function that it has compiled for eight networks.
        torch.compiler.reset()
    train = load_split(cfg.train_dataloader.dataset, device, images)
    steps = len(train.labels) // cfg.train_dataloader.batch_size
    trainer = Trainer(cfg, seed, device, epochs, amp, compiled, channels_last, steps)
    test = load_split(cfg.test_dataloader.dataset, device)
    log.parent.mkdir(parents=True, exist_ok=True)
    # On a CPU the process's own time, which other work on the machine changes little.
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    with _attention() if on_cpu and amp else nullcontext(), log.open("w") as file:
        print(json.dumps(settings), file=file, flush=True)
        for epoch in range(epochs):
            start = clock()
            lr = trainer.optimizer.param_groups[0]["lr"]
            loss = trainer.train_epoch(train, epoch)
            seconds = (clock() - start) / (torch.get_num_threads() if on_cpu else 1)
            line = dict(epoch=epoch + 1, lr=lr, loss=round(loss, 4), seconds=round(seconds, 1))
            if (epoch + 1) % eval_interval == 0 or epoch + 1 == epochs:
                line["top1"] = round(trainer.accuracy(test), 2)
            print(json.dumps(line), file=file, flush=True)


def _digest(cfg: Config) -> str:
    """Of what a config says about training, and of where its data is."""
    keys = ("model", "data_preprocessor", "optim_wrapper", "param_scheduler")
    told = [
        *map(cfg.get, keys),
        cfg.train_cfg.max_epochs,  # a schedule is scaled from this length
        cfg.train_dataloader.batch_size,
    ]
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        root = Path(loader.dataset.get("data_root") or "").resolve()
        told.append({**loader.dataset, "data_root": root})
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _attention() -> AbstractContextManager:
    """Plain matrix products: on a CPU, flash attention in bfloat16 is slow in its backward pass."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # before torch 2.3
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def read_log(log: Path) -> list[dict[str, Any]]:
    """The settings, then a dict per epoch, without a truncated last line.

    Raises:
        ValueError: Another line is not JSON.
    """
    found = []
    lines = log.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{log}: line {number} is not JSON: {error}") from error
    return found


def table(folder: Path) -> str:
    """Markdown: a row for each config and length with finished logs in ``folder``.

    Accuracy is the last epoch's. The digest is that of the logs' text, in the order of seeds.
    """
    groups: dict[tuple[str, int], dict[int, tuple[list[dict], bytes]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = read_log(path)
        if lines and len(lines) == 1 + lines[0]["epochs"]:
            key = (lines[0]["config"], lines[0]["epochs"])
            groups.setdefault(key, {})[lines[0]["seed"]] = (lines, path.read_bytes())
    rows = [
        "| config | epochs | seeds | top-1, mean ± standard deviation | of each seed | s / epoch "
        "| device, torch | logs' SHA-256 |",
        "|---" * 8 + "|",
    ]
    for (config, epochs), runs in groups.items():
        runs = dict(sorted(runs.items()))
        final = [lines[-1]["top1"] for lines, _ in runs.values()]
        seconds = mean(line["seconds"] for lines, _ in runs.values() for line in lines[1:])
        digest = hashlib.sha256(b"".join(text for _, text in runs.values())).hexdigest()[:12]
        first = next(iter(runs.values()))[0][0]
        precision = ", bf16" if first["amp"] else ""
        cells = [
            config, str(epochs), ", ".join(map(str, runs)), spread(final, ".2f"),
            ", ".join(f"{value:.2f}" for value in final), f"{seconds:.0f}",
            f"{first['device']} x {first['threads']}{precision}, {first['torch']}", f"`{digest}`",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
