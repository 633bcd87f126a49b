"""Checks of a run's config: a misspelt key or a wrong type gives an error of one line."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    init_default_scope,
)
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmrla.engine.data.classes import check_classes
from mmrla.engine.data.config import datasets_of, evaluators, type_name
from mmrla.engine.run.runner import build_runner, check_weights, init_cpu_distributed
from mmrla.layers.checks import check_count

# What mmengine's runner takes from a config, and what tools read beside it.
_TOP = {"custom_imports", "runner_type", "model_wrapper_cfg", "allow_missing", "strategy",
        "find_unused_parameters", *inspect.signature(Runner).parameters} - {"cfg"}  # fmt: skip
# Those of them that are no dicts or lists. A config's own variables are mostly such values too.
_SCALARS = ("work_dir", "load_from", "resume", "launcher", "log_level", "default_scope",
            "experiment_name", "runner_type", "find_unused_parameters")  # fmt: skip
# Of a dataloader, what mmengine takes out before torch's sees the rest.
_LOADER = frozenset({"type", "dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn",
                     "num_batch_per_epoch", "seed"})  # fmt: skip

# mmdet's transforms that move boxes and leave masks where they were.
_BOXES_ALONE = frozenset({"Mosaic", "MixUp", "RandomShift"})
# Where parts of a model name files of weights: init_cfg, older arguments, and teachers.
_WEIGHTS = ("checkpoint", "pretrained", "teacher_ckpt")


def check_config(cfg: Config, splits: Iterable[str]) -> None:
    """Raise on misspelt keys and wrong types; builds nothing."""
    splits = tuple(splits)
    for key in sorted(cfg.keys() - _TOP):
        nested = isinstance(cfg[key], (Mapping, list))
        close = difflib.get_close_matches(key, _TOP if nested else _SCALARS, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"unknown key {key!r} of the config; did you mean {close[0]!r}?")
    _mapping(cfg.get("model"), "model")
    for split in splits:
        loader = f"{split}_dataloader"
        if cfg.get(loader) is None:
            if split == "train":
                raise TypeError(f"{loader} must be a dict, got {cfg.get(loader)!r}")
            continue
        _check_loader(_mapping(cfg[loader], loader), loader)
        _check_masks(cfg[loader].get("dataset"), f"{loader}.dataset")
    if "train" in splits:
        _check_train_cfg(_mapping(cfg.get("train_cfg"), "train_cfg"))
        optimizer = _mapping(cfg.get("optim_wrapper"), "optim_wrapper")
        if "constructor" not in optimizer:
            _mapping(optimizer.get("optimizer"), "optim_wrapper.optimizer")
    schedulers = cfg.get("param_scheduler") or ()
    if not isinstance(schedulers, (Mapping, Sequence)) or isinstance(schedulers, str):
        raise TypeError(f"param_scheduler must be a dict or a list of them, got {schedulers!r}")
    for key in ("param_scheduler", "custom_hooks", *(f"{split}_evaluator" for split in splits)):
        parts = cfg.get(key) or ()
        for index, part in enumerate(() if isinstance(parts, (Mapping, str)) else parts):
            if isinstance(part, str):
                raise TypeError(f"{key}[{index}] must be a dict, got the string {part!r}")
    check_classes(cfg, splits)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a dict, got {value!r}")
    return value


def _unknown(key: str, where: str, allowed: Iterable[str]) -> ValueError:
    allowed = sorted(allowed)
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
    return ValueError(f"unknown key {key!r} of {where}; {hint}")


def _check_loader(loader: Mapping[str, Any], where: str) -> None:
    allowed = _LOADER | set(inspect.signature(DataLoader).parameters)
    for key in loader:
        if key not in allowed and not key.startswith("_"):
            raise _unknown(key, where, allowed)
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        value = loader.get(key, 1)
        none = value is None and key == "batch_size"
        if not none and (type(value) is not int or value < least):
            raise TypeError(f"{where}.{key} must be an int from {least}, got {value!r}")


def _check_masks(dataset: Any, where: str, after: tuple[tuple[str, Any], ...] = ()) -> None:
    """Raise ValueError if masks are loaded and a later step moves only boxes.

    ``after``: steps of wrappers around the dataset, with their places. The result would be an
    IndexError or masks of other objects.
    """
    if not isinstance(dataset, Mapping):
        return
    own = enumerate(dataset.get("pipeline") or ())
    steps = (*((f"{where}.pipeline[{index}]", step) for index, step in own), *after)
    _check_masks(dataset.get("dataset"), f"{where}.dataset", steps)
    for index, inner in enumerate(dataset.get("datasets") or ()):
        _check_masks(inner, f"{where}.datasets[{index}]", steps)
    with_masks = any(isinstance(step, Mapping) and step.get("with_mask") for _, step in steps)
    place, step = next((s for s in steps if type_name(s[1]) in _BOXES_ALONE), ("", None))
    if with_masks and step is not None:
        raise ValueError(
            f"{place}: {type_name(step)} moves boxes but not masks, and masks "
            "are loaded; use CachedMosaic or CachedMixUp, or load only boxes (with_mask=False)"
        )


def _parameters(cls: type) -> set[str] | None:
    """Parameters of a constructor, including those passed to base classes; None: any."""
    found: set[str] = set()
    for ancestor in cls.__mro__:
        if "__init__" not in vars(ancestor):
            continue
        parameters = inspect.signature(ancestor).parameters
        kinds = inspect.Parameter
        found |= {n for n, p in parameters.items() if p.kind is not kinds.VAR_KEYWORD}
        if not any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
            return found
    return None


def _check_train_cfg(train_cfg: Mapping[str, Any]) -> None:
    by_epoch = train_cfg.get("by_epoch", True)
    kind = train_cfg.get("type", "EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop")
    loop = LOOPS.get(kind) if isinstance(kind, str) else kind
    if loop is None:
        raise ValueError(f"train_cfg: unknown type {kind!r}")
    parameters = _parameters(loop)
    if parameters is not None:
        allowed = {"type", "by_epoch", *parameters} - {"runner", "dataloader"}
        for key in train_cfg:
            if key not in allowed and not key.startswith("_"):
                raise _unknown(key, "train_cfg", allowed)
    for name in ("max_epochs", "max_iters", "val_interval"):
        if train_cfg.get(name) is not None:
            check_count(f"train_cfg.{name}", train_cfg[name])


def check_schedule(cfg: Config) -> None:
    """Raise ValueError if a learning-rate scheduler would begin after the last epoch."""
    last = (cfg.get("train_cfg") or {}).get("max_epochs")
    schedulers = cfg.get("param_scheduler") or ()
    schedulers = (schedulers,) if isinstance(schedulers, Mapping) else schedulers
    for index, scheduler in enumerate(schedulers):
        begin = scheduler.get("begin", 0)
        if last is not None and scheduler.get("by_epoch", True) and begin >= last:
            raise ValueError(
                f"param_scheduler[{index}] ({scheduler['type']}) begins at epoch {begin}, but "
                f"train_cfg.max_epochs={last}; a shorter run needs a shorter schedule, such as "
                f"--cfg-options param_scheduler.{index}.begin=0"
            )


def _check_initial_weights(node: object, where: str) -> None:
    """Raise FileNotFoundError if a part of the model names a missing local checkpoint."""
    if isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            _check_initial_weights(value, f"{where}[{index}]")
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        local = key in _WEIGHTS and isinstance(value, str) and value and "://" not in value
        if local and not Path(value).is_file():
            raise FileNotFoundError(f"{where}.{key}: no such file: {Path(value).absolute()}")
        _check_initial_weights(value, f"{where}.{key}")


def check_processes(launcher: str) -> None:
    """Raise ValueError if the launcher starts more processes than this node has GPUs.

    Without a GPU any number of processes can run on the CPU, with the ``pytorch`` launcher.
    """
    gpus = torch.cuda.device_count()
    if launcher in ("slurm", "mpi") and gpus == 0:
        raise ValueError(
            f"--launcher {launcher} needs GPUs and this node has none; on CPU use "
            "tools/dist_train.sh (launcher pytorch)"
        )
    variable = {"slurm": "SLURM_NTASKS_PER_NODE", "mpi": "OMPI_COMM_WORLD_LOCAL_SIZE"}.get(
        launcher, "LOCAL_WORLD_SIZE"
    )
    processes = int(os.environ.get(variable, 1))
    if processes < 1:
        raise ValueError(f"the number of processes must be at least 1, got {processes}")
    if gpus and processes > gpus:
        raise ValueError(
            f"{processes} processes requested on a node with {gpus} GPU(s); allowed: 1 to "
            f"{gpus} (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')})"
        )


# The others would open a run on some server.
_LOCAL_BACKENDS = ("LocalVisBackend", "TensorboardVisBackend")


def prepare_runner(cfg: Config, splits: Iterable[str], dry_run: bool) -> Runner | None:
    """Check the weights of a run and build its runner.

    A dry run only prints what :func:`build_only` builds, and there is no runner.
    """
    if dry_run:
        print(build_only(cfg, splits))
        return None
    check_weights(cfg)
    init_cpu_distributed(cfg)
    return build_runner(cfg)


def build_only(cfg: Config, splits: Iterable[str]) -> str:
    """Build everything a run builds, and discard it.

    Model, datasets, samplers, loaders, evaluators, hooks, visualizer, optimizer and schedulers are
    built. No weights are read, no image is loaded, and nothing is left on the disk. Of visualizer
    backends that log to a server only the name is checked.

    Raises:
        ValueError: The config of a part is invalid; parts may also raise TypeError, KeyError and
            others.
    """
    splits = tuple(splits)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    # First what names the place in the config where it fails.
    network = MODELS.build(cfg.model)
    build_parts(cfg, network, splits)
    cfg = copy.deepcopy(cfg)
    cfg.launcher = "none"
    cfg.log_level = "WARNING"
    visualizer = cfg.get("visualizer") or {}
    for index, backend in enumerate(visualizer.get("vis_backends") or ()):
        check_registered(VISBACKENDS, backend, f"visualizer.vis_backends[{index}]")
    if visualizer.get("vis_backends"):
        visualizer["vis_backends"] = [
            backend
            for backend in visualizer["vis_backends"]
            if str(backend.get("type")).rpartition(".")[2] in _LOCAL_BACKENDS
        ]
    # Most of the time would go into formatting the config for logs that nobody reads.
    with TemporaryDirectory() as folder, mock.patch.object(Config, "pretty_text", ""):
        cfg.work_dir = folder
        if visualizer:
            visualizer["name"] = folder  # mmengine keeps one of each name, whatever it is asked
        runner = build_runner(cfg)
        sizes = []
        for split in splits:
            # A run may do without validation.
            if cfg.get(f"{split}_dataloader") is not None:
                loop = getattr(runner, f"{split}_loop")
                sizes.append(f"{split} {len(loop.dataloader.dataset)}")
        if "train" in splits and isinstance(runner, Runner):
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            if runner.param_schedulers is not None:
                runner.build_param_scheduler(runner.param_schedulers)
        parts = ["evaluators", "hooks", "visualizer"]
        if "train" in splits:
            parts = ["optimizer", "schedule", *parts]
    model = type(network).__name__
    return (
        f"dry run: fine are config, data (images: {', '.join(sizes)}), loaders, {model}, "
        f"{', '.join(parts[:-1])} and {parts[-1]}; weights were not read"
    )


def build_parts(cfg: Config, model: Any, splits: Iterable[str]) -> None:
    """Build everything except the model and discard it; no annotations are read.

    Raises:
        ValueError: The config of a part is invalid; the message names the part.
    """
    for split in splits:
        for place, dataset in datasets_of(cfg, [split]):
            with _naming(place):
                DATASETS.build({**dataset, "lazy_init": True})
        for place, evaluator in evaluators(cfg, split):
            check_registered(METRICS, evaluator, place)
    for index, hook in enumerate(cfg.get("custom_hooks") or ()):
        check_registered(HOOKS, hook, f"custom_hooks[{index}]")
    if "train" in splits:
        if "constructor" not in cfg.optim_wrapper:
            check_registered(OPTIMIZERS, cfg.optim_wrapper.optimizer, "optim_wrapper.optimizer")
        with quiet_logger(), _naming("optim_wrapper"):
            build_optim_wrapper(model, cfg.optim_wrapper)
        schedulers = cfg.get("param_scheduler") or ()
        schedulers = [schedulers] if isinstance(schedulers, Mapping) else schedulers
        for index, scheduler in enumerate(schedulers):
            check_registered(PARAM_SCHEDULERS, scheduler, f"param_scheduler[{index}]")


def check_registered(registry: Any, cfg: Any, where: str) -> None:
    """Raise TypeError unless ``cfg`` is a dict, ValueError unless its type is registered."""
    kind = _mapping(cfg, where).get("type") if not inspect.isclass(cfg) else cfg
    # As build does: a name without a prefix is looked for in the default scope.
    with registry.switch_scope_and_registry(None) as scoped:
        if kind is None or (isinstance(kind, str) and scoped.get(kind) is None):
            raise ValueError(f"{where}: unknown type {kind!r}")


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Prefix errors of a part's constructor with its place in the config."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{where}: {text}") from error


@contextmanager
def quiet_logger() -> Iterator[None]:
    """Without the lines that mmengine logs for each parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)
