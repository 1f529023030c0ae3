"""Part a COCO file into train, val and test: see `python tools/split_data.py --help`."""

import sys

from detector.cli.split_data import main

if __name__ == "__main__":
    sys.exit(main())
