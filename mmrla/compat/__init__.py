"""Compatibility with installed packages: mmcv without its compiled extension, version checks."""

from mmrla.compat.environment import warn_about_versions
from mmrla.compat.logging import log
from mmrla.compat.mm_packages import mend_mm_packages
from mmrla.compat.mmcv_fallback import (
    install_mmcv_fallback,
    log_ops_in_use,
    ops_in_use,
)

__all__ = [
    "install_mmcv_fallback", "log", "log_ops_in_use", "mend_mm_packages", "ops_in_use",
    "warn_about_versions",
]  # fmt: skip
