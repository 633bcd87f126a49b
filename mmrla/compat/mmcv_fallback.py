"""Provides ``mmcv._ext`` if mmcv was installed without its compiled operations.

The package index has mmcv only as source, and mmdet's models cannot be imported without
``mmcv._ext``. A finder at the *end* of ``sys.meta_path`` is used only if no other finder has the
module, so a compiled extension always takes precedence.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from mmrla.compat.logging import log

_NAME = "mmcv._ext"


class _FallbackLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # Late, because torchvision is not needed before this point.
        from mmrla.compat import torchvision_ops

        torchvision_ops.populate(module)


class _FallbackFinder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:  # type: ignore[no-untyped-def]
        if fullname != _NAME:
            return None
        return ModuleSpec(_NAME, _FallbackLoader(), origin="mmrla.compat.torchvision_ops")


def install_mmcv_fallback() -> None:
    """Make ``mmcv._ext`` importable if it is not compiled. Calling it again does nothing.

    Modules of mmdet, mmpretrain and mmseg that were imported before have replaced operations by
    functions that raise, or by None; these are corrected.
    """
    if any(isinstance(finder, _FallbackFinder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_FallbackFinder())
    _repair_earlier_imports()


def _raises_for_want_of_ops(value: object) -> bool:
    """Whether a function or class is what the maintained forks put where mmcv.ops is missing."""
    function = value.__dict__.get("__init__") if isinstance(value, type) else value
    code = getattr(function, "__code__", None)
    return code is not None and any(
        isinstance(text, str) and "requires mmcv to be compiled" in text for text in code.co_consts
    )


def _repair_earlier_imports() -> None:
    stubs = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] in ("mmdet", "mmpretrain")
        for name, value in list(vars(module).items())
        if _raises_for_want_of_ops(value)
    ]
    # mmseg puts None under the operation's name, sometimes with an underscore in front.
    stubs += [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] == "mmseg"
        for name, value in list(vars(module).items())
        if value is None and not name.startswith("__")
    ]
    # The originals leave a name out instead.
    transformer = sys.modules.get("mmcv.cnn.bricks.transformer")
    left_out = "MultiScaleDeformableAttention"
    if transformer is not None and not hasattr(transformer, left_out):
        stubs.append((transformer, left_out))
    if not stubs:
        return
    ops = importlib.import_module("mmcv.ops")
    for module, name in stubs:
        public = name.removeprefix("_")
        if public in ops.__all__:
            setattr(module, name, getattr(ops, public))


def ops_in_use() -> str:
    """The implementation of ``mmcv.ops``.

    Returns:
        ``'compiled'``, ``'fallback'`` (torchvision's kernels), or ``'none'`` if mmcv is not
        installed or neither is available.
    """
    if importlib.util.find_spec("mmcv") is None:
        return "none"
    spec = importlib.util.find_spec(_NAME)
    if spec is None:
        return "none"
    return "fallback" if isinstance(spec.loader, _FallbackLoader) else "compiled"


def log_ops_in_use() -> None:
    """Log the implementation of ``mmcv.ops``."""
    messages = {
        "compiled": "mmcv ops: compiled extension",
        "fallback": "mmcv ops: mmrla's fallback over torchvision's kernels (mmcv has no compiled "
        "extension); box and mask detectors work, other ops raise NotImplementedError",
        "none": "mmcv ops: not available",
    }
    log(messages[ops_in_use()])
