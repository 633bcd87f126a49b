"""Definition of a family of networks for the converter, and renaming of keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match], str]]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How the keys of one kind of network are recognised and renamed.

    Args:
        name: Its name in :class:`mmrla.checkpoints.convert.Conversion`.
        describe: Maps keys without ``backbone.`` and their tensors to a name with depth and width,
            or to None if they are of another family.
        style: Whose names the keys are: ``'torchvision'``, ``'timm'``,
            ``'efficientnet-pytorch'`` (the package of that name), ``'original'`` (the network's
            authors') or ``'mmrla'`` (mmpretrain's, mmdet's).
        to_ours: Others' names to ours, under ``backbone.`` and ``head.``.
        known: Regular expression that must match each converted key completely.
        to_released: Ours to the released implementation's; None if it has none.
    """

    name: str
    describe: Callable[[State], str | None]
    style: Callable[[State], str]
    to_ours: Callable[[State], dict[str, Tensor]]
    known: str
    to_released: Callable[[State], dict[str, Tensor]] | None = None


def rename(key: str, rules: Sequence[Rule]) -> str:
    """Apply regular expressions to a key, in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def rename_all(state: State, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The tensors of a state dict under renamed keys."""
    return {rename(key, rules): value for key, value in state.items()}


def count_layers(keys: State, pattern: str) -> dict[int, int]:
    """Number of layers per stage (or in total, under 0) from keys that match ``pattern``."""
    found: dict[int, set[int]] = {}
    for key in keys:
        match = re.match(pattern, key)
        if match:
            *stage, layer = map(int, match.groups())
            found.setdefault(stage[0] if stage else 0, set()).add(layer)
    return {stage: len(layers) for stage, layers in sorted(found.items())}


def any_key(state: State, pattern: str) -> bool:
    """Whether a regular expression is found in any key."""
    return any(re.search(pattern, key) for key in state)


# Suffixes of a host's name for its layer attention.
ATTENTION = r"(lambda_t|(query|key|value)\.weight)"
RELEASED_ATTENTION: list[Rule] = [
    (r"\.mrla\.m[rl]+a\.Wq\.", ".mrla.query."),
    (r"\.mrla\.m[rl]+a\.Wk\.", ".mrla.key."),
    (r"\.mrla\.m[rl]+a\.Wv\.", ".mrla.value."),
]
BACK_ATTENTION: list[Rule] = [
    (r"\.mrla\.query\.", ".mrla.mrla.Wq."),
    (r"\.mrla\.key\.", ".mrla.mrla.Wk."),
    (r"\.mrla\.value\.", ".mrla.mrla.Wv."),
]
# Of hosts that keep it in a branch with its norms.
INTO_BRANCH: list[Rule] = [
    *RELEASED_ATTENTION,
    (r"\.mrla\.(lambda_t|query|key|value)\b", r".mrla.attention.\1"),
]
OUT_OF_BRANCH: list[Rule] = [(r"\.mrla\.attention\.", ".mrla."), *BACK_ATTENTION]
