"""Operations with a gradient of their own, registered with torch where it can do that."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

CAN_REGISTER = hasattr(torch.library, "custom_op")
"""Whether torch has ``torch.library.custom_op`` (2.4 and later); torch.compile needs it."""


def on_its_device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``fn`` on the device of its first tensor, and with autocast off: it picks its dtypes."""

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        device = next(a for a in pytree.tree_flatten(args)[0] if isinstance(a, Tensor)).device
        on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on, torch.autocast(device.type, enabled=False):
            return fn(*args)

    return wrapped


def register(
    name: str, schema: str, fn: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """A function as an operation that torch.compile does not look into, without a gradient.

    Args:
        name: ``mmrla::...``.
        schema: Its arguments and results, ``(Tensor x, ...) -> Tensor``.
        fn: The implementation, for any device. No result may share memory with an argument.
        fake: Makes empty results of the right shapes, strides and dtypes.
    """
    fn = on_its_device(fn)
    if not CAN_REGISTER:
        return without_gradient(name, fn)
    op = torch.library.custom_op(name, fn, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def register_differentiable(
    name: str,
    schema: str,
    fn: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Like :func:`register`, with a gradient.

    Args:
        name: See :func:`register`.
        schema: See :func:`register`.
        fn: See :func:`register`.
        fake: See :func:`register`.
        setup_context: ``(ctx, inputs, output)``; saves what ``backward`` needs.
        backward: ``(ctx, *grads)``; one gradient for each argument, a list for a list. What it
            calls is registered without a gradient, so that a second derivative raises.
    """
    if not CAN_REGISTER:
        return as_function(name, on_its_device(fn), setup_context, backward)
    op = register(name, schema, fn, fake)
    op.register_autograd(backward, setup_context=setup_context)
    return op


def as_function(
    name: str,
    fn: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What :func:`register_differentiable` makes where torch has no custom operations.

    ``torch.autograd.Function`` sees no tensors inside lists, so lists travel flat.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spec: Any, *flat: Any) -> Any:
            inputs = pytree.tree_unflatten(list(flat), spec)
            output = fn(*inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            flat: list[Any] = [None]
            for grad in backward(ctx, *grads):
                flat.extend(grad if isinstance(grad, list) else [grad])
            return tuple(flat)

    return _flattened(Function, name)


def without_gradient(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """What :func:`register` makes where torch has no custom operations."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spec: Any, *flat: Any) -> tuple[Tensor, ...]:
            return tuple(fn(*pytree.tree_unflatten(list(flat), spec)))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(f"{name} has no autograd formula: no second derivative")

    call = _flattened(Function, name)
    return lambda *args: list(call(*args))


def _flattened(function: Any, name: str) -> Callable[..., Any]:
    """``function`` on arguments that it gets flat, after their structure."""
    function.__name__ = name.replace("::", "_")

    def call(*args: Any) -> Any:
        flat, spec = pytree.tree_flatten(list(args))
        return function.apply(spec, *flat)

    return call
