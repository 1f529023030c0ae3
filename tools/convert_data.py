"""Convert VOC, YOLO, CSV and labelme to COCO, or COCO to YOLO: see `python tools/convert_data.py --help`."""

import sys

from detector.cli.convert_data import main

if __name__ == "__main__":
    sys.exit(main())
