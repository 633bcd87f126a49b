"""Deprecated: `mmrla cost speed`."""

import sys

from mmrla.commands.cost import main

main(["speed", *sys.argv[1:]])
