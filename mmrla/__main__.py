"""``python -m mmrla COMMAND``."""

import sys

from mmrla.cli import main

sys.exit(main())
