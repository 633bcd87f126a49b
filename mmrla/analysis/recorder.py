"""Records what the layers of a network attend to while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mmrla.analysis.modules import layer_attentions
from mmrla.layers import LayerAttention, Retrieval
from mmrla.ops.fused import is_compiling


@dataclass(frozen=True)
class GroupRecord:
    """The record of one group of layers: a stage, or several blocks of a transformer."""

    name: str
    """Path of its modules (``layer1``), with the blocks if several groups share it
    (``layers 0-3``)."""
    layers: tuple[str, ...]
    """Names of the T layers' blocks within that path: ``('0', '1', '2')``; if a block has several
    layers, with their names: ``('0 attn', '0 ffn', '1 attn')``."""
    modules: tuple[str, ...]
    """The names of the layer attentions in the model."""
    queries: Tensor
    """``[N, T, heads, d_k]`` in float32 on the CPU, N images."""
    scores: Tensor
    """``[N, heads, T, T]``: the weight of layer s for layer t (second last axis); NaN for s > t.
    ``[N, heads, T, S]`` if layers attend to S sources that are not layers."""
    sources: tuple[str, ...]
    """Names of the sources: ``layers``, or ``in`` for the group's input and ``0 attn - 1 ffn`` for
    a sum of layers."""
    label: str = "attention score"
    """A description of the scores."""
    sum_to_one: bool = True
    """Whether the scores of a layer sum to one."""


@dataclass
class _Pass:
    """One forward through one group."""

    names: list[str] = field(default_factory=list)
    retrievals: list[Retrieval] = field(default_factory=list)
    memory: Any = None
    attention: LayerAttention | None = None


class LayerAttentionRecorder:
    """The recorder returned by :func:`record_layer_attention`, with all records.

    Args:
        model: Any module with layer attentions in it.

    Raises:
        ValueError: There is no layer attention in the model.
        TypeError: One of a type that does not tell what it attends to.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._attentions: dict[str, LayerAttention] = {}
        for name in layer_attentions(model):
            attention = modules[name]
            assert isinstance(attention, LayerAttention)
            if type(attention).retrieval is LayerAttention.retrieval:
                raise TypeError(
                    f"{type(attention).__name__} ({name}) does not tell what it attends to: it has "
                    "no method retrieval of its own, see mmrla.layers.LayerAttention"
                )
            self._attentions[name] = attention
        if not self._attentions:
            raise ValueError(
                f"{type(model).__name__} has no layer attention: there is nothing to record. Is it "
                "the plain network (layer_attention=None)?"
            )
        self._passes: list[_Pass] = []
        self._passed_on = False
        self._handles: list[Any] = []

    def _start(self) -> None:
        for name, attention in self._attentions.items():
            self._handles.append(attention.register_forward_hook(self._hook(name)))

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    def _forget(self) -> None:
        """Release data that the last group's next layer would have needed."""
        if self._passes:
            self._passes[-1].memory = None

    def _hook(self, name: str) -> Any:
        def hook(attention: LayerAttention, args: tuple, output: tuple) -> None:
            # Traced into a compiled graph, this hook would outlive its removal.
            if is_compiling():
                return
            # Inside backward runs what activation checkpointing computes again.
            if torch._C._current_graph_task_id() != -1:
                return
            x, shortcut, state = args
            with torch.no_grad():
                self._record(name, attention, x, shortcut, state)
            self._passed_on = output[1] is not None

        return hook

    def _record(
        self, name: str, attention: LayerAttention, x: Tensor, shortcut: Tensor, state: Any
    ) -> None:
        if not self._continues(name, state):
            self._forget()
            self._passes.append(_Pass(attention=attention))
        current = self._passes[-1]
        found = attention.retrieval(x, shortcut, state, current.memory)
        current.memory = found.memory
        current.names.append(name)
        # Copies: what is a view of a parameter would change with it, and ask for a gradient.
        query, scores = (t.detach().to("cpu", torch.float32, copy=True) for t in found[:2])
        current.retrievals.append(Retrieval(query, scores, sources=found.sources))

    def _continues(self, name: str, state: Any) -> bool:
        """Whether a layer belongs to the group of the one before it."""
        if not self._passes:
            return False
        last = self._passes[-1].attention
        if state is not None:
            # One that comes from layers of another width begins a record: heads do not compare.
            return last is not None and last.channels == self._attentions[name].channels
        if self._passed_on:
            return False  # there was a state, which the host did not pass on
        # No state travels here, so a group is what lies next to each other below one path.
        parent, layer = _place(name)
        last_parent, last_layer = _place(self._passes[-1].names[-1])
        follows = layer.isdigit() and last_layer.isdigit() and int(layer) == int(last_layer) + 1
        return parent == last_parent and follows

    @property
    def groups(self) -> list[GroupRecord]:
        """A record for each group of layers, in the order of the network, over all forwards.

        Raises:
            ValueError: No layer attention has run.
        """
        if not self._passes:
            raise ValueError(
                f"nothing was recorded: none of the {len(self._attentions)} layer attentions "
                "(the first: "
                f"{next(iter(self._attentions))}) was called inside record_layer_attention; a "
                "compiled network does not call its modules"
            )
        bundles: dict[tuple[str, ...], list[_Pass]] = {}
        for one in self._passes:
            bundles.setdefault(tuple(one.names), []).append(one)
        parents = [_place(names[0])[0] for names in bundles]
        groups = []
        for parent, (names, passes) in zip(parents, bundles.items(), strict=True):
            layers = tuple(_place(name)[1] for name in names)
            if len(set(layers)) < len(layers):
                ends = (name.rpartition(".")[2] for name in names)
                layers = tuple(map(" ".join, zip(layers, ends, strict=True)))
            title = _without_wrappers(parent)
            if parents.count(parent) > 1 or not title:
                title = f"{title} {layers[0]}-{layers[-1]}".strip()
            attention = passes[0].attention
            assert attention is not None
            groups.append(
                GroupRecord(
                    name=title,
                    layers=layers,
                    modules=names,
                    queries=torch.cat([_stack_queries(one) for one in passes]),
                    scores=torch.cat([_stack_scores(one) for one in passes]),
                    sources=_sources(layers, passes[0].retrievals[-1].sources),
                    label=attention.scores_label,
                    sum_to_one=attention.scores_sum_to_one,
                )
            )
        return groups


def _stack_queries(one: _Pass) -> Tensor:
    return torch.stack([found.query for found in one.retrievals], dim=1)


def _stack_scores(one: _Pass) -> Tensor:
    count = one.retrievals[-1].scores.shape[-1]
    rows = [
        torch.nn.functional.pad(found.scores, (0, count - found.scores.shape[-1]), value=torch.nan)
        for found in one.retrievals
    ]
    return torch.stack(rows, dim=2)


def _sources(layers: Sequence[str], ends: Sequence[int] | None) -> tuple[str, ...]:
    if ends is None:
        return tuple(layers)
    spans = (layers[begin:end] for begin, end in pairwise(ends))
    return ("in", *(" - ".join(dict.fromkeys((span[0], span[-1]))) for span in spans))


def _place(name: str) -> tuple[str, str]:
    """Path to an attention's block, from its name, and the block's number within that path.

    The number is the last numeric part: ``layer1.0.mrla`` is block 0 of ``layer1``.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return "", name
    return ".".join(parts[: numbers[-1]]), parts[numbers[-1]]


def _without_wrappers(path: str) -> str:
    parts = path.split(".")
    while parts and parts[0] in ("module", "backbone"):
        parts.pop(0)
    return ".".join(parts)


@contextmanager
def record_layer_attention(model: nn.Module) -> Iterator[LayerAttentionRecorder]:
    """Record what every layer attention in ``model`` attends to in the forwards inside.

    Works in any mode, with and without gradients, under autocast and with activation checkpointing,
    for a backbone, a classifier or a detector. It uses forward hooks on the layer attentions, which
    are removed on exit, even after an exception; the model is not changed. While recording,
    residual blocks do not use the fused operation for their end, so a forward takes more memory and
    differs by rounding. Networks compiled with torch.compile record nothing.

    Args:
        model: Any module with layer attentions in it, each of a type that has ``retrieval``.

    Yields:
        The recorder: ``rec.groups`` has the records so far, during and after the context.

    Raises:
        ValueError: There is no layer attention in the model.
        TypeError: One of a type that does not tell what it attends to.

    Example:
        >>> import torch
        >>> from mmrla.analysis import record_layer_attention
        >>> from mmrla.models import MRLAResNet
        >>> backbone = MRLAResNet(18, layer_attention=dict(type='MRLABase')).eval()
        >>> with record_layer_attention(backbone) as rec:
        ...     _ = backbone(torch.rand(2, 3, 64, 64))
        >>> [(group.name, tuple(group.scores.shape)) for group in rec.groups][:2]
        [('layer1', (2, 4, 2, 2)), ('layer2', (2, 8, 2, 2))]
    """
    recorder = LayerAttentionRecorder(model)
    recorder._start()
    try:
        yield recorder
    finally:
        recorder._stop()


def query_similarity(group: GroupRecord, include_first: bool = False) -> Tensor:
    """Absolute cosine similarity between the queries of consecutive layers, per head (Fig. 2b).

    Args:
        group: Of one group of layers.
        include_first: Include the group's first layer, which the paper leaves out because it
            attends only to itself.

    Returns:
        ``[N, pairs, heads]``: T - 2 pairs of layers, or T - 1 with the first; the last pairs are
        the last layers. There may be none.
    """
    queries = group.queries if include_first else group.queries[:, 1:]
    return torch.cosine_similarity(queries[:, :-1], queries[:, 1:], dim=-1).abs().clamp(max=1)
