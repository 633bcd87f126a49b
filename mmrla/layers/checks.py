"""Checks of arguments: a TypeError or ValueError gives the argument's name and value."""

from __future__ import annotations

from typing import Any


def is_count(value: Any) -> bool:
    """Whether ``value`` is an int of at least 1, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_count(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a bool; the string 'False' would be true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
