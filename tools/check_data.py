"""Check a COCO annotation file and its images, or correct it: see `python tools/check_data.py --help`."""

import sys

from detector.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
