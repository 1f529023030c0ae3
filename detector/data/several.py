"""Several data sets as one: their images one after the other, their classes merged by name.

Everything that reads an index (loader, orders, steps, evaluation, tools) sees one `CocoIndex`, with ids of its own
where those of the sources collide.  Masks stay in the sources' files.  S sources, n images and m annotations in all.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.index import CocoIndex
from detector.errors import DataError

Renaming = Mapping[str, str | None]  # a source's class -> its name in the run; None: left out
_NAMED = 5  # classes that a sentence lists


@dataclass(frozen=True, eq=False)
class SeveralIndex(CocoIndex):
    """The images of `parts` in their order; objects of classes that are left out have no row."""

    sources: tuple[str, ...]  # S names
    parts: tuple[CocoIndex, ...]  # as their files are: own ids, own classes
    label_maps: tuple[np.ndarray, ...]  # S times (K_s,) int64: own label -> label here, or -1
    first_image: np.ndarray  # (S + 1,) int64: source s has the images first_image[s] to first_image[s + 1]
    first_row: np.ndarray  # (S + 1,) int64
    part_rows: np.ndarray  # (m,) int64: the row in its part

    @classmethod
    def merge(
        cls, parts: Mapping[str, CocoIndex], classes: tuple[str, ...], renaming: Mapping[str, Renaming]
    ) -> SeveralIndex:
        """
        Args:
            parts: by the name of their source.
            classes: of the run, K.
            renaming: of each source, for all of its classes.
        """
        indices = tuple(parts.values())
        labels = {name: k for k, name in enumerate(classes)}
        maps = tuple(
            np.array([-1 if (new := renaming[s][old]) is None else labels[new] for old in part.classes], dtype=np.int64)
            for s, part in parts.items()
        )
        rows = [np.flatnonzero(to[part.labels] >= 0) for to, part in zip(maps, indices, strict=True)]
        counts = [
            np.diff(np.searchsorted(kept, part.offsets)) for kept, part in zip(rows, indices, strict=True)
        ]  # of objects in each image

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name)[kept] for kept, part in zip(rows, indices, strict=True)])

        image_ids, shift = _unique([part.image_ids for part in indices])
        annotation_ids, _ = _unique([part.annotation_ids[kept] for kept, part in zip(rows, indices, strict=True)])
        return cls(
            annotations=Path(f"data.sources ({', '.join(parts)})"),  # for messages alone
            images=Path("."),
            classes=classes,
            category_ids=np.arange(1, len(classes) + 1),
            image_ids=np.concatenate(image_ids),
            sizes=np.concatenate([part.sizes for part in indices]),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
            boxes=joined("boxes"),
            labels=np.concatenate(
                [to[part.labels[kept]] for to, kept, part in zip(maps, rows, indices, strict=True)]
            ).astype(np.int32),
            weight=_weights(indices, rows),
            crowd=joined("crowd"),
            area=joined("area"),
            annotation_ids=np.concatenate(annotation_ids),
            annotated=all(part.annotated for part in indices),
            notices=() if shift is None else (_about_ids(shift, list(parts)),),
            names=b"".join(part.names for part in indices),
            name_offsets=_accumulated([part.name_offsets for part in indices]),
            spans=joined("spans"),
            stamp=(0, 0),
            sources=tuple(parts),
            parts=indices,
            label_maps=maps,
            first_image=np.concatenate([[0], np.cumsum([len(part) for part in indices])]).astype(np.int64),
            first_row=np.concatenate([[0], np.cumsum([len(kept) for kept in rows])]).astype(np.int64),
            part_rows=np.concatenate(rows),
        )

    @property
    def source(self) -> np.ndarray:
        """(n,) int64: which source each image is of."""
        return np.repeat(np.arange(len(self.parts)), np.diff(self.first_image))

    def folder(self, i: int) -> Path:
        return self.parts[self._source_of(i)].images

    def origin(self, row: int) -> tuple[CocoIndex, int]:
        s = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return self.parts[s], int(self.part_rows[row])

    def segmentation(self, row: int) -> Any:
        part, own = self.origin(row)
        return part.segmentation(own)

    def mask(self, row: int) -> np.ndarray | None:
        part, own = self.origin(row)
        return part.mask(own)

    def rings(self, row: int) -> tuple[np.ndarray, ...] | None:
        part, own = self.origin(row)
        return part.rings(own)

    def title(self, i: int) -> str:
        return f"{self.sources[self._source_of(i)]}, "

    def _source_of(self, i: int) -> int:
        return int(np.searchsorted(self.first_image, i, side="right")) - 1


def renamed(source: str, classes: tuple[str, ...], rename: Mapping[str, str], drop: Sequence[str]) -> Renaming:
    """Of each of a source's classes its name in the run.

    Raises:
        DataError: `rename` or `drop` names a class that the source does not have.
    """
    for key, names in (("rename", rename), ("drop", drop)):
        for name in names:
            if name not in classes:
                near = difflib.get_close_matches(name, classes, 1)
                meant = f"; did you mean {near[0]!r}?" if near else f"; it has {listed(classes)}"
                raise DataError(f"data.sources.{source}.{key}: the source has no class {name!r}{meant}")
    return {name: None if name in drop else rename.get(name, name) for name in classes}


def merged(renaming: Mapping[str, Renaming], order: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes of all sources: in the given order, or each where it first appears.

    Raises:
        DataError: two sources write a name differently, or `order` lacks a class or has one that no source has.
    """
    held: dict[str, list[str]] = {}  # class -> sources
    for source, classes in renaming.items():
        for name in dict.fromkeys(new for new in classes.values() if new is not None):
            held.setdefault(name, []).append(source)
    if not held:
        raise DataError("data.sources: no class is left: drop fewer")
    _refuse_variants(held, renaming)
    if order is None:
        return tuple(held)
    lacking = [name for name in held if name not in order]
    if lacking:
        source = held[lacking[0]][0]
        raise DataError(
            f"data.classes: lacks {lacking[0]!r}, a class of the source {source!r}"
            f"{f' (and {len(lacking) - 1} more)' if len(lacking) > 1 else ''}: add it, or leave its objects out with"
            f" data.sources.{source}.drop"
        )
    idle = next((name for name in order if name not in held), None)
    if idle is not None:
        raise DataError(f"data.classes: no source has the class {idle!r}; they have {listed(tuple(held))}")
    return order


def partly_labelled(renaming: Mapping[str, Renaming], classes: tuple[str, ...]) -> str | None:
    """A sentence about classes that some of the sources do not have; None where all have all."""
    parts, sources = [], list(renaming)
    for name in classes:
        having = [s for s in sources if name in renaming[s].values()]
        if 0 < len(having) < len(sources):
            parts.append(f"{name!r} ({', '.join(s for s in sources if s not in having)})")
    if not parts:
        return None
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return (
        "classes that a source does not label count as background there, so training unlearns those that its images"
        f" show: {', '.join(parts[:_NAMED])}{more}; label them, rename what is the same under another name, or say"
        " with data.partial=allow that these images show none"
    )


def _refuse_variants(held: Mapping[str, list[str]], renaming: Mapping[str, Renaming]) -> None:
    """Names that differ in case, spaces, dashes or underscores are most likely one class."""
    known: dict[str, str] = {}
    for name, sources in held.items():
        plain = " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
        other = known.setdefault(plain, name)
        if other == name or (len(sources) == 1 and sources == held[other]):  # its own file tells them apart
            continue
        own = next(old for old, new in renaming[sources[0]].items() if new == name)
        change = f'data.sources.{sources[0]}.rename={{"{own}": "{other}"}}'
        raise DataError(
            f"data.sources: the class {name!r} of {sources[0]!r} and {other!r} of {held[other][0]!r} differ in spelling"
            f" alone: make them one with {change}, or rename one of them to tell them apart"
        )


def _weights(parts: Sequence[CocoIndex], rows: Sequence[np.ndarray]) -> np.ndarray | None:
    """Of the kept objects; a source that gives none has 1."""
    if all(part.weight is None for part in parts):
        return None
    ones = [np.ones(len(part.labels), dtype=np.float32) if part.weight is None else part.weight for part in parts]
    return np.concatenate([weight[kept] for weight, kept in zip(ones, rows, strict=True)])


def _unique(groups: list[np.ndarray]) -> tuple[list[np.ndarray], int | None]:
    """The ids of each source, unique over all, and by what those of the s-th source were raised s times.

    None: they are unique as they are.  0: they are too large for that and count from 1.
    """
    together = np.concatenate(groups)
    if len(np.unique(together)) == len(together):
        return groups, None
    shift = 10 ** len(str(2 * max(abs(int(together.min())), abs(int(together.max())))))
    if shift * len(groups) < np.iinfo(np.int64).max // 2:
        return [ids + s * shift for s, ids in enumerate(groups)], shift
    numbers = np.arange(1, len(together) + 1)
    return np.split(numbers, np.cumsum([len(ids) for ids in groups])[:-1]), 0


def _about_ids(shift: int, sources: list[str]) -> str:
    if shift == 0:
        return "image ids occur in several sources: images are numbered from 1 in the order of data.sources"
    raised = ", ".join(f"{s * shift} ({name})" for s, name in enumerate(sources) if s)
    return f"image ids occur in several sources: they are raised by {raised}"


def _accumulated(offsets: list[np.ndarray]) -> np.ndarray:
    """Offsets into what is put together."""
    starts = np.cumsum([0, *(part[-1] for part in offsets)])
    return np.concatenate([[0], *(part[1:] + start for part, start in zip(offsets, starts, strict=False))])


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
