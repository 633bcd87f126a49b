"""Steps of networks side by side: wall time, the time of a GPU's kernels, peak memory.

Needs only torch: ``mmrla check-gpu`` runs without the mm packages.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from mmrla.ops.dispatch import forced_backend

Step = Callable[[], object]
ATTENTIONS = {
    "plain": None,
    "light": dict(type="MRLALight", head_channels=32),
    "base": dict(type="MRLABase", head_channels=16),
}


def cpu_name() -> str:
    """The CPU's name as Linux has it, with the family and model if the name has no number.

    Elsewhere, what the interpreter knows.
    """
    try:
        listed = Path("/proc/cpuinfo").read_text()
    except OSError:
        listed = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", listed, re.MULTILINE))
    name = found.get("model name")
    if name is None:
        return platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= found.keys():
        return name
    return f"{name}, family {found['cpu family']}, model {found['model']}"


class Classifier(nn.Module):
    """A backbone of ``channels`` outputs with a loss, for training steps."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of images ``[B, 3, H, W]`` and labels ``[B]``."""
        return F.cross_entropy(self.fc(self.backbone(x)[-1].mean((2, 3))).float(), labels)


class Timed:
    """A network on one batch: its training step and its inference.

    Args:
        model: The network.
        forward: Runs it; returns the loss.
        device: Where the network is.
        amp: Use bfloat16 autocast.
        backend: Of mmrla's operations; None: their own choice.
        lr: Of the training step.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[], Tensor], device: torch.device,
        amp: bool = False, backend: str | None = None, lr: float = 1e-4,
    ) -> None:  # fmt: skip
        self.model, self._forward, self.device = model, forward, device
        self.amp, self.backend = amp, backend
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=lr, momentum=0.9)

    def loss(self) -> Tensor:
        """One forward."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)
        with forced_backend(self.backend), autocast:
            return self._forward()

    def gradients(self) -> None:
        """Forward and backward."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def train_step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.gradients()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        """One forward in evaluation mode."""
        self.model.eval()
        self.loss()


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


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Peak memory of a step in bytes, above what was allocated before it; None on a CPU."""
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
