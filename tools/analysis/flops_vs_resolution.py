"""Deprecated: `mmrla cost resolution`."""

import sys

from mmrla.commands.cost import main

main(["resolution", *sys.argv[1:]])
