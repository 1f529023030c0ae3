"""Take over weights of other toolkits: see `python tools/convert_weights.py --help`."""

import sys

from detector.cli.convert_weights import main

if __name__ == "__main__":
    sys.exit(main())
