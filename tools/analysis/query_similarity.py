"""Deprecated: `mmrla figure similarity`."""

import sys

from mmrla.commands.figure import main

main(["similarity", *sys.argv[1:]])
