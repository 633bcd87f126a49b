"""Hooks that mmrla's tools add to a run, and COCO metrics computed by faster-coco-eval."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmengine.dist import master_only
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmpretrain.engine import VisualizationHook

from mmrla.analysis import LayerAttentionRecorder, record_layer_attention
from mmrla.analysis.modules import eval_mode
from mmrla.checkpoints.files import CheckpointError, state_dict_of
from mmrla.checkpoints.report import allowed_heads, compare
from mmrla.compat.heap import give_back_free_memory
from mmrla.engine.network import extract_features, preprocess
from mmrla.loads import unwrapped
from mmrla.registry import HOOKS, METRICS


@HOOKS.register_module()
class CheckLoadHook(Hook):
    """Reports each checkpoint that the runner loads, and stops if it does not fit.

    mmengine loads with ``strict=False``. A test run and a resumed one need every tensor;
    fine-tuning (``load_from``) may omit the parts given by
    :func:`mmrla.checkpoints.report.allowed_heads`, and new layer attentions. Keys are converted to
    the model's names first, so the report describes exactly what is loaded.

    Args:
        allow_missing: Patterns of keys that may be missing.

    Raises:
        mmrla.checkpoints.files.CheckpointError: It does not fit.
    """

    priority = "VERY_HIGH"

    def __init__(self, allow_missing: Sequence[str] = ()) -> None:
        self.allow_missing = tuple(allow_missing)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Called by the runner between reading a checkpoint and filling the model."""
        # Of spread weights a process has a part alone.
        whole = getattr(getattr(runner, "strategy", None), "unsharded", None)
        model = unwrapped(runner.model) if whole is None else whole
        state = state_dict_of(checkpoint)
        report, fitting = compare(model, state)
        # A runner that tests has no training loop built.
        fine_tuning = not runner._resume and not isinstance(runner._train_loop, (dict, type(None)))
        allowed = list(self.allow_missing)
        if fine_tuning:
            allowed += allowed_heads(report, state)
        report.require("checkpoint", allowed, model, state, fresh_mrla=fine_tuning)
        if runner._resume:
            check_optimizer(getattr(runner, "optim_wrapper", None), checkpoint.get("optimizer"))
        checkpoint["state_dict"] = fitting
        print_log(f"checkpoint: {report.summary()}", logger="current")

    def before_train(self, runner: Runner) -> None:
        """Log a message if a resumed run has nothing left to do."""
        loop = runner.train_loop
        if runner._resume and (runner.iter >= loop.max_iters or runner.epoch >= loop.max_epochs):
            print_log(
                f"The run was finished: the checkpoint is of epoch {runner.epoch} of "
                f"{loop.max_epochs}, iteration {runner.iter} of {loop.max_iters}, so nothing is "
                "trained. To train longer, raise train_cfg.max_epochs (or max_iters) and the "
                "schedulers' end",
                logger="current",
                level=logging.WARNING,
            )


def check_optimizer(wrapper: Any, saved: Any) -> None:
    """Raise CheckpointError if a checkpoint's optimizer cannot be resumed in this run.

    Args:
        wrapper: The run's optimizer wrapper; not checked if it has several optimizers.
        saved: The checkpoint's entry ``optimizer``, None if it has none.
    """
    groups = getattr(getattr(wrapper, "optimizer", None), "param_groups", None)
    if groups is None or "param_groups" not in (saved or {}):
        return
    sizes = [[len(group["params"]) for group in some] for some in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        there, here = (f"{sum(size)} tensors in {len(size)} parameter group(s)" for size in sizes)
        raise CheckpointError(
            f"--resume: the checkpoint's optimizer has {there}, this config's {here}: another "
            "optim_wrapper or another network. Resume with the config it was trained with, or "
            "start a new run from its weights: --cfg-options load_from=CHECKPOINT without --resume"
        )


@HOOKS.register_module()
class LogIntervalHook(Hook):
    """Adapts the log interval to the length of an epoch, so that a run shows progress.

    In an epoch shorter than the interval of mmengine's ``LoggerHook`` it logs ten times, or every
    iteration. On a CPU, where an iteration takes seconds, it logs at least every tenth. A shorter
    interval is kept. The commands add it unless ``default_hooks.logger`` is set on the command
    line.
    """

    def before_train(self, runner: Runner) -> None:
        """Set the interval."""
        try:
            length = len(runner.train_dataloader)
        except TypeError:  # a stream
            return
        for hook in runner.hooks:
            logs = isinstance(hook, LoggerHook)
            if logs and (hook.interval > length or not torch.cuda.is_available()):
                hook.interval = min(hook.interval, max(1, min(10, length // 10)))


@HOOKS.register_module()
class LayerAttentionVisHook(Hook):
    """Draws what each layer attends to during training, as in tools/analysis.

    Every ``interval`` iterations the first images of the batch go through the network once more, in
    evaluation mode and without gradients, and the visualizer gets the picture ``layer_attention``,
    for all backends in the config, such as TensorBoard or a local folder. Training itself is not
    affected: no module hook outlives that forward, and weights stay the same bit for bit.

    Args:
        interval: Iterations between pictures.
        heads: Heads to draw for each group of layers, in addition to their mean: their indices, or
            their number, spread evenly.
        max_images: Number of images of the batch to average over.

    Raises:
        ValueError: A number below 1; before training, a network without layer attention or
            with weights sharded by FSDP; with the first picture, a head that a group does not have.
        TypeError: Before training, a layer attention that does not support recording.
    """

    priority = "LOW"

    def __init__(
        self, interval: int = 500, heads: Sequence[int] | int = 3, max_images: int = 4
    ) -> None:
        for name, value in (("interval", interval), ("max_images", max_images)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(heads, int) and heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        self.interval = interval
        self.heads = heads
        self.max_images = max_images

    def before_train(self, runner: Runner) -> None:
        """Refuse a network that cannot be recorded, before training starts."""
        if hasattr(getattr(runner, "strategy", None), "unsharded"):
            raise ValueError("LayerAttentionVisHook: no process has all weights with FSDP")
        LayerAttentionRecorder(unwrapped(runner.model))

    @master_only
    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Called by the runner after each iteration."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        from mmrla.analysis.figures import as_array, layer_attention_figure

        model = unwrapped(runner.model)
        with eval_mode(model), torch.no_grad(), record_layer_attention(model) as rec:
            images = preprocess(model, data_batch["inputs"][: self.max_images])
            extract_features(model, images)
        step = runner.iter + 1
        count = len(rec.groups[0].scores)
        title = f"What each layer attends to\niteration {step}, mean of {count} training images"
        figure = layer_attention_figure(rec.groups, self.heads, title)
        runner.visualizer.add_image("layer_attention", as_array(figure), step=step)


@HOOKS.register_module()
class TrimHeapHook(Hook):
    """Returns free memory held by the C library to the system after each epoch.

    The CPU's counterpart of mmengine's ``EmptyCacheHook``. Between tensors of changing sizes glibc
    keeps more and more free space, especially in validations, so resident memory grows although
    nothing leaks. It does nothing with other C libraries. The tools add it if there is no GPU.
    """

    priority = "LOWEST"

    def after_train_epoch(self, runner: Runner) -> None:
        """Called by the runner after each epoch of training."""
        give_back_free_memory()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Called by the runner after each validation."""
        give_back_free_memory()


@HOOKS.register_module()
class ClassificationVisHook(VisualizationHook):
    """mmpretrain's hook, with pictures named after the image's folder and name.

    With class folders, file names often repeat, and pictures would overwrite each other.

    Args:
        **kwargs: As in :class:`mmpretrain.engine.VisualizationHook`.
    """

    def _draw_samples(
        self, batch_idx: int, data_batch: dict, data_samples: Sequence[Any], step: int = 0
    ) -> None:
        named = []
        for sample in data_samples:
            sample = sample.clone()
            if "img_path" in sample:
                path = Path(sample.img_path)
                sample.set_metainfo(dict(img_path=f"{path.parent.name}_{path.name}"))
            named.append(sample)
        super()._draw_samples(batch_idx, data_batch, named, step=step)


@METRICS.register_module()
class FasterCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric`` with matching and accumulation in compiled code.

    The same numbers, results files and arguments; see `faster-coco-eval
    <https://github.com/MiXaiLL76/faster_coco_eval>`_, an optional dependency:
    ``pip install "mmrla[fast-eval]"``. Switch a config over by
    ``val_evaluator.type=mmrla.FasterCocoMetric test_evaluator.type=mmrla.FasterCocoMetric``.

    Args:
        *args: As in :class:`mmdet.evaluation.CocoMetric`.
        **kwargs: Likewise. ``use_mp_eval`` is not supported and not needed.

    Raises:
        ModuleNotFoundError: faster-coco-eval is not installed.
        ValueError: ``use_mp_eval=True``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            from faster_coco_eval import COCOeval_faster
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "FasterCocoMetric needs faster-coco-eval, which is not installed: "
                'pip install "mmrla[fast-eval]", or use type="CocoMetric"'
            ) from error
        super().__init__(*args, **kwargs)
        if self.use_mp_eval:
            raise ValueError(
                "FasterCocoMetric has no use_mp_eval=True; use type='CocoMetric' for that"
            )
        self._evaluator = COCOeval_faster

    def compute_metrics(self, results: list) -> dict[str, float]:
        """As the ancestor's, with the other evaluator in place of pycocotools'."""
        # It takes pycocotools' objects, so that nothing but the evaluator changes.
        with mock.patch.object(coco_metric, "COCOeval", self._evaluator):
            return super().compute_metrics(results)
