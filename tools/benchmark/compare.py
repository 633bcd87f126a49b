"""Deprecated: `mmrla cost compare`."""

import sys

from mmrla.commands.cost import main

main(["compare", *sys.argv[1:]])
