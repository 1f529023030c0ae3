"""Several sources as one set: the same samples, ids and classes of their own, and scores as of one merged file."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from detector.data.coco import CocoData, CocoIndex
from detector.data.config import Data, SeveralData
from detector.data.copy_paste import CopyPaste
from detector.data.loader import train_loader
from detector.data.mosaic import Mosaic
from detector.data.order import BySource, Shuffle
from detector.data.outlines import Frame, Outlines
from detector.data.resize import Fixed
from detector.data.sampler import Stream
from detector.data.several import SeveralIndex
from detector.data.shapes import ShapeSet, ensure
from detector.data.transforms import Flip
from detector.errors import DataError
from detector.evaluate.coco import CocoEvaluator
from detector.evaluate.truth import Truth
from detector.structures import Detections
from tests.data.test_loader import same

read = TypeAdapter(Data).validate_python
COUNTS = {"a": 7, "b": 4, "c": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of the same four classes; ids of images and annotations collide, those of c are very large."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, (name, count) in enumerate(COUNTS.items()):
        size = (64, 48) if name == "b" else (48, 64)
        ensure(folder / name, ShapeSet("plain", count, size, seed=seed))
    return folder


def edit(root: Path, target: Path, name: str, change: Any) -> Path:
    """A copy of a source's annotation file, changed."""
    document = json.loads((root / name / "annotations.json").read_text())
    change(document)
    target.write_text(json.dumps(document))
    return target


def section(root: Path, names: str = "abc", **other: Any) -> dict[str, Any]:
    sources = {
        name: {
            "type": "coco",
            "root": str(root / name),
            "train": {"annotations": "annotations.json", "images": "images"},
            "val": {"annotations": "annotations.json", "images": "images"},
        }
        for name in names
    }
    return {"type": "several", "sources": sources, "workers": 0, **other}


def several(root: Path, names: str = "abc", **other: Any) -> SeveralData:
    found = read(section(root, names, **other))
    assert isinstance(found, SeveralData)
    return found


def changed(root: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The section of all three with keys of sources set."""
    found = section(root)
    for name, more in changes.items():
        found["sources"][name] |= more
    return found


def part(root: Path, name: str) -> CocoData:
    return CocoData(CocoIndex.load(root / name / "annotations.json", root / name / "images"))


def test_samples_are_those_of_the_sources(root: Path) -> None:
    data = several(root).open("train")
    assert isinstance(data.index, SeveralIndex)
    assert len(data) == sum(COUNTS.values())
    place = 0
    for name in COUNTS:
        alone = part(root, name)
        for i in range(len(alone)):
            one, other = alone[i], data[place]
            for key in ("image", "boxes", "labels", "crowd", "original_size"):
                assert np.array_equal(getattr(one, key), getattr(other, key)), key
            frame = Frame.of(one.image)
            own, here = Outlines.stored(alone.index, one.rows), Outlines.stored(data.index, other.rows)
            for k in range(len(one.rows)):
                assert np.array_equal(own.drawn(k, frame), here.drawn(k, frame))
                row = int(other.rows[k])
                assert data.index.image_of(row) == place
                mask = alone.index.mask(int(one.rows[k]))
                assert np.array_equal(np.asarray(data.index.mask(row)), np.asarray(mask))
            assert data.index.image_path(place) == alone.index.image_path(i)
            assert data.index.title(place) == f"{name}, "
            place += 1


def test_ids_are_unique_and_lead_back(root: Path) -> None:
    index = several(root).open("val").index
    assert isinstance(index, SeveralIndex)
    assert index.image_ids.tolist() == [*range(1, 8), *range(101, 105), *range(201, 206)]
    assert len(set(index.annotation_ids.tolist())) == len(index.annotation_ids)
    assert index.notices == ("image ids occur in several sources: they are raised by 100 (b), 200 (c)",)
    alone = several(root, val="b").open("val").index
    assert alone.image_ids.tolist() == [1, 2, 3, 4]
    assert not alone.notices


def test_ids_that_cannot_be_raised_are_replaced(root: Path, tmp_path: Path) -> None:
    def enlarge(document: Any) -> None:
        for image in document["images"]:
            image["id"] += 2**61
        for annotation in document["annotations"]:
            annotation["image_id"] += 2**61

    path = edit(root, tmp_path / "large.json", "c", enlarge)
    large = {"train": {"annotations": str(path), "images": "images"}}
    index = read(changed(root, c=large)).open("train").index
    assert index.image_ids.tolist() == list(range(1, 17))
    assert "numbered from 1" in index.notices[0]
    truth = Truth.of(index)
    assert truth.image_ids.tolist() == list(range(1, 17))


def test_classes_merge_by_name_with_renaming_and_dropping(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = changed(
        root,
        b={"rename": {"circle": "round"}},
        c={"drop": ["triangle"]},
    )
    config = read(values)
    assert read(config.model_dump(mode="json")) == config
    index = config.open("train").index
    assert index.classes == (*classes(root), "round")
    assert "counts as background" not in caplog.text
    assert "'triangle' (c)" in caplog.text
    assert "'round' (a, c)" in caplog.text
    own = part(root, "b").index
    rows = slice(index.first_row[1], index.first_row[2])
    names = [own.classes[k].replace("circle", "round") for k in own.labels]
    assert [index.classes[k] for k in index.labels[rows]] == names
    third = part(root, "c").index
    kept = third.labels != third.classes.index("triangle")
    rows = slice(index.first_row[2], index.first_row[3])
    assert np.array_equal(index.boxes[rows], third.boxes[kept])
    assert [index.classes[k] for k in index.labels[rows]] == [third.classes[k] for k in third.labels[kept]]

    caplog.clear()
    read({**values, "partial": "allow"}).open("train")
    read(values).open("val")
    assert not caplog.text
    with pytest.raises(DataError, match=r"data\.sources: classes that a source does not label .*'triangle' \(c\)"):
        read({**values, "partial": "refuse"}).open("train")


def classes(root: Path) -> tuple[str, ...]:
    return part(root, "a").index.classes


def test_two_classes_of_a_source_may_become_one(root: Path) -> None:
    names = classes(root)
    everything = dict.fromkeys(names, "shape")
    config = read(changed(root, a={"rename": everything}, b={"rename": everything}, c={"rename": everything}))
    index = config.open("train").index
    assert index.classes == ("shape",)
    assert not index.labels.any()
    assert len(index.labels) == sum(len(part(root, name).index.labels) for name in COUNTS)
    assert Truth.of(index).names == ("shape",)


def test_the_order_of_classes_can_be_given_and_is_the_same_in_all_splits(root: Path) -> None:
    names = classes(root)[::-1]
    config = several(root, classes=names, train="b", val=["a", "c"])
    train, val = config.open("train"), config.open("val", names)
    assert train.index.classes == val.index.classes == names
    assert (len(train), len(val)) == (4, 12)
    only = read({**changed(root, c={"rename": {"circle": "ring"}}), "train": "a", "val": "b"})
    assert only.open("train").index.classes == only.open("val").index.classes == (*classes(root), "ring")


def test_a_source_takes_part_in_the_splits_that_it_gives(root: Path) -> None:
    values = section(root)
    del values["sources"]["b"]["val"]
    config = read(values)
    assert config.taking_part("train") == ("a", "b", "c")
    assert config.taking_part("val") == ("a", "c")
    with pytest.raises(DataError, match=r"data\.test: no source gives this split"):
        config.open("test")
    with pytest.raises(ValidationError, match=r"val: the source 'b' does not give this split: set sources\.b\.val"):
        read({**values, "val": "b"})
    mixed = read({**values, "sources": {**values["sources"], "d": {"type": "shapes", "root": str(root / "made"),
                  "size": [48, 64], "train": 3, "val": 2, "test": 1}}})  # fmt: skip
    assert [len(mixed.open(split)) for split in ("train", "val", "test")] == [19, 14, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rename": {"circel": "x"}}, r"sources\.b\.rename: the source has no class 'circel'; did you mean 'circle'\?"),
        ({"drop": ["whale"]}, r"sources\.b\.drop: the source has no class 'whale'; it has 'circle'"),
        (
            {"rename": {"circle": " Circle"}},
            r"class ' Circle' of 'b' and 'circle' of 'a' differ in spelling alone: make them one with"
            r" data\.sources\.b\.rename=\{\"circle\": \"circle\"\}",
        ),
        ({"root": "nowhere"}, r"data\.sources\.b\.train\.annotations: .*nowhere"),
        ({"train": {"annotations": "broken.json", "images": "images"}}, r"source 'b': .*broken\.json: .*tion id 7"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_source(root: Path, change: dict[str, Any], message: str) -> None:
    edit(root, root / "b" / "broken.json", "b", lambda d: d["annotations"][6].update(bbox="none"))
    with pytest.raises(DataError, match=message):
        read(changed(root, b=change)).open("train")


def test_classes_must_be_all_and_no_others(root: Path) -> None:
    names = classes(root)
    with pytest.raises(DataError, match=rf"data\.classes: lacks '{names[-1]}', a class of the source 'a'.*drop"):
        several(root, classes=names[:-1]).open("train")
    with pytest.raises(DataError, match=r"data\.classes: no source has the class 'whale'"):
        several(root, classes=(*names, "whale")).open("train")
    everything = {"drop": list(names)}
    with pytest.raises(DataError, match=r"no class is left"):
        read(changed(root, a=everything, b=everything, c=everything)).open("train")


def test_a_file_may_tell_apart_what_two_may_not(root: Path, tmp_path: Path) -> None:
    both = edit(root, tmp_path / "both.json", "b", lambda d: d["categories"].append({"id": 99, "name": "CIRCLE"}))
    values = changed(root, b={"train": {"annotations": str(both), "images": "images"}, "rename": {}})
    with pytest.raises(DataError, match="'CIRCLE' of 'b' and 'circle' of 'a' differ in spelling"):
        read(values).open("train")
    del values["sources"]["a"], values["sources"]["c"]
    assert "CIRCLE" in read(values).open("train").index.classes


def test_splits_of_a_source_have_equal_classes(root: Path, tmp_path: Path) -> None:
    more = edit(root, tmp_path / "more.json", "b", lambda d: d["categories"].append({"id": 99, "name": "whale"}))
    config = read(changed(root, b={"val": {"annotations": str(more), "images": "images"}}))
    with pytest.raises(DataError, match=r"source 'b': .*more\.json: class 'whale' is none of"):
        config.open("val")
    # Other ids and another order do not matter.
    other = edit(root, tmp_path / "other.json", "b", lambda d: _number_backwards(d))
    config = read(changed(root, b={"val": {"annotations": str(other), "images": "images"}}))
    train, val = config.open("train").index, config.open("val").index
    assert np.array_equal(train.labels, val.labels)
    assert np.array_equal(Truth.of(train).category, Truth.of(val).category)


def _number_backwards(document: Any) -> None:
    for entry in document["categories"]:
        entry["id"] = 50 - entry["id"]
    for entry in document["annotations"]:
        entry["category_id"] = 50 - entry["category_id"]


@pytest.mark.parametrize(
    "other",
    [
        {"sources": {}},
        {"sources": {"all": {"type": "shapes"}}},
        {"sources": {"a b": {"type": "shapes"}}},
        {"sources": {"a": {"type": "shapes", "workers": 3}}},
        {"sources": {"a": {"type": "shapes", "rename": {"star": "x"}, "drop": ["star"]}}},
        {"sources": {"a": {"type": "several", "sources": {}}}},
        {"sources": {"a": {"type": "shapes"}}, "val": "b"},
        {"sources": {"a": {"type": "shapes"}}, "val": []},
        {"sources": {"a": {"type": "shapes"}}, "classes": ["x", "x"]},
        {"sources": {"a": {"type": "shapes"}}, "order": {"type": "by_source", "shares": {"b": 1}}},
        {"sources": {"a": {"type": "shapes"}}, "order": {"type": "by_source", "shares": {"a": 0}}},
        {"sources": {"a": {"type": "shapes"}}, "order": {"type": "by_source", "shares": {"a": -1}}},
        {"sources": {"a": {"type": "shapes"}, "b": {"type": "shapes"}},
         "order": {"type": "by_source", "shares": {"a": 1}}},
    ],
)  # fmt: skip
def test_settings_are_checked(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read({"type": "several", **other})


def test_scores_are_those_of_one_merged_file(root: Path, tmp_path: Path) -> None:
    """Against a file that is merged here by plain Python; with a box that the index leaves out, and a lost class."""
    edit(root, tmp_path / "a.json", "a", lambda d: d["annotations"][2].update(bbox=[5, 5, 0, 9], id=10**6))
    values = changed(
        root,
        a={"val": {"annotations": str(tmp_path / "a.json"), "images": "images"}},
        b={"rename": {"circle": "triangle"}},
        c={"drop": ["triangle"]},
    )
    index = read(values).open("val").index
    assert isinstance(index, SeveralIndex)
    images, annotations = [], []
    for s, (name, path) in enumerate((("a", tmp_path / "a.json"), ("b", None), ("c", None))):
        document = json.loads((path or root / name / "annotations.json").read_text())
        names = {c["id"]: c["name"] for c in document["categories"]}
        if name == "b":
            names = {k: "triangle" if v == "circle" else v for k, v in names.items()}
        images += [{**image, "id": image["id"] + 100 * s} for image in document["images"]]
        for annotation in document["annotations"]:
            kind = names[annotation["category_id"]]
            if not (name == "c" and kind == "triangle"):
                own = {"id": len(annotations) + 1, "image_id": annotation["image_id"] + 100 * s}
                annotations.append({**annotation, **own, "category_id": index.classes.index(kind) + 1})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(index.classes)]
    whole = {"images": images, "annotations": annotations, "categories": categories}

    rng = np.random.default_rng(0)
    scored = [CocoEvaluator(whole), CocoEvaluator(index)]  # type: ignore[list-item]
    truth = scored[1].truth
    assert len(truth) == len(annotations)
    assert len(set(truth.ids.tolist())) == len(truth)
    for i, image_id in enumerate(index.image_ids.tolist()):
        boxes = index.boxes[index.rows(i)] + rng.normal(0, 2, (len(index.boxes[index.rows(i)]), 4))
        labels = torch.from_numpy(index.labels[index.rows(i)].astype(np.int64))
        scores = torch.from_numpy(rng.random(len(boxes)))
        for evaluator in scored:
            evaluator.add([image_id], [Detections(torch.from_numpy(boxes), scores, labels)])
    expected, result = (evaluator.result() for evaluator in scored)
    assert 0.2 < expected.numbers["AP"] < 0.9
    assert result.numbers == expected.numbers
    assert [c.ap for c in result.per_class] == [c.ap for c in expected.per_class]
    assert [c.objects for c in result.per_class] == [c.objects for c in expected.per_class]
    assert any("are raised by 100 (b)" in note for note in result.notes)
    # An object's id in the index is that in the truth, which comparisons rely on.
    at = {number: k for k, number in enumerate(truth.ids.tolist())}
    for row in range(len(index.labels)):
        k = at[int(index.annotation_ids[row])]
        assert np.allclose(truth.boxes[k][:2], index.boxes[row][:2], atol=1e-3)
        assert truth.image_ids[truth.image[k]] == index.image_ids[index.image_of(row)]


def test_masks_are_scored_too(root: Path) -> None:
    index = several(root, "ab").open("val").index
    truth = Truth.of(index, masks=True)
    assert truth.masks is not None
    own = [
        m["segmentation"] for n in "ab" for m in json.loads((root / n / "annotations.json").read_text())["annotations"]
    ]
    assert truth.masks == own  # fmt: skip


def test_workers_ranks_and_restarts_change_no_byte(root: Path) -> None:
    config = several(root, order={"type": "by_source", "shares": {"a": 1, "b": 2, "c": 0.5}, "group_shapes": True})
    data = config.open("train")

    def batches(workers: int, start: int = 0, rank: int = 0, world: int = 1) -> list[Any]:
        steps = (CopyPaste(), Mosaic(size=(48, 48)), Flip())
        loader = train_loader(
            data, augment=steps, resize=Fixed(size=(48, 48)), batch_size=4 // world, seed=2, start_step=start,
            stop_step=9, workers=workers, order=config.order, rank=rank, world=world,
        )  # fmt: skip
        return list(loader)

    straight = batches(0)
    assert same(straight, batches(1))
    assert same(straight, batches(2))
    assert same(straight[5:], batches(2, start=5))
    ranks = [batches(0, rank=rank, world=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 9
    for whole, one, other in zip(straight, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([one.images, other.images]))


@pytest.mark.parametrize("group_shapes", [False, True])
def test_each_source_has_its_share(root: Path, group_shapes: bool) -> None:
    index = several(root).open("train").index
    assert isinstance(index, SeveralIndex)
    shares = {"a": 1.0, "b": 2.0, "c": 0.0}
    ordering = BySource(shares=shares, group_shapes=group_shapes)
    order, n = ordering.of(index, 3), len(index)
    of_image = np.zeros(n)
    for epoch in range(60):
        images, repeats = order.epoch(epoch, 4)
        assert len(images) == n
        counts = np.bincount(index.source[images], minlength=3)
        for s, share in enumerate((1 / 3, 2 / 3, 0)):
            assert np.floor(share * n) <= counts[s] <= np.ceil(share * n)
        of_image += np.bincount(images, minlength=n)
        assert {(i, r) for i, r in zip(images.tolist(), repeats.tolist(), strict=True)}.__len__() == n
    within = of_image[index.source == 1] / 60
    assert np.abs(within - 2 / 3 * n / COUNTS["b"]).max() < 0.35, "images of a source alike"

    def keys(start: int = 0, batch: int = 6, rank: int = 0, world: int = 1) -> list[Any]:
        stream = Stream(
            n, batch_size=batch, seed=3, start_step=start, stop_step=11, rank=rank, world=world, order=order
        )
        return list(stream)

    whole = keys()
    assert keys(start=4) == whole[4:]
    ranks = [keys(batch=2, rank=rank, world=3) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_shares_need_several_sources_that_hold_images(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"by_source needs several sources: set data\.type=several"):
        BySource(shares={"a": 1}).of(part(root, "a").index, 0)
    (tmp_path / "none.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    values = changed(root, c={"train": {"annotations": str(tmp_path / "none.json"), "images": "images"}})
    index = read(values).open("train").index
    assert len(index) == 11
    with pytest.raises(DataError, match=r"data\.order\.shares: the source 'c' holds no image"):
        BySource(shares={"a": 1, "b": 1, "c": 1}).of(index, 0)
    images, _ = BySource(shares={"a": 1, "b": 1, "c": 0}).of(index, 0).epoch(0)
    assert len(images) == 11
    assert len(list(Shuffle().of(index, 0).epoch(0)[0])) == 11


def test_weights_of_one_source_leave_the_others_at_1(root: Path, tmp_path: Path) -> None:
    def weigh(document: Any) -> None:
        for annotation in document["annotations"]:
            annotation["weight"] = 0.25

    path = edit(root, tmp_path / "weighed.json", "b", weigh)
    settings = section(root, "ab")
    settings["sources"]["b"]["train"]["annotations"] = str(path)
    data = read(settings).open("train")
    assert several(root, "ab").open("train").index.weight is None
    for i, source in enumerate(data.index.source):
        sample = data[i]
        assert sample.weight is not None
        assert sample.weight.tolist() == [0.25 if source == 1 else 1.0] * len(sample.boxes)
