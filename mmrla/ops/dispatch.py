"""Selects one of several implementations of an operation, with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

ENV_VAR = "MMRLA_BACKEND"


@contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """Force a backend of every operation; None: their own choice, whatever the environment says."""
    before = os.environ.pop(ENV_VAR, None)
    if name is not None:
        os.environ[ENV_VAR] = name
    try:
        yield
    finally:
        os.environ.pop(ENV_VAR, None)
        if before is not None:
            os.environ[ENV_VAR] = before


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Args:
        name: The name to force it by, ``'naive'`` or ``'fused'``.
        fn: The implementation; all backends of an operation share one signature.
        unsupported_reason: Takes the operation's arguments and returns why this backend cannot
            run them, or None if it can.
    """

    name: str
    fn: Callable[..., Any]
    unsupported_reason: Callable[..., str | None]


class Selection(NamedTuple):
    """The backend that runs, and the reason it was chosen."""

    backend: Backend
    """The implementation."""
    reason: str
    """Why this backend was chosen, and why none before it."""


class Op:
    """An operation with an argument check and one or more backends.

    A call takes the first backend, in the order given, that can run its arguments.
    ``MMRLA_BACKEND`` in the environment, or ``backend=`` in the call (which wins), forces one; a
    forced backend that cannot run raises an error instead of silently falling back.

    Args:
        name: The operation's name, for messages.
        check: Takes the operation's arguments and raises if they are unusable.
        backends: The implementations, fastest first.
    """

    def __init__(self, name: str, check: Callable[..., None], backends: Sequence[Backend]) -> None:
        self.name = name
        self.__name__ = name
        self.check = check
        self.backends = {backend.name: backend for backend in backends}

    def select(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Selection:
        """The backend that would run these arguments, and the reason.

        Raises:
            ValueError: No backend has the forced name.
            RuntimeError: The forced backend cannot run the arguments, or no backend can.
        """
        forced_by = "the argument backend" if backend is not None else f"the variable {ENV_VAR}"
        forced = backend if backend is not None else os.environ.get(ENV_VAR) or None
        if forced is not None:
            if forced not in self.backends:
                raise ValueError(
                    f"{self.name} has no backend {forced!r} (asked for by {forced_by}); "
                    f"allowed: {', '.join(map(repr, self.backends))}"
                )
            reason = self.backends[forced].unsupported_reason(*args, **kwargs)
            if reason is not None:
                raise RuntimeError(
                    f"{self.name}: {forced_by} forces {forced!r}, which cannot run here: {reason}"
                )
            return Selection(self.backends[forced], f"forced by {forced_by}")
        refusals: list[str] = []
        for candidate in self.backends.values():
            reason = candidate.unsupported_reason(*args, **kwargs)
            if reason is None:
                chosen = "; ".join([*refusals, f"{candidate.name} can run"])
                return Selection(candidate, chosen)
            refusals.append(f"{candidate.name} cannot run: {reason}")
        raise RuntimeError(f"{self.name}: {'; '.join(refusals)}")

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Check the arguments and run the selected backend."""
        self.check(*args, **kwargs)
        return self.select(*args, backend=backend, **kwargs).backend.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Op({self.name!r}, backends={list(self.backends)})"


def always(*args: Any, **kwargs: Any) -> None:
    """The ``unsupported_reason`` of a backend without requirements."""
    return None
