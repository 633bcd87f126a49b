"""``mmrla run``: run a Python program of another project in a process with mmrla imported."""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrla.engine.errors import exit_with_message


def find_script(name: str) -> Path:
    """The file of a program: a path, or ``PACKAGE:TOOL`` for a tool that an mm package installs.

    Args:
        name: Such as ``tools/my.py`` or ``mmdet:analysis_tools/confusion_matrix.py``.

    Raises:
        FileNotFoundError: It does not exist; the message lists a package's tools.
    """
    package, colon, tool = name.partition(":")
    if not colon or Path(name).is_file():
        if not Path(name).is_file():
            raise FileNotFoundError(f"no such script: {Path(name).absolute()}")
        return Path(name)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no such package: {package!r}")
    tools = Path(spec.submodule_search_locations[0], ".mim", "tools")
    if not (tools / tool).is_file():
        known = ", ".join(sorted(str(path.relative_to(tools)) for path in tools.rglob("*.py")))
        raise FileNotFoundError(f"{package} has no tool {tool!r}; it has: {known or 'none'}")
    return tools / tool


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program as ``python SCRIPT ...`` does; its exit status is the command's."""
    parser = argparse.ArgumentParser(
        "mmrla run",
        description="Run a Python program of another project with mmrla imported before it: "
        "mmcv's operations are there, and so are mmrla's names.",
    )
    parser.add_argument(
        "script",
        metavar="SCRIPT",
        help="a file, or PACKAGE:TOOL such as mmdet:analysis_tools/confusion_matrix.py",
    )
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="what the program takes"
    )
    args = parser.parse_args(argv)
    with exit_with_message(FileNotFoundError):
        script = find_script(args.script)
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *args.rest]
    # As Python does: modules beside a program are found.
    sys.path.insert(0, str(script.parent.absolute()))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
