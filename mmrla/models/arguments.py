"""Checks of the arguments of hosts' base classes: errors name the bad argument.

The base classes respond to bad arguments with bare assertions, with errors from deep inside torch,
or with a network that silently lacks an output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmrla.layers.checks import check_bool, check_count, is_count
from mmrla.registry import WEIGHT_INITIALIZERS

_COUNTS = ("in_channels", "stem_channels", "base_channels", "num_stages", "groups",
           "width_per_group", "embed_dims")  # fmt: skip
_RATES = ("drop_path_rate", "drop_rate", "attn_drop_rate")
_BOOLS = ("norm_eval", "with_cp", "deep_stem", "avg_down", "zero_init_residual", "final_norm",
          "with_cls_token", "qkv_bias", "pre_norm", "use_abs_pos_embed", "norm_after_stage",
          "use_conv_ffn", "convert_weights")  # fmt: skip
_CHOICES: dict[str, tuple[str, ...]] = {
    "style": ("pytorch", "caffe"),
    "interpolate_mode": ("nearest", "nearest-exact", "bilinear", "bicubic", "area"),
}
# One entry for each stage; paddings may be 0.
_BY_STAGE: dict[str, int] = {
    "strides": 1, "dilations": 1, "num_layers": 1, "num_heads": 1, "patch_sizes": 1,
    "sr_ratios": 1, "mlp_ratios": 1, "paddings": 0,
}  # fmt: skip
_REQUIRED_CFGS = ("norm_cfg", "act_cfg")
_OPTIONAL_CFGS = ("conv_cfg", "mrla_act_cfg")
_ARCH_KEYS = ("embed_dims", "num_layers", "num_heads", "feedforward_channels")


def check_arguments(
    ancestor: type, given: Mapping[str, Any], *, stages: int | None = None,
    outputs: int | None = None, frozen: int | None = None, negative_outputs: bool = False,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError, naming the argument, if one is invalid.

    Args:
        ancestor: The class whose constructor takes them; its defaults apply to arguments not given.
        given: Arguments by name; unknown ones are left to the ancestor.
        stages: Number of stages, if arguments have one entry per stage.
        outputs: Upper bound of ``out_indices``, exclusive.
        frozen: Largest ``frozen_stages``.
        negative_outputs: Whether ``out_indices`` may be negative, or a single int.
    """
    for check, names in _CHECKS:
        for name in names:
            if name in given:
                check(name, given[name])
    for name, allowed in _CHOICES.items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {given[name]!r}")
    for name in (*_REQUIRED_CFGS, *_OPTIONAL_CFGS):
        if name in given and not (given[name] is None and name in _OPTIONAL_CFGS):
            check_config(name, given[name])
    scale = given.get("layer_scale_init_value", 0.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"layer_scale_init_value must be a number, got {scale!r}")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"layer_scale_init_value must be finite and from 0, got {scale!r}")
    if given.get("expansion") is not None:
        check_count("expansion", given["expansion"])
    if "init_cfg" in given:
        _check_init_cfg(given["init_cfg"])
    if "frozen_stages" in given and frozen is not None:
        value = given["frozen_stages"]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"frozen_stages must be an int, got {value!r}")
        if not -1 <= value <= frozen:
            raise ValueError(f"frozen_stages must be from -1 to {frozen}, got {value}")
    if stages is not None:
        _check_by_stage(ancestor, given, stages)
    if "out_indices" in given and outputs is not None:
        _check_out_indices(given["out_indices"], outputs, negative_outputs)


def check_rate(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_config(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a dict with a type."""
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), (str, type)):
        raise TypeError(f"{name} must be a dict with a type, got {value!r}")


# Norms of maps: they take channels for the second dimension, which of tokens is the third.
_OF_MAPS = re.compile(r"(Sync)?BN([123]d)?|GN|IN([123]d)?|LN2d|MMSyncBN")


def check_token_norm(value: Any) -> None:
    """Raise TypeError or ValueError unless ``norm_cfg`` is of a norm for tokens, such as LN."""
    check_config("norm_cfg", value)
    if _OF_MAPS.fullmatch(str(value["type"])):
        raise ValueError(f"norm_cfg must be of a norm of tokens, such as LN, got {dict(value)!r}")


def check_arch(arch: Any, known: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless ``arch`` is a known name or a dict of ``_ARCH_KEYS``."""
    if isinstance(arch, str):
        if arch.lower() not in known:
            raise ValueError(f"arch must be one of {sorted(known)}, got {arch!r}")
        return
    if not isinstance(arch, Mapping) or not set(_ARCH_KEYS) <= arch.keys():
        raise TypeError(f"arch must be a name or a dict with keys {_ARCH_KEYS}, got {arch!r}")
    for key in _ARCH_KEYS:
        check_count(f"arch: {key}", arch[key])
    if arch["embed_dims"] % arch["num_heads"]:
        raise ValueError(
            f"arch: num_heads must divide embed_dims, got num_heads={arch['num_heads']} with "
            f"embed_dims={arch['embed_dims']}"
        )


def _check_init_cfg(value: Any) -> None:
    entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise TypeError(f"init_cfg must be None, a dict with a type or a list, got {value!r}")
        kind = entry.get("type", "Pretrained" if "checkpoint" in entry else None)
        # Of another package's prefix that package knows.
        own = kind.removeprefix("mmrla.") if isinstance(kind, str) else "."
        if "." not in own and WEIGHT_INITIALIZERS.get(own) is None:
            raise ValueError(f"init_cfg: unknown type {kind!r}")
        if not isinstance(kind, (str, type)):
            raise TypeError(f"init_cfg must be a dict with a type, got {value!r}")


def _check_by_stage(ancestor: type, given: Mapping[str, Any], stages: int) -> None:
    defaults = inspect.signature(ancestor.__init__).parameters
    for name, least in _BY_STAGE.items():
        value = given.get(name, defaults[name].default if name in defaults else None)
        if value is None and name not in given:
            continue
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a sequence, one entry for each stage, got {value!r}")
        if len(value) != stages:
            raise ValueError(
                f"{name} must have an entry for each of num_stages={stages} stages, got {value!r}"
            )
        for entry in value:
            if not is_count(entry) and not (least == 0 and type(entry) is int and entry == 0):
                raise ValueError(f"{name} must hold integers from {least}, got {value!r}")


def _check_out_indices(value: Any, outputs: int, negative: bool) -> None:
    if negative and isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"out_indices must be a sequence of ints, got {value!r}")
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in value):
        raise TypeError(f"out_indices must hold ints, got {value!r}")
    least = -outputs if negative else 0
    if not value or not all(least <= index < outputs for index in value):
        raise ValueError(
            f"out_indices must hold indices from {least} to {outputs - 1}, got {value!r}"
        )
    if len({index % outputs for index in value}) < len(value):
        raise ValueError(f"out_indices must not repeat one, got {value!r}")


def _check_size(name: str, value: Any) -> None:
    if is_count(value):
        return
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value)):
        return
    raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")


_CHECKS = ((check_count, _COUNTS), (check_rate, _RATES), (check_bool, _BOOLS),
           (_check_size, ("img_size", "patch_size")))  # fmt: skip


def check_patches(img_size: Any, patch_size: Any) -> None:
    """Raise ValueError if not even one patch fits into an image."""
    image, patch = (v if isinstance(v, (list, tuple)) else (v, v) for v in (img_size, patch_size))
    if any(p > i for i, p in zip(image, patch, strict=True)):
        raise ValueError(f"patch_size must fit into img_size={img_size}, got {patch_size}")


@contextmanager
def name_arguments_in_errors(owner: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Make errors raised in a constructor name its arguments.

    A ValueError or TypeError that already names one of them, or a part of mmrla, is raised
    unchanged; anything else, such as a bare assertion, becomes a ValueError that lists all
    arguments.
    """
    try:
        yield
    except Exception as error:
        names = (*given, "layer_attention", "plugins", "mrla_", "arch")
        clear = isinstance(error, (ValueError, TypeError, OSError, NotImplementedError))
        if clear and any(name in str(error) for name in names):
            raise
        arguments = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{owner} cannot be built with {arguments}: {text}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:120]}..."
