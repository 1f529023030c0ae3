"""Train a detector as a recipe says: see `python tools/train.py --help`."""

import sys

from detector.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
