"""Attention between the tokens of a vision transformer, as computed by its blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class TokenAttentionRecorder:
    """The recorder returned by :func:`record_token_attention`, updated by each forward."""

    def __init__(self) -> None:
        self.attention: Tensor | None = None
        """``[B, heads, N, N]`` of the last forward: how much query (third axis) takes of key."""
        self.grid: tuple[int, int] | None = None
        """Rows and columns of patches."""
        self.extra = 0
        """How many tokens come before the patches: class, distillation."""

    def of_token(self, index: int) -> Tensor:
        """Attention of the extra token ``index`` (0: class) to each patch: ``[B, heads, h, w]``.

        Raises:
            ValueError: No forward has run.
        """
        return self._map(index)

    def of_patch(self, row: int, column: int) -> Tensor:
        """Attention of a patch to each patch: ``[B, heads, h, w]``.

        Raises:
            ValueError: No forward has run, or there is no such patch.
        """
        height, width = self._recorded()[1]
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"no patch at row {row}, column {column}: the image has {height} x {width} patches"
            )
        return self._map(self.extra + row * width + column)

    def _map(self, token: int) -> Tensor:
        attention, grid = self._recorded()
        return attention[:, :, token, self.extra :].unflatten(-1, grid)

    def _recorded(self) -> tuple[Tensor, tuple[int, int]]:
        if self.attention is None or self.grid is None:
            raise ValueError("nothing was recorded: no forward ran inside record_token_attention")
        return self.attention, self.grid


@contextmanager
def record_token_attention(backbone: Any, layer: int = -1) -> Iterator[TokenAttentionRecorder]:
    """Record the self-attention of one block of a vision transformer with a class token.

    ``softmax(q k^T / sqrt(head dims))``, computed from the input of the block's attention by hooks
    that are removed on exit; the backbone is not changed.

    Args:
        backbone: A ViT, DeiT or CeiT of mmpretrain or mmrla.
        layer: Index of the block, negative from the end.

    Yields:
        The recorder.

    Raises:
        TypeError: The backbone is not such a transformer.
        ValueError: It has no class token, or no such block.
    """
    name = type(backbone).__name__
    layers: Any = getattr(backbone, "layers", None)
    embed = getattr(backbone, "patch_embed", None)
    first = getattr(layers[0], "attn", None) if isinstance(layers, nn.ModuleList) else None
    if embed is None or not isinstance(getattr(first, "qkv", None), nn.Linear):
        raise TypeError(
            f"{name} is no vision transformer whose blocks have one qkv projection of all tokens "
            "(ViT, DeiT, CeiT)"
        )
    if getattr(backbone, "cls_token", None) is None:
        raise ValueError(f"this {name} has no class token (with_cls_token=False)")
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"no block {layer}: {name} has {len(layers)}, so {-len(layers)} to {len(layers) - 1}"
        )
    attn = layers[layer].attn
    if isinstance(attn.scaled_dot_product_attention, partial):
        raise ValueError("attention with a qk_scale of its own is not supported")
    recorder = TokenAttentionRecorder()
    recorder.extra = backbone.num_extra_tokens

    def keep_attention(module: Any, args: tuple) -> None:
        x = args[0]
        with torch.no_grad():
            qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dims))
            query, key, _ = qkv.float().permute(2, 0, 3, 1, 4)
            with torch.autocast(x.device.type, enabled=False):
                logits = query @ key.transpose(-2, -1) / math.sqrt(module.head_dims)
            recorder.attention = logits.softmax(-1).cpu()

    def keep_grid(module: Any, args: tuple, output: tuple) -> None:
        recorder.grid = tuple(output[1])

    handles = [
        attn.register_forward_pre_hook(keep_attention),
        embed.register_forward_hook(keep_grid),
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
