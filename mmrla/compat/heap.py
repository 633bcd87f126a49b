"""The C library's heap, which contains CPU tensors."""

from __future__ import annotations

import ctypes


def give_back_free_memory() -> None:
    """Return free pages of the C heap to the system, if the C library supports it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
