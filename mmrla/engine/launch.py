"""Configs, options and processes of ``mmrla train`` and ``mmrla test``."""

from __future__ import annotations

import argparse
import datetime
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.runner import Runner

from mmrla.checkpoints import load_file, state_dict_of
from mmrla.checkpoints.atomic import latest_intact
from mmrla.configs import config_path, list_configs
from mmrla.engine.config_check import OptionAction, check_config, read_config
from mmrla.engine.data_check import (
    check_data,
    datasets_of,
    evaluators,
    set_data_root,
    type_name,
)
from mmrla.engine.evaluator_check import check_evaluators, warn_of_unchecked
from mmrla.engine.strategy import use_one_process


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
        _add_hook(cfg, type="mmrla.LogIntervalHook")
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


# Where parts of a model name files of weights: init_cfg, older arguments, and teachers.
_WEIGHTS = ("checkpoint", "pretrained", "teacher_ckpt")


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


def init_cpu_distributed(cfg: Config) -> None:
    """Start gloo if processes were launched and there is no GPU.

    mmengine's own start-up selects a CUDA device, which fails there; it skips itself when a
    process group exists. With GPUs nothing happens here and mmengine starts nccl.

    Args:
        cfg: The config, whose ``launcher`` tells whether processes were launched. If gloo is
            started, ``model_wrapper_cfg`` gets the settings needed to run without a GPU.
    """
    if cfg.launcher == "none" or torch.cuda.is_available() or dist.is_initialized():
        return
    # mmengine names a CUDA device to DDP, unless the config says something else.
    default = dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
        device_ids=None,
    )
    cfg.model_wrapper_cfg = {**default, **(cfg.get("model_wrapper_cfg") or {})}
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner, including the model.

    Args:
        cfg: A config as :func:`load_config` returns it, with ``work_dir``; if there is no GPU, a
            ``mmrla.TrimHeapHook`` is added; without a launcher, its ``strategy`` is removed.

    Returns:
        mmengine's Runner, or the class named by ``runner_type``; ``train()`` and ``test()`` start
        it.
    """
    if not torch.cuda.is_available():
        _add_hook(cfg, type="mmrla.TrimHeapHook")
    if "runner_type" in cfg:
        from mmengine.registry import RUNNERS

        use_one_process(cfg)
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def _add_hook(cfg: Config, **hook: object) -> None:
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), hook]


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
    _add_hook(cfg, type="mmrla.ChannelsLastHook", enabled=channels_last)


def check_weights(cfg: Config) -> None:
    """Check every load of the run, after reading a local file safely once.

    Args:
        cfg: The config of the run, changed in place: gets a ``mmrla.CheckLoadHook``. The file is
            the one it loads or resumes from, if any. A run that resumes without naming a file
            continues from the newest intact one in its work dir.

    Raises:
        CheckpointError: The file cannot be read without running code from it, or at all.
        FileNotFoundError: A local file does not exist.
    """
    allowed = list(cfg.get("allow_missing", ()))
    _add_hook(cfg, type="mmrla.CheckLoadHook", allow_missing=allowed)
    path = cfg.get("load_from")
    if path is None and cfg.get("resume"):
        path = cfg.load_from = latest_intact(cfg.work_dir)
    if path is not None and "://" not in path:
        state_dict_of(load_file(path))


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Make a test run draw its predictions, in place.

    Args:
        cfg: Of a detector or a classifier.
        args: ``show``: in a window, for ``wait_time`` seconds; ``show_dir``: into this folder of
            the work dir.
    """
    if cfg.get("default_scope") == "mmpretrain":
        cfg.default_hooks.visualization = dict(
            type="mmrla.ClassificationVisHook",
            enable=True,
            interval=1,
            show=args.show,
            wait_time=args.wait_time,
            out_dir=args.show_dir and str(Path(cfg.work_dir, args.show_dir)),
        )
    else:
        from mmdet.engine.hooks.utils import trigger_visualization_hook

        trigger_visualization_hook(cfg, args)


def use_tta(cfg: Config) -> None:
    """Make a test run average over augmented images, in place.

    Args:
        cfg: Defines ``tta_model`` and ``tta_pipeline``. Without them each image is evaluated
            unchanged and mirrored; a detector's boxes are merged by NMS at an IoU of 0.5.

    Raises:
        ValueError: The detector predicts masks and the config has no ``tta_model``: mmdet only
            merges boxes. Or the test set has no pipeline.
    """
    classifies = cfg.get("default_scope") == "mmpretrain"
    datasets = [dataset for _, dataset in datasets_of(cfg, ["test"])]
    if not datasets or not all("pipeline" in dataset for dataset in datasets):
        raise ValueError("--tta: test_dataloader.dataset has no pipeline")
    if "tta_model" not in cfg:
        if (cfg.model.get("roi_head") or {}).get("mask_head") is not None:
            raise ValueError(
                "--tta: mmdet merges only boxes, and this detector predicts masks too; leave them "
                "out with --cfg-options model.roi_head.mask_head=None test_evaluator.metric=bbox"
            )
        nms = dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
        cfg.tta_model = (
            dict(type="mmpretrain.AverageClsScoreTTA")
            if classifies
            else dict(type="DetTTAModel", tta_cfg=nms)
        )
    pipeline = cfg.get("tta_pipeline")
    for dataset in datasets:
        *steps, pack = dataset.pipeline
        if not classifies:
            # Results are mirrored back by what is noted of each image.
            pack = {**pack, "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape",
                                          "scale_factor", "flip", "flip_direction")}  # fmt: skip
        flips = [dict(type="RandomFlip", prob=prob) for prob in (1.0, 0.0)]
        both = dict(type="TestTimeAug", transforms=[flips, [pack]])
        dataset.pipeline = [*steps, both] if pipeline is None else pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def prediction_writer(cfg: Config, path: str) -> BaseMetric:
    """A metric that writes all predictions of a test run to a pickle file."""
    if cfg.get("default_scope") == "mmpretrain":
        return DumpResults(out_file_path=path)
    from mmdet.evaluation import DumpDetResults

    return DumpDetResults(out_file_path=path)
