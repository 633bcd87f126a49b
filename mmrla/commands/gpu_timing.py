"""The timings of ``mmrla check-gpu``: block ends and ResNet-50, next to the plain network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from mmrla import ops
from mmrla.commands.gpu_comparison import STAGES
from mmrla.ops.reference import BaseGroup, BaseWeights, LightWeights, Norm

Step = Callable[[], object]
ROUNDS = 5
ATTENTIONS = {
    "plain": None,
    "light": dict(type="MRLALight", head_channels=32),
    "base": dict(type="MRLABase", head_channels=16),
}


def side_by_side(
    steps: Mapping[str, Step],
    rounds: int,
    device: torch.device,
    warm_up: int = 2,
    repeats: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs all of them, in rotating order.

    If the machine slows down, it affects a whole round, so ratios within rounds stay valid. On a
    CPU with one thread the process's CPU time is measured, which excludes other work of the
    machine.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in [*steps.values()] * warm_up:
        step()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = clock()
            for _ in range(repeats):
                steps[name]()
            _synchronize(device)
            seconds[name].append((clock() - start) / repeats)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Median over rounds of ``name`` over ``reference``."""
    return median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def device_work(step: Step, device: torch.device) -> tuple[float, int] | None:
    """Total time of a step's kernels and copies in seconds, and their number; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    # Annotations, such as the optimizer's, span kernels that are listed themselves.
    found = [
        event.time_range.elapsed_us()
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("Optimizer.")
    ]
    return 1e-6 * sum(found), len(found)


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


class Classifier(nn.Module):
    """A backbone of ``channels`` outputs with a loss, for training steps."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of images ``[B, 3, H, W]`` and labels ``[B]``."""
        return F.cross_entropy(self.fc(self.backbone(x)[-1].mean((2, 3))).float(), labels)


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
    training: dict[str, Step] = {}
    inference: dict[str, Step] = {}
    for name, attention in ATTENTIONS.items():
        model = Classifier(MRLAResNet(50, layer_attention=attention), 2048).to(device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def train(model: nn.Module = model, optimizer: torch.optim.SGD = optimizer) -> None:
            model.train()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(x, labels)
            loss.backward()
            optimizer.step()

        @torch.no_grad()
        def infer(model: nn.Module = model) -> None:
            model.eval()
            with torch.autocast(device.type, torch.bfloat16):
                model(x, labels)

        training[name], inference[name] = train, infer
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


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Peak memory of a step in bytes, above what was allocated before it."""
    if device.type != "cuda":
        return None
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
