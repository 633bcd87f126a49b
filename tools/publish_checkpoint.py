"""Make a checkpoint to hand out: what `mmrla publish` does."""

import sys

from mmrla.commands.publish import main

if __name__ == "__main__":
    sys.exit(main())
