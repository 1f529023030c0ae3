"""Annotate images with a trained detector: see `python tools/pseudo_label.py --help`."""

import sys

from detector.cli.pseudo_label import main

if __name__ == "__main__":
    sys.exit(main())
