"""Everything that is found out about a data set, and what is worth a warning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detector.assign import Assigner
from detector.data.config import Resize
from detector.errors import ConfigError
from detector.lab.dataset import advice, anchors, files, reach
from detector.lab.dataset.describe import Facts, describe
from detector.lab.dataset.overlap import THRESHOLDS
from detector.lab.dataset.split import Split, check_together
from detector.models.priors import Anchors, AnyPriors, Points

Progress = Callable[[int], Callable[[], None]]
NMS_IOU = 0.6  # of the toolkit's default decoding
NAMED = 5  # examples in a note
MANY_PAIRS = 1000  # of classes, in the JSON document


@dataclass(frozen=True)
class Settings:
    resize: Resize | None  # None: images keep their size
    strides: tuple[int, ...]  # pixels, rising
    priors: AnyPriors | None = None  # a recipe's, beside those that are always looked at
    rule: Assigner | None = None  # a recipe's
    pad_multiple: int = 32
    anchors: int | None = None  # k; None: three for each stride
    images_for_rules: int = 100
    distance: int = 8  # bits by which hashes of like images may differ
    share: float = 0.95  # of objects that the advice is for
    cells: float = 2.0
    seed: int = 0
    look_at_images: bool = True

    @property
    def k(self) -> int:
        return 3 * len(self.strides) if self.anchors is None else self.anchors


@dataclass(frozen=True)
class AnchorFits:
    """For k = 1, ..., the largest."""

    means: tuple[anchors.Fit, ...]
    medoids: tuple[anchors.Fit, ...]
    objects: int  # all that fits are measured on
    means_from: int  # of them, those that k-means saw
    medoids_from: int


@dataclass(frozen=True, eq=False)
class Analysis:
    """Anchors, rules and advice are for the first split: the one that is trained on."""

    title: str
    settings: Settings
    splits: tuple[Split, ...]
    facts: tuple[Facts, ...]
    seen: files.Seen | None  # None: image files were left alone
    anchors: AnchorFits
    reach: tuple[reach.Reach, ...]
    reach_images: int
    advice: advice.Advice

    def notes(self) -> list[str]:
        """Sentences about what may spoil a training, or these numbers."""
        found = []
        for split in self.splits:
            if split.sampled:
                found.append(
                    f"{split.name}: {len(split.images)} of {len(split.index)} images, drawn with seed"
                    f" {self.settings.seed} (--max-images); all numbers are of these"
                )
        for facts in self.facts:
            found += [f"{facts.name}: {notice}" for notice in facts.notices]
        found += self._about_files() + self._about_classes() + self._about_objects()
        return found

    def _about_files(self) -> list[str]:
        if self.seen is None:
            return []
        found = []
        for name, problems in self.seen.unreadable.items():
            if problems:
                more = f" (and {len(problems) - NAMED} more)" if len(problems) > NAMED else ""
                found.append(f"{name}: {len(problems)} images cannot be read: {'; '.join(problems[:NAMED])}{more}")
        for (one, other), count in self.seen.twins.items():
            names = self.splits[one].name, self.splits[other].name
            if one > other:  # what is tested on looks like what was trained on
                found.append(
                    f"{count} of {len(self.splits[one].images)} images of {names[0]} look like an image of {names[1]}:"
                    f" scores on {names[0]} are higher than they would be on new images; split by scene instead"
                )
        for s, count in self.seen.within.items():
            if count:
                found.append(
                    f"{self.splits[s].name}: {count} of {len(self.splits[s].images)} images look like an earlier one"
                )
        return found

    def _about_classes(self) -> list[str]:
        found = []
        counts = np.array([[c.objects for c in facts.classes] for facts in self.facts])
        names = [c.name for c in self.facts[0].classes]
        for s, facts in enumerate(self.facts[1:], 1):
            new = [names[k] for k in np.flatnonzero((counts[0] == 0) & (counts[s] > 0))]
            gone = [names[k] for k in np.flatnonzero((counts[0] > 0) & (counts[s] == 0))]
            first = self.facts[0].name
            if new:
                found.append(f"{facts.name}: here but not in {first}, so that nothing can learn them: {_some(new)}")
            if gone:
                found.append(f"{facts.name}: in {first} but not here, so that nothing scores them: {_some(gone)}")
        nowhere = [names[k] for k in np.flatnonzero((counts == 0).all(0))]
        if nowhere:
            found.append(f"declared, but in no image: {_some(nowhere)}")
        rare = [names[k] for k in np.flatnonzero((counts[0] > 0) & (counts[0] < 10))]
        if rare:
            found.append(f"{self.facts[0].name}: fewer than 10 objects each: {_some(rare)}")
        return found

    def _about_objects(self) -> list[str]:
        found = []
        facts = self.facts[0]
        lost = facts.crowding.above(NMS_IOU, same_class=True)
        if lost >= 0.005:
            found.append(
                f"{facts.name}: {lost:.1%} of the objects overlap another of their class by more than {NMS_IOU}: NMS at"
                " that IoU cannot keep both (raise decode.nms_iou, or look whether they are annotated twice)"
            )
        enlarged = float(np.median(np.sqrt(self.splits[0].scale(self.settings.resize).prod(1))))
        if enlarged > advice.MOST_ENLARGED:
            found.append(
                f"{facts.name}: the resize enlarges the median image {enlarged:.1f} times, which costs time and adds no"
                " detail: see the advice"
            )
        side = np.sqrt(self.splits[0].resized_sides(self.settings.resize).prod(1))
        finest = self.settings.strides[0]
        tiny = float((side < finest).mean())
        if tiny >= 0.01:
            found.append(
                f"{facts.name}: after the resize {tiny:.1%} of the objects have a side below the finest stride"
                f" ({finest} pixels): many priors never see them"
            )
        if self.advice.limited:
            found.append(
                f"{facts.name}: objects are so small that no input that enlarges images by at most"
                f" {advice.MOST_ENLARGED} brings {self.advice.wanted:.0%} of them within reach; at the advised size"
                f" {self.advice.chosen.share:.0%} are: cut images into tiles, or accept that"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data; what is not a number is null."""
        return {
            "title": self.title,
            "settings": self._settings(),
            "notes": self.notes(),
            "splits": [_facts(f, s) for f, s in zip(self.facts, self.splits, strict=True)],
            "files": None if self.seen is None else self._files(self.seen),
            "anchors": {
                kind: [{"k": k, "sizes": fit.sizes.round(2).tolist(), "mean_iou": fit.mean_iou, "recall": fit.recall}
                       for k, fit in enumerate(fits, 1)]
                for kind, fits in (("k_means", self.anchors.means), ("k_medoids", self.anchors.medoids))
            },
            "rules": {"images": self.reach_images, "found": [asdict(r) for r in self.reach]},
            "advice": asdict(self.advice) | {"resize": self.advice.resize},
        }  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        s = self.settings
        return {
            "resize": None if s.resize is None else s.resize.model_dump(mode="json"),
            "strides": list(s.strides),
            "anchors": s.k,
            "duplicate_distance": s.distance,
            "seed": s.seed,
        }

    def _files(self, seen: files.Seen) -> dict[str, Any]:
        groups = [
            [{"split": self.splits[s].name, "file_name": self.splits[s].file_name(i)} for s, i in group]
            for group in seen.groups
        ]
        return {
            "kinds": seen.kinds,
            "unreadable": {name: list(problems) for name, problems in seen.unreadable.items()},
            "groups": groups,
            "twins": [
                {"split": self.splits[a].name, "of": self.splits[b].name, "images": n}
                for (a, b), n in seen.twins.items()
            ],
            "within": {self.splits[s].name: count for s, count in seen.within.items()},
        }


def analyse(title: str, splits: Sequence[Split], settings: Settings, progress: Progress | None = None) -> Analysis:
    """
    Raises:
        DataError: the splits' classes differ, or the first holds no object.
        ConfigError: fewer anchors than strides.
    """
    check_together(splits)
    if settings.k < len(settings.strides):
        raise ConfigError(
            f"--anchors {settings.k}: every level needs one, and there are {len(settings.strides)} strides"
            f" ({', '.join(map(str, settings.strides))}): ask for at least {len(settings.strides)}"
        )
    train = splits[0]
    fits = _fit_anchors(train.resized_sides(settings.resize), settings)
    sets: dict[str, AnyPriors | reach.Listed] = {
        "points": Points(),
        "9 anchors": Anchors(),
        f"{settings.k} k-means anchors": reach.spread_over_levels(fits.means[-1].sizes, settings.strides),
        f"{settings.k} k-medoid anchors": reach.spread_over_levels(fits.medoids[-1].sizes, settings.strides),
    }
    if settings.priors is not None and settings.priors not in sets.values():
        sets = {"recipe's": settings.priors, **sets}
    found, images = reach.reach(
        train, settings.resize, settings.strides, sets, settings.rule,
        most=settings.images_for_rules, pad_multiple=settings.pad_multiple,
    )  # fmt: skip
    return Analysis(
        title=title,
        settings=settings,
        splits=tuple(splits),
        facts=tuple(describe(split, settings.resize) for split in splits),
        seen=files.look_at(splits, settings.distance, progress) if settings.look_at_images else None,
        anchors=fits,
        reach=tuple(found),
        reach_images=images,
        advice=advice.advise(train, settings.share, settings.cells),
    )


def _fit_anchors(sizes: np.ndarray, settings: Settings) -> AnchorFits:
    seen = anchors.sample(sizes, anchors.MEANS_FROM, settings.seed)
    some = anchors.sample(sizes, anchors.MEDOIDS_FROM, settings.seed)
    means = anchors.k_means(seen, settings.k, settings.seed)
    medoids = anchors.k_medoids(some, settings.k)
    return AnchorFits(
        tuple(anchors.fit(sizes, a) for a in means),
        tuple(anchors.fit(sizes, a) for a in medoids),
        len(sizes),
        len(seen),
        len(some),
    )


def _facts(facts: Facts, split: Split) -> dict[str, Any]:
    """Without the arrays that have an entry for each object."""
    k = np.triu(facts.together, 1)
    one, other = np.nonzero(k)
    order = np.argsort(-k[one, other], kind="stable")[:MANY_PAIRS]
    plain = {key: value for key, value in vars(facts).items() if key not in ("crowding", "together", "centers")}
    plain |= {
        "annotations": str(split.index.annotations),
        "classes": [asdict(c) for c in facts.classes],
        "together": [{"classes": [facts.classes[one[i]].name, facts.classes[other[i]].name],
                      "images": int(k[one[i], other[i]])} for i in order],
        "centers": facts.centers.tolist(),
        "image_sizes": [list(size) for size in facts.image_sizes],
        "overlap": {
            "above": {str(t): facts.crowding.above(t) for t in THRESHOLDS},
            "above_of_class": {str(t): facts.crowding.above(t, same_class=True) for t in THRESHOLDS},
            "contested": facts.crowding.contested,
            "pairs_per_image": facts.crowding.pairs_per_image,
        },
    }  # fmt: skip
    return plain


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:NAMED])
    kind = "class" if len(names) == 1 else "classes"
    return f"{len(names)} {kind} ({shown}{', ...' if len(names) > NAMED else ''})"
