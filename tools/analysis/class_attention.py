"""Deprecated: `mmrla figure class-token`."""

import sys

from mmrla.commands.figure import main

main(["class-token", *sys.argv[1:]])
