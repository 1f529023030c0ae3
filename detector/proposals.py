"""Makes files of proposals: those of a trained RPN, or selective search, which needs no training.

The file is what `data.proposals` reads: detector/data/proposals.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from detector.data.coco import CocoData
from detector.data.loader import eval_loader
from detector.errors import DataError, UserError
from detector.evaluate.runner import inference, to_original
from detector.files import write_whole
from detector.models.two_stage import TwoStageDetector
from detector.predict import Restored
from detector.structures import Detections

SHORT = 200  # pixels of the shorter side that selective search sees: its time grows faster than their number
Rows = tuple[int, np.ndarray]  # image id; (k, 4) xyxy in pixels of the original image, by falling score


def of_rpn(restored: Restored, data: CocoData, device: torch.device, batch_size: int, most: int) -> Iterator[Rows]:
    """What the RPN of a trained detector proposes, at most `most` of an image.

    Raises:
        UserError: the detector has no RPN.
    """
    model, config = restored.model, restored.config
    if not isinstance(model, TwoStageDetector) or model.rpn is None:
        raise UserError(f"model.type {config.model.type!r} of the checkpoint has no RPN: give one that has")
    model = model.to(device)
    numbers = model.rpn.config.test.model_copy(update={"post_nms": most})  # type: ignore[union-attr]
    loader = eval_loader(
        data,
        resize=config.data.resize,
        batch_size=batch_size,
        workers=config.data.workers,
        pad_multiple=config.data.pad_multiple,
        max_unreadable=config.data.max_unreadable,
    )
    with inference(model):
        for batch in loader:
            batch = batch.to(device)
            boxes, valid = model.propose(batch.images, batch.sizes, numbers)
            found = [
                Detections(b[v], torch.ones(int(v.sum()), device=device), v[v].long())
                for b, v in zip(boxes, valid, strict=True)
            ]
            for image_id, one in zip(batch.ids.tolist(), to_original(found, batch), strict=True):
                yield image_id, one.boxes.cpu().numpy()


def of_selective_search(data: CocoData, most: int) -> Iterator[Rows]:
    """Uijlings et al., "Selective Search for Object Recognition" (IJCV 2013), fast mode, of OpenCV's contrib modules.

    In the order in which OpenCV gives them.

    Raises:
        UserError: this OpenCV has no contrib modules, or the images are not RGB of 8 bits.
    """
    contrib = getattr(cv2, "ximgproc", None)
    if contrib is None:
        raise UserError(
            "selective search: this OpenCV has no contrib modules (cv2.ximgproc): replace it, with pip"
            " uninstall opencv-python-headless and then pip install opencv-contrib-python-headless"
        )
    if data.pixels is not None:
        raise UserError("selective search: takes RGB images of 8 bits, which these are not")
    for i in range(len(data)):
        sample = data[i]
        scale = min(1.0, SHORT / min(sample.image.shape[:2]))
        size = [max(1, round(n * scale)) for n in sample.image.shape[1::-1]]
        search = contrib.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(
            cv2.cvtColor(cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
        )
        search.switchToSelectiveSearchFast()
        boxes = np.asarray(search.process(), dtype=np.float64).reshape(-1, 4)[:most]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        yield sample.image_id, corners * np.tile(np.array(sample.image.shape[1::-1]) / size, 2)


def write(path: Path, rows: Iterator[Rows], progress: Callable[[int], object]) -> tuple[int, int]:
    """An .npz file, replaced in one step; how many proposals of how many images.

    Scores are 1, 1/2, 1/3, ... by rank: what is known is the order.

    Raises:
        DataError: not a single proposal was found.
        UserError: the file cannot be written.
    """
    ids, boxes, scores, images = [], [], [], 0
    for image_id, corners in rows:
        images += 1
        ids.append(np.full(len(corners), image_id, dtype=np.int64))
        boxes.append(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).astype(np.float32))
        scores.append((1 / np.arange(1, len(corners) + 1)).astype(np.float32))
        progress(images)
    count = sum(len(part) for part in ids)
    if count == 0:
        raise DataError(f"{path}: not a single proposal was found in {images} images: nothing is written")
    content = io.BytesIO()
    np.savez_compressed(content, image_id=np.concatenate(ids), bbox=np.concatenate(boxes), score=np.concatenate(scores))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
    return count, images
