"""Fixes for import problems of mm packages in some environments."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import prod
from types import ModuleType
from typing import Any

from mmrla.compat.on_import import after_import

# What mmpretrain's multimodal models subclass and call. Where one is missing they put None in its
# place, and then fail with "NoneType takes no arguments".
_NEEDED = {
    "transformers": ("BasicTokenizer", "PreTrainedModel"),
    "transformers.pytorch_utils": (
        "apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer",
    ),
}  # fmt: skip


def multimodal_obstacle() -> str | None:
    """Why mmpretrain's multimodal models cannot be imported with the installed transformers."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return None
    # mmpretrain asks for 4.28 or later alone. Release 5 is known, so need not be imported.
    if int(found.partition(".")[0]) >= 5:
        return f"transformers {found} is too new, they are written for transformers 4"
    for module, names in _NEEDED.items():
        try:
            missing = [name for name in names if not hasattr(import_module(module), name)]
        except Exception as error:  # whatever a broken installation raises
            return f"transformers {found} does not import: {str(error).partition(chr(10))[0]}"
        if missing:
            return f"transformers {found} has no {', '.join(missing)}"
    return None


def _switch_off_multimodal(dependency: ModuleType) -> None:
    """Make mmpretrain register placeholders, as without transformers."""
    if dependency.WITH_MULTIMODAL and multimodal_obstacle():
        dependency.WITH_MULTIMODAL = False


def _hush_onedl(logging: ModuleType) -> None:
    """Suppress a DEBUG message of the forks that bypasses every logger."""
    original = logging.print_log

    @functools.wraps(original)
    def print_log(msg: Any, *args: Any, **kwargs: Any) -> None:
        if not str(msg).startswith("Could not import OneDL"):
            original(msg, *args, **kwargs)

    logging.print_log = print_log


def _count_sums_of_products(analysis: ModuleType) -> None:
    """Add rules to mmengine's counter for the two operators that sum products and have none.

    MRLA-base's weighted sum uses the first, the state of linear recurrent layer attention the
    second.
    """

    def addcmul(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(outputs[0].type().sizes())

    def baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(inputs[1].type().sizes()) * inputs[2].type().sizes()[-1]

    rules = {"aten::addcmul": addcmul, "aten::baddbmm": baddbmm}
    for name, rule in rules.items():
        analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(name, rule)


def mend_mm_packages() -> None:
    """Register the changes, which are made when the packages are imported."""
    after_import("mmpretrain.utils.dependency", _switch_off_multimodal)
    after_import("mmengine.logging", _hush_onedl)
    after_import("mmengine.analysis.complexity_analysis", _count_sums_of_products)
