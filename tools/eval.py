"""COCO's numbers of a checkpoint or of a results file: see `python tools/eval.py --help`."""

import sys

from detector.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
