"""Reading checkpoint files without running what is in them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNSAFE_ENV_VAR = "MMRLA_UNSAFE_LOAD"

# Wrappers around a state dict, the averaged copy of the weights last.
_WRAPPERS = ("state_dict", "model", "model_state", "network")
EMA_WRAPPERS = ("ema_state_dict", "state_dict_ema", "model_ema")


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the message says why and what to do."""


def _harmless_globals() -> list[Any]:
    """What mmengine's training checkpoints hold besides tensors: log histories as numpy arrays."""
    import numpy as np

    core = getattr(np, "_core", None) or np.core  # _core from NumPy 2 on
    rebuild = (core.multiarray._reconstruct, core.multiarray.scalar)
    allowed: list[Any] = [*rebuild, np.ndarray, np.dtype]
    allowed += [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1", "u1")]
    with contextlib.suppress(ImportError):
        from mmengine.logging.history_buffer import HistoryBuffer

        allowed.append(HistoryBuffer)
    # The names that older NumPy pickled them by.
    return [*allowed, *((f, f"numpy.core.multiarray.{f.__name__}") for f in rebuild)]


def _local_path(path: str) -> Path:
    """Where a checkpoint lies on this machine, downloaded first where it is a URL."""
    if path.startswith("torchvision://"):
        from mmengine.runner.checkpoint import get_torchvision_models

        urls = get_torchvision_models()
        name = path.removeprefix("torchvision://")
        if name not in urls:
            raise CheckpointError(f"{path}: torchvision has no weights of that name")
        path = urls[name]
    if path.startswith(("http://", "https://")):
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        target = folder / Path(path.split("?")[0]).name
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(path, str(target))
            except OSError as error:
                raise CheckpointError(f"cannot download {path}: {error}") from error
        return target
    return Path(path)


def load_file(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU, running no code from it.

    Args:
        path: A local file, ``torchvision://NAME``, an http(s) address (kept in torch's hub folder),
            or another address that mmengine's file backends know, such as ``s3://...``.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: A local file is not there.
        CheckpointError: The file is empty, truncated, a web page, no checkpoint, or needs objects
            besides tensors (``MMRLA_UNSAFE_LOAD=1`` loads those, and runs what is in them).
    """
    text = str(path)
    if "://" in text and not text.startswith(("torchvision://", "http://", "https://")):
        from mmengine.fileio import get

        return _read(get(text), text)
    local = _local_path(text)
    if not local.is_file():
        raise FileNotFoundError(f"no such checkpoint: {local.absolute()}")
    return _read(local, text)


def _read(source: Path | bytes, name: str) -> Any:
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(512)
    else:
        head = source[:512]
    if not head:
        raise CheckpointError(f"{name}: the file is empty")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{name}: this is a web page, not a checkpoint; a download probably got an error page"
        )
    opened = source if isinstance(source, Path) else io.BytesIO(source)
    unsafe = os.environ.get(UNSAFE_ENV_VAR) == "1"
    allow = getattr(torch.serialization, "safe_globals", None)
    context = allow(_harmless_globals()) if allow and not unsafe else contextlib.nullcontext()
    try:
        with context:
            return torch.load(opened, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        # torch says so too where the file is no pickle at all.
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{name}: holds objects besides tensors, and reading them can run code. If you "
                f"trust where it comes from, set {UNSAFE_ENV_VAR}=1. ({_first_line(error)})"
            ) from error
        raise CheckpointError(f"{name}: not a torch checkpoint ({_first_line(error)})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        kind = "truncated or damaged" if head.startswith(b"PK") else "not a torch checkpoint"
        raise CheckpointError(f"{name}: {kind} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def state_dict_of(checkpoint: Any, *, prefer_ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrappers and the ``module.`` of DDP.

    Args:
        checkpoint: What :func:`load_file` returned: a state dict, or a dict that holds one under
            ``state_dict`` or ``model``.
        prefer_ema: Take the averaged copy of the weights where there is one.

    Returns:
        Tensors by key, in the file's order.

    Raises:
        CheckpointError: There are no tensors by name in it.
    """
    names = (*EMA_WRAPPERS, *_WRAPPERS) if prefer_ema else (*_WRAPPERS, *EMA_WRAPPERS)
    found = checkpoint
    if isinstance(checkpoint, Mapping):
        for name in names:
            if _is_state_dict(checkpoint.get(name)):
                found = checkpoint[name]
                break
    if not _is_state_dict(found):
        shape = sorted(map(str, found))[:8] if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"no weights in this checkpoint: it holds {shape}")
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    # mmengine's averaged models keep a counter beside the weights.
    tensors.pop("steps", None)
    while tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors
