"""Cost of a network: parameters, multiply-adds, memory kept for backward.

The layer attention's operations are counted, and operators without a counting rule are listed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mmrla.analysis.modules import eval_mode, layer_attentions
from mmrla.ops.dispatch import forced_backend


class Complexity(NamedTuple):
    """Result of :func:`complexity`."""

    params: int
    """Parameters."""
    macs: int
    """Multiply-adds of one forward; divided by 1e9, papers call them GFLOPs."""
    attention_macs: int
    """Multiply-adds inside the layer attentions, element-wise ones included."""
    elementwise_macs: int
    """Those of ``attention_macs`` that ``macs`` leaves out: gate and lambda of MRLA-light."""
    skipped: Counter[str]
    """Operators without a rule, which are not counted, and how often each ran."""


# Kept apart from what makes up `macs`: element-wise products, and calls of skipped operators.
_MUL, _SKIPPED = "elementwise products", "skipped "
# Under tracing these work on sizes too, as operators on integer tensors, which is no work.
_ARITHMETIC = ("add", "add_", "sub", "sub_", "rsub", "div", "div_", "mul", "mul_", "neg", "sqrt")

# They only move or shape data; mmengine ignores the others of their kind.
_MOVES = (
    "aten::alias",
    "aten::clone",
    "aten::expand_as",
    "aten::empty_like",
    "aten::lift_fresh",
    "aten::numpy_T",
    "aten::ones_like",
    "aten::pad",
    "aten::repeat",
    "aten::repeat_interleave",
    "aten::unflatten",
    "aten::view_as",
)


def _sizes(value: Any) -> list[int]:
    return value.type().sizes()


def _mean(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_sizes(inputs[0]))


def _elementwise(name: str) -> Callable[[list[Any], list[Any]], Counter[str]]:
    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        (out,) = outputs
        if not out.isCompleteTensor() or not out.type().dtype().is_floating_point:
            return Counter()
        found = Counter({_SKIPPED + name.rstrip("_"): 1})
        if name.startswith("mul"):
            found[_MUL] = prod(_sizes(out))
        return found

    return handle


def _scaled_dot_product_attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (_sizes(v) for v in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_HANDLES = {
    "aten::mean": _mean,
    "aten::scaled_dot_product_attention": _scaled_dot_product_attention,
    **{f"aten::{name}": _elementwise(name) for name in _ARITHMETIC},
    "aten::addcmul_": _elementwise("mul"),  # of weighted sums
    **dict.fromkeys(_MOVES),
}


@contextmanager
def _visible_attention() -> Iterator[None]:
    """Disable the inference kernel of ``nn.MultiheadAttention``, which hides its products."""
    mha = getattr(torch.backends, "mha", None)  # newer than torch 2.1
    before = mha.get_fastpath_enabled() if mha else None
    try:
        if mha:
            mha.set_fastpath_enabled(False)
        with torch.enable_grad():  # which too keeps it off, unless all parameters are frozen
            yield
    finally:
        if mha:
            mha.set_fastpath_enabled(before)


def _products(counts: Counter[str]) -> int:
    return int(sum(n for op, n in counts.items() if op != _MUL and not op.startswith(_SKIPPED)))


def _random_state(tensors: Iterable[Any]) -> Any:
    devices = {t.device.index for t in tensors if isinstance(t, torch.Tensor) and t.is_cuda}
    return torch.random.fork_rng(sorted(devices))


def complexity(model: nn.Module, *inputs: torch.Tensor) -> Complexity:
    """Count parameters and multiply-adds of one forward in eval mode.

    mmengine's counter, as in :func:`mmengine.analysis.get_model_complexity_info`, with rules for
    means (one for each element averaged) and for the products of scaled dot-product attention.
    The weighted sum of MRLA-base, one for each element of each value, is counted in both.
    That is how the released networks count, whose pooling is a module and whose weighted sum is a
    matrix product. As there, ``macs`` excludes element-wise operations: activations, residual
    additions, MRLA-light's gate and lambda. The latter (one multiply-add per element each) are in
    ``attention_macs``, which includes everything inside :class:`mmrla.layers.LayerAttention`
    modules: GAP, Conv1D of query and key, heads, depthwise convolution, gate or weighted sum,
    lambda; not the host's norm around them. The total including the attention's element-wise part
    is ``macs + elementwise_macs``.

    The model is not changed.

    Args:
        model: Any module.
        *inputs: Arguments of ``model.forward``.

    Returns:
        Parameters, multiply-adds, the attention's, and what was not counted.
    """
    # The plain implementations show their work to the counter, whatever runs otherwise.
    naive = forced_backend("naive")
    with _random_state(inputs), eval_mode(model), _visible_attention(), naive:
        counter = FlopAnalyzer(model, inputs).set_op_handle(**_HANDLES)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
        counts = counter.by_module_and_operator()
    attention: Counter[str] = sum((counts[name] for name in layer_attentions(model)), Counter())
    elementwise = attention[_MUL]
    skipped: Counter[str] = Counter()
    for op, calls in counter.unsupported_ops().items():
        skipped[op.split("::")[-1].rstrip("_")] += calls
    for op, calls in counts[""].items():
        if op.startswith(_SKIPPED):
            skipped[op.removeprefix(_SKIPPED)] += calls
    skipped["mul"] -= attention[_SKIPPED + "mul"]
    return Complexity(
        params=sum(p.numel() for p in model.parameters()),
        macs=_products(counts[""]),
        attention_macs=_products(attention) + int(elementwise),
        elementwise_macs=int(elementwise),
        skipped=+skipped,
    )


def activation_memory(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that a training forward keeps for the backward pass, per image.

    It counts the distinct storages that autograd saves, except parameters and buffers, with each
    operation's usual backend (``MMRLA_BACKEND`` is respected), with the model's frozen stages, and
    without a loss. Nothing is computed: the forward runs on a copy of the model made of fake
    tensors, which have a shape and a device but no data. So the model is not changed, and its size
    does not matter. Forwards with data-dependent control flow, as in two-stage detectors, cannot be
    measured: measure the backbone.

    Args:
        model: Any module; its mode does not matter.
        *inputs: Arguments of ``model.forward``, images first, on the model's device. At least two
            images if batch norm would otherwise get a single value per channel.

    Returns:
        Bytes, divided by the number of images.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    fake.train()
    images = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    with _random_state(inputs), mode, torch.enable_grad():
        return _kept(fake, lambda: fake(*images)) // len(inputs[0])


def kept_for_backward(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward that is computed keeps for the backward pass.

    As in :func:`activation_memory`, and without the casts of parameters that autocast makes.
    """
    return _kept(model, forward, lambda tensor: not _is_from_a_parameter(tensor))


def _kept(
    model: nn.Module,
    forward: Callable[[], Any],
    counts: Callable[[torch.Tensor], bool] = lambda tensor: True,
) -> int:
    kept: dict[int, int] = {}
    alive = []  # or storages of which autograd lets go would lend others their address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if counts(tensor):
            alive.append(storage)
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # a node that held its own output would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())


def _is_from_a_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter cast or transposed, as autocast makes them."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")
