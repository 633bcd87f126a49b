"""Evaluate a checkpoint: what `mmrla test` does."""

import sys

from mmrla.commands.test import main

if __name__ == "__main__":
    sys.exit(main())
