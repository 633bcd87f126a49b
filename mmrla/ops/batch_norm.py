"""Batch norm as a scale and a shift a channel, for operations that fold it into their passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrla.ops.query_key import accumulation_dtype
from mmrla.ops.tiles import tiles


class BatchNorm(NamedTuple):
    """What a batch norm computes with: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    ``mean`` and ``var`` are running statistics, or both None where those of the batch are taken.
    """

    weight: Tensor | None
    """``[C]``, gamma, or None for 1."""
    bias: Tensor | None
    """``[C]``, beta, or None for 0."""
    mean: Tensor | None
    """``[C]``, running mean."""
    var: Tensor | None
    """``[C]``, running variance."""
    eps: float
    """What is added to the variance."""

    @property
    def uses_batch(self) -> bool:
        """Whether the batch's statistics are taken."""
        return self.mean is None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, C, H, W]`` normalised, and the mean and biased variance of the batch, ``[C]``.

        With running statistics the last two are empty.
        """
        out = F.batch_norm(
            x, self.mean, self.var, self.weight, self.bias, training=self.uses_batch, eps=self.eps
        )
        if not self.uses_batch:
            empty = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
            return out, empty, empty
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return out, *statistics(x)

    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless it fits ``x``, as ``torch.nn.functional.batch_norm`` would."""
        channels = x.shape[1]
        for key, value in (("weight", self.weight), ("bias", self.bias), ("mean", self.mean),
                           ("var", self.var)):  # fmt: skip
            if value is not None and value.shape != (channels,):
                raise ValueError(f"{name}.{key} must be [{channels}], got {tuple(value.shape)}")
        if (self.mean is None) != (self.var is None):
            raise ValueError(f"{name}.mean and {name}.var come together, got one of them")
        if self.uses_batch and x.numel() == channels:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{tuple(x.shape)}"
            )


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``[B, C, H, W]``, ``[C]``."""
    dtype = accumulation_dtype(x.dtype)
    if x.is_cuda and x.dtype != torch.float64:
        mean, inverse = torch.batch_norm_stats(x, 0.0)  # 0 where the variance is
        return mean, torch.where(inverse > 0, inverse, torch.inf).pow(-2)
    # Of every plane first, so that a large mean cancels nothing and a tile is read once.
    means, squares = (x.new_empty(x.shape[:2], dtype=dtype) for _ in range(2))
    for tile in tiles(x):
        part = x[tile].to(dtype)
        means[tile] = part.mean(dim=(2, 3))
        centred = part - means[tile][:, :, None, None]
        squares[tile] = torch.linalg.vector_norm(centred, dim=(2, 3)).square_()
    mean = means.mean(0)
    pixels = x.shape[2] * x.shape[3]
    between = (means - mean).square_().mean(0)
    return mean, squares.mean(0) / pixels + between


class UsedNorm(NamedTuple):
    """A batch norm with the statistics that it uses, all ``[C]`` in the accumulation dtype."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    uses_batch: bool

    def of(self, channels: slice) -> UsedNorm:
        """The norm of some of the channels."""
        weight, bias = (None if p is None else p[channels] for p in (self.weight, self.bias))
        return self._replace(
            weight=weight, bias=bias, mean=self.mean[channels], var=self.var[channels]
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """The norm as a factor and a shift."""
        factor = torch.rsqrt(self.var + self.eps)
        if self.weight is not None:
            factor = factor * self.weight
        shift = -self.mean * factor
        return factor, shift if self.bias is None else shift + self.bias


def used_norm(norm: BatchNorm, mean: Tensor, var: Tensor, uses_batch: bool) -> UsedNorm:
    """The norm with the statistics ``mean`` and ``var``."""
    dtype = accumulation_dtype(mean.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (norm.weight, norm.bias))
    return UsedNorm(weight, bias, mean.to(dtype), var.to(dtype), norm.eps, uses_batch)
