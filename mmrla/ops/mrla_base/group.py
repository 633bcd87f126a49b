"""What a layer's node in autograd's graph gets beside the operation's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from mmrla.ops.memory import is_compiling
from mmrla.ops.mrla_base.deferred import Terms
from mmrla.ops.mrla_base.recompute import Recomputed


class Group(NamedTuple):
    """How a layer is bound to the earlier ones of its group."""

    recomputed: Recomputed | None = None
    """How values are computed again; None: they are kept."""
    own_terms: Terms | None = None
    """Where later layers leave the gradient of the layer's value; None: autograd brings it."""
    terms: Sequence[Terms] = ()
    """Where the gradients of all earlier values are left; empty: autograd takes them."""


_current: ContextVar[Group | None] = ContextVar("group", default=None)


@contextmanager
def bound_to(group: Group) -> Iterator[None]:
    """Give ``group`` to the operation inside."""
    token = _current.set(group)
    try:
        yield
    finally:
        _current.reset(token)


def current_group() -> Group:
    """What :func:`bound_to` was given."""
    found = None if is_compiling() else _current.get()
    return Group() if found is None else found
