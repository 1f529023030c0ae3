"""Files of proposals near the objects of generated shapes, for detectors that are given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from detector.data.config import Data

_DATA: Any = pydantic.TypeAdapter(Data)


def write_proposals(data: dict[str, Any], folder: Path) -> dict[str, str]:
    """Of the splits train and val of generated shapes: each object four times, moved a little, and boxes anywhere."""
    files = {}
    for split in ("train", "val"):
        index = _DATA.validate_python(data).open(split).index
        random = np.random.default_rng(0)
        ids, boxes = [], []
        for i in range(len(index)):
            height, width = index.sizes[i]
            own = np.repeat(index.boxes[index.rows(i)], 4, axis=0)
            moved = own + random.normal(size=own.shape) * 0.1 * np.tile(own[:, 2:] - own[:, :2], 2)
            far = np.sort(random.uniform(0, 1, size=(20, 2, 2)), axis=1).reshape(-1, 4) * (width, height, width, height)
            for x1, y1, x2, y2 in np.concatenate([moved, far]):
                ids.append(int(index.image_ids[i]))
                boxes.append((x1, y1, x2 - x1, y2 - y1))
        folder.mkdir(parents=True, exist_ok=True)
        files[split] = str(folder / f"{split}.npz")
        np.savez(files[split], image_id=np.array(ids), bbox=np.array(boxes), score=random.uniform(size=len(ids)))
    return files
