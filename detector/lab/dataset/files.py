"""One look at every image file: can it be read, what kind is it, what does it look like; and which look alike.

Legend: n images of a split.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from detector.data.images import read_reduced
from detector.errors import DataError
from detector.lab.dataset import hashes
from detector.lab.dataset.split import Split


@dataclass(frozen=True)
class Look:
    """What an image file shows; `problem` says why it cannot be read."""

    kind: str = ""  # format and colour mode, such as "JPEG RGB"
    hash: int = 0
    picture: np.ndarray | None = None  # (T,) uint8
    problem: str | None = None


@dataclass(frozen=True)
class Seen:
    """The image files of all splits."""

    kinds: dict[str, dict[str, int]]  # split -> format and mode -> images
    unreadable: dict[str, tuple[str, ...]]  # split -> a sentence for each image that cannot be read
    groups: tuple[tuple[tuple[int, int], ...], ...]  # of images that look alike: (split, image of those looked at)
    leaking: tuple[bool, ...]  # for each group: does it join splits?
    twins: dict[tuple[int, int], int]  # (split, other split) -> images of the one that look like some of the other
    within: dict[int, int]  # split -> images that could go and leave one of each kind in the split


def look_at(splits: Sequence[Split], distance: int, progress: Callable[[int], Callable[[], None]] | None) -> Seen:
    """Reads every image once, reduced where it is a JPEG, in as many threads as there are cores.

    distance: bits of 64 by which hashes of images that look alike may differ.
    """
    places = [(s, i) for s, split in enumerate(splits) for i in range(len(split.images))]
    step = None if progress is None else progress(len(places))
    looks: list[Look] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for look in pool.map(lambda place: _look(splits[place[0]], place[1]), places):
            looks.append(look)
            if step is not None:
                step()
    kinds = {split.name: Counter[str]() for split in splits}
    unreadable: dict[str, list[str]] = {split.name: [] for split in splits}
    for (s, _), look in zip(places, looks, strict=True):
        if look.problem is None:
            kinds[splits[s].name][look.kind] += 1
        else:
            unreadable[splits[s].name].append(look.problem)
    readable = [i for i, look in enumerate(looks) if look.picture is not None]
    found: list[np.ndarray] = []
    if readable:
        pictures = np.stack([p for i in readable if (p := looks[i].picture) is not None])
        found = hashes.groups(np.array([looks[i].hash for i in readable], dtype=np.uint64), pictures, distance)
    groups = tuple(tuple(places[readable[i]] for i in group) for group in found)
    return Seen(
        kinds={name: dict(count.most_common()) for name, count in kinds.items()},
        unreadable={name: tuple(problems) for name, problems in unreadable.items()},
        groups=groups,
        leaking=tuple(len({s for s, _ in group}) > 1 for group in groups),
        twins=_twins(groups),
        within=_within(groups, len(splits)),
    )


def _look(split: Split, i: int) -> Look:
    path = split.index.image_path(int(split.images[i]))
    height, width = split.index.sizes[split.images[i]].tolist()
    try:
        image, _ = read_reduced(path, (height, width), (hashes.SIDE * 2, hashes.SIDE * 2))
        number, picture = hashes.fingerprint(image)
        return Look(_kind(path), number, picture)
    except DataError as error:
        return Look(problem=str(error))


def _kind(path: Path) -> str:
    try:
        with Image.open(path) as header:
            return f"{header.format} {header.mode}"
    except Exception:  # what cv2 can read and Pillow cannot, which raises many kinds of errors
        return path.suffix.lstrip(".").upper() or "unknown"


def _twins(groups: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], int]:
    found: Counter[tuple[int, int]] = Counter()
    for group in groups:
        count = Counter(s for s, _ in group)
        for one in count:
            for other in count:
                if one != other:
                    found[one, other] += count[one]
    return dict(sorted(found.items()))


def _within(groups: Sequence[Sequence[tuple[int, int]]], splits: int) -> dict[int, int]:
    found = dict.fromkeys(range(splits), 0)
    for group in groups:
        for s, count in Counter(s for s, _ in group).items():
            found[s] += count - 1
    return found
