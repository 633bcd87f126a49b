"""Deprecated: `mmrla cost flops`."""

import sys

from mmrla.commands.cost import main

main(["flops", *sys.argv[1:]])
