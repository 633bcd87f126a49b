"""Attention-augmented convolution.

Paper: Attention Augmented Convolutional Networks, ICCV 2019, https://arxiv.org/abs/1904.09925,
Eq. 1 to 6: ``out = [conv(x); W concat_h(softmax(l_h) V_h)]``, some channels by convolution and d_v
channels by self-attention over all positions with relative position embeddings of height and width,
``l(i, j) = q_i . (k_j + r^W_{j_x - i_x} + r^H_{j_y - i_y}) / sqrt(d_k / heads)``, shared by heads.
"""

from __future__ import annotations

from math import lcm, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrla.models.plugins.checks import check_counts
from mmrla.models.plugins.contract import ConvPlugin
from mmrla.registry import MODELS


@MODELS.register_module()
class AttentionAugmentedConv(ConvPlugin):
    """Replaces a convolution; some of its output channels come from self-attention.

    If the convolution has a stride, the input of the attention is averaged (3x3, that stride).

    Args:
        in_channels: Given by the block, as are the others up to ``groups``.
        out_channels: F, of convolution and attention together.
        kernel_size: Of the convolution.
        stride: Of both.
        padding: Of the convolution.
        dilation: Of the convolution.
        groups: Of the convolution.
        num_heads: N_h.
        key_ratio: kappa, d_k over F.
        value_ratio: upsilon, d_v over F. d_v is rounded down to a multiple of ``num_heads`` and of
            ``groups``, but not to zero.
        min_key_channels: Minimum number of channels per head of queries and keys.
        size: Height and width of the map (an integer for both) for which relative positions are
            learned. Larger distances use the embedding of the largest.
        downsample: Attention runs on a map smaller by this factor and is interpolated back, for
            large images; the paper's way to save memory.

    Raises:
        ValueError: An argument is not positive, or attention leaves the convolution no channel.
    """

    _abbr_ = "attention_augmented_conv"

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1,
        padding: int = 1, dilation: int = 1, groups: int = 1, num_heads: int = 8,
        key_ratio: float = 0.2, value_ratio: float = 0.1, min_key_channels: int = 20,
        size: int | tuple[int, int] = 14, downsample: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        check_counts(
            "AttentionAugmentedConv", num_heads=num_heads, min_key_channels=min_key_channels,
            downsample=downsample, **{f"size[{i}]": value for i, value in enumerate(self.size)},
        )  # fmt: skip
        for name, ratio in (("key_ratio", key_ratio), ("value_ratio", value_ratio)):
            if not ratio > 0:
                raise ValueError(f"AttentionAugmentedConv: {name} must be positive, got {ratio!r}")
        self.num_heads = num_heads
        self.stride = stride
        self.downsample = downsample
        self.head_channels = max(int(key_ratio * out_channels) // num_heads, min_key_channels)
        unit = lcm(num_heads, groups)
        self.value_channels = max(int(value_ratio * out_channels) // unit, 1) * unit
        if self.value_channels >= out_channels:
            raise ValueError(
                f"AttentionAugmentedConv: {out_channels} channels leave none to the convolution: "
                f"attention takes {self.value_channels} (num_heads={num_heads}, groups={groups}, "
                f"value_ratio={value_ratio})"
            )
        self.conv = nn.Conv2d(
            in_channels, out_channels - self.value_channels, kernel_size, stride, padding, dilation,
            groups, bias=False,
        )  # fmt: skip
        keys = num_heads * self.head_channels
        self.splits = (keys, keys, self.value_channels)
        self.query_key_value = nn.Conv2d(in_channels, sum(self.splits), 1, bias=False)
        self.project = nn.Conv2d(self.value_channels, self.value_channels, 1, bias=False)
        self.relative_height = nn.Parameter(torch.empty(2 * self.size[0] - 1, self.head_channels))
        self.relative_width = nn.Parameter(torch.empty(2 * self.size[1] - 1, self.head_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings of standard deviation ``1 / sqrt(channels per head)``."""
        for table in (self.relative_height, self.relative_width):
            nn.init.normal_(table, std=1 / sqrt(self.head_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, F, H / stride, W / stride]``."""
        convolved = self.conv(x)
        stride = self.stride * self.downsample
        if stride > 1:
            x = F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
        attended = self.attend(x)
        if attended.shape[2:] != convolved.shape[2:]:
            attended = F.interpolate(
                attended, convolved.shape[2:], mode="bilinear", align_corners=False
            )
        return torch.cat([convolved, attended.to(convolved.dtype)], dim=1)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the positions: ``[B, C, H, W]`` to ``[B, d_v, H, W]``."""
        height, width = x.shape[2:]
        query, key, value = (
            part.unflatten(1, (self.num_heads, -1))
            for part in self.query_key_value(x).split(self.splits, dim=1)
        )
        query = query / sqrt(self.head_channels)
        rows = _table(self.relative_height, height)
        columns = _table(self.relative_width, width)
        # b: sample, n: head, d: channel, (h, w): query's position, (u, v): key's.
        logits = torch.einsum("bndhw,bnduv->bnhwuv", query, key)
        logits = logits + torch.einsum("bndhw,hud->bnhwu", query, rows)[..., None]
        logits = logits + torch.einsum("bndhw,wvd->bnhwv", query, columns)[..., None, :]
        weights = logits.flatten(4).softmax(dim=-1)
        attended = torch.einsum("bnhwp,bndp->bndhw", weights, value.flatten(3))
        return self.project(attended.flatten(1, 2))


def _table(embeddings: Tensor, length: int) -> Tensor:
    """``[length, length, d]``: the embedding of the distance of key position to query position."""
    largest = len(embeddings) // 2
    position = torch.arange(length, device=embeddings.device)
    distance = position[None, :] - position[:, None]
    return embeddings[distance.clamp(-largest, largest) + largest]
