"""Write a generated COCO-format data set: see `python tools/make_shapes.py --help`."""

import sys

from detector.cli.make_shapes import main

if __name__ == "__main__":
    sys.exit(main())
