"""Deprecated: `mmrla cost layout`."""

import sys

from mmrla.commands.cost import main

main(["layout", *sys.argv[1:]])
