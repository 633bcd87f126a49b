"""Loads a state dict and reports exactly what was loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from torch import Tensor, nn

from mmrla.checkpoints.files import CheckpointError
from mmrla.compat import log


def is_mrla_key(key: str) -> bool:
    """Whether a state-dict key belongs to a layer attention: part of its name contains mrla."""
    return "mrla" in key


def plugin_keys(model: nn.Module) -> set[str]:
    """The state-dict keys of a model's plugins, from ``plugin_names`` of its modules."""
    prefixes = tuple(
        f"{name}.{plugin}." if name else f"{plugin}."
        for name, module in model.named_modules()
        for plugin in getattr(module, "plugin_names", ())
    )
    return {key for key in model.state_dict() if key.startswith(prefixes)} if prefixes else set()


@dataclass
class LoadReport:
    """The outcome of a load for each tensor."""

    matched: list[str] = field(default_factory=list)
    """Keys of the model that were loaded."""
    missing: list[str] = field(default_factory=list)
    """Keys of the model that the checkpoint lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Keys of the checkpoint that the model lacks."""
    mismatched: list[str] = field(default_factory=list)
    """``key: checkpoint shape -> model shape`` of tensors that were skipped because of it."""
    prefix: str = ""
    """Prefix removed from the checkpoint's keys (``backbone.``) or, with ``+``, added to them."""

    @property
    def wrong_shape(self) -> list[str]:
        """The keys of ``mismatched``."""
        return [entry.split(":")[0] for entry in self.mismatched]

    def summary(self, limit: int = 8) -> str:
        """A line of counts, and a line for each kind of key that was not loaded."""
        lines = [
            f"{len(self.matched)} tensors loaded, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} of the wrong shape"
            + (f" (prefix {self.prefix!r})" if self.prefix else "")
        ]
        for title in ("missing", "unexpected", "mismatched"):
            keys = getattr(self, title)
            if keys:
                more = f", ... ({len(keys) - limit} more)" if len(keys) > limit else ""
                lines.append(f"  {title}: {', '.join(keys[:limit])}{more}")
        return "\n".join(lines)

    def require(
        self, source: str, allowed: Iterable[str], model: nn.Module, state: Mapping[str, Tensor], *,
        fresh_mrla: bool = False,
    ) -> None:  # fmt: skip
        """Raise CheckpointError if nothing matches, or parts of the model would stay random.

        Also if the checkpoint contains layer attentions that the model has no place for.

        Args:
            source: Name of the checkpoint in the message.
            allowed: Patterns (as in :mod:`fnmatch`) of keys that may be missing; counters of batch
                norms always may.
            model: The module that the report is about.
            state: The checkpoint that the report is about.
            fresh_mrla: Whether layer attentions may be newly initialised, all of them together, and
                plugins likewise.
        """
        if not self.matched:
            raise CheckpointError(
                f"{source}: no key matches the model. The checkpoint's begin with "
                f"{', '.join(list(state)[:3])}; the model's with "
                f"{', '.join(list(model.state_dict())[:3])}"
            )
        patterns = ["*num_batches_tracked", *allowed]
        stray = [k for k in self.unexpected if is_mrla_key(k) and not _matches(k, patterns)]
        if stray:
            raise CheckpointError(
                f"{source}: holds {len(stray)} tensors of layer attentions that the model has no "
                f"place for ({', '.join(stray[:4])}, ...): another layer attention, or the plain "
                f"network\n{self.summary()}"
            )
        if not any(is_mrla_key(key) for key in self.matched):
            # A plain checkpoint: its layer attentions may start fresh, but only all of them.
            patterns += ["*mrla*"] if fresh_mrla else []
        unfilled = [*self.missing, *self.wrong_shape]
        plugins = plugin_keys(model) if fresh_mrla else set()
        if not plugins.intersection(self.matched):
            unfilled = [key for key in unfilled if key not in plugins]
        bad = [key for key in unfilled if not _matches(key, patterns)]
        if bad:
            raise CheckpointError(
                f"{source}: {len(bad)} tensors of the model would stay random: "
                f"{', '.join(bad[:8])}{', ...' if len(bad) > 8 else ''}. If that is meant, name "
                f"them in allow_missing\n{self.summary()}"
            )


def _align(state: Mapping[str, Tensor], own: Iterable[str]) -> tuple[dict[str, Tensor], str]:
    """The checkpoint's keys with or without ``backbone.``, whichever matches the model better.

    Or twice: in mmdet's teacher-student detectors both networks get the checkpoint's weights.
    """
    keys = set(own)
    candidates: dict[str, dict[str, Tensor]] = {
        "": dict(state),
        "backbone.": {
            k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
        },
        "+backbone.": {f"backbone.{k}": v for k, v in state.items()},
    }
    pair = ("teacher.", "student.")
    if all(any(k.startswith(prefix) for k in keys) for prefix in pair):
        candidates["+teacher. and student."] = {p + k: v for p in pair for k, v in state.items()}
    best = max(candidates, key=lambda name: sum(k in keys for k in candidates[name]))
    return candidates[best], best


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, allow_missing: Iterable[str] = (),
    source: str = "checkpoint",
) -> LoadReport:  # fmt: skip
    """Load matching tensors and report the rest; raise if a part other than MRLA's stays random.

    Works with and without a ``backbone.`` prefix on either side, from a detector's or classifier's
    checkpoint into a backbone, and across classifier heads of another size (which are not loaded).

    Args:
        model: The module to load.
        state: Tensors by key.
        allow_missing: Patterns (as in :mod:`fnmatch`) of keys that may be missing. Counters of
            batch norms always may, as may heads (see :func:`allowed_heads`), and layer attentions
            and plugins if the checkpoint has none.
        source: Name of the checkpoint in messages.

    Returns:
        The outcome for each tensor; also logged.

    Raises:
        CheckpointError: Nothing matches, or keys that may not be missing are.
    """
    report, fitting = compare(model, state)
    allowed = [*allowed_heads(report, state), *allow_missing]
    report.require(source, allowed, model, state, fresh_mrla=True)
    model.load_state_dict(fitting, strict=False)
    log(f"{source}: {report.summary()}")
    return report


def compare(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[LoadReport, dict[str, Tensor]]:
    """Report what a load would do, without doing it.

    Args:
        model: The module that would be loaded.
        state: Tensors by key.

    Returns:
        The report, and the matching tensors under the model's keys, with position embeddings of
        vision transformers resized to the model's grid.

    Raises:
        CheckpointError: A position embedding cannot be resized.
    """
    own = model.state_dict()
    aligned, prefix = _align(state, own)
    _fit_pos_embeds(model, aligned)
    report = LoadReport(prefix=prefix)
    fitting = {}
    for key, value in aligned.items():
        if key not in own:
            report.unexpected.append(key)
        elif own[key].shape != value.shape:
            shapes = f"{tuple(value.shape)} -> {tuple(own[key].shape)}"
            report.mismatched.append(f"{key}: {shapes}")
        else:
            fitting[key] = value
    if prefix == "backbone.":
        report.unexpected += [k for k in state if not k.startswith("backbone.")]
    report.matched = list(fitting)
    filled_or_mismatched = {*fitting, *report.wrong_shape}
    report.missing = [k for k in own if k not in filled_or_mismatched]
    return report, fitting


def _fit_pos_embeds(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Resize position embeddings for modules that support it, in place."""
    for name, module in model.named_modules():
        fit = getattr(module, "fit_pos_embed", None)
        key = f"{name}.pos_embed" if name else "pos_embed"
        if fit is not None and key in state:
            try:
                state[key] = fit(state[key])
            except ValueError as error:
                raise CheckpointError(f"{key}: {error}") from error


# Parts that one rightly trains anew on other classes.
_HEADS = ("head.*", "fc.*", "classifier.*", "*_head.*")
# What only a whole detector has.
_DETECTOR_PARTS = ("neck.*", "*_head.*")


def allowed_heads(report: LoadReport, state: Mapping[str, Tensor]) -> list[str]:
    """Patterns of parts that fine-tuning may leave random.

    Heads of another size; and, if the checkpoint is of a backbone or a classifier, all other parts
    of a detector. A detector's checkpoint without a neck or a head is suspicious.
    """
    patterns = [key for key in report.wrong_shape if _matches(key, _HEADS)]
    if not any(_matches(key, _DETECTOR_PARTS) for key in state):
        patterns += [*_HEADS, *_DETECTOR_PARTS]
    return patterns


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)
