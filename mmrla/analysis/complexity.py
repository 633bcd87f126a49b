"""Parameters and multiply-adds of a network, the layer attention's work included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

from mmrla.ops.dispatch import ENV_VAR


class Complexity(NamedTuple):
    """What :func:`complexity` counts."""

    params: int
    """Parameters."""
    macs: int
    """Multiply-adds of one forward; divided by 1e9, what papers call GFLOPs."""


def _numel(value: Any) -> int:
    return prod(value.type().sizes() or [1])


def _mean(inputs: list[Any], outputs: list[Any]) -> int:
    return _numel(inputs[0])


def _addcmul(inputs: list[Any], outputs: list[Any]) -> int:
    return _numel(outputs[0])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def complexity(model: nn.Module, *inputs: torch.Tensor) -> Complexity:
    """Count parameters and multiply-adds of one forward in eval mode.

    mmengine's counter, as in :func:`mmengine.analysis.get_model_complexity_info`, with two
    operations more: global average pooling (one for each element it averages) and the weighted sum
    of MRLA-base (one for each element of each value). That is how the released networks count,
    whose pooling is a module and whose weighted sum is a matrix product. Not counted, as there:
    element-wise work, that is activations, residual additions, MRLA-light's gate and lambda
    (together 2 multiply-adds an element).

    Args:
        model: Any module.
        *inputs: What ``model.forward`` takes.

    Returns:
        Parameters and multiply-adds.
    """
    handles = {"aten::mean": _mean, "aten::addcmul": _addcmul}
    # The plain implementations show their work to the counter, whatever runs otherwise.
    with _eval_mode(model), mock.patch.dict(os.environ, {ENV_VAR: "naive"}):
        counter = FlopAnalyzer(model, inputs).set_op_handle(**handles)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
        macs = counter.total()
    return Complexity(sum(p.numel() for p in model.parameters()), int(macs))
