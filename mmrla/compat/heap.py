"""The C library's heap, which on a CPU holds the tensors."""

from __future__ import annotations

import ctypes


def give_back_free_memory() -> None:
    """Return the free pages of the C heap to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
