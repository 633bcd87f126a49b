"""Finds a backbone's layers, their widths and their data flow, by a trial forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

# How backbones of mm packages name their layers; the first that is there is taken.
USUAL_LAYERS = (
    "stages.[0-9]*.blocks.[0-9]*",  # Swin
    "stages.[0-9]*.[0-9]*",  # ConvNeXt
    "layer[0-9]*.[0-9]*",  # everything that descends from ResNet, MobileNetV2
    "layers.[0-9]*.[0-9]*.[0-9]*",  # PVT
    "layers.[0-9]*.[0-9]*",  # EfficientNet
)
PROJECTION = "downsample"
"""Name of the child that projects a residual layer's input to its shortcut."""


@dataclass
class Call:
    """A layer's inputs and outputs in a trial forward."""

    name: str
    module: nn.Module
    inputs: list[tuple[tuple, dict]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    projected: list[tuple[Any, Any]] = field(default_factory=list)
    """Inputs and outputs of its projection."""

    @property
    def container(self) -> str:
        """Name of the module that contains it."""
        return self.name.rpartition(".")[0]

    @property
    def x(self) -> Tensor:
        """Its input."""
        return self.inputs[0][0][0]

    @property
    def out(self) -> Tensor:
        """Its output."""
        return self.outputs[0]

    @property
    def projects(self) -> bool:
        """Whether its projection ran."""
        return bool(self.projected)

    def fault(self) -> str | None:
        """Why no layer attention can be added after it; None if one can."""
        if len(self.outputs) != 1:
            return f"it runs {len(self.outputs)} times in a forward of the backbone, not once"
        args = self.inputs[0][0]
        if not args or not isinstance(args[0], Tensor) or not isinstance(self.out, Tensor):
            return "it does not map a tensor, its first argument, to a tensor"
        if self.out.dim() not in (3, 4):
            return f"its output has {self.out.dim()} dimensions, not [B, C, H, W] or [B, N, C]"
        if self.out.dim() == 3 and self.grid() is None:
            return (
                f"it is called without the grid (height, width) of its {self.out.shape[1]} tokens"
            )
        return None

    def is_residual(self) -> bool:
        """Whether there is a shortcut of the output's shape: the input, or its projection."""
        if not self.projected:
            return self.x.shape == self.out.shape
        ((source, projected),) = self.projected[:1]
        return len(self.projected) == 1 and source is self.x and projected.shape == self.out.shape

    def grid(self) -> int | str | None:
        """Which argument after the first is the grid of the tokens."""
        args, kwargs = self.inputs[0]
        for key, value in [*enumerate(args[1:]), *kwargs.items()]:
            if (
                isinstance(value, (tuple, list))
                and len(value) == 2
                and all(isinstance(side, int) for side in value)
                and value[0] * value[1] == self.out.shape[1]
            ):
                return key
        return None


def name_of(backbone: Any) -> str:
    """The class of a wrapped backbone, for messages."""
    return backbone.mixed_from[1].__name__


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def find_layers(backbone: Any, layers: str | Sequence[str] | None) -> list[Call]:
    """The layers with the given or the usual names, in the order of ``named_modules``."""
    modules = dict(backbone.named_modules())
    modules.pop("")
    patterns = USUAL_LAYERS if layers is None else (layers,) if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"layers must be a name, a pattern or a list of them, got {layers!r}")
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        new = {name: module for name, module in modules.items() if _matches(name, pattern)}
        if layers is None and new:
            found = new
            break
        if layers is not None and not new:
            raise ValueError(
                f"layers: no module of {name_of(backbone)} is named {pattern!r}; it has "
                f"{_outline(modules)}"
            )
        found.update(new)
    if not found:
        raise ValueError(
            f"cannot find the layers of {name_of(backbone)}; name them, such as layers='stage*.*'. "
            f"It has {_outline(modules)}"
        )
    order = list(modules)
    calls = [Call(name, found[name]) for name in sorted(found, key=order.index)]
    if layers is None and len({call.container for call in calls}) == 1:
        raise ValueError(
            f"cannot find the layers of {name_of(backbone)}: only {calls[0].container} has a usual "
            f"name; name them all, such as layers='stage*.*'. It has {_outline(modules)}"
        )
    return calls


def _outline(modules: Mapping[str, nn.Module], limit: int = 12) -> str:
    """The modules next to the top, for an error message."""
    names = [
        name
        for name, module in modules.items()
        if name.count(".") <= 1 and next(module.parameters(), None) is not None
    ]
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@contextmanager
def watching(calls: Sequence[Call]) -> Iterator[None]:
    """Record inputs and outputs of layers and their projections."""
    handles = []
    for call in calls:

        def layer_hook(_: Any, args: Any, kwargs: Any, out: Any, call: Call = call) -> None:
            call.inputs.append((args, kwargs))
            call.outputs.append(out)

        def projection_hook(_: Any, args: Any, out: Any, call: Call = call) -> None:
            call.projected.append((args[0], out))

        handles.append(call.module.register_forward_hook(layer_hook, with_kwargs=True))
        projection = getattr(call.module, PROJECTION, None)
        if isinstance(projection, nn.Module):
            handles.append(projection.register_forward_hook(projection_hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trial(backbone: Any, shape: tuple[int, ...]) -> Any:
    """A forward in eval mode that does not change the backbone."""
    modes = [(module, module.training) for module in backbone.modules()]
    device = next((p.device for p in backbone.parameters()), None)
    try:
        for module, _ in modes:
            module.training = False  # not eval(), which backbones override
        with torch.no_grad():
            return backbone(torch.zeros(shape, device=device))
    except Exception as error:
        raise ValueError(
            f"the trial forward of {name_of(backbone)} on {list(shape)} failed: {error!r} "
            "(probe_size sets its height and width)"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def groups_of(backbone: Any, calls: Sequence[Call], named: bool) -> list[list[Call]]:
    """Layers that pass features on, for each container; if ``named``, none is skipped.

    Raises:
        ValueError: A layer cannot carry a layer attention.
    """
    groups: list[list[Call]] = []
    previous: Call | None = None
    for call in calls:
        fault = call.fault()
        if fault is None and not call.is_residual():
            if not named:
                previous = None
                continue
            fault = (
                f"it is not residual: it maps {list(call.x.shape)} to {list(call.out.shape)} "
                f"without a {PROJECTION!r} from one to the other"
            )
        if fault is not None:
            raise ValueError(f"layer {call.name} of {name_of(backbone)}: {fault}")
        if previous is None or previous.container != call.container:
            groups.append([])
        elif call.x is not previous.out:
            raise ValueError(
                f"layer {call.name} of {name_of(backbone)} does not take the output of "
                f"{previous.name} as it is, so they cannot be layers of one group"
            )
        groups[-1].append(call)
        previous = call
    if not groups:
        raise ValueError(f"{name_of(backbone)} has no residual layer among {calls[0].name}, ...")
    return groups


def shapes_of(value: Any) -> Any:
    """Shapes of tensors in nested outputs."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: shapes_of(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [shapes_of(item) for item in value]
    return type(value).__name__
