"""Runs that other programs start: mmengine's runners compare classes before they begin.

``mmrla train`` and ``test`` check a config when they read it. mmdet's own ``tools/train.py`` does
not, and with heads of other classes than the data it ends in an IndexError of the loss, or trains
to nothing. As soon as mmrla is imported, mmengine's runners make the check themselves, for configs
that use mmrla.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from mmrla.compat.on_import import after_import

# Methods of runners, with the splits that they use.
_SPLITS = {"train": ("train", "val"), "val": ("val",), "test": ("test",)}


def _check(cfg: Any, splits: tuple[str, ...]) -> None:
    """Raise ValueError if a config that uses mmrla has heads of other classes than its data."""
    if "mmrla" in str(cfg.get("custom_imports")) or "mmrla." in str(cfg.get("model")):
        from mmrla.engine.data.classes import check_classes

        check_classes(cfg, splits)


def _checked(method: Any, splits: tuple[str, ...]) -> Any:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.cfg, splits)
        return method(self, *args, **kwargs)

    return run


def _extend_runner(module: ModuleType) -> None:
    runner = getattr(module, "Runner", None) or module.FlexibleRunner
    for name, splits in _SPLITS.items():
        setattr(runner, name, _checked(getattr(runner, name), splits))


def install_runs() -> None:
    """Extend mmengine's runners, now or when they are imported. Again: does nothing."""
    after_import("mmengine.runner.runner", _extend_runner)
    after_import("mmengine.runner._flexible_runner", _extend_runner)
