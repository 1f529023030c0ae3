"""What rules of label assignment do: see `python tools/assignment.py --help`."""

import sys

from detector.cli.assignment import main

if __name__ == "__main__":
    sys.exit(main())
