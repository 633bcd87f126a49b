"""Checks of arguments that plugins share."""

from __future__ import annotations


def check_counts(owner: str, **counts: int) -> None:
    """Raise ValueError unless every argument is a positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")


def check_odd(owner: str, **sizes: int) -> None:
    """Raise ValueError unless every argument is a positive odd integer."""
    check_counts(owner, **sizes)
    for name, value in sizes.items():
        if value % 2 == 0:
            raise ValueError(f"{owner}: {name} must be odd, got {value!r}")
