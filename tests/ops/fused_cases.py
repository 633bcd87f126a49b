"""Arguments for the fused operations, and the comparison of two backends on them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrla.ops import BatchNorm, mrla_base_tail, mrla_light_tail

SHAPES = [(2, 24, 7, 7, 8), (1, 16, 1, 1, 16), (2, 12, 13, 17, 4), (3, 8, 1, 5, 1)]
LAYOUTS = ["nchw", "channels_last", "sliced", "mixed"]


def feature_map(shape, layout="nchw", dtype=torch.float64, index=0) -> Tensor:
    """A leaf in one of the layouts; ``mixed`` alternates with ``index``."""
    b, c, h, w = shape
    x = torch.randn(b, c, h, 2 * w, dtype=torch.float64)[..., ::2].to(dtype)
    if layout == "mixed":
        layout = ("nchw", "channels_last", "sliced")[index % 3]
    if layout == "nchw":
        x = x.contiguous()
    elif layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.detach().requires_grad_()


def small(*shape, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul(0.5).to(dtype).requires_grad_()


def gradients(outputs, leaves, seed=1):
    """Gradients of random weights on all outputs."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def close(got, expected, tolerance, names=None):
    """Compare lists of tensors relative to the largest value of each, and their dtypes."""
    assert len(got) == len(expected)
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        name = i if names is None else names[i]
        if theirs is None:
            assert mine is None, name
            continue
        assert mine.shape == theirs.shape, name
        assert mine.dtype == theirs.dtype, name
        if theirs.numel():
            scale = theirs.double().abs().max().clamp(min=1e-2)
            error = ((mine.double() - theirs.double()).abs().max() / scale).item()
            assert error <= tolerance, f"{name}: {error}"


def light_args(shape, head_channels, layout="nchw", dtype=torch.float64, previous=True):
    c = shape[1]
    return [
        feature_map(shape, layout, dtype, 0),
        feature_map(shape, layout, dtype, 1) if previous else None,
        small(1, 1, 3, dtype=dtype),
        small(1, 1, 5, dtype=dtype),
        small(c, 1, 3, 3, dtype=dtype),
        small(c, dtype=dtype) if previous else None,
        head_channels,
    ]


def base_args(layers, shape, layout="nchw", dtype=torch.float64):
    b, c = shape[:2]
    key_dtype = torch.promote_types(dtype, torch.float32)
    return (
        small(b, c, dtype=key_dtype),
        [small(b, c, dtype=key_dtype) for _ in range(layers)],
        [feature_map(shape, layout, dtype, i) for i in range(layers)],
    )


class Tail:
    """A tail's leaves and a way to run it by a backend; ``kind`` is ``light`` or ``base``."""

    def __init__(self, kind, shape, head_channels, layout="nchw", dtype=torch.float64,
                 running=(False, False), scale=False, layers=3) -> None:  # fmt: skip
        b, c = shape[:2]
        wide = torch.promote_types(dtype, torch.float32)
        self.kind, self.head_channels = kind, head_channels
        self.maps = [feature_map(shape, layout, dtype, i) for i in range(2)]
        self.norms = [small(c, dtype=wide) for _ in range(4)]
        self.weights = [small(1, 1, 3, dtype=dtype), small(1, 1, 3, dtype=dtype),
                        small(c, 1, 3, 3, dtype=dtype)]  # fmt: skip
        if kind == "light":
            self.weights.append(small(c, dtype=dtype))
        self.group = [[], []]
        if kind == "base":
            _, self.group[0], self.group[1] = base_args(layers - 1, shape, layout, dtype)
        self.running = [
            (torch.randn(c, dtype=wide), torch.rand(c, dtype=wide) + 0.5) if r else (None, None)
            for r in running
        ]
        self.scale = torch.arange(b, dtype=wide) * 1.25 if scale else None

    @property
    def leaves(self):
        return [*self.maps, *self.norms, *self.weights, *self.group[0], *self.group[1]]

    def run(self, backend, leaves=None):
        """Every output that has a gradient, and the statistics."""
        z, shortcut, w1, b1, w2, b2, *rest = leaves or self.leaves
        first, last = ([None if s is None else s.to(w1.dtype) for s in r] for r in self.running)
        norm, out_norm = BatchNorm(w1, b1, *first, 1e-5), BatchNorm(w2, b2, *last, 1e-3)
        count = len(self.weights)
        weights, rest = rest[:count], rest[count:]
        end = (self.head_channels, out_norm, self.scale)
        if self.kind == "light":
            found = mrla_light_tail(z, shortcut, norm, *weights, *end, backend=backend)
            return [found.out], list(found[1:])
        t = len(rest) // 2
        group = rest[:t], rest[t:]
        found = mrla_base_tail(z, shortcut, norm, *weights, *group, *end, backend=backend)
        return [found.tail.out, found.key, found.value], list(found.tail[1:])
