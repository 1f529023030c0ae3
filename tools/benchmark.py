"""How fast it is, against others in the same run: see `python tools/benchmark.py --help`."""

import sys

from detector.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
