"""mmrla's registries: children of mmengine's, scope ``mmrla``.

mmengine imports this module when it meets the prefix ``mmrla.`` in a config, so ``custom_imports``
is not needed for the classes registered here. ``locations`` keep that import cheap: the modules are
loaded on first use.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import VISBACKENDS as MMENGINE_VISBACKENDS
from mmengine.registry import VISUALIZERS as MMENGINE_VISUALIZERS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

import mmrla  # noqa: F401  (installs the mmcv fallback before any model module loads)

__all__ = [
    "DATASETS",
    "HOOKS",
    "LAYER_ATTENTIONS",
    "LOOPS",
    "METRICS",
    "MODELS",
    "OPTIM_WRAPPERS",
    "STRATEGIES",
    "TRANSFORMS",
    "VISBACKENDS",
    "VISUALIZERS",
    "WEIGHT_INITIALIZERS",
]


def _child(name: str, parent: Registry, location: str) -> Registry:
    return Registry(name, parent=parent, scope="mmrla", locations=[location])


MODELS = _child("model", MMENGINE_MODELS, "mmrla.models")
"""Hosts, the wrapper, necks, heads and within-layer attentions."""
LAYER_ATTENTIONS = Registry("layer attention", scope="mmrla", locations=["mmrla.models"])
"""Types for ``layer_attention=dict(type=...)`` of a host.

It has no parent, so the error for an unknown name lists exactly the allowed names.
``@LAYER_ATTENTIONS.register_module()`` before a subclass of ``mmrla.layers.LayerAttention`` adds
one.
"""
WEIGHT_INITIALIZERS = _child("weight initializer", MMENGINE_WEIGHT_INITIALIZERS, "mmrla.models")
"""Types for ``init_cfg``: ``WarmStart``."""
DATASETS = _child("dataset", MMENGINE_DATASETS, "mmrla.datasets")
"""CIFAR from folders of images."""
TRANSFORMS = _child("transform", MMENGINE_TRANSFORMS, "mmrla.datasets")
"""Data transforms; mmrla has none."""
HOOKS = _child("hook", MMENGINE_HOOKS, "mmrla.engine")
"""Hooks: atomic checkpoints, the check for NaN, pictures of layer attention, ..."""
LOOPS = _child("loop", MMENGINE_LOOPS, "mmrla.engine")
"""Training loops: ``ResumableTrainLoop``."""
OPTIM_WRAPPERS = _child("optim_wrapper", MMENGINE_OPTIM_WRAPPERS, "mmrla.engine")
"""Optimizer wrappers: ``AmpOptimWrapper``, for CPUs too."""
STRATEGIES = _child("strategy", MMENGINE_STRATEGIES, "mmrla.engine")
"""How mmengine's ``FlexibleRunner`` uses several processes: ``FSDPStrategy``."""
METRICS = _child("metric", MMENGINE_METRICS, "mmrla.engine")
"""Evaluators: ``FasterCocoMetric``."""
VISUALIZERS = _child("visualizer", MMENGINE_VISUALIZERS, "mmrla.engine")
"""Visualizers; mmrla has none."""
VISBACKENDS = _child("vis_backend", MMENGINE_VISBACKENDS, "mmrla.engine")
"""Visualizer backends; mmrla has none."""
