"""Pictures of assignments: a row for each rule, a panel for each level, a dot for each prior that learns something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from detector import canvas, draw
from detector.structures import Assignment, Batch, Priors

LEAST, MOST = 2.0, 8.0  # pixels, radius of the dots of the lowest and of the highest weight


def rule_row(
    batch: Batch, priors: Priors, assignment: Assignment, classes: Sequence[str], title: str, panel: int = 300
) -> np.ndarray:
    """The first image of a batch: one rule, a panel for each level, as (H, W, 3) uint8 RGB.

    A dot is a prior that learns an object, in the object's colour, its area by weight x quality; of priors in one place
    the heaviest is drawn.  A panel's boxes are the objects that this level learns; objects that no level learns are
    dashed and named in the first panel.  Crosses are priors in no loss.
    """
    image = batch.objects.select_image(0)
    boxes, labels = draw.array(image.boxes), draw.array(image.labels)
    kept = draw.array((assignment.weight > 0) & (assignment.prior < len(priors)))
    prior, owner = draw.array(assignment.prior)[kept], draw.array(assignment.object)[kept]
    strength = (draw.array(assignment.weight) * draw.array(assignment.quality))[kept]
    order = np.argsort(strength, kind="stable")
    prior, owner, strength = prior[order], owner[order], strength[order]
    level, centers = draw.array(priors.level), draw.array(priors.centers)
    ignored = draw.array(assignment.ignored[0])
    base, scale = canvas.fit(draw.faded(draw.image_of(batch, 0)), panel, panel)
    missing = np.setdiff1d(np.arange(len(boxes)), owner)
    full = max(1e-9, float(strength.max(initial=0)))
    panels = []
    for k in range(len(priors.level_sizes)):
        on = level[prior] == k
        picture = base.copy()
        places = canvas.Labels(picture, canvas.font_size(picture))
        for o in np.unique(owner[on]).tolist():
            canvas.box(picture, boxes[o] * scale, canvas.color(o), 1)
        for o in missing.tolist() if k == 0 else ():
            canvas.box(picture, boxes[o] * scale, canvas.color(o), 1, dashed=True)
            places.add(classes[int(labels[o])], boxes[o] * scale, canvas.color(o))
        for x, y in np.unique((centers[ignored & (level == k)] * scale).round().astype(int), axis=0).tolist():
            if x < picture.shape[1] and y < picture.shape[0]:
                cv2.drawMarker(picture, (x, y), canvas.BLACK, cv2.MARKER_TILTED_CROSS, 4, 1)
        stride = float(draw.array(priors.stride)[level == k].max(initial=0))
        most = float(np.clip(0.42 * stride * scale, LEAST, MOST))  # so that neighbours stay apart
        radius = LEAST + (most - LEAST) * np.sqrt(strength[on] / full)
        for (x, y), o, r in zip(
            (centers[prior[on]] * scale).tolist(), owner[on].tolist(), radius.tolist(), strict=True
        ):
            at = (round(x), round(y))
            cv2.circle(picture, at, round(r) + 1, canvas.BLACK, cv2.FILLED, cv2.LINE_AA)
            cv2.circle(picture, at, round(r), canvas.color(o), cv2.FILLED, cv2.LINE_AA)
        places.draw()
        panels.append(draw.framed(picture, picture.shape[1], f"stride {stride:g}: {on.sum()}"))
    without = f", {len(missing)} without any" if len(missing) else ""
    head = f"{title}: {len(prior)} pairs for {len(boxes)} objects{without}"
    row = draw.side_by_side(panels)
    return draw.framed(row, row.shape[1], head)


def rule_sheet(
    batch: Batch, priors: Priors, assignments: Mapping[str, Assignment], classes: Sequence[str], panel: int = 300
) -> np.ndarray:
    """The rows of several rules, one below the other."""
    return draw.stacked([rule_row(batch, priors, a, classes, name, panel) for name, a in assignments.items()])


def crop(image: np.ndarray, box: np.ndarray, side: int = 160) -> np.ndarray:
    """What is around a box (xyxy, pixels of `image`), at most `side` high and wide, with the box drawn."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = box.tolist()
    reach = max(0.75 * max(x2 - x1, y2 - y1), 16)
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    left, top = max(0, round(middle[0] - reach * 1.3)), max(0, round(middle[1] - reach * 1.3))
    right, bottom = min(width, round(middle[0] + reach * 1.3)), min(height, round(middle[1] + reach * 1.3))
    part, scale = canvas.fit(np.ascontiguousarray(image[top:bottom, left:right]), side, side)
    canvas.box(part, (box - np.array([left, top, left, top])) * scale, (230, 159, 0), 2)
    return part


def jpeg(image: np.ndarray, quality: int = 80) -> bytes:
    """(H, W, 3) uint8 RGB as a file."""
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(content.tobytes())
