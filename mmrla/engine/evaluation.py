"""COCO metrics computed by faster-coco-eval, if it is installed."""

from __future__ import annotations

from typing import Any
from unittest import mock

from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric

from mmrla.registry import METRICS


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
