"""A file of proposals for detectors that are given them: see `python tools/make_proposals.py --help`."""

import sys

from detector.cli.make_proposals import main

if __name__ == "__main__":
    sys.exit(main())
