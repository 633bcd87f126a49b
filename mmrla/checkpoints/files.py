"""Reads checkpoint files without running code from them."""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNSAFE_ENV_VAR = "MMRLA_UNSAFE_LOAD"

# Wrappers around a state dict.
_WRAPPERS = ("state_dict", "model", "model_state", "network")
# Averaged copies beside it, as timm and DeiT save them. mmengine swaps the two on saving: its
# ``state_dict`` is the averaged copy, and ``ema_state_dict`` holds the weights of the optimizer.
_AVERAGED = ("state_dict_ema", "model_ema")
_MMENGINE_RAW = "ema_state_dict"


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the message gives the reason and a fix."""


class _Inert:
    """Stands for an object of a checkpoint that nobody needs: accepts anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Reads tensors and mmengine's log histories, which torch's own safe reader refuses.

    Histories are built from arrays by code of mmrla, not of the file. ``getattr`` and what a
    history's class does with its state are what a file could use to reach code; neither is run
    here. No other name is looked up, so no code of a file can run.
    """

    _allowed = re.compile(
        r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|device|\w+Storage)"
        r"|torch\.(b?float|u?int)\d+|torch\.bool|torch\.storage\.\w+Storage"
        r"|collections\.(OrderedDict|Counter|defaultdict)"
        r"|numpy(\.\w+)*\.(_reconstruct|scalar|ndarray|dtype|\w+DType)"
    )

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if self._allowed.fullmatch(full):
            return super().find_class(module, name)
        if full == "_codecs.encode":
            return _bytes_of
        if full == "mmengine.logging.history_buffer.HistoryBuffer":
            return _history_class()
        if full == "mmengine.config.config.ConfigDict":
            return dict
        if full in ("builtins.getattr", "__builtin__.getattr"):
            return _Inert
        raise pickle.UnpicklingError(f"Unsupported global: {full}")


class _Pickle:
    """What ``torch.load`` takes as ``pickle_module``."""

    __name__ = "pickle"
    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _Unpickler(file, **kwargs).load()


def _local_path(path: str) -> Path:
    """Local path of a checkpoint, downloaded first if it is a URL."""
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
                digest = re.search(r"-([0-9a-f]{8,})\.", target.name)
                prefix = digest[1] if digest else None
                torch.hub.download_url_to_file(path, str(target), hash_prefix=prefix)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"cannot download {path}: {error}") from error
        return target
    return Path(path)


def _bytes_of(text: str, encoding: str) -> bytes:
    """What protocol 2 writes bytes as."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"Unsupported global: _codecs.encode to {encoding!r}")
    return text.encode("latin1")


@functools.lru_cache(maxsize=1)
def _history_class() -> type:
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:  # without mmengine nobody resumes
        return _Inert

    class History(HistoryBuffer):
        def __setstate__(self, state: Any) -> None:
            # Its own keeps functions that the file names, for all histories.
            self._set_default_statistics()
            for key in ("max_length", "_log_history", "_count_history"):
                if key in state:
                    setattr(self, key, state[key])
            self.__class__ = HistoryBuffer

    return History


@contextmanager
def safe_loading() -> Iterator[None]:
    """Make mmengine read every checkpoint like :func:`load_file` within this context.

    mmengine itself runs code from files that torch's safe reader refuses. Log histories are kept,
    so that training can be resumed. ``open-mmlab://`` and other addresses that only mmengine
    supports are refused; download the file and pass its path.
    """
    from mmengine.runner.checkpoint import CheckpointLoader

    def load_from_mmrla(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
        return load_file(filename)

    before = CheckpointLoader._schemes
    CheckpointLoader._schemes = dict.fromkeys(before, load_from_mmrla)
    try:
        yield
    finally:
        CheckpointLoader._schemes = before


def load_file(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU, running no code from it.

    Args:
        path: A local file, ``torchvision://NAME``, an http(s) address (kept in torch's hub folder),
            or another address supported by mmengine's file backends, such as ``s3://...``.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: A local file does not exist.
        CheckpointError: The file is empty, truncated, a web page, not a checkpoint, or needs
            objects other than tensors (``MMRLA_UNSAFE_LOAD=1`` loads these, which may run code).
    """
    text = str(path)
    if "://" in text and not text.startswith(("torchvision://", "http://", "https://")):
        from mmengine.fileio import get

        try:
            content = get(text)
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{text}: cannot be read; download it and name the file"
            ) from error
        return _read(content, text)
    local = _local_path(text)
    if not local.is_file():
        raise FileNotFoundError(f"no such checkpoint: {local.absolute()}")
    try:
        return _read(local, text)
    except CheckpointError as error:
        if "://" not in text:
            raise
        # Otherwise the corrupt download would stay cached and every later load would fail.
        local.unlink()
        raise CheckpointError(f"{error}; removed {local}, try again") from error


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
    try:
        if os.environ.get(UNSAFE_ENV_VAR) == "1":
            return torch.load(_opened(source), map_location="cpu", weights_only=False)
        try:
            return torch.load(_opened(source), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(
                _opened(source), map_location="cpu", weights_only=False, pickle_module=_Pickle()
            )
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise CheckpointError(
                f"{name}: holds objects besides tensors, and reading them can run code. If you "
                f"trust where it comes from, set {UNSAFE_ENV_VAR}=1. ({_first_line(error)})"
            ) from error
        raise CheckpointError(f"{name}: not a torch checkpoint ({_first_line(error)})") from error
    except Exception as error:  # a damaged pickle can raise anything
        kind = "truncated or damaged" if head.startswith(b"PK") else "not a torch checkpoint"
        raise CheckpointError(f"{name}: {kind} ({_first_line(error)})") from error


def _opened(source: Path | bytes) -> Path | io.BytesIO:
    return source if isinstance(source, Path) else io.BytesIO(source)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def state_dict_of(checkpoint: Any, weights: str = "default") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrappers and the ``module.`` of DDP.

    Args:
        checkpoint: The result of :func:`load_file`: a state dict, or a dict that contains one under
            ``state_dict`` or ``model``.
        weights: If a checkpoint contains two copies: ``'default'`` takes the one a test run would
            load, ``'averaged'`` the moving average if there is one, ``'raw'`` the other.

    Returns:
        Tensors by key, in the file's order.

    Raises:
        CheckpointError: It contains no named tensors.
        ValueError: ``weights`` is invalid.
    """
    if weights not in ("default", "averaged", "raw"):
        raise ValueError(f"weights must be 'default', 'averaged' or 'raw', got {weights!r}")
    names: tuple[str, ...] = _WRAPPERS
    if weights == "averaged":
        names = (*_AVERAGED, *_WRAPPERS)
    elif weights == "raw":
        names = (_MMENGINE_RAW, *_WRAPPERS)
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
