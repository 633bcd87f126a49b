"""Stops a run at the first number that is not finite, and reports its origin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmrla.engine.layout import optim_wrappers
from mmrla.loads import unwrapped
from mmrla.registry import HOOKS


class NonFiniteError(FloatingPointError):
    """NaN or infinity in a loss, a gradient, a weight or an activation."""


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Stops training if a loss or a gradient is NaN or infinite, before it reaches a weight.

    Checks the loss of each iteration, all gradients before each optimizer step, and every tensor of
    a checkpoint before it is saved, so neither weights nor files are corrupted. The error names the
    first layer whose output is not finite, found by running the same batch once more with the same
    random numbers, or the image that contains the NaN, or the parameters whose gradients do. All
    processes of a distributed run stop together.

    Steps that the loss scaler of mixed precision skips, to continue with a smaller scale, are not
    errors; a scale below ``min_loss_scale`` is.

    The check costs one transfer from the device per iteration. A hook that saves must not run
    before it; mmengine's ``CheckpointHook`` runs last.

    Args:
        min_loss_scale: The smallest acceptable scale of a dynamic loss scaler.

    Raises:
        ValueError: ``min_loss_scale`` is not positive.
        NonFiniteError: While training, as described.
    """

    priority = "HIGH"

    def __init__(self, min_loss_scale: float = 2.0**-14) -> None:
        if not min_loss_scale > 0:
            raise ValueError(f"min_loss_scale must be positive, got {min_loss_scale}")
        self.min_loss_scale = min_loss_scale
        self._unwatch: list[Callable[[], None]] = []
        self._batch: Any = None
        self._random: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Refuse initial weights that are not finite, and start checking optimizer steps."""
        require_finite("the network before training", unwrapped(runner.model).state_dict())
        self._remove()
        for wrapper in optim_wrappers(runner):
            check = functools.partial(self._check_gradients, runner, wrapper.optimizer)
            self._unwatch.append(_before_step(wrapper.optimizer, check))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Save what is needed to rerun the iteration."""
        self._batch = data_batch
        self._random = [torch.get_rng_state()]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._random.append(torch.cuda.get_rng_state())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Check the iteration's loss and the loss scale."""
        bad = [name for name, value in (outputs or {}).items() if not _is_finite(value)]
        if _anywhere(bool(bad)):
            where = ", ".join(bad) or "of another process"
            raise NonFiniteError(
                f"iteration {runner.iter + 1}: the loss is not finite ({where}); "
                f"{self._reason(runner)}"
            )
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        if scaler is not None and scaler.get_scale() < self.min_loss_scale:
            raise NonFiniteError(
                f"iteration {runner.iter + 1}: the loss scale fell to {scaler.get_scale():g}, "
                f"below min_loss_scale={self.min_loss_scale:g}: gradients overflow at any scale; "
                f"{self._reason(runner)}"
            )
        self._batch = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to save tensors that are not finite."""
        require_finite(
            f"iteration {runner.iter}, no checkpoint saved: the network", checkpoint["state_dict"]
        )

    def after_train(self, runner: Runner) -> None:
        """Stop checking optimizer steps."""
        self._remove()

    def _remove(self) -> None:
        for unwatch in self._unwatch:
            unwatch()
        self._unwatch = []

    def _check_gradients(self, runner: Runner, optimizer: torch.optim.Optimizer) -> None:
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow > 0):
            return  # a fused optimizer, which itself leaves out the step that the scaler skips
        groups = optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        # A norm is not finite where an element is not; that of large finite ones may overflow too,
        # so elements decide.
        norms = torch.stack([n.float() for n in torch._foreach_norm(grads)]) if grads else None
        suspect = norms is not None and not bool(norms.isfinite().all())
        if not _anywhere(suspect and not all(bool(g.isfinite().all()) for g in grads)):
            return
        bad = [
            name
            for name, p in unwrapped(runner.model).named_parameters()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        found = f"of {len(bad)} parameters, {bad[-1]!r} nearest to the loss" if bad else ""
        raise NonFiniteError(
            f"iteration {runner.iter + 1}: gradients are not finite "
            f"({found or 'in another process'}), the weights are unchanged; "
            f"{self._reason(runner)}"
        )

    def _reason(self, runner: Runner) -> str:
        """A description of the origin of the first value that is not finite."""
        model = unwrapped(runner.model)
        for name, tensor in model.named_parameters():
            if not bool(tensor.isfinite().all()):
                return f"parameter {name!r} is not finite"
        if self._batch is None:
            return "the batch is no longer there"
        for image, path in _float_inputs(self._batch):
            if not bool(image.isfinite().all()):
                return f"the input image {path} holds {_count(image)}{_first_module(model)}"
        torch.set_rng_state(self._random[0])
        if len(self._random) > 1:
            torch.cuda.set_rng_state(self._random[1])
        with first_non_finite(model) as found, torch.no_grad():
            try:
                (wrapper, *others) = optim_wrappers(runner)
                with nullcontext() if others else wrapper.optim_context(model):
                    data = model.data_preprocessor(self._batch, True)
                    model._run_forward(data, mode="loss")
            except Exception as error:  # a network may raise on NaN; what was found counts
                found.setdefault("text", f"running the batch again raised {error!r}")
        return found.get(
            "text", "all outputs of layers are finite: it arose in the loss or backward"
        )


def _before_step(optimizer: torch.optim.Optimizer, check: Callable[[], None]) -> Callable[[], None]:
    """Call ``check`` before each step; returns a function that stops this.

    Not by ``register_step_pre_hook``: once torch.compile has been used, torch 2.1 does not call
    such hooks of optimizers created later.
    """
    step = optimizer.step
    own = "step" in vars(optimizer)  # a schedule's, which counts steps

    @functools.wraps(step)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check()
        return step(*args, **kwargs)

    def end() -> None:
        if own:
            setattr(optimizer, "step", step)  # noqa: B010
        else:
            del optimizer.step

    setattr(optimizer, "step", checked)  # noqa: B010
    return end


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[dict[str, str]]:
    """Find a network's first output that is not finite.

    If there was one, the yielded dict has a ``text`` afterwards: the layer's name and type, the
    number of values, and whether its inputs were finite.
    """
    found: dict[str, str] = {}

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        bad = next((t for t in _tensors(output) if not _is_finite(t)), None)
        if bad is not None:
            found["text"] = (
                f"the first layer with such an output is {name!r} ({type(module).__name__}): "
                f"{_count(bad)}, its input "
                f"{'is finite' if _is_finite(inputs) else 'is not finite either'}"
            )

    def hook(name: str) -> Any:
        return lambda *args: None if found else look(name, *args)

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def require_finite(what: str, tensors: dict[str, Any]) -> None:
    """Check that all floating-point tensors are finite.

    Raises:
        NonFiniteError: Some are not; the message names up to three.
    """
    bad = [name for name, value in tensors.items() if not _is_finite(value)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(f"{what} is not finite in {', '.join(map(repr, bad[:3]))}{more}")


def _is_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _anywhere(bad: bool) -> bool:
    """Whether ``bad`` is True in any process."""
    if not is_distributed():
        return bad
    flag = torch.tensor(float(bad))
    if torch.distributed.get_backend() == "nccl":
        flag = flag.cuda()
    all_reduce(flag)
    return bool(flag > 0)


def _float_inputs(batch: Any) -> Iterator[tuple[Tensor, str]]:
    """Images of a batch that may contain NaN, with a description of each."""
    inputs = batch.get("inputs") if isinstance(batch, dict) else None
    samples: Sequence[Any] = batch.get("data_samples") or () if isinstance(batch, dict) else ()
    for i, image in enumerate(inputs if inputs is not None else ()):
        if isinstance(image, Tensor) and image.is_floating_point():
            path = getattr(samples[i], "img_path", None) if i < len(samples) else None
            rank = f" of process {get_rank()}" if is_distributed() else ""
            yield image, f"{i}{rank} of the batch{f' ({path})' if path else ''}"


def _first_module(model: nn.Module) -> str:
    """The layer that gets the images: the first parameter's."""
    name = next((n.rpartition(".")[0] for n, _ in model.named_parameters()), "")
    return f", which the first layer {name!r} gets" if name else ""


def _count(tensor: Tensor) -> str:
    nan = int(tensor.isnan().sum())
    return f"{nan} NaN and {int(tensor.isinf().sum())} infinite of {tensor.numel()} values"
