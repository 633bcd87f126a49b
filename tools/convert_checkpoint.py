"""Turn checkpoints into mmrla's key names, or back: what `mmrla convert` does."""

import sys

from mmrla.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
