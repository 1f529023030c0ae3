"""Train object detectors on COCO-format data, and compare label-assignment strategies on equal terms.

import detector
found = detector.load("runs/quickstart/best.pt")("image.jpg")
found.boxes, found.scores, found.labels, found.names
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.predict import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`detector.load` on first use: importing the package, or asking a command for help, does not import torch."""
    if name == "load":
        from detector.predict import load

        return load
    raise AttributeError(f"module 'detector' has no attribute {name!r}")
