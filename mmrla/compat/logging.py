"""Log lines, with mmengine or without."""

from __future__ import annotations

import logging


def log(message: str) -> None:
    """Log at level INFO, to the run's logger if mmengine is installed."""
    try:
        from mmengine.logging import print_log
    except ImportError:
        logging.getLogger("mmrla").info(message)
        return
    print_log(message, logger="current", level=logging.INFO)
