"""Deprecated: `mmrla figure maps`."""

import sys

from mmrla.commands.figure import main

main(["maps", *sys.argv[1:]])
