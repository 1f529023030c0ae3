"""Run a study and compare its arms: see `python tools/compare.py --help`."""

import sys

from detector.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
