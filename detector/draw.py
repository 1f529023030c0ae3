"""Pictures to look at: detections, augmented samples with their truth, and which prior learns which object.

Images are (H, W, 3) uint8 RGB.  Colours are by class, in the sheet of assignments by object; they can be told apart
with any kind of colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from detector import canvas
from detector.errors import UserError
from detector.files import write_whole
from detector.structures import Assignment, Batch, Detections, Objects, Priors

_MARGIN = 6  # pixels between the panels of a sheet


def detections(image: np.ndarray, found: Detections, classes: Sequence[str], threshold: float = 0.3) -> np.ndarray:
    """A copy of `image`, made visible, with a box and a label `name score` for every detection of at least `threshold`.

    `found`: boxes in pixels of `image`, by falling score.  Where labels would cover each other, the less certain one
    is left out; its box stays.
    """
    picture = np.ascontiguousarray(canvas.visible(image)).copy()
    boxes, scores, labels = (array(t) for t in (found.boxes, found.scores, found.labels))
    order = [i for i in np.argsort(-scores, kind="stable").tolist() if scores[i] >= threshold]
    places = canvas.Labels(picture, canvas.font_size(picture))
    for i in reversed(order):
        canvas.box(picture, boxes[i], canvas.color(int(labels[i])), _line_width(picture, boxes[i]))
    for i in order:
        label = int(labels[i])
        places.add(f"{classes[label]} {scores[i]:.2f}", boxes[i], canvas.color(label))
    places.draw()
    return picture


def sample_sheet(batch: Batch, classes: Sequence[str], limit: int = 16, panel: int = 360) -> np.ndarray:
    """The first images of a batch as the network sees them, with their objects; crowd regions are hatched.

    `panel`: width and height of one image's place, in pixels.
    """
    panels = [_sample_panel(batch, i, classes, panel) for i in range(min(len(batch), limit))]
    columns = math.ceil(math.sqrt(len(panels)))
    return stacked([side_by_side(panels[i : i + columns]) for i in range(0, len(panels), columns)])


def pair_sheet(
    before: Batch, after: Batch, classes: Sequence[str], titles: Sequence[str], columns: int, panel: int
) -> np.ndarray:
    """Each image of `before` beside the one in its place in `after`, with their objects; `columns` pairs in a row.

    `titles`: what to say above each pair.  `panel`: width and height of one image's place, in pixels.
    """
    pairs = []
    for i, title in enumerate(titles):
        pair = side_by_side([_sample_panel(batch, i, classes, panel) for batch in (before, after)])
        pairs.append(framed(pair, pair.shape[1], title))
    return stacked([side_by_side(pairs[i : i + columns]) for i in range(0, len(pairs), columns)])


def assignment_sheet(
    batch: Batch, priors: Priors, assignment: Assignment, classes: Sequence[str], limit: int = 4, panel: int = 360
) -> np.ndarray:
    """Which prior learns which object: a row for each image, a panel for each level.

    A dot is a cell in which at least one prior is positive, in the colour of its object (the one of the best quality,
    where there are several) and the larger, the more priors of the cell are positive.  Crosses are ignored priors;
    those in the padding are neither drawn nor counted.
    The boxes of a panel are the objects that this level learns; objects that no level learns are dashed and named in
    the first panel, crowd regions dashed in white.
    """
    centers, stride, level = array(priors.centers), array(priors.stride), array(priors.level)
    owner, prior = array(assignment.object), array(assignment.prior)
    kept, quality = array(assignment.weight) > 0, array(assignment.quality)
    chosen = np.argsort(quality, kind="stable")  # the best is drawn last
    chosen = chosen[kept[chosen]]
    owner, image, prior = owner[chosen], prior[chosen] // assignment.num_priors, prior[chosen] % assignment.num_priors
    ignored = array(assignment.ignored)
    rows = []
    for i in range(min(len(batch), limit)):
        mine = image == i
        drawn = _Drawn(batch, i, classes, np.unique(owner[mine]), panel)
        row = []
        for k in range(len(priors.level_sizes)):
            on, skipped = mine & (level[prior] == k), ignored[i] & (level == k) & drawn.holds(centers)
            first = drawn.missing if k == 0 else np.zeros(0, dtype=np.int64)
            picture = drawn.picture(np.unique(owner[on]), first)
            reach = stride[level == k].max(initial=0)
            _draw_crosses(picture, centers[skipped] * drawn.scale, reach * drawn.scale)
            _draw_dots(
                picture, centers[prior[on]] * drawn.scale, stride[prior[on]] * drawn.scale, drawn.number(owner[on])
            )
            title = f"stride {reach:g}: {on.sum()} positive, {skipped.sum()} ignored"
            row.append(framed(picture, panel, title))
        title = f"image {int(batch.ids[i])}: {drawn.count} objects, {len(drawn.missing)} without any prior"
        rows.append(framed(side_by_side(row), panel * len(row), title))
    return stacked(rows)


def write(path: Path, image: np.ndarray) -> None:
    """An image file of the kind that the name says (.jpg, .png, .webp ...), replaced in one step.

    Raises:
        UserError: the kind is unknown or the file cannot be written.
    """
    path = Path(path)
    if not (path.suffix and cv2.haveImageWriter(path.name)):
        raise UserError(f"{path}: cannot write this kind of image; use a name that ends in .jpg or .png")
    _, content = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    write_whole(path, content.tobytes())


def _sample_panel(batch: Batch, i: int, classes: Sequence[str], panel: int) -> np.ndarray:
    """One image with its objects, and how many there are."""
    picture, scale = canvas.fit(image_of(batch, i), panel, panel)
    objects = batch.objects.select_image(i).to("cpu")
    _draw_truth(picture, objects, scale, classes)
    counts = f"{len(objects)} objects" + (f", {len(objects.ignore)} crowds" if len(objects.ignore) else "")
    return framed(picture, panel, f"image {int(batch.ids[i])}: {counts}")


def _draw_truth(picture: np.ndarray, objects: Objects, scale: float, classes: Sequence[str]) -> None:
    boxes, labels, crowds = array(objects.boxes) * scale, array(objects.labels), array(objects.ignore) * scale
    places = canvas.Labels(picture, canvas.font_size(picture))
    for crowd in crowds:
        canvas.hatch(picture, crowd)
        canvas.box(picture, crowd, canvas.WHITE, 1, dashed=True)
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable").tolist()  # small ones on top
    for i in order:
        canvas.box(picture, boxes[i], canvas.color(int(labels[i])), _line_width(picture, boxes[i]))
    for i in order:
        places.add(classes[int(labels[i])], boxes[i], canvas.color(int(labels[i])))
    for crowd in crowds:
        places.add("crowd", crowd, canvas.WHITE)
    places.draw()


class _Drawn:
    """One image of the sheet of assignments, to be drawn once for each level."""

    def __init__(self, batch: Batch, i: int, classes: Sequence[str], learned: np.ndarray, panel: int) -> None:
        truth = batch.objects
        self.faded, self.scale = canvas.fit(faded(image_of(batch, i)), panel, panel)
        self.boxes, self.labels = array(truth.boxes) * self.scale, array(truth.labels)
        self.crowds = array(truth.ignore)[array(truth.ignore_image) == i] * self.scale
        mine = np.flatnonzero(array(truth.image) == i)
        self.count, self.first = len(mine), int(mine[0]) if len(mine) else 0
        self.missing = np.setdiff1d(mine, learned)
        self.classes = classes

    def holds(self, points: np.ndarray) -> np.ndarray:
        """Which of (n, 2) x, y in network pixels lie in the image, not in the batch's padding."""
        height, width = self.faded.shape[:2]
        return np.asarray((points * self.scale < (width, height)).all(1))

    def number(self, objects: np.ndarray) -> np.ndarray:
        """Of objects of the batch within their image: what their colour goes by."""
        return objects - self.first

    def picture(self, learned: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """The faded image with crowds, the objects that some prior learns, and dashed those that none does."""
        picture = self.faded.copy()
        for crowd in self.crowds:
            canvas.box(picture, crowd, canvas.WHITE, 1, dashed=True)
        places = canvas.Labels(picture, canvas.font_size(picture))
        for o in [*learned.tolist(), *missing.tolist()]:
            canvas.box(picture, self.boxes[o], canvas.color(o - self.first), 1, dashed=o in missing)
        for o in missing.tolist():
            places.add(self.classes[int(self.labels[o])], self.boxes[o], canvas.color(o - self.first))
        places.draw()
        return picture


def _draw_dots(picture: np.ndarray, centers: np.ndarray, stride: np.ndarray, number: np.ndarray) -> None:
    """(n, 2) x, y and (n,) stride of positive priors, (n,) the number of each one's object.

    Priors of one cell share their centre: one dot, the larger the more there are.
    """
    places, cell = np.unique(centers.round(1), axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    count, last, reach = np.bincount(cell), np.zeros(len(places), np.int64), np.zeros(len(places))
    last[cell] = number  # of equal indices the last one stays: the best quality
    reach[cell] = stride
    for (x, y), n, o, width in zip(places.tolist(), count.tolist(), last.tolist(), reach.tolist(), strict=True):
        radius = round(min(max(width * (0.15 + 0.03 * min(n, 9)), 2), 9))
        cv2.circle(picture, (round(x), round(y)), radius + 1, canvas.BLACK, cv2.FILLED, cv2.LINE_AA)
        cv2.circle(picture, (round(x), round(y)), radius, canvas.color(o), cv2.FILLED, cv2.LINE_AA)


def _draw_crosses(picture: np.ndarray, centers: np.ndarray, stride: float) -> None:
    size = int(min(max(stride * 0.25, 1), 6))
    for x, y in np.unique(centers.round().astype(int), axis=0).tolist():
        cv2.drawMarker(picture, (x, y), canvas.BLACK, cv2.MARKER_TILTED_CROSS, size, 1)


def framed(picture: np.ndarray, width: int, title: str) -> np.ndarray:
    """The picture under its title, on white of at least `width`."""
    width = max(width, picture.shape[1])
    size = 13
    title = canvas.shorten(title, size, width)
    top = canvas.text_size(title, size)[1]
    panel = np.full((top + picture.shape[0], width, 3), 255, dtype=np.uint8)
    panel[top:, : picture.shape[1]] = picture
    canvas.put_text(panel, title, 0, 0, size, canvas.WHITE)
    return panel


def side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Side by side, on white."""
    height = max(p.shape[0] for p in panels)
    row = np.full((height, sum(p.shape[1] + _MARGIN for p in panels) + _MARGIN, 3), 255, dtype=np.uint8)
    left = _MARGIN
    for panel in panels:
        row[: panel.shape[0], left : left + panel.shape[1]] = panel
        left += panel.shape[1] + _MARGIN
    return row


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """One below the other, on white."""
    width = max(r.shape[1] for r in rows)
    sheet = np.full((sum(r.shape[0] + _MARGIN for r in rows) + _MARGIN, width, 3), 255, dtype=np.uint8)
    top = _MARGIN
    for row in rows:
        sheet[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0] + _MARGIN
    return sheet


def image_of(batch: Batch, i: int) -> np.ndarray:
    """(h, w, 3) uint8 image `i` without the batch's padding, to look at."""
    height, width = (int(n) for n in batch.sizes[i])
    return np.ascontiguousarray(canvas.visible(array(batch.images[i, :, :height, :width]).transpose(1, 2, 0)))


def faded(image: np.ndarray) -> np.ndarray:
    """Grey and paler, so that colours on it stand out."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.repeat((110 + grey * 0.5)[..., None].astype(np.uint8), 3, axis=2)


def _line_width(picture: np.ndarray, corners: np.ndarray) -> int:
    """Thin for small boxes, which would otherwise be nothing but line."""
    return min(canvas.line_width(picture), max(1, int(min(corners[2:] - corners[:2]) // 10)))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
