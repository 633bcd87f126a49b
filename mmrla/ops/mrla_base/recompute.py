"""Values of MRLA-base that backward computes again instead of keeping them.

A value is needed by every later layer of its group. With a recipe of each value, an operation
saves what the recipes start from, which the layers keep anyway, and not the values. Backward goes
through the group from its end: the first layer that asks for a value computes it, and the value's
own layer, which is the last to ask, lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmrla.ops.custom_op import on_its_device


class Again:
    """Computes a value, and keeps it until its own layer has taken it.

    Args:
        fn: From what a recipe starts from to the value.
    """

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = on_its_device(fn)
        self.value: Tensor | None = None

    def __call__(self, sources: Sequence[Tensor | None]) -> Tensor:
        """The value."""
        if self.value is None:
            with torch.no_grad():
                self.value = self.fn(*sources)
        return self.value

    def take(self) -> Tensor | None:
        """The value if it is there, for the last time."""
        value, self.value = self.value, None
        return value


class Recipe(NamedTuple):
    """How to compute a value again, and what from."""

    again: Again
    sources: tuple[Tensor | None, ...]


class Recomputed(NamedTuple):
    """The recipes of the values of earlier layers, and of the layer's own, without its sources."""

    recipes: tuple[Recipe, ...]
    own: Again

    def sources(self) -> list[Tensor | None]:
        """What all recipes start from."""
        return [source for recipe in self.recipes for source in recipe.sources]

    def without_sources(self) -> Kept:
        """What a node keeps beside the sources, which are saved as other tensors are."""
        return Kept([(r.again, len(r.sources)) for r in self.recipes], self.own)


class Kept(NamedTuple):
    """The rest of a :class:`Recomputed`."""

    recipes: list[tuple[Again, int]]
    own: Again

    def values(self, sources: Sequence[Tensor | None]) -> list[Tensor]:
        """The values of earlier layers, and the layer's own if it is there."""
        found, at = [], 0
        for again, count in self.recipes:
            found.append(again(sources[at : at + count]))
            at += count
        own = self.own.take()
        return found if own is None else [*found, own]
