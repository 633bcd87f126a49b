"""The ends of residual blocks as one operation each, with a hand-written backward.

Backward recomputes most tensors that autograd would keep. The implementation is chosen in one
place: Triton's kernels on a GPU, once :mod:`mmrla.ops.verify` has compared them with plain torch
there; :mod:`mmrla.ops.whole_map` elsewhere.

MRLA-base's values get a gradient from every later layer of their group,
``sum_{t>=s} a_ts * grad o_t``. With autograd, layer t would write its term as a map that is then
added to the others. Here it passes ``grad o_t`` and its factors ``[B, C]`` to layer s, whose
backward sums all terms in one pass. Autograd runs layer s after every later layer, because values
remain inputs of those in its graph.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrla.ops import verify, whole_map
from mmrla.ops.reference import (
    NO_LAYERS,
    BaseGroup,
    BaseWeights,
    LightWeights,
    Norm,
    accumulation_dtype,
    autocast_dtype,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# torch.compiler has this from 2.2 on.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._dynamo.is_compiling


@functools.cache
def has_triton() -> bool:
    """Whether Triton 3.4 or later is installed, and a CUDA device that it compiles for."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (7, 0)


def uses_triton(z: Tensor) -> bool:
    """Whether Triton's kernels support ``z``; float64 uses plain torch."""
    return z.is_cuda and z.dtype != torch.float64 and z.numel() > 0 and has_triton()


def unsupported_reason(z: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why a fused tail cannot run, or None.

    Args:
        z: The tail's first argument, ``[B, C, H, W]``.
        *args: The others. With them, kernels that this process has not used yet are compared with
            plain torch first.
        **kwargs: Likewise.
    """
    if z.dtype not in DTYPES:
        return f"it takes float64, float32, float16 and bfloat16, got z.dtype={z.dtype}"
    if torch.jit.is_tracing():
        return "torch.jit.trace records plain operations alone"
    if is_compiling():
        return "torch.compile and torch.export fuse plain operations themselves"
    in_func = torch._C._functorch.peek_interpreter_stack() is not None
    if in_func or torch.autograd.forward_ad._current_level >= 0:
        return "torch.func and forward-mode derivatives need plain operations"
    if autocast_dtype(z) != z.dtype:
        return f"under autocast to {autocast_dtype(z)} z must have that dtype, got {z.dtype}"
    if args and uses_triton(z):
        return verify.reason_against(z, *args, **kwargs)
    return None


def light_implementation(z: Tensor) -> Any:
    """The module that computes MRLA-light's tail of ``z``."""
    if not uses_triton(z):
        return whole_map
    from mmrla.ops import kernels_light

    return kernels_light


def base_implementation(z: Tensor) -> Any:
    """The module that computes MRLA-base's tail of ``z``."""
    if not uses_triton(z):
        return whole_map
    from mmrla.ops import kernels_base

    return kernels_base


class Call(NamedTuple):
    """A tail's small arguments. Tensors are passed separately, so that autograd sees them."""

    norm: Norm
    weights: Any
    out_norm: Norm
    drop: Tensor | None

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Tensors with a gradient."""
        return (*self.norm[:2], *self.weights[:-1], *self.out_norm[:2])

    def without_tensors(self) -> Call:
        """The call without tensors, kept by a node in addition to its saved tensors."""
        norm, out_norm = (n._replace(running_mean=None, running_var=None) for n in self[::2])
        nothing = (None,) * len(self.parameters())
        return Call(norm, self.weights, out_norm, None).with_tensors(nothing, None)

    def with_tensors(self, tensors: tuple[Tensor | None, ...], drop: Tensor | None) -> Call:
        """The call with other tensors in place of :meth:`parameters` and ``drop``."""
        norm = self.norm._replace(weight=tensors[0], bias=tensors[1])
        count = len(self.weights) - 1
        weights = type(self.weights)(*tensors[2 : 2 + count], self.weights.head_channels)
        out_norm = self.out_norm._replace(weight=tensors[2 + count], bias=tensors[3 + count])
        return Call(norm, weights, out_norm, drop)


@contextlib.contextmanager
def on_device_of(z: Tensor) -> Iterator[None]:
    """Run on the device of ``z`` and without autocast: the operations choose their dtypes."""
    device = torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(z.device.type, enabled=False):
        yield


def dense_maps(z: Tensor, *others: Tensor) -> list[Tensor]:
    """Make all maps dense and of one layout, that of ``z`` if it is dense."""
    if not (z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)):
        z = z.contiguous()
    return [z, *(whole_map.laid_out(x, z) for x in others)]


def in_dtypes_of(grads: Any, parameters: tuple[Tensor | None, ...]) -> Iterator[Tensor | None]:
    """Gradients in the dtypes and shapes of their parameters; None for those without one."""
    for grad, parameter in zip(grads, parameters, strict=True):
        if grad is None or parameter is None:
            yield None
        else:
            yield grad.to(parameter.dtype).view_as(parameter)


class _Refuse(torch.autograd.Function):
    """Returns its first ``count`` tensors; the gradient of any of its inputs raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a fused tail cannot be differentiated twice; MMRLA_BACKEND=naive can")


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose results, if a graph of it is asked for, raise when differentiated."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        return _Refuse.apply(len(found), *found, *ctx.saved_tensors, *grads)

    return wrapped


class _LightTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, keep: bool, z: Tensor, s: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        ctx.implementation = light_implementation(z)
        with on_device_of(z):
            out, saved = ctx.implementation.light_forward(z, s, *call, keep)
        ctx.save_for_backward(z, s, call.drop, *parameters, *saved)
        ctx.call = call.without_tensors()
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, s, drop, *rest = ctx.saved_tensors
        parameters, saved = tuple(rest[:8]), rest[8:]
        call = ctx.call.with_tensors(parameters, drop)
        with on_device_of(z):
            grad = whole_map.laid_out(grad, z)
            found = ctx.implementation.light_backward(grad, z, s, *call, saved)
        return None, None, *found[:2], *in_dtypes_of(found[2:], parameters)


def light_tail(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: LightWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
) -> Tensor:
    """See :func:`mmrla.ops.reference.light_tail_reference`.

    Has no second derivative, and no gradient of ``drop``.
    """
    call = Call(norm, weights, out_norm, drop_factors(drop, z))
    tensors = (*dense_maps(z, shortcut), *call.parameters())
    return _LightTail.apply(call, needs_backward(tensors), *tensors)


def needs_backward(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd will ask for a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def drop_factors(drop: Tensor | None, z: Tensor) -> Tensor | None:
    """Drop path's factors in the accumulation dtype, without a gradient."""
    return None if drop is None else drop.detach().to(accumulation_dtype(z.dtype))


class _Inbox:
    """Contributions of later layers to the gradient of one value, in one backward pass.

    It belongs to one pass, so ``retain_graph``, ``autograd.grad`` for some of the inputs and a
    backward that raised leave nothing that a later pass could mistake for its own.
    """

    def __init__(self) -> None:
        self._pass = -1
        self._terms: list[tuple[Tensor, Tensor]] = []

    def leave(self, grad: Tensor, factor: Tensor) -> None:
        """Add ``factor[b, c] * grad`` to the value's gradient."""
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass, self._terms = current, []
        self._terms.append((grad, factor))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Gradients ``[B, C, H, W]`` and factors ``[B, C]`` of this backward pass."""
        mine = self._pass == torch._C._current_graph_task_id()
        terms, self._terms, self._pass = self._terms, [], -1
        return terms if mine else []


class _Again:
    """Recomputes a value, and keeps it until its own layer has used it."""

    def __init__(self, norm: Norm, weights: BaseWeights) -> None:
        call = Call(norm, weights, norm, None).without_tensors()
        self.norm, self.weights = call.norm, call.weights
        self.sources: tuple[Tensor | None, ...] = ()
        """What the value is computed from, for the layer's link; nodes save it as tensors."""
        self.value: Tensor | None = None

    def get(self, sources: Sequence[Any], last: bool = False) -> Tensor:
        """The value; with ``last`` it is released."""
        value = self.value
        if value is None:
            z, s, weight, bias, value_weight, mean, inverse = sources
            norm = self.norm._replace(weight=weight, bias=bias)
            weights = self.weights._replace(value=value_weight)
            value = whole_map.value_again(z, s, norm, weights, mean, inverse)
        self.value = None if last else value
        return value


class _Link(NamedTuple):
    """How later layers of a group reach a layer's backward."""

    inbox: _Inbox
    node: Any
    """The layer's node in autograd's graph, which its value came from."""
    again: _Again | None
    sources: tuple[Tensor | None, ...]
    """Of ``again``."""


class _Group(NamedTuple):
    """How a node reaches the layers of its group."""

    own: _Inbox
    inboxes: tuple[_Inbox | None, ...]
    """Of earlier layers; None: autograd handles the value's gradient."""
    again: tuple[_Again | None, ...]
    """Of earlier layers and of the layer itself; None: the value is kept."""


class _BaseTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, group: _Group, sources: tuple[tuple[Tensor | None, ...], ...],
        keep: bool, z: Tensor, s: Tensor, *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        t = len(group.inboxes)
        parameters, keys, values = tensors[:7], tensors[7 : 7 + t], tensors[7 + t :]
        ctx.implementation = base_implementation(z)
        with on_device_of(z):
            out, key, value, saved = ctx.implementation.base_forward(
                z, s, *call, keys, values, keep
            )
        own = group.again[-1]
        if own is not None and keep:
            used = ctx.implementation.statistics_of(saved)
            own.sources = (z, s, *call.norm[:2], call.weights.value, *used)
            saved = ctx.implementation.without_maps(saved)
        kept: list[Tensor | None] = []
        for again, given, v in zip(group.again, (*sources, ()), (*values, value), strict=True):
            kept += [v] if again is None else given
        ctx.save_for_backward(z, s, call.drop, *parameters, *keys, key, *saved, *kept)
        ctx.call, ctx.group, ctx.small = call.without_tensors(), group, len(saved)
        ctx.set_materialize_grads(False)
        return out, key, value

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None
    ) -> tuple[Any, ...]:
        z, s, drop, *rest = ctx.saved_tensors
        group, t = ctx.group, len(ctx.group.again)
        parameters, keys = tuple(rest[:7]), rest[7 : 7 + t]
        saved, kept = rest[7 + t : 7 + t + ctx.small], iter(rest[7 + t + ctx.small :])
        call = ctx.call.with_tensors(parameters, drop)
        with on_device_of(z):
            values = [
                next(kept) if again is None else again.get([next(kept) for _ in range(7)])
                for again in group.again[:-1]
            ]
            own = group.again[-1]
            if own is None:
                values.append(next(kept))
            else:
                used = ctx.implementation.statistics_of(saved)
                values.append(own.get((z, s, *parameters[:2], parameters[4], *used), last=True))
            later = group.own.take()
            if grad_value is not None:
                later.append((whole_map.laid_out(grad_value, z), torch.ones_like(keys[-1])))
            grad = torch.zeros_like(z) if grad is None else whole_map.laid_out(grad, z)
            *found, grad_keys, grad_o, factors = ctx.implementation.base_backward(
                grad, grad_key, z, s, *call, keys, values, later, saved
            )
            grad_values: list[Tensor | None] = []
            for inbox, factor in zip(group.inboxes, factors, strict=False):
                if inbox is None:
                    grad_values.append(grad_o * factor.to(grad_o.dtype)[:, :, None, None])
                else:
                    inbox.leave(grad_o, factor)
                    grad_values.append(None)
        small = in_dtypes_of(found[2:], parameters)
        return None, None, None, None, *found[:2], *small, *grad_keys, *grad_values


def base_tail(
    z: Tensor,
    shortcut: Tensor,
    norm: Norm,
    weights: BaseWeights,
    out_norm: Norm,
    drop: Tensor | None = None,
    group: BaseGroup = NO_LAYERS,
    recompute: bool = False,
) -> tuple[Tensor, BaseGroup]:
    """See :func:`mmrla.ops.reference.base_tail_reference`.

    Has no second derivative, and no gradient of ``drop``.
    """
    call = Call(norm, weights, out_norm, drop_factors(drop, z))
    z, shortcut, *values = dense_maps(z, shortcut, *group.values)
    tensors = (z, shortcut, *call.parameters(), *group.keys, *values)
    keep = needs_backward(tensors)
    inboxes = tuple(
        None if link is None or value.grad_fn is not link.node else link.inbox
        for link, value in zip(group.links, values, strict=True)
    )
    own, again = _Inbox(), _Again(norm, weights) if recompute and keep else None
    earlier = [(None, ()) if link is None else link[2:] for link in group.links]
    reached = _Group(own, inboxes, (*(a for a, _ in earlier), again))
    sources = tuple(found for _, found in earlier)
    out, key, value = _BaseTail.apply(call, reached, sources, keep, *tensors)
    if value.grad_fn is None:
        return out, group.with_layer(key, value)
    made_from = () if again is None else again.sources
    if again is not None:
        again.sources = ()  # the link holds them; a node that did would keep them too long
    return out, group.with_layer(key, value, _Link(own, value.grad_fn, again, made_from))
