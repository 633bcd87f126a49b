"""The configs that ship with the package, by name, and ``_base_ = 'mmrla::...'`` in others.

In a wheel they lie in ``mmrla/.mim``, where mim and mmengine look; in a checkout that folder links
to ``configs/``, ``tools/`` and ``model-index.yml`` at the top.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import sys
from fnmatch import fnmatch
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

MIM = Path(__file__).parent / ".mim"
SCOPE = "mmrla::"


def list_configs(pattern: str = "*") -> list[str]:
    """Names of the configs, sorted.

    Args:
        pattern: As in :mod:`fnmatch`, for the whole name, such as ``'mask*'`` or ``'imagenet/*'``.

    Returns:
        Names as :func:`get_config` takes them: the path below ``configs/`` without ``.py``.
    """
    folder = MIM / "configs"
    # Two levels by hand: rglob does not follow the links of a checkout before Python 3.13.
    found = [*folder.glob("*.py"), *folder.glob("[!_]*/*.py")]
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in found)
    return sorted(
        n for n in names if not n.rpartition("/")[2].startswith("_") and fnmatch(n, pattern)
    )


def config_path(name: str) -> str:
    """The file of a config.

    Args:
        name: As :func:`list_configs` gives it, with or without ``.py`` and ``mmrla::``.

    Returns:
        Its absolute path; in a checkout that of the file in ``configs/``.

    Raises:
        FileNotFoundError: There is no such config; the message names similar ones.
        ValueError: The name leads out of the folder of configs.
    """
    stem = name.removeprefix(SCOPE).removesuffix(".py")
    if Path(stem).is_absolute() or ".." in stem.replace("\\", "/").split("/"):
        raise ValueError(f"{name!r} is no name of a config: it leads out of mmrla's configs")
    path = MIM / "configs" / f"{stem}.py"
    if path.is_file():
        return str(path.resolve())  # in a checkout, the file and not the link
    known = list_configs()
    # Also where the folder was left out, or written where there is none.
    tails = {known_name.rpartition("/")[2]: known_name for known_name in reversed(known)}
    close = difflib.get_close_matches(stem.rpartition("/")[2], tails, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(tails[tail] for tail in close)}?" if close else ""
    raise FileNotFoundError(f"mmrla has no config {stem!r}{hint} (mmrla list shows all)")


def get_config(name: str) -> Config:
    """Read a config that ships with the package.

    Args:
        name: As :func:`list_configs` gives it, with or without ``.py``.

    Returns:
        mmengine's Config, with all that it inherits.

    Raises:
        FileNotFoundError: There is no such config; the message names similar ones.
    """
    from mmengine.config import Config

    return Config.fromfile(config_path(name))


_MODULE = "mmengine.config.config"


class _ConfigFinder(MetaPathFinder):
    """Waits until somebody imports mmengine's configs, which ``import mmrla`` alone does not."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module: ModuleType) -> None:
                execute(module)
                _extend(module.Config)

            spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec


def install_config_bases() -> None:
    """Let configs inherit from ``'mmrla::NAME.py'``. Calling it again does nothing.

    mmengine knows a closed list of packages and wants a folder in every such name, so this answers
    in front of the function that resolves them. Without mmengine nothing happens.
    """
    if _MODULE in sys.modules:
        _extend(sys.modules[_MODULE].Config)
    elif not any(isinstance(finder, _ConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ConfigFinder())


def _extend(cls: type[Config]) -> None:
    original = cls._get_cfg_path
    if getattr(original, "knows_mmrla", False):
        return

    @functools.wraps(original)
    def resolve(cfg_path: str, filename: str) -> Any:
        if cfg_path.startswith(SCOPE):
            # No scope: types without a prefix are those of the default scope, here as anywhere.
            return config_path(cfg_path), None
        return original(cfg_path, filename)

    resolve.knows_mmrla = True
    cls._get_cfg_path = staticmethod(resolve)
