"""Deprecated: `mmrla figure cam`."""

import sys

from mmrla.commands.figure import main

main(["cam", *sys.argv[1:]])
