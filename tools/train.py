"""Train the network of a config: what `mmrla train` does."""

import sys

from mmrla.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
