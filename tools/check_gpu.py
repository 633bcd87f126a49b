"""Check the fused operations on this machine's GPU: what `mmrla check-gpu` does."""

import sys

from mmrla.commands.check_gpu import main

if __name__ == "__main__":
    sys.exit(main())
