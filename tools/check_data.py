"""Find bad data before a run: what `mmrla check-data` does."""

import sys

from mmrla.commands.check_data import main
from mmrla.commands.pipes import ends_with_its_reader

if __name__ == "__main__":
    with ends_with_its_reader():
        sys.exit(main())
