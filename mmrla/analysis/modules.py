"""The layer attentions of a model, and temporary evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmrla.layers import LayerAttention


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        # Backbones with frozen stages freeze them again with each change of mode.
        for parameter in trainable:
            parameter.requires_grad = True


def layer_attentions(model: nn.Module) -> list[str]:
    """Names of the layer attentions that are not inside another one."""
    names = [name for name, m in model.named_modules() if isinstance(m, LayerAttention)]
    return [n for n in names if not any(n != o and n.startswith(f"{o}.") for o in names)]
