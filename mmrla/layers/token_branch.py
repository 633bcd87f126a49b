"""A layer attention after a transformer block: the norms and the map around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmrla.layers.layer_attention import LayerAttention


class TokenBranch(nn.Module):
    """A layer attention after a transformer block, with the norms around it.

    ``xn = LN(x)``, ``sn = LN'(shortcut)`` if the attention uses the shortcut; the patch tokens form
    a map and go through the attention, extra tokens (class, distillation) bypass it:
    ``out = x + drop_path(concat(xn_extra, o_p))``.

    Args:
        attention: The layer attention.
        norm: Makes one norm of C channels.
        drop_path: Stochastic depth of what is added.
    """

    def __init__(
        self, attention: LayerAttention, norm: Callable[[], nn.Module], drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.attention = attention
        self.norm = norm()
        self.shortcut_norm = norm() if attention.uses_shortcut else None
        self.drop_path = drop_path

    def start_as_identity(self) -> None:
        """Make the branch add zero: zero norms give zero value, shortcut and extra tokens.

        Their own gradients are not zero, so all parts learn.
        """
        for norm in (self.norm, self.shortcut_norm):
            for parameter in norm.parameters() if norm is not None else ():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, shortcut: Tensor, grid: tuple[int, int], extra: int, state: Any
    ) -> tuple[Tensor, Any]:
        """Map a block's output and input, each ``[B, extra + H*W, C]``, to the new output.

        Raises:
            ValueError: The tokens after the extra ones do not fill the grid.
        """
        normed = self.norm(x)
        patches = to_map(normed, grid, extra)
        previous = patches
        if self.shortcut_norm is not None:
            previous = to_map(self.shortcut_norm(shortcut), grid, extra)
        o, state = self.attention(patches, previous, state)
        retrieved = torch.cat([normed[:, :extra], o.flatten(2).transpose(1, 2)], dim=1)
        return x + self.drop_path(retrieved), state


def to_map(tokens: Tensor, grid: tuple[int, int], extra: int) -> Tensor:
    """Patch tokens of ``[B, extra + H*W, C]`` as a map ``[B, C, H, W]``.

    Raises:
        ValueError: The tokens after the extra ones do not fill the grid.
    """
    count = tokens.shape[1] - extra
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"{count} patch tokens ({tokens.shape[1]} tokens, {extra} of them extra) do not make a "
            f"grid of {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
    return tokens[:, extra:].transpose(1, 2).unflatten(2, grid)
