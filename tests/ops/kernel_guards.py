"""All Triton kernels of a package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def triton_modules(package: ModuleType) -> Iterator[ModuleType]:
    """The package's modules, at any depth, whose files import Triton."""
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        spec = found.module_finder.find_spec(found.name)
        if "import triton" in Path(spec.origin).read_text():
            yield importlib.import_module(found.name)


def jit_functions(module: ModuleType) -> dict[str, Any]:
    """The functions with the decorator ``triton.jit`` that a module defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value).__name__ in ("JITFunction", "InterpretedFunction")
        and value.fn.__module__ == module.__name__
    }
