"""``mmrla COMMAND``: every command of the project, from any folder."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from mmrla.commands.pipes import ends_with_its_reader
from mmrla.configs import MIM, list_configs
from mmrla.version import __version__

# Each is `main(argv)` of the module of that name in mmrla.commands.
COMMANDS: dict[str, str] = {
    "train": "train the network of a config",
    "test": "evaluate a checkpoint",
    "predict": "detect objects in images, or classify them",
    "check-data": "find bad data before a run",
    "convert-data": "convert data in another format to COCO's",
    "new-config": "write a config for such data",
    "convert": "convert released or plain checkpoints to mmrla's key names",
    "publish": "make a checkpoint to hand out",
    "export-onnx": "write a network as ONNX and compare it with torch",
    "train-cifar": "train networks of configs/cifar with the data on the device",
    "cost": "count and time configs beside their plain hosts",
    "figure": "draw what a network attends to, as in the paper",
    "run": "run a program of another project, such as mmdet's analysis tools",
    "check-gpu": "check that the fused operations are correct on this GPU, and time them",
}
# Each is what `python tools/SCRIPT` is, in a checkout and in a wheel.
SCRIPTS: dict[str, tuple[str, str]] = {
    "demo": ("demo.py", "generate a small dataset, train a detector on it and draw predictions"),
}
# Names of earlier versions.
ALIASES = {"complexity": ["cost", "flops"]}
OWN: dict[str, str] = {
    "list": "list the names of configs",
    "check-env": "installed versions, and problems with them",
}


@ends_with_its_reader()
def main(argv: Sequence[str] | None = None) -> int | None:
    """Run a command; ``argv`` defaults to the program's arguments."""
    args = list(sys.argv[1:] if argv is None else argv)
    args[:1] = ALIASES.get(args[0], args[:1]) if args else []
    commands = {**COMMANDS, **{name: text for name, (_, text) in SCRIPTS.items()}, **OWN}
    parser = argparse.ArgumentParser(
        prog="mmrla",
        description="Multi-head recurrent layer attention for OpenMMLab.",
        epilog="\n".join(
            ["commands:", *(f"  {name:<13} {text}" for name, text in commands.items())]
            + ["", "mmrla COMMAND --help shows a command's options."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mmrla {__version__}")
    parser.add_argument("command", choices=commands, metavar="COMMAND")
    # Arguments after the command belong to the command.
    command = parser.parse_args(args[:1]).command
    rest = args[1:]
    if command in COMMANDS:
        module = importlib.import_module(f"mmrla.commands.{command.replace('-', '_')}")
        return module.main(rest)
    if command in OWN:
        {"list": _list, "check-env": _check_env}[command](rest)
        return None
    script = load_script(SCRIPTS[command][0])
    # The scripts read sys.argv; its first word is how they call themselves in messages.
    before, sys.argv = sys.argv, [f"mmrla {command}", *rest]
    try:
        return script.main()
    finally:
        sys.argv = before


def load_script(name: str) -> ModuleType:
    """A script of ``tools/`` as a module."""
    spec = importlib.util.spec_from_file_location(
        f"_mmrla_tools_{name.removesuffix('.py').replace('/', '_')}", MIM / "tools" / name
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _list(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mmrla list", description="Print the names of the configs.")
    parser.add_argument("pattern", nargs="?", default="*", help="such as 'mask*' or 'imagenet/*'")
    pattern = parser.parse_args(argv).pattern
    names = list_configs(pattern)
    if not names:
        parser.exit(1, f"no config matches {pattern!r}\n")
    print("\n".join(names))


def _check_env(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(
        "mmrla check-env",
        description="Print package versions and their origin, the implementation of mmcv's "
        "operations, GPU and driver, and a line for each problem.",
    ).parse_args(argv)
    from mmrla.compat.environment import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
