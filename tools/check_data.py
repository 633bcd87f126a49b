"""Find bad data before a run: what `mmrla check-data` does."""

import sys

from mmrla.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())
