"""Decides whether parts of frozen stages that a plain network lacks stay trainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmrla.checkpoints.files import load_file, state_dict_of
from mmrla.checkpoints.report import is_mrla_key

WARM_START = "WarmStart"


def is_warm_start(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` is ``dict(type='mmrla.WarmStart', ...)``: name, prefix or class.

    Raises:
        ValueError: It is one of several in a list: the others would overwrite it.
    """
    if isinstance(init_cfg, (list, tuple)):
        if any(is_warm_start(entry) for entry in init_cfg):
            raise ValueError("WarmStart must be the only init_cfg, not one of a list")
        return False
    if not isinstance(init_cfg, Mapping):
        return False
    kind = init_cfg.get("type", "")
    return getattr(kind, "__name__", str(kind)).removeprefix("mmrla.") == WARM_START


def keeps_mrla_trainable(init_cfg: Any, is_own: Callable[[str], bool] = is_mrla_key) -> bool:
    """Whether freezing excludes a host's MRLA parts, according to its ``init_cfg``.

    This must be known when the network is built, because DDP and optimizers check which parameters
    are trainable before weights are loaded. ``freeze_mrla`` in the ``init_cfg`` decides; by default
    the keys of a local checkpoint do. ``torchvision://`` and files that do not exist locally (yet)
    count as plain networks.

    Raises:
        ValueError: ``freeze_mrla`` is not True, False or None.
    """
    if not is_warm_start(init_cfg):
        return False
    freeze = init_cfg.get("freeze_mrla")
    if freeze not in (None, True, False):
        raise ValueError(f"freeze_mrla must be None, True or False, got {freeze!r}")
    if freeze is not None:
        return not freeze
    path = str(init_cfg.get("checkpoint", ""))
    if "://" in path or not Path(path).is_file():
        return True
    return not _holds(path, is_own)


def _holds(path: str, is_own: Callable[[str], bool]) -> bool:
    """Whether a local checkpoint contains keys of a kind."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # an old format or more than tensors: read it with all its checks
        checkpoint = load_file(path)
    return any(is_own(key) for key in state_dict_of(checkpoint))
