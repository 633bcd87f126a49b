"""The comparisons of ``mmrla check-gpu``: cases, their errors against plain torch, limits."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmrla.ops import fused, reference
from mmrla.ops.reference import BaseWeights, LightWeights, eca_kernel_size
from mmrla.ops.verify import Case

LIMITS = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}
"""Of relative errors, norm of the difference over norm of the expected value. Rounding errors are
several times smaller; a wrong tap, tile or statistic gives a much larger error."""
KINDS = {"light": LightWeights, "base": BaseWeights}
STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
"""ResNet-50's channels and heights."""
LARGE = 2**31 + 2**26
"""Elements of a map whose offsets need more than 32 bits."""
MOMENTUM = 0.1


class Check(NamedTuple):
    """One comparison."""

    kind: str
    """``light`` or ``base``."""
    shape: tuple[int, int, int, int]
    head_channels: int
    dtype: str = "float32"
    channels_last: bool = True
    batch: tuple[bool, bool] = (True, True)
    """Whether each of the two norms uses the batch's statistics."""
    drop: bool = False
    grad: bool = True
    layers: int = 1
    copies: int = 1
    """How often the batch is repeated: statistics stay the same, so the result is known from one
    copy. This checks maps too large for float64."""

    def __str__(self) -> str:
        return ", ".join(f"{value}" for value in self.columns().values() if value)

    def columns(self) -> dict[str, str]:
        """The case, as cells of a table."""
        batch, *rest = self.shape
        norms = ["batch" if b else "frozen" for b in self.batch]
        return {
            "operation": self.kind if self.layers == 1 else f"{self.kind}, {self.layers} layers",
            "dtype": self.dtype,
            "layout": "channels_last" if self.channels_last else "NCHW",
            "shape": "x".join(map(str, [batch * self.copies, *rest])),
            "norms": norms[0] if norms[0] == norms[1] else "/".join(norms),
            "more": ", ".join(
                ["drop path"] * self.drop + ["no gradients"] * (not self.grad)
            ),
        }  # fmt: skip


class Outcome(NamedTuple):
    """The result of a check."""

    check: Check
    errors: dict[str, float]
    """Relative errors by name."""
    note: str = ""
    """Why it was not run, or how it failed."""
    failed: bool = False
    """Whether it raised or crashed."""

    @property
    def above(self) -> dict[str, float]:
        """Errors beyond the limit, NaN included."""
        limit = LIMITS[self.check.dtype]
        return {name: error for name, error in self.errors.items() if not error <= limit}

    @property
    def wrong(self) -> bool:
        """Whether something is wrong."""
        return self.failed or bool(self.above)

    def explanation(self) -> str:
        """What is wrong."""
        found = [f"{name} {error:.1e}" for name, error in self.above.items()]
        return "; ".join(filter(None, [self.note, ", ".join(found)]))

    def columns(self) -> dict[str, str]:
        """The worst error, as cells of a table."""
        if not self.errors:
            return {
                "worst error": "",
                "of": "",
                "result": "WRONG" if self.failed else "not checked",
            }
        name = max(self.errors, key=lambda k: (math.isnan(self.errors[k]), self.errors[k]))
        return {
            "worst error": f"{self.errors[name]:.1e}",
            "of": name,
            "result": "WRONG" if self.wrong else "ok",
        }

    def __str__(self) -> str:
        worst, name, verdict = self.columns().values()
        return f"{verdict} ({self.note or f'{worst}, {name}'})"


def checks_of(part: str, batch: int) -> list[Check]:
    """The comparisons of a part: ``all``, ``large``, ``cpu`` or ``interpreter``.

    ``batch`` is ResNet-50's, which the timing uses: its kernels are checked at that size.
    """
    return list({"all": _all, "large": _large, "cpu": _small, "interpreter": _small}[part](batch))


def _all(batch: int) -> Iterator[Check]:
    """Alternating operations, with the most informative checks first, in case time runs out."""
    pairs = zip(_each("light", 32, 1, batch), _each("base", 16, 3, batch), strict=True)
    yield from itertools.chain.from_iterable(pairs)
    yield Check("base", (2, 16, 5, 6), 8, "float32", layers=11)


def _each(kind: str, head_channels: int, layers: int, batch: int) -> Iterator[Check]:
    last = itertools.cycle((True, False))
    for dtype, channels_last in itertools.product(LIMITS, (True, False)):
        yield Check(kind, (4, 128, 14, 14), 32, dtype, channels_last, layers=layers)
    for norms in ((False, False), (True, False), (False, True)):
        yield Check(kind, (3, 64, 9, 11), 16, "float32", next(last), norms, norms[1], layers=layers)
    for shape, width in (
        ((2, 24, 7, 7), 8), ((2, 136, 1, 2), 8), ((3, 12, 13, 17), 4), ((2, 72, 3, 9), 24),
    ):  # fmt: skip
        yield Check(kind, shape, width, "float32", next(last), drop=True, layers=layers)
    for channels, height in STAGES:
        shape = (min(8, batch), channels, height, height)
        copies = max(1, batch // 8)
        at = Check(kind, shape, head_channels, "bfloat16", layers=layers, copies=copies)
        yield at
        yield at._replace(batch=(False, False), grad=False)
    # A detector's: a large map, norms frozen.
    yield Check(kind, (1, 256, 200, 304), 32, "bfloat16", True, (False, False), layers=layers)


def _large(batch: int) -> Iterator[Check]:
    shape = (2, 256, 112, 112)
    copies = math.ceil(LARGE / math.prod(shape))
    yield Check("light", shape, 32, "bfloat16", copies=copies)
    yield Check("light", shape, 32, "bfloat16", False, (False, False), copies=copies)
    yield Check("base", shape, 16, "bfloat16", copies=copies)
    yield Check("base", shape, 16, "bfloat16", False, (False, False), False, False, 2, copies)


def _small(batch: int) -> Iterator[Check]:
    for kind, layers in (("light", 1), ("base", 3)):
        yield Check(kind, (2, 8, 5, 6), 4, "float32", layers=layers)
        yield Check(kind, (3, 12, 4, 3), 6, "float32", False, drop=True, layers=layers)
        yield Check(kind, (2, 8, 3, 5), 4, "float32", True, (False, False), layers=layers)
        yield Check(kind, (2, 8, 3, 5), 4, "bfloat16", grad=False, layers=layers)


def compare(check: Check, device: torch.device) -> Outcome:
    """Run a check; exceptions become part of the outcome."""
    try:
        if device.type == "cuda":
            size = check.copies * math.prod(check.shape) * getattr(torch, check.dtype).itemsize
            needed = size * check.layers * (11 if check.grad else 7)
            free = torch.cuda.mem_get_info(device)[0]
            if check.copies > 1 and needed > free:
                note = f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
                return Outcome(check, {}, note)
        return Outcome(check, errors_of(check, device))
    except torch.cuda.OutOfMemoryError:
        return Outcome(check, {}, "memory ran out")
    except Exception as error:  # whatever a compiler or a launch may raise
        message = str(error).strip().splitlines()[:1] or [""]
        return Outcome(check, {}, f"{type(error).__name__}: {message[0]}", True)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def errors_of(check: Check, device: torch.device) -> dict[str, float]:
    """Relative errors of outputs, running statistics and gradients, by name."""
    kernel_size = eca_kernel_size(check.shape[1])
    case = Case(
        KINDS[check.kind], check.shape, check.head_channels, getattr(torch, check.dtype), device,
        check.channels_last, check.batch, check.drop, check.layers, (kernel_size, kernel_size),
    )  # fmt: skip
    # Large logits saturate softmax and sigmoid. Then float32 keeps few digits of the gradients of
    # query and key, by any implementation.
    for name, leaf in case.leaves.items():
        if name.startswith(("query", "key")):
            leaf.mul_(0.25)
    tails = (fused.light_tail, fused.base_tail)
    if check.copies == 1:
        return case.errors(*tails, check.grad)
    plain = (reference.light_tail_reference, reference.base_tail_reference)
    expected = case.run(*plain, True, check.grad)
    got = repeated(case, check.copies).run(*tails, False, check.grad)
    errors: dict[str, float] = {}
    for name, x in expected.items():
        found = got.pop(name)
        if x.shape == case.shape:
            each = [_error(part.double(), x) for part in found.split(case.shape[0])]
            errors[name] = max(each, key=lambda e: (math.isnan(e), e))
            continue
        found = found.double()
        if name.startswith("grad of"):
            found = found / check.copies
        if "running_var" in name and check.batch[name.startswith("out_norm")]:
            x = _unbiased_as(x, case.running[name].double(), case.shape, check.copies)
        errors[name] = _error(found, x)
    return errors


def repeated(case: Case, copies: int) -> Case:
    """The case with every map, and drop path's factors, repeated along the batch."""
    many = copy.copy(case)

    def repeat(x: Tensor) -> Tensor:
        if x.shape != case.shape:
            return x
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        shape = (copies * len(x), *x.shape[1:])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for part in out.split(len(x)):
            part.copy_(x)
        return out

    many.leaves = {name: repeat(x) for name, x in case.leaves.items()}
    many.grads = [repeat(x) for x in case.grads]
    many.drop = None if case.drop is None else case.drop.repeat(copies)
    return many


def _unbiased_as(x: Tensor, before: Tensor, shape: tuple[int, ...], copies: int) -> Tensor:
    """The running variance if the batch is repeated: ``n / (n - 1)`` changes."""
    n = shape[0] * shape[2] * shape[3]
    kept = (1 - MOMENTUM) * before
    return kept + (x - kept) * ((n - 1) / n) * (copies * n / (copies * n - 1))


def _error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected value."""
    # Rounding is all there is if the exact result is 0, as of a query in a group's first layer.
    floor = 1e-3 * math.sqrt(expected.numel())
    return ((got - expected).norm() / expected.norm().clamp(min=floor)).item()
