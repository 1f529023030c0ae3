"""Draw and list what a trained detector finds in images and videos: see `python tools/predict.py --help`."""

import sys

from detector.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
