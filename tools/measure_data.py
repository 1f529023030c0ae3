"""Mean and deviation of a set's pixels, as YAML for a recipe: see `python tools/measure_data.py --help`."""

import sys

from detector.cli.measure_data import main

if __name__ == "__main__":
    sys.exit(main())
