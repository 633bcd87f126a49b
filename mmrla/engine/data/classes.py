"""Checks that the heads of a config have as many classes as its datasets."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from mmrla.datasets.findings import class_names
from mmrla.engine.data.config import datasets_of, path_under, type_name

# Parts whose numbers of classes are of something else: objects or not, stuff, ImageNet.
_OTHERS = frozenset({"rpn_head", "backbone", "neck", "semantic_head", "data_preprocessor",
                     "train_cfg", "test_cfg"})  # fmt: skip
# Detectors of any words: their number is that of tokens.
_OF_WORDS = ("GLIP", "GroundingDINO")


def check_classes(cfg: Config, splits: Iterable[str]) -> None:
    """Raise if a head has more or fewer classes than a dataset of the run.

    Heads are all parts of the model that take ``num_classes``, with the constructor's default if
    the config does not set it, or ``num_things_classes`` and ``num_stuff_classes``, which are
    added.

    Args:
        cfg: The config, after all options; nothing is built.
        splits: Which of ``'train'``, ``'val'``, ``'test'`` will be used.

    Raises:
        ValueError: The numbers differ (the message gives both and a fix), or a dataset's classes
            are a string.
        TypeError: A dataset's classes are not names.
    """
    scope = cfg.get("default_scope") or "mmengine"
    model = cfg.get("model") or {}
    if type_name(model) in _OF_WORDS:
        return
    heads = list(_heads(model, "model", scope))
    for where, dataset in datasets_of(cfg, splits):
        classes = classes_of(dataset, where, scope)
        if classes is None:
            continue
        things = getattr(class_of(DATASETS, dataset, scope), "METAINFO", {})
        things = len(things.get("thing_classes") or classes)
        wrong = {
            place: (given, things if key == "num_classes" else len(classes))
            for place, key, given in heads
            if given != (things if key == "num_classes" else len(classes))
        }
        if wrong:
            named = "classes" in (dataset.get("metainfo") or {}) or "classes" in dataset
            raise ValueError(_message(wrong, where, classes, named))


def _message(
    wrong: Mapping[str, tuple[int, int]], where: str, classes: tuple[str, ...], named: bool
) -> str:
    are = ", ".join(f"{place}={given}" for place, (given, _) in wrong.items())
    shown = f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    source = "" if named else f", as its type's own: {where}.metainfo.classes is not set"
    options = " ".join(f"{place}={wanted}" for place, (_, wanted) in wrong.items())
    return (
        f"{are}, but {where} has {len(classes)} classes ({shown}{source}): the numbers must be "
        f"equal; in the config write {_as_config(wrong)}, or give --cfg-options {options}"
    )


def _as_config(wrong: Mapping[str, tuple[int, int]]) -> str:
    """``model = dict(bbox_head=dict(num_classes=2))``; places in lists as assignments to them."""
    tree: dict[str, Any] = {}
    for place, (_, wanted) in wrong.items():
        *path, last = place.split(".")
        if any(part.isdigit() for part in path):
            return ", ".join(f"{place}={wanted}" for place, (_, wanted) in wrong.items())
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = wanted

    def text(node: Any) -> str:
        if not isinstance(node, dict):
            return str(node)
        return f"dict({', '.join(f'{key}={text(value)}' for key, value in node.items())})"

    return f"model = {text(tree['model'])}"


def class_of(registry: Any, cfg: Mapping[str, Any], scope: str) -> Any:
    """The class that a part's type names, None if there is none."""
    kind = cfg.get("type")
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(scope) as scoped:
        return scoped.get(kind)


def _heads(node: Any, where: str, scope: str) -> Iterator[tuple[str, str, int]]:
    """Place, key and number of each head below ``node``."""
    if isinstance(node, (list, tuple)):
        for index, part in enumerate(node):
            yield from _heads(part, f"{where}.{index}", scope)
    if not isinstance(node, Mapping):
        return
    cls = class_of(MODELS, node, scope) if "type" in node else None
    takes = _defaults(cls) if inspect.isclass(cls) else {}
    if "num_things_classes" in takes:
        things, stuff = (
            node.get(key, takes.get(key)) for key in ("num_things_classes", "num_stuff_classes")
        )
        yield f"{where}.num_things_classes", "num_things_classes", things + stuff
    elif "num_classes" in takes and not node.get("class_agnostic"):
        number = node.get("num_classes", takes["num_classes"])
        if isinstance(number, int) and number > 0:
            yield f"{where}.num_classes", "num_classes", number
    for key, value in node.items():
        if key not in _OTHERS and not key.startswith("loss"):
            yield from _heads(value, f"{where}.{key}", scope)


def _defaults(cls: type) -> dict[str, Any]:
    """Parameters of a constructor and those of its base classes, with their defaults."""
    found: dict[str, Any] = {}
    for ancestor in reversed(cls.__mro__):
        if "__init__" in vars(ancestor):
            for name, parameter in inspect.signature(ancestor.__init__).parameters.items():
                found[name] = parameter.default
    return found


def classes_of(dataset: Mapping[str, Any], where: str, scope: str) -> tuple[str, ...] | None:
    """The names of a dataset's classes, None if they are not known before it is built.

    From the config, else from its type, else from the class folders.

    Raises:
        ValueError: They are a string that is not a file.
        TypeError: They are not names.
    """
    given = dataset.get("classes")
    place = f"{where}.classes"
    if given is None:
        given, place = (dataset.get("metainfo") or {}).get("classes"), f"{where}.metainfo.classes"
    if given is not None:
        return class_names(given, place)
    cls = class_of(DATASETS, dataset, scope)
    known = getattr(cls, "METAINFO", {}).get("classes")
    if known is not None:
        return tuple(known)
    prefix = dataset.get("data_prefix") or ""
    folder = prefix if isinstance(prefix, str) else prefix.get("img_path") or ""
    path = Path(path_under(dataset.get("data_root") or "", folder))
    labelled = dataset.get("with_label", True) and not dataset.get("ann_file")
    if getattr(cls, "__name__", "") == "CustomDataset" and labelled and path.is_dir():
        return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
    return None
