"""The config of a run: options, reading, and settings that fit it to data and machine."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mmrla.configs import config_path, list_configs
from mmrla.engine.data.config import (
    check_data,
    check_evaluators,
    evaluators,
    set_data_root,
    type_name,
    warn_of_unchecked,
)
from mmrla.engine.run.checks import (
    _check_initial_weights,
    check_config,
    check_processes,
    check_schedule,
)
from mmrla.engine.run.runner import add_hook


class OptionAction(DictAction):
    """mmengine's ``KEY=VALUE`` options, whose values may also be Python with dicts in it.

    mmengine's own parser only knows lists and tuples, and would leave dicts as strings.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the options to the namespace.

        Raises:
            argparse.ArgumentError: An option has no value, or it begins like a dict or a list of
                dicts but is not one.
        """
        for option in values:
            key, equals, value = option.partition("=")
            if not key or not equals:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {option!r}")
            if value.lstrip(" ([").startswith("{"):
                try:
                    parsed = ast.literal_eval(value.strip())
                except (ValueError, SyntaxError) as error:
                    raise argparse.ArgumentError(
                        self,
                        f"{key}: not a dict or a list of dicts in Python's spelling: {value}; "
                        f"write \"{key}=[{{'type': 'LinearLR', 'end': 500}}]\", or set single "
                        f"values, as in {key}.0.end=500",
                    ) from error
                options = dict(getattr(namespace, self.dest, None) or {})
                setattr(namespace, self.dest, {**options, key: parsed})
            else:
                super().__call__(parser, namespace, [option], option_string)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``mmrla train`` and ``mmrla test`` share."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints")
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="point every dataset and evaluator of the config at DIR, which holds annotations/ "
        "and the image folders (COCO), or train/ and val/ (ImageNet)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=OptionAction,
        metavar="KEY=VALUE",
        help="override settings of the config, such as train_dataloader.batch_size=4; lists as "
        "key=\"[a,b]\", dicts as key=\"{'type': 'SGD', 'lr': 0.1}\"",
    )
    add_layout_argument(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="who starts the processes; dist_train.sh and slurm_train.sh set it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config, data, processes and model, then stop without writing anything",
    )
    # torchrun's predecessors pass this.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_layout_argument(
    parser: argparse.ArgumentParser,
    default: str = "channels_last for convolutional networks in mixed precision, else NCHW",
) -> None:
    """``--channels-last`` and ``--no-channels-last``; None is the default."""
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help=f"keep images and weights in channels_last, or in NCHW; default: {default}",
    )


def load_config(args: argparse.Namespace, splits: Iterable[str]) -> Config:
    """Read the config and apply the options; check files and processes.

    Args:
        args: With ``config`` and the attributes of :func:`add_common_arguments`.
        splits: Which of ``'train'``, ``'val'``, ``'test'`` the run uses.

    Returns:
        The config, ready for :func:`build_runner`.

    Raises:
        FileNotFoundError: The config (see :func:`find_config`), a data folder or an annotation file
            does not exist.
        TypeError: A part of the config is of the wrong type.
        ValueError: The config cannot be read or has a misspelt key; there are more processes than
            GPUs, or no GPU although the launcher needs one.
    """
    args.config = find_config(args.config)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / Path(args.config).stem)
    check_config(cfg, splits := tuple(splits))
    set_layout(cfg, args.channels_last)
    if not any(key.startswith("default_hooks.logger") for key in args.cfg_options or ()):
        add_hook(cfg, type="mmrla.LogIntervalHook")
    fit_classes(cfg)
    fit_workers(cfg)
    check_schedule(cfg)
    check_processes(args.launcher)
    check_data(cfg, splits)
    check_evaluators(cfg, splits)
    warn_of_unchecked(cfg, splits)
    if "train" in splits:
        _check_initial_weights(cfg.get("model"), "model")
    return cfg


def read_config(path: str) -> Config:
    """Read a config file.

    Raises:
        ValueError: It, or one of its bases, cannot be read; the message of one line names the file.
        FileNotFoundError: A base does not exist.
    """
    try:
        return Config.fromfile(path)
    except Exception as error:  # configs are Python, which may raise anything
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        text = " ".join(str(error).split())[:300]
        raise kind(f"config {path}: {type(error).__name__}: {text}") from error


def find_config(path: str) -> str:
    """The file of a config: ``path`` itself or, if it does not exist, the shipped one of that name.

    Raises:
        FileNotFoundError: There is neither; the message gives similar names.
    """
    if Path(path).is_file():
        return path
    name = path.removesuffix(".py")
    shipped = list_configs()
    for candidate in (name, name.removeprefix("mmrla::"), name.removeprefix("configs/")):
        if candidate in shipped:
            return config_path(candidate)
    message = f"no such config: {Path(path).absolute()}"
    names = {c.name: str(c) for c in sorted(Path(path).parent.glob("*.py"))}
    for known in reversed(shipped):
        names.setdefault(f"{known.rpartition('/')[2]}.py", config_path(known))
    wanted = Path(path).name if path.endswith(".py") else f"{Path(path).name}.py"
    similar = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if similar:
        message += f"; did you mean {', '.join(names[name] for name in similar)}?"
    raise FileNotFoundError(message)


def fit_classes(cfg: Config) -> None:
    """Adapt a classifier's data preprocessor and metrics to its number of classes, in place.

    Mixup needs this number, and top-5 accuracy needs five classes.
    """
    classes = ((cfg.get("model") or {}).get("head") or {}).get("num_classes")
    if cfg.get("default_scope") != "mmpretrain" or classes is None:
        return
    if "num_classes" in (cfg.get("data_preprocessor") or {}):
        cfg.data_preprocessor.num_classes = classes
    for split in ("val", "test"):
        for _, evaluator in evaluators(cfg, split):
            if "topk" in evaluator:
                topk = evaluator["topk"]
                asked = (topk,) if isinstance(topk, int) else tuple(topk)
                evaluator["topk"] = tuple(k for k in asked if k == 1 or k <= classes)


def fit_workers(cfg: Config) -> None:
    """Remove settings that only apply to workers from loaders without workers, in place.

    torch refuses ``persistent_workers`` and ``prefetch_factor`` at ``num_workers=0``, and most
    configs inherit them.
    """
    for split in ("train", "val", "test"):
        loader = cfg.get(f"{split}_dataloader") or {}
        if loader.get("num_workers", 0) == 0:
            for key in ("persistent_workers", "prefetch_factor"):
                loader.pop(key, None)


def set_layout(cfg: Config, channels_last: bool | None) -> None:
    """Add a ``mmrla.ChannelsLastHook`` to a run, in place.

    Args:
        cfg: The config of the run, after all options.
        channels_last: Argument of the hook; None: from the config, else the hook's default.
    """
    hooks = list(cfg.get("custom_hooks") or ())
    others = [hook for hook in hooks if type_name(hook) != "ChannelsLastHook"]
    if channels_last is None and len(others) < len(hooks):
        return
    cfg.custom_hooks = others
    add_hook(cfg, type="mmrla.ChannelsLastHook", enabled=channels_last)
