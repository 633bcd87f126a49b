"""The timings of ``mmrla check-gpu``: block ends and ResNet-50, next to the plain network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from mmrla import ops
from mmrla.commands.gpu_comparison import STAGES
from mmrla.commands.timing import (
    ATTENTIONS,
    Classifier,
    Step,
    Timed,
    device_work,
    peak_memory,
    ratio,
    side_by_side,
)
from mmrla.ops.reference import BaseGroup, BaseWeights, LightWeights, Norm

ROUNDS = 5


def columns(
    name: str, steps: Mapping[str, Step], device: torch.device, repeats: int = 1
) -> dict[str, dict[str, object]]:
    """Cells by step: wall time, kernels' time, each also over the first step's, and launches."""
    fast = device.type == "cuda"
    seconds = side_by_side(
        steps, ROUNDS if fast else 1, device, warm_up=2 if fast else 1, repeats=repeats
    )
    work = {key: device_work(step, device) for key, step in steps.items()}
    first = next(iter(steps))
    cells: dict[str, dict[str, object]] = {}
    for key in steps:
        cells[key] = {
            name: f"{1e3 * median(seconds[key]):.2f}",
            f"{name}, over plain": f"{ratio(seconds, key, first):.2f}",
        }
        mine, plain = work[key], work[first]
        if mine and plain:
            cells[key] |= {
                f"{name}, kernels": f"{1e3 * mine[0]:.2f}",
                f"{name}, kernels over plain": f"{mine[0] / plain[0]:.2f}",
                f"{name}, launches": mine[1],
            }
    return cells


def operation_rows(
    device: torch.device, batch: int, small: bool = False
) -> Iterator[dict[str, object]]:
    """Rows for the block ends of ResNet-50's stages: fused, naive and plain.

    A layer of MRLA-base is the third of its group.
    """
    for channels, height in ((64, 7),) if small else STAGES:
        training = dict(_ends(device, batch, channels, height, True))
        inference = dict(_ends(device, batch, channels, height, False))
        repeats = 1 if small else 10
        cells = columns("training", training, device, repeats)
        others = columns("inference", inference, device, repeats)
        for name in training:
            shape = f"{batch}x{channels}x{height}x{height}"
            yield {"shape": shape, "block end": name, **cells[name], **others[name]}


def _ends(
    device: torch.device, batch: int, channels: int, height: int, training: bool
) -> Iterator[tuple[str, Step]]:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, requires_grad=training)

    def draw_map() -> Tensor:
        maps = torch.randn(batch, channels, height, height, device=device, dtype=torch.bfloat16)
        return maps.contiguous(memory_format=torch.channels_last).requires_grad_(training)

    def draw_norm() -> Norm:
        running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        return Norm(draw(channels), draw(channels), *running, 0.1, 1e-5, training)

    z, shortcut, grad = draw_map(), draw_map(), draw_map().detach()
    norm, out_norm = draw_norm(), draw_norm()
    taps = (draw(1, 1, 5), draw(1, 1, 5), draw(channels, 1, 3, 3))
    light = LightWeights(*taps, draw(channels), 32)
    base = BaseWeights(*taps, 16)
    keys = (draw(batch, channels).detach(), draw(batch, channels).detach())
    group = BaseGroup(keys, (draw_map().detach(), draw_map().detach()), (None, None))
    parameters = (*norm[:2], *out_norm[:2], *light[:-1])
    leaves = [z, shortcut, *(p for p in parameters if p is not None)]

    def run(forward: Callable[[], Tensor]) -> Step:
        def step() -> None:
            with torch.set_grad_enabled(training):
                with torch.autocast(device.type, torch.bfloat16):
                    out = forward()
                if training:
                    torch.autograd.grad(out, leaves, grad, allow_unused=True)

        return step

    def light_end(backend: str) -> Step:
        return run(lambda: ops.mrla_light_tail(z, shortcut, norm, light, out_norm, backend=backend))

    def base_end(backend: str) -> Step:
        return run(
            lambda: ops.mrla_base_tail(
                z, shortcut, norm, base, out_norm, group=group, backend=backend
            )[0]
        )

    yield "plain", run(lambda: (norm(z) + shortcut).relu_())
    for backend in ("fused", "naive"):
        yield f"light, {backend}", light_end(backend)
        yield f"base, {backend}", base_end(backend)


def network_rows(
    device: torch.device, batch: int, small: bool = False
) -> Iterator[dict[str, object]]:
    """Rows for ResNet-50, plain and with each layer attention, with the default backend.

    Raises:
        ImportError: the mm packages are not installed.
    """
    from mmrla.models import MRLAResNet

    size = 64 if small else 224
    x = torch.randn(batch, 3, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(1000, (batch,), device=device)
    timed: dict[str, Timed] = {}
    for name, attention in ATTENTIONS.items():
        model = Classifier(MRLAResNet(50, layer_attention=attention), 2048).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        timed[name] = Timed(model, partial(model, x, labels), device, amp=True)
    training: dict[str, Step] = {name: one.train_step for name, one in timed.items()}
    inference: dict[str, Step] = {name: one.infer for name, one in timed.items()}
    with _fastest_convolutions():
        cells = columns("training step", training, device)
        others = columns("inference", inference, device)
        peaks = {name: peak_memory(step, device) for name, step in training.items()}
    for name in training:
        row: dict[str, object] = {"ResNet-50": name, **cells[name], **others[name]}
        mine, plain = peaks[name], peaks["plain"]
        if mine and plain:
            row["peak memory over plain"] = f"{mine / plain:.2f}"
        yield row


@contextlib.contextmanager
def _fastest_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
