"""Hooks that mmrla's tools add to a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.engine import VisualizationHook

from mmrla.checkpoints.files import state_dict_of
from mmrla.checkpoints.report import allowed_heads, compare
from mmrla.registry import HOOKS


@HOOKS.register_module()
class CheckLoadHook(Hook):
    """Reports each checkpoint that the runner loads, and stops where it would not fit.

    mmengine loads with ``strict=False``. A test run and a resumed one need every tensor;
    fine-tuning (``load_from``) may leave what :func:`mmrla.checkpoints.report.allowed_heads` says,
    and fresh layer attentions. Keys are brought to the model's names first, so what is reported is
    what is loaded.

    Args:
        allow_missing: Patterns of keys that need not fit.

    Raises:
        mmrla.checkpoints.files.CheckpointError: It would not fit.
    """

    priority = "VERY_HIGH"

    def __init__(self, allow_missing: Sequence[str] = ()) -> None:
        self.allow_missing = tuple(allow_missing)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Called by the runner between reading a checkpoint and filling the model."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        state = state_dict_of(checkpoint)
        report, fitting = compare(model, state)
        # A runner that tests has no training loop built.
        fine_tuning = not runner._resume and not isinstance(runner._train_loop, (dict, type(None)))
        allowed = list(self.allow_missing)
        if fine_tuning:
            allowed += allowed_heads(report, state)
        report.require("checkpoint", allowed, model, state, fresh_mrla=fine_tuning)
        checkpoint["state_dict"] = fitting
        print_log(f"checkpoint: {report.summary()}", logger="current")


@HOOKS.register_module()
class ClassificationVisHook(VisualizationHook):
    """mmpretrain's hook, whose pictures are named by the image's folder and name.

    In a folder for each class, names alone often repeat, and pictures would overwrite each other.

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
