"""Extends mmengine's loading of weights, which does not fail if nothing matches.

``load_checkpoint``, ``init_cfg=dict(type='Pretrained', ...)`` of any part of a model, the runner,
inferencers and ``get_model`` all end in ``mmengine.runner.checkpoint.load_state_dict``. With
``strict=False``, their default, it logs keys that do not match and continues, even if no key
matches. Once mmrla is imported, it finds the prefix of a part in the checkpoint of a whole model,
and raises an error if nothing was loaded.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mmrla.compat.on_import import after_import


def unwrapped(model: Any) -> Any:
    """The network inside the wrappers of a distributed run and of test-time augmentation."""
    from mmengine.model import BaseTTAModel, is_model_wrapper

    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def fit_keys(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a state dict without any of the model's keys to the model's keys.

    Args:
        model: The module to load: a model, or any part of one.
        state: Tensors by key, or a checkpoint that holds such a dict. A part's tensors may have the
            prefix of that part in a whole model, as in a detector's checkpoint; a model may get
            its backbone's.

    Returns:
        Matching tensors, under the model's keys; ``state`` itself if it has a key of the model, or
        if nothing matches.

    Raises:
        mmrla.checkpoints.files.CheckpointError: Several parts of the checkpoint match equally well.
    """
    from mmrla.checkpoints.files import CheckpointError, state_dict_of
    from mmrla.checkpoints.report import compare
    from mmrla.compat.logging import log

    own = model.state_dict()
    if not own or not state or any(key in own for key in state):
        return state
    try:
        tensors = state_dict_of(state)
    except CheckpointError:
        return state
    prefixes = Counter(
        key[: -len(name)]
        for name, value in own.items()
        for key in tensors
        if key.endswith(f".{name}") and tensors[key].shape == value.shape
    ).most_common(2)
    name = type(model).__name__
    if prefixes:
        (prefix, count), *others = prefixes
        if others and others[0][1] == count:
            raise CheckpointError(
                f"{name}: the checkpoint has its tensors under {prefix!r} and under "
                f"{others[0][0]!r}; say which with prefix={prefix!r} in init_cfg"
            )
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        log(f"{name}: takes what has the prefix {prefix!r} in the checkpoint")
    report, fitting = compare(model, tensors)
    if not fitting:
        return state
    log(f"{name}: {report.summary()}")
    return fitting


def _extend_loading(checkpoint: ModuleType) -> None:
    load, with_prefix = checkpoint.load_state_dict, checkpoint._load_checkpoint_with_prefix

    @functools.wraps(load)
    def load_state_dict(
        module: Any, state_dict: Mapping[str, Any], strict: bool = False, logger: Any = None
    ) -> None:
        if strict:
            load(module, state_dict, strict, logger)
            return
        model = unwrapped(module)
        state_dict = fit_keys(model, state_dict)
        # Each write moves a tensor's version, also where hooks of the model rename keys.
        versions = _versions(model)
        load(module, state_dict, strict, logger)
        if state_dict and versions and _versions(model) == versions:
            raise _nothing_loaded(model, state_dict)

    @functools.wraps(with_prefix)
    def _load_checkpoint_with_prefix(prefix: str, filename: str, *args: Any, **kwargs: Any) -> Any:
        from mmrla.checkpoints.files import CheckpointError

        try:
            return with_prefix(prefix, filename, *args, **kwargs)
        except AssertionError as error:
            raise CheckpointError(f"{filename}: no key begins with prefix={prefix!r}") from error

    checkpoint.load_state_dict = load_state_dict
    checkpoint._load_checkpoint_with_prefix = _load_checkpoint_with_prefix


def _versions(model: Any) -> list[int]:
    return [
        tensor._version
        for key, tensor in model.state_dict(keep_vars=True).items()
        # torch itself fills counters of batch norms that a checkpoint lacks.
        if not key.endswith("num_batches_tracked")
        and hasattr(tensor, "_version")
        and not tensor.is_inference()
    ]


def _nothing_loaded(model: Any, state: Mapping[str, Any]) -> Exception:
    from torch import Tensor

    from mmrla.checkpoints.files import CheckpointError
    from mmrla.checkpoints.report import compare

    report, _ = compare(model, {k: v for k, v in state.items() if isinstance(v, Tensor)})
    return CheckpointError(
        f"{type(model).__name__}: nothing of the checkpoint was loaded: {report.summary()}\nThe "
        f"checkpoint's keys begin with {', '.join(list(state)[:3])}; the model's with "
        f"{', '.join(list(model.state_dict())[:3])}"
    )


def install_loads() -> None:
    """Extend mmengine's functions, now or when they are imported; idempotent."""
    after_import("mmengine.runner.checkpoint", _extend_loading)
