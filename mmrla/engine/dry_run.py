"""``--dry-run``: everything a run builds before its first iteration, in a temporary folder."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from tempfile import TemporaryDirectory
from unittest import mock

from mmengine.config import Config
from mmengine.registry import MODELS, VISBACKENDS, init_default_scope
from mmengine.runner import Runner

from mmrla.engine.config_check import build_parts, check_registered
from mmrla.engine.launch import build_runner, check_weights, init_cpu_distributed

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

    Args:
        cfg: The config, after all options; not changed.
        splits: Which of ``'train'``, ``'val'``, ``'test'`` the run uses.

    Returns:
        One line that lists the parts that were built.

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
