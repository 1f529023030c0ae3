"""Draw training samples before and after augmentation: see `python tools/browse_data.py --help`."""

import sys

from detector.cli.browse_data import main

if __name__ == "__main__":
    sys.exit(main())
