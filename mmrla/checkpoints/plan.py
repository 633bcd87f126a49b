"""Whether the MRLA parts of frozen stages stay trainable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmrla.checkpoints.files import load_file, state_dict_of
from mmrla.checkpoints.report import is_mrla_key

WARM_START = "WarmStart"


def is_warm_start(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` is ``dict(type='mmrla.WarmStart', ...)``: name, prefix or class.

    Raises:
        ValueError: It is one of several in a list: the others would undo it.
    """
    if isinstance(init_cfg, (list, tuple)):
        if any(is_warm_start(entry) for entry in init_cfg):
            raise ValueError("WarmStart must be the only init_cfg, not one of a list")
        return False
    if not isinstance(init_cfg, Mapping):
        return False
    kind = init_cfg.get("type", "")
    return getattr(kind, "__name__", str(kind)).removeprefix("mmrla.") == WARM_START


def keeps_mrla_trainable(init_cfg: Any) -> bool:
    """Tell from a host's ``init_cfg`` whether freezing leaves its MRLA parts out.

    That has to be known when the network is built: DDP and optimizers look at what is trainable
    before weights are loaded. ``freeze_mrla`` in the ``init_cfg`` says it; by default a look into
    the checkpoint does, at its keys alone, where it lies on this machine. ``torchvision://`` and
    files that are not here (yet) count as plain networks.

    Args:
        init_cfg: What the host was given.

    Returns:
        True for a warm start from a checkpoint without MRLA weights, unless the user froze them.

    Raises:
        ValueError: ``freeze_mrla`` is none of True, False and None.
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
    return not has_mrla(path)


def has_mrla(path: str) -> bool:
    """Whether a local checkpoint holds weights of a layer attention."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # an old format or more than tensors: read it with all its checks
        checkpoint = load_file(path)
    return any(is_mrla_key(key) for key in state_dict_of(checkpoint))
