"""Look at a configuration, check it, or write its schema: see `python tools/config.py --help`."""

import sys

from detector.cli.config import main

if __name__ == "__main__":
    sys.exit(main())
