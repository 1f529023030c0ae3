"""Pictures: what must be seen is there, nothing leaves the image, nothing given is changed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector import canvas, draw
from detector.assign.points import Fcos
from detector.errors import UserError
from detector.models.priors import Points
from detector.structures import Assignment, Batch, Detections, Objects

CLASSES = ("person", "traffic light", "größerer Hund", "自転車", "a class with a name longer than any small image")


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.long))


def same(color: canvas.Color, pixel: np.ndarray) -> bool:
    return tuple(pixel.tolist()) == color


def test_colors_differ_and_their_text_is_readable() -> None:
    colors = [canvas.color(i) for i in range(21)]
    assert len(set(colors)) == 21
    assert canvas.color(21) == colors[0]

    def luminance(color: canvas.Color) -> float:
        c = np.array(color) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    for color in colors:
        light, dark = sorted((luminance(color), luminance(canvas.ink(color))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5  # what WCAG asks of text


def test_box_lies_where_its_pixels_are() -> None:
    """Pixel edges: the box 10 20 30 50 covers columns 10 to 29 and rows 20 to 49."""
    image = np.full((100, 100, 3), 128, np.uint8)
    canvas.box(image, np.array([10.0, 20, 30, 50]), (255, 0, 0), 1)
    colored = np.argwhere((image == (255, 0, 0)).all(2))
    assert colored.min(0).tolist() == [20, 10]
    assert colored.max(0).tolist() == [49, 29]
    assert same((64, 64, 64), image[19, 20])  # the rim on both sides
    assert same((64, 64, 64), image[21, 20])
    assert same((128, 128, 128), image[18, 20])
    assert same((128, 128, 128), image[35, 20])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_labels_stay_inside_and_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 400, 2)
    image = np.zeros((height, width, 3), np.uint8)
    labels = canvas.Labels(image, canvas.font_size(image))
    for _ in range(20):
        corners = np.sort(rng.uniform(-50, 450, (2, 2)), axis=0).reshape(-1)
        canvas.box(image, corners, canvas.color(1), 2, dashed=bool(rng.integers(2)))
        canvas.hatch(image, corners)
        labels.add(str(rng.choice(CLASSES)), corners, canvas.color(0))
    placed = np.array(labels.draw()).reshape(-1, 4)
    assert (placed[:, :2] >= 0).all()
    assert (placed[:, 2:] <= (width, height)).all()
    for i, a in enumerate(placed):
        for b in placed[:i]:
            assert not ((np.maximum(a[:2], b[:2]) < np.minimum(a[2:], b[2:])).all())


def test_long_names_are_shortened_to_fit() -> None:
    for width in (20, 60, 100, 1000):
        text = canvas.shorten(CLASSES[4], 14, width)
        assert text == "" or canvas.text_size(text, 14)[0] <= width
    assert canvas.shorten(CLASSES[4], 14, 1000) == CLASSES[4]
    assert canvas.shorten(CLASSES[4], 14, 100).endswith("…")


@pytest.mark.parametrize("name", CLASSES[:4])
def test_names_in_any_script_are_drawn(name: str) -> None:
    image = np.zeros((60, 300, 3), np.uint8)
    canvas.put_text(image, name, 5, 5, 16, canvas.WHITE)
    width, height = canvas.text_size(name, 16)
    dark = np.argwhere((image[5 : 5 + height, 5 : 5 + width] < 100).all(2))
    assert len(dark) > 40
    assert dark.min(0)[0] > 0  # neither cut off at the top nor at the bottom nor at the right
    assert dark.max(0)[0] < height - 1
    assert dark.max(0)[1] < width
    unknown = np.zeros_like(image)
    canvas.put_text(unknown, "?" * len(name), 5, 5, 16, canvas.WHITE)
    assert not np.array_equal(image, unknown)


def test_detections() -> None:
    image = np.full((200, 300, 3), 200, np.uint8)
    found = detections(
        [[50, 60, 120, 150], [150, 60, 220, 150], [-20, -30, 400, 500], [10, 10, 30, 30]],
        [0.9, 0.5, 0.4, 0.2],
        [0, 1, 2, 3],
    )
    picture = draw.detections(image, found, CLASSES, 0.3)
    assert picture.shape == image.shape
    assert (image == 200).all()  # a copy
    assert same(canvas.color(0), picture[149, 80])
    assert same(canvas.color(1), picture[149, 180])
    assert same(canvas.color(2), picture[199, 100])  # clipped to the image
    assert not (picture == canvas.color(3)).all(2).any()  # below the threshold
    for tiny in (np.zeros((1, 1, 3), np.uint8), np.zeros((8, 300, 3), np.uint8)):
        assert draw.detections(tiny, found, CLASSES, 0).shape == tiny.shape
    assert np.array_equal(draw.detections(image, detections([], [], []), CLASSES), image)


def batch() -> Batch:
    images = torch.full((3, 3, 128, 160), 90, dtype=torch.uint8)
    objects = Objects.collate(
        [torch.tensor([[10.0, 10, 60, 60], [70, 20, 150, 120]]), torch.zeros(0, 4), torch.tensor([[5.0, 5, 8, 8]])],
        [torch.tensor([0, 1]), torch.zeros(0), torch.tensor([2])],
        [torch.zeros(0, 4), torch.tensor([[0.0, 0, 64, 64]]), torch.zeros(0, 4)],
        torch.tensor([[128.0, 160], [100, 160], [128, 90]]),
    )
    ones = torch.ones(3, 2)
    return Batch(images, objects, torch.tensor([5, 6, 7]), torch.tensor([[128, 160]] * 3), ones, ones * 0)


def test_sample_sheet() -> None:
    sheet = draw.sample_sheet(batch(), CLASSES, panel=160)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 2 * 160 + 3 * 6  # two columns
    for label in range(3):
        assert (sheet == canvas.color(label)).all(2).any()
    one = draw.sample_sheet(batch(), CLASSES, limit=1, panel=160)
    assert one.shape[0] < sheet.shape[0]
    assert not (one == canvas.color(2)).all(2).any()


def test_assignment_sheet() -> None:
    truth = batch()
    sizes = [(16, 20), (8, 10), (4, 5)]
    priors = Points()(sizes, [8, 16, 32])
    assignment = Fcos(limits=(32, 64))(priors, truth.objects)
    sheet = draw.assignment_sheet(truth, priors, assignment, CLASSES, panel=160)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 3 * 160 + 4 * 6
    for number in range(2):  # colours go by the object's number in its image
        assert (sheet == canvas.color(number)).all(2).any()
    fewer = draw.assignment_sheet(truth, priors, assignment, CLASSES, limit=1, panel=160)
    assert fewer.shape[0] < sheet.shape[0]


def test_assignment_sheet_without_pairs() -> None:
    truth = batch()
    priors = Points()([(16, 20)], [8])
    none = torch.zeros(0, dtype=torch.long)
    empty = Assignment(
        len(priors), none, none, torch.zeros(0), torch.zeros(0), torch.ones(3, len(priors), dtype=torch.bool)
    )
    assert draw.assignment_sheet(truth, priors, empty, CLASSES).dtype == np.uint8


def test_several_objects_for_one_prior() -> None:
    """The object of the best quality gives the colour; pairs of no weight are padding."""
    truth = batch()
    priors = Points()([(4, 5)], [32])
    assignment = Assignment(
        num_priors=len(priors),
        prior=torch.tensor([7, 7, 7]),
        object=torch.tensor([0, 1, 0]),
        quality=torch.tensor([0.5, 0.9, 1.0]),
        weight=torch.tensor([1.0, 1.0, 0.0]),
        ignored=torch.zeros(3, len(priors), dtype=torch.bool),
    )
    sheet = draw.assignment_sheet(truth, priors, assignment, CLASSES, limit=1, panel=160)
    x, y = priors.centers[7].tolist()
    top = sheet.shape[0] - 6 - 128  # the picture ends above the last margin
    assert same(canvas.color(1), sheet[top + round(y), 6 + round(x)])


def test_write(tmp_path: Path) -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    image[..., 0] = 200
    draw.write(tmp_path / "new" / "a.png", image)
    assert np.array_equal(cv2.imread(str(tmp_path / "new" / "a.png"))[..., ::-1], image)
    draw.write(tmp_path / "a.jpg", image)
    for name in ("a", "a.docx"):
        with pytest.raises(UserError, match="cannot write this kind of image"):
            draw.write(tmp_path / name, image)
    with pytest.raises(UserError, match="cannot write the file"):
        draw.write(tmp_path / "a.jpg" / "b.png", image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "new"]
