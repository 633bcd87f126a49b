"""(a) Single operations: time, and the least bytes they must move against the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from common import Row, backend, side_by_side
from torch import Tensor

from mmrla.layers import LayerAttention, MRLABase, MRLALight


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    seconds = side_by_side({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.nbytes / median(seconds)


def least_bytes(layer: LayerAttention, n: int, depth: int) -> tuple[int, int]:
    """Bytes forward and backward that no implementation can do without, ``n`` in one map.

    Light forward: x for its mean, then x and the shortcut read, o written. Backward: a pass over
    x and o's gradient for the gate's, then x, shortcut and gradient read, two gradients written.
    Base forward: x for its mean and again for the value, which is written, with all earlier ones
    read and o written. Backward: o's gradient and all values read, a gradient for each written.
    """
    if isinstance(layer, MRLALight):
        return 4 * n, 7 * n
    return (3 + depth) * n, (1 + 2 * depth) * n


def measure(device: torch.device, rounds: int, quick: bool) -> list[Row]:
    """Rows for MRLA-light and MRLA-base at the widths of ResNet-50's stages."""
    bandwidth = copy_bandwidth(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = 64 if device.type == "cuda" else 2
    shapes = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
    rows: list[Row] = []
    for channels, size in shapes[1:3] if quick else shapes:
        for layer, depth in ((MRLALight(channels), 1), (MRLABase(channels), 3)):
            layer = layer.to(device, dtype).to(memory_format=torch.channels_last)
            maps = [
                torch.randn(batch, channels, size, size, device=device, dtype=dtype)
                for _ in range(depth + 1)
            ]
            ahead_only, whole = _steps(layer, maps)
            names = ("naive", "fused")
            steps: dict[str, Callable[[], object]] = {}
            for name in names:
                steps[f"{name} forward"] = _forced(name, ahead_only)
                steps[f"{name} both"] = _forced(name, whole)
            seconds = side_by_side(steps, rounds, device)
            least = least_bytes(layer, maps[0].nbytes, depth)
            for name in names:
                ahead = median(seconds[f"{name} forward"])
                pairs = zip(seconds[f"{name} both"], seconds[f"{name} forward"], strict=True)
                back = median(both - forward for both, forward in pairs)
                rows.append(
                    dict(
                        operation=f"{type(layer).__name__}, layer {depth} of a group",
                        shape=f"{batch}x{channels}x{size}x{size} {str(dtype)[6:]}",
                        backend=name,
                        forward_ms=round(1e3 * ahead, 3),
                        backward_ms=round(1e3 * back, 3),
                        forward_of_roofline=round(least[0] / bandwidth / ahead, 3),
                        backward_of_roofline=round(least[1] / bandwidth / back, 3),
                        copy_GB_s=round(bandwidth / 1e9, 1),
                    )
                )
    return rows


def _steps(
    layer: LayerAttention, maps: list[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    *earlier, x, shortcut = maps
    x, shortcut = x.requires_grad_(), shortcut.requires_grad_()
    grad = torch.randn_like(x)
    with torch.no_grad():
        state = None
        for other in earlier:
            state = layer(other, other, state)[1]

    def fresh(state):
        if state is None:
            return None
        # Leaves: only this layer's backward is timed.
        parts = {n: getattr(state, n) for n in ("keys", "values")}
        return state._replace(
            **{n: tuple(t.detach().requires_grad_() for t in part) for n, part in parts.items()}
        )

    def forward() -> object:
        return layer(x, shortcut, fresh(state))[0]

    def both() -> object:
        layer(x, shortcut, fresh(state))[0].backward(grad)
        x.grad = shortcut.grad = None
        layer.zero_grad()
        return None

    return forward, both


def _forced(name: str, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with backend(name):
            return step()

    return run
