"""``python -m mmrla.startup on``: makes mmrla's names known to programs that do not import it.

mmdet's ``tools/train.py`` reads its config before it could import mmrla. A ``.pth`` file next to
the installed packages imports mmrla whenever this environment's Python starts. mmrla only writes it
on request. ``off`` removes it.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

NAME = "mmrla-startup.pth"
# Python runs lines that start with "import". It must not fail once mmrla has been uninstalled.
LINE = "import importlib.util; importlib.util.find_spec('mmrla') and __import__('mmrla')\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Switch it on or off, or print its status."""
    parser = argparse.ArgumentParser("python -m mmrla.startup", description=__doc__)
    parser.add_argument("action", choices=["on", "off", "status"])
    action = parser.parse_args(argv).action
    path = Path(sysconfig.get_path("purelib")) / NAME
    if action == "on":
        path.write_text(LINE)
    elif action == "off":
        path.unlink(missing_ok=True)
    print(f"{'on' if path.exists() else 'off'}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
