"""The runner of a config: its processes, weights and outputs."""

from __future__ import annotations

import argparse
import copy
import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine import _strategy
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric, DumpResults
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmrla.checkpoints import load_file, state_dict_of
from mmrla.checkpoints.atomic import latest_intact
from mmrla.engine.data.config import datasets_of, type_name
from mmrla.registry import STRATEGIES


def add_hook(cfg: Config, **hook: object) -> None:
    """Add a hook to a run, in place."""
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), hook]


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
        add_hook(cfg, type="mmrla.TrimHeapHook")
    if "runner_type" in cfg:
        from mmengine.registry import RUNNERS

        use_one_process(cfg)
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


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
    add_hook(cfg, type="mmrla.CheckLoadHook", allow_missing=allowed)
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


@STRATEGIES.register_module()
class FSDPStrategy(_strategy.FSDPStrategy):
    """mmengine's strategy for its ``FlexibleRunner``, which trains with gloo where there is no GPU.

    A checkpoint is one file with the whole network, which any runner loads. Weight decay and
    clipping of gradients are those of one process: mmengine's strategy takes every weight for a
    flat one, and each process clips by the norm of its own part.

    Args:
        model_wrapper: As in :class:`mmengine._strategy.FSDPStrategy`; ``use_orig_params`` is always
            True.
        state_dict_cfg: Likewise, but ``'full'`` by default.
        **kwargs: Likewise.
    """

    unsharded: nn.Module
    """The network before its weights were spread, on the device ``meta``."""

    def __init__(
        self,
        *,
        model_wrapper: dict | None = None,
        state_dict_cfg: str | dict = "full",
        **kwargs: Any,
    ) -> None:
        model_wrapper = {"type": "MMFullyShardedDataParallel", **(model_wrapper or {})}
        model_wrapper["use_orig_params"] = True
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            model_wrapper["device_id"] = torch.device("cpu")  # mmengine names a GPU
        super().__init__(model_wrapper=model_wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if on_cpu:
            # FSDP would not copy what is there already, free its memory, and crash.
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """As the ancestor's; keeps names and shapes of the whole network."""
        built: nn.Module = super().build_model(model)
        empty: dict[int, Tensor] = {id(b): b.to("meta") for b in built.buffers()}
        for p in built.parameters():
            empty[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        self.unsharded = copy.deepcopy(built, empty)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        """As the ancestor's, from shapes that FSDP has not made flat."""
        wrapper = super().build_optim_wrapper(optim_wrapper, self.unsharded)
        if isinstance(wrapper, OptimWrapper):
            shards = {
                name.replace("_fsdp_wrapped_module.", ""): p
                for name, p in self.model.named_parameters()
            }
            of_whole = {id(p): shards[name] for name, p in self.unsharded.named_parameters()}
            for group in wrapper.optimizer.param_groups:
                group["params"] = [of_whole[id(p)] for p in group["params"]]
            if wrapper.clip_grad_kwargs and wrapper.clip_func is nn.utils.clip_grad_norm_:
                wrapper.clip_func = lambda _, **kwargs: self.model.clip_grad_norm_(**kwargs)
        return wrapper

    def model_state_dict(self) -> dict:
        """As the ancestor's, of plain tensors: FSDP leaves marks that are not safe to load."""
        state = super().model_state_dict()
        if self._is_full_state_dict():
            for key, value in state.items():
                state[key] = value.detach()
        return state

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """As the ancestor's, which gives torch its arguments in the order of torch 2.0."""
        own = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(own)


def use_one_process(cfg: Config) -> None:
    """Have a run that no launcher started do without a strategy for several processes, in place."""
    if cfg.launcher == "none" and "strategy" in cfg:
        cfg.strategy = dict(type="SingleDeviceStrategy")
        if type_name(cfg.get("optim_wrapper")) == "DeepSpeedOptimWrapper":
            cfg.optim_wrapper.type = "OptimWrapper"
