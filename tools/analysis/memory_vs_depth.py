"""Deprecated: `mmrla cost memory`."""

import sys

from mmrla.commands.cost import main

main(["memory", *sys.argv[1:]])
