"""Tiles of feature maps that stay in a CPU's cache while several passes go over them."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1 << 18
"""Values of a tile for one thread: 1 MiB in float32, about a core's second cache."""
SHARED_TILE = 1 << 22
"""Values of a tile that several threads share; smaller ones leave them waiting for each other."""

Tile = tuple[slice, slice]


def tiles(x: Tensor) -> list[Tile]:
    """Slices of samples and of channels that cover ``x [B, C, H, W]``.

    One for the whole of ``x`` where it is small, on another device than the CPU or not contiguous.
    """
    batch, channels, height, width = x.shape
    size = TILE if torch.get_num_threads() == 1 else SHARED_TILE
    if x.device.type != "cpu" or x.numel() <= 2 * size or not x.is_contiguous():
        return [(slice(0, batch), slice(0, channels))]
    step = max(1, size // (height * width))
    step = -(-channels // -(-channels // step))  # tiles of one size
    return [
        (slice(b, b + 1), slice(c, min(c + step, channels)))
        for b in range(batch)
        for c in range(0, channels, step)
    ]
