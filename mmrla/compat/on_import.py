"""Changes to modules of other packages, made when they are imported and not before."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]


class _ChangeFinder(MetaPathFinder):
    """Finds modules through the other finders, and applies the changes after execution."""

    def __init__(self) -> None:
        self.changes: dict[str, list[Change]] = {}
        self.searching: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.changes or fullname in self.searching:
            return None
        self.searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                for change in self.changes[fullname]:
                    change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def after_import(name: str, change: Change) -> None:
    """Call ``change(module)`` as soon as a module has been executed, now if it already has.

    A second call with the same arguments does nothing, as does a call for a missing module.
    """
    finder = next((f for f in sys.meta_path if isinstance(f, _ChangeFinder)), None)
    if finder is None:
        finder = _ChangeFinder()
        sys.meta_path.insert(0, finder)
    changes = finder.changes.setdefault(name, [])
    if change in changes:
        return
    changes.append(change)
    if name in sys.modules:
        change(sys.modules[name])
