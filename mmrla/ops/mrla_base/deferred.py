"""Gradients of MRLA-base's values, summed up once, by the layer that the value came from.

The gradient of ``V_s`` is ``sum_{t>=s} a_ts * grad o_t``. Left to autograd, each later layer t
writes its term as a map, which is then added onto the others: five maps read or written for each
pair of layers. Here layer t leaves a reference to ``grad o_t`` and its weights ``[B, C]`` with
layer s, whose backward sums all terms in one pass: one map read for each pair.

Autograd runs layer s after every later layer because the keys still connect them. What was left
belongs to one backward pass, so that ``retain_graph``, ``autograd.grad`` for some of the inputs
and a backward that raised leave nothing that a later one could take for its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrla.ops.memory import is_compiling

_HAS_TASKS = hasattr(torch._C, "_current_graph_task_id")


class Terms:
    """What later layers have left for one value, in one backward pass."""

    def __init__(self) -> None:
        self._task = -1
        self._grads: list[Tensor] = []
        self._factors: list[Tensor] = []

    def leave(self, grad: Tensor, factor: Tensor) -> None:
        """Add ``factor[b, c] * grad`` to the value's gradient."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._grads, self._factors = task, [], []
        self._grads.append(grad)
        self._factors.append(factor)

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients ``[B, C, H, W]`` and factors ``[B, C]`` of this backward pass."""
        task, grads, factors = self._task, self._grads, self._factors
        self._task, self._grads, self._factors = -1, [], []
        return (grads, factors) if task == torch._C._current_graph_task_id() else ([], [])


class Deferred(NamedTuple):
    """Where the gradient of a layer's value can be left, as later layers of its group get it."""

    terms: Terms
    node: Any
    """The layer's node in autograd's graph, which its key came from."""

    def reached_by(self, key: Tensor) -> bool:
        """Whether the layer's backward waits for that of whoever uses ``key``.

        Not if the key was detached on its way, as in a checkpointed or frozen part.
        """
        return key.grad_fn is self.node


def can_defer() -> bool:
    """Whether gradients can be left: eager mode, and a torch that numbers its backward passes."""
    return _HAS_TASKS and torch.is_grad_enabled() and not is_compiling()
