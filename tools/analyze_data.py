"""What is in a data set, and which size, strides and anchors suit it: see `python tools/analyze_data.py --help`."""

import sys

from detector.cli.analyze_data import main

if __name__ == "__main__":
    sys.exit(main())
