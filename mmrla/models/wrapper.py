"""A layer attention in a backbone that has no host here.

Layer attention: Cross-Layer Retrospective Retrieving via Layer Attention, ICLR 2023,
https://openreview.net/forum?id=pvgEL1yS3Ql.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmrla.checkpoints.plan import keeps_mrla_trainable
from mmrla.layers.checks import check_bool, is_count
from mmrla.models.arguments import check_config
from mmrla.models.branches import LayerAttentionOnMap, LayerAttentionOnTokens
from mmrla.models.host import (
    LayerAttentionHost,
    _simple,
    branch_rate,
    check_drop_path_rate,
    rest_unreached,
)
from mmrla.registry import MODELS

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


class _Carried(NamedTuple):
    """What a layer hands to the next of its group: its output and the state of the attention.

    The container between them passes it on unseen, so the state is nobody's attribute: it cannot
    outlive a forward, and checkpointing, DDP and torch.compile see a function of arguments.
    """

    x: Tensor
    state: Any


def _restore(mixin: type, base: type) -> Any:
    return object.__new__(_joined(mixin, base))


_JOINED: dict[tuple[type, type], Any] = {}


def _joined(mixin: type, base: type) -> Any:
    """``base`` with a mixin before it; the same class for the same two."""
    if (mixin, base) not in _JOINED:
        body = {"__module__": __name__, "joined_from": (mixin, base)}
        name = f"{mixin.__name__}[{base.__name__}]"
        _JOINED[mixin, base] = type(base)(name, (mixin, base), body)
    return _JOINED[mixin, base]


class _Joined:
    joined_from: tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle could not find it by name.
        return _restore, self.joined_from, self.__dict__


class LayerWithAttention(_Joined):
    """Mixed in before the class of a layer that exists: the attention comes behind its forward."""

    mrla: LayerAttentionOnMap | LayerAttentionOnTokens
    mrla_last: bool
    """Whether it is the last of its group."""
    mrla_grid: int | str | None
    """Which further argument, by position or name, is the grid of tokens; None for maps."""
    mrla_projects: bool

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map what the layer maps, or what the group's previous layer hands over."""
        state = None
        if isinstance(x, _Carried):
            x, state = x
        out = super().forward(x, *args, **kwargs)
        if self.mrla_grid is None:
            out, state = self.mrla(out, self._shortcut(x), state)
        else:
            key = self.mrla_grid
            height, width = args[key] if isinstance(key, int) else kwargs[key]
            out, state = self.mrla(out, x, (height, width), 0, state)
        return out if self.mrla_last else _Carried(out, state)

    def _shortcut(self, x: Tensor) -> Tensor:
        """The layer's identity branch: its input, after the projection where there is one."""
        if not (self.mrla_projects and self.mrla.attention.uses_shortcut):
            return x
        projection = getattr(self, PROJECTION)
        # The layer has computed it and keeps it to itself. Once more, on copies of the buffers:
        # statistics of norms count a batch once.
        buffers = {name: buffer.clone() for name, buffer in projection.named_buffers()}
        return functional_call(projection, buffers, (x,))


@dataclass
class _Call:
    """What a trial forward showed of a layer."""

    name: str
    module: nn.Module
    inputs: list[tuple[tuple, dict]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    projected: list[tuple[Any, Any]] = field(default_factory=list)
    """Inputs and outputs of its projection."""

    @property
    def container(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def x(self) -> Tensor:
        return self.inputs[0][0][0]

    @property
    def out(self) -> Tensor:
        return self.outputs[0]

    @property
    def projects(self) -> bool:
        return bool(self.projected)

    def fault(self) -> str | None:
        """Why no layer attention can stand behind it."""
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
        """Which argument behind the first is the grid of the tokens."""
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


@MODELS.register_module()
class LayerAttentionWrapper(_Joined, LayerAttentionHost):
    """A backbone of any mm package with a layer attention after each residual layer.

    What it returns *is* the backbone, its class extended: attributes, ``frozen_stages``,
    ``norm_eval``, ``init_cfg`` and outputs are the backbone's, state-dict keys too, and the added
    keys contain ``mrla``: ``layer1.0.mrla.attention.value.weight``. A group of layers is a stage:
    the layers that lie in one container. Around the attention are the norm and stochastic depth of
    the hosts for maps (``out = x + drop_path(norm(o_t))``) or tokens, as in PVTv2.

    A trial forward in the constructor shows which layers there are, their width, and whether the
    backbone's outputs keep their shapes.

    Args:
        backbone: Config of the backbone, with the prefix of its package: ``mmdet.RegNet``.
        layer_attention: Config of the layer attention; None for the plain backbone.
            Default: MRLA-light with 8 channels a head on maps, 16 on tokens.
        layers: Names of the layers, as ``named_modules`` gives them, or patterns of such names in
            which ``*`` stands for one part or less (``'stage*.*'``). Default None: the usual names
            (:data:`USUAL_LAYERS`), where layers without a shortcut of their output's shape stay
            plain and the next one begins a new group.
        norm_cfg: Of the norms around the attention. Default None: the backbone's ``norm_cfg``,
            and BN for maps and LN for tokens where it has none.
        mrla_drop_path_rate: Stochastic depth of the attention branch; None: the layer's own rate.
        zero_init_mrla: See :class:`mmrla.models.host.LayerAttentionHost`.
        probe_size: Height and width of the image of the trial forward.

    Raises:
        TypeError: ``backbone`` is no config with a type.
        ValueError: No layers are found, or a named one is not there, is not residual or cannot
            carry a layer attention; the backbone looks at features between the layers of a
            group; an unknown layer attention, or one that refuses its arguments.

    Example:
        >>> import torch
        >>> from mmrla.models import LayerAttentionWrapper
        >>> backbone = LayerAttentionWrapper(
        ...     backbone=dict(type='mmdet.RegNet', arch='regnetx_400mf', out_indices=(2, 3)),
        ...     layer_attention=dict(type='MRLALight', head_channels=16)).eval()
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 160, 4, 6), (1, 384, 2, 3)]
    """

    def __new__(cls, backbone: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build the backbone and extend its class; ``__init__`` adds what belongs to it."""
        if not isinstance(backbone, Mapping) or "type" not in backbone:
            raise TypeError(
                "backbone must be a config such as dict(type='mmdet.RegNet', ...), "
                f"got {backbone!r}"
            )
        cfg = dict(backbone)
        if "init_cfg" in cfg:
            cfg["init_cfg"] = _simple(cfg["init_cfg"])
        built = MODELS.build(cfg)
        built.__class__ = _joined(LayerAttentionWrapper, type(built))
        return built

    def __init__(
        self,
        backbone: Mapping[str, Any],
        layer_attention: Mapping[str, Any] | None = dict(type="MRLALight"),
        layers: str | Sequence[str] | None = None,
        *,
        norm_cfg: Mapping[str, Any] | None = None,
        mrla_drop_path_rate: float | None = 0.0,
        zero_init_mrla: bool = True,
        probe_size: int | tuple[int, int] = 224,
    ) -> None:
        # Not the ancestor's constructor: it has run in __new__.
        check_drop_path_rate(mrla_drop_path_rate)
        size = probe_size if isinstance(probe_size, (tuple, list)) else (probe_size, probe_size)
        if len(size) != 2 or not all(map(is_count, size)):
            raise ValueError(f"probe_size must be a positive int or a pair, got {probe_size!r}")
        check_bool("zero_init_mrla", zero_init_mrla)
        self.layer_attention, self.zero_init_mrla = layer_attention, zero_init_mrla
        self.keep_mrla_trainable = keeps_mrla_trainable(backbone.get("init_cfg"))
        if layer_attention is None:
            return
        image_shape = (1, backbone.get("in_channels", 3), *size)
        if norm_cfg is not None:
            check_config("norm_cfg", norm_cfg)
        norm_cfg = norm_cfg or _norm_cfg_of(self, backbone)
        candidates = _find(self, layers)
        with _watching(candidates):
            before = _trial(self, image_shape)
        for group in _groups(self, candidates, named=layers is not None):
            for call in group:
                _attach(call, layer_attention, norm_cfg, mrla_drop_path_rate, call is group[-1])
        try:
            after = _trial(self, image_shape)
        except ValueError as error:
            raise ValueError(f"with layer attention, {error}") from error
        if _shapes(after) != _shapes(before):
            raise ValueError(
                f"backbone {_name(self)} looks at features between the layers of a group: its "
                f"outputs are {_shapes(after)} with layer attention, {_shapes(before)} without"
            )
        self._free_fresh_norms()
        if hasattr(self.joined_from[1], "_freeze_stages"):
            self._freeze_stages()
        rest_unreached(self, image_shape)


def _name(backbone: Any) -> str:
    return backbone.joined_from[1].__name__


def _norm_cfg_of(backbone: Any, cfg: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the backbone takes for its norms: given, kept as an attribute, or its default."""
    default = inspect.signature(backbone.joined_from[1].__init__).parameters.get("norm_cfg")
    found = (
        cfg.get("norm_cfg"),
        getattr(backbone, "norm_cfg", None),
        default.default if default is not None else None,
    )
    return next((norm for norm in found if isinstance(norm, Mapping)), None)


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _find(backbone: Any, layers: str | Sequence[str] | None) -> list[_Call]:
    """The layers that were named or are usual, in the order of ``named_modules``."""
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
                f"layers: no module of {_name(backbone)} is named {pattern!r}; it has "
                f"{_outline(modules)}"
            )
        found.update(new)
    if not found:
        raise ValueError(
            f"cannot find the layers of {_name(backbone)}; name them, such as layers='stage*.*'. "
            f"It has {_outline(modules)}"
        )
    order = list(modules)
    calls = [_Call(name, found[name]) for name in sorted(found, key=order.index)]
    if layers is None and len({call.container for call in calls}) == 1:
        raise ValueError(
            f"cannot find the layers of {_name(backbone)}: only {calls[0].container} has a usual "
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
def _watching(calls: Sequence[_Call]) -> Iterator[None]:
    """Note what goes in and out of layers and their projections."""
    handles = []
    for call in calls:

        def layer_hook(_: Any, args: Any, kwargs: Any, out: Any, call: _Call = call) -> None:
            call.inputs.append((args, kwargs))
            call.outputs.append(out)

        def projection_hook(_: Any, args: Any, out: Any, call: _Call = call) -> None:
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


def _trial(backbone: Any, shape: tuple[int, ...]) -> Any:
    """A forward in eval mode that leaves the backbone as it was."""
    modes = [(module, module.training) for module in backbone.modules()]
    device = next((p.device for p in backbone.parameters()), None)
    try:
        for module, _ in modes:
            module.training = False  # not eval(), which backbones override
        with torch.no_grad():
            return backbone(torch.zeros(shape, device=device))
    except Exception as error:
        raise ValueError(
            f"the trial forward of {_name(backbone)} on {list(shape)} failed: {error!r} "
            "(probe_size sets its height and width)"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def _groups(backbone: Any, calls: Sequence[_Call], named: bool) -> list[list[_Call]]:
    """Layers that hand features to one another, for each container.

    Args:
        backbone: For messages.
        calls: The layers, after a trial forward.
        named: Whether the user named them, so that none may be passed over.

    Raises:
        ValueError: A layer cannot carry a layer attention.
    """
    groups: list[list[_Call]] = []
    previous: _Call | None = None
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
            raise ValueError(f"layer {call.name} of {_name(backbone)}: {fault}")
        if previous is None or previous.container != call.container:
            groups.append([])
        elif call.x is not previous.out:
            raise ValueError(
                f"layer {call.name} of {_name(backbone)} does not take the output of "
                f"{previous.name} as it is, so they cannot be layers of one group"
            )
        groups[-1].append(call)
        previous = call
    if not groups:
        raise ValueError(f"{_name(backbone)} has no residual layer among {calls[0].name}, ...")
    return groups


def _attach(
    call: _Call,
    layer_attention: Mapping[str, Any],
    norm_cfg: Mapping[str, Any] | None,
    drop_path_rate: float | None,
    last: bool,
) -> None:
    layer: Any = call.module
    rate = branch_rate(drop_path_rate, layer)
    part: nn.Module
    if call.out.dim() == 4:
        part = LayerAttentionOnMap(
            layer_attention,
            call.out.shape[1],
            norm_cfg or dict(type="BN"),
            rate,
            with_cp=getattr(layer, "with_cp", False) is True,
        )
    else:
        part = LayerAttentionOnTokens(
            layer_attention, call.out.shape[2], norm_cfg or dict(type="LN", eps=1e-6), rate
        )
    # A child of its layer, so that what freezes or scales the layer does it to both.
    layer.mrla = part.to(call.out.device).train(layer.training)
    layer.mrla_last = last
    layer.mrla_grid = call.grid() if call.out.dim() == 3 else None
    layer.mrla_projects = call.projects
    layer.__class__ = _joined(LayerWithAttention, type(layer))


def _shapes(value: Any) -> Any:
    """Shapes of tensors in nested outputs."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: _shapes(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_shapes(item) for item in value]
    return type(value).__name__
