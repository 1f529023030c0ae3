from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.cli.split_data import main
from detector.data.formats.split import group_keys, split, stratify
from detector.errors import DataError
from tests.data import small_coco
from tests.data.formats.make import load

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def clips(count: int, frames: int, classes: int, seed: int = 0) -> dict[str, Any]:
    """Videos of several frames; class k is in about every (k + 1)-th of them."""
    rng = np.random.default_rng(seed)
    document: dict[str, Any] = {
        "info": {"year": 2020},
        "licenses": [{"id": 1}],
        "images": [],
        "annotations": [],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(classes)],
    }
    for clip in range(count):
        has = [k for k in range(classes) if rng.random() < 1 / (k + 1)]
        for frame in range(frames):
            number = len(document["images"]) + 1
            name = f"clip{clip}/frame{frame}.png"
            document["images"].append({"id": number, "file_name": name, "height": 40, "width": 60, "clip": clip})
            for k in has:
                document["annotations"].append(
                    {
                        "id": len(document["annotations"]) + 1,
                        "image_id": number,
                        "category_id": k + 1,
                        "bbox": [1.0, 2.0, 3.5, 4.0],
                        "area": 14.0,
                        "iscrowd": 0,
                        "segmentation": [],
                        "kept": "as it is",
                    }
                )
    return document


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def written(tmp_path: Path, document: dict[str, Any], *options: object) -> dict[str, dict[str, Any]]:
    source = tmp_path / "all.json"
    source.write_text(json.dumps(document))
    assert run(source, "--out", tmp_path / "parts", *options) == 0
    return {p.stem: json.loads(p.read_text()) for p in sorted((tmp_path / "parts").iterdir())}


def test_parts_hold_everything_once_and_unchanged(tmp_path: Path, capsys: Any) -> None:
    document = clips(50, 1, 3)
    parts = written(tmp_path, document)
    assert set(parts) == {"train", "val", "test"}
    for key in ("images", "annotations"):
        together = [entry for part in parts.values() for entry in part[key]]
        assert sorted(together, key=lambda e: e["id"]) == document[key]
    for part in parts.values():
        ids = [image["id"] for image in part["images"]]
        assert ids == sorted(ids)
        assert {a["image_id"] for a in part["annotations"]} <= set(ids)
        assert part["categories"] == document["categories"]
        assert part["licenses"] == document["licenses"]
        assert part["info"]["year"] == 2020
        assert part["info"]["split"]["seed"] == 0
    out = capsys.readouterr().out
    assert "class 2" in out
    assert "groups: train 40, val 5, test 5" in out


def test_frames_of_a_clip_stay_together(tmp_path: Path) -> None:
    document = clips(20, 7, 3)
    for options in (("--group", "^clip[0-9]+"), ("--group", "^clip([0-9]+)/"), ("--group-field", "clip")):
        parts = written(tmp_path, document, *options, "--force")
        where = [{image["clip"] for image in part["images"]} for part in parts.values()]
        assert sum(map(len, where)) == len(set.union(*where)) == 20


def test_equal_seeds_give_equal_parts(tmp_path: Path) -> None:
    document = clips(40, 1, 2)
    first = written(tmp_path, document)
    assert written(tmp_path, document, "--force") == first
    others = [written(tmp_path, document, "--force", "--seed", seed) for seed in (1, 2)]
    assert any(other["val"]["images"] != first["val"]["images"] for other in others)


@pytest.mark.parametrize("seed", range(4))
def test_classes_keep_their_shares(seed: int) -> None:
    """Within one image for single labels, as the algorithm promises; a random split of 300 is off by 4 on average."""
    label = np.random.default_rng(seed).choice(4, 300, p=[0.6, 0.25, 0.1, 0.05])
    holds = np.eye(4, dtype=np.int64)[label]
    shares = np.array([0.7, 0.2, 0.1])
    part = stratify(holds, np.ones(300, dtype=np.int64), shares, np.random.default_rng(seed))
    found = np.stack([holds[part == s].sum(0) for s in range(3)])
    assert np.abs(found - shares[:, None] * holds.sum(0)).max() < 1.5


def test_several_labels_an_image_are_nearer_than_chance() -> None:
    document = clips(200, 1, 6, seed=3)
    shares = np.array(list(SHARES.values()))
    result = split(document, SHARES, group_keys(document["images"], None, None), seed=0)
    total = result.images.sum(0)
    off = np.abs(result.images / total - shares[:, None]).max()
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(50):
        part = rng.permutation(np.repeat([0, 1, 2], [120, 40, 40]))
        holds = np.zeros((200, 6))
        for a in document["annotations"]:
            holds[a["image_id"] - 1, a["category_id"] - 1] = 1
        found = np.stack([holds[part == s].sum(0) for s in range(3)])
        chance.append(np.abs(found / total - shares[:, None]).max())
    assert off < min(chance)
    assert off < 0.03


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 30), st.integers(1, 4), st.integers(1, 5))
def test_no_part_is_empty_and_no_group_torn(seed: int, count: int, frames: int, classes: int) -> None:
    document = clips(count, frames, classes, seed)
    keys = group_keys(document["images"], r"clip\d+", None)
    result = split(document, {"train": 0.98, "val": 0.01, "test": 0.01}, keys, seed)
    assert set(result.part.tolist()) == {0, 1, 2}
    assert all(len(set(result.part[np.array(keys) == key].tolist())) == 1 for key in keys)
    assert (result.objects.sum(0) == result.images.sum(0)).all()


def test_small_classes_are_named(tmp_path: Path, capsys: Any) -> None:
    document = clips(20, 2, 1)
    document["categories"] += [{"id": 7, "name": "rare"}, {"id": 8, "name": "never"}]
    document["annotations"][0]["category_id"] = 7
    written(tmp_path, document, "--group-field", "clip")
    said = capsys.readouterr().err
    assert "class 'rare' is in 1 group of images, too few for its share in every part: val and test have none" in said
    assert "class 'never' has no object at all" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--group", "clip"], "1 groups of images"),
        (["--group", "film[0-9]"], "does not fit --group"),
        (["--group", "clip["], "not a regular expression"),
        (["--group-field", "video"], "has no 'video'"),
    ],
)
def test_groups_that_do_not_work(tmp_path: Path, capsys: Any, options: list[str], said: str) -> None:
    source = tmp_path / "all.json"
    source.write_text(json.dumps(clips(9, 2, 1)))
    assert run(source, "--out", tmp_path / "parts", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_too_few_images() -> None:
    document = clips(2, 1, 1)
    with pytest.raises(DataError, match=re.escape("2 groups of images (such as '0'), expected at least 3")):
        split(document, SHARES, group_keys(document["images"], None, None), 0)


@pytest.mark.parametrize("shares", [["a=1"], ["a=0.5", "b=0.4"], ["a=1", "b=0"], ["a=0.5", "a=0.5"], ["a", "b"]])
def test_shares_that_are_none(tmp_path: Path, shares: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "all.json", "--out", tmp_path, "--shares", *shares)
    assert left.value.code == 2


def test_files_are_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    path, _ = small_coco.write(tmp_path)
    arguments = (path, "--out", tmp_path, "--shares", "annotations=0.6", "rest=0.4")
    assert run(*arguments, "--force") == 2
    assert "a part of itself" in capsys.readouterr().err
    assert json.loads(path.read_text()) == small_coco.document()
    (tmp_path / "val.json").write_text("mine")
    assert run(path, "--out", tmp_path) == 2
    assert "val.json: exists already" in capsys.readouterr().err
    assert not (tmp_path / "train.json").exists()


def test_broken_and_empty_files(tmp_path: Path, capsys: Any) -> None:
    document = small_coco.document()
    document["annotations"][0]["image_id"] = 99
    path, _ = small_coco.write(tmp_path, document)
    assert run(path, "--out", tmp_path / "parts") == 2
    assert "check_data.py" in capsys.readouterr().err
    document["annotations"] = []
    path.write_text(json.dumps(document))
    assert run(path, "--out", tmp_path / "parts") == 2
    assert "has no annotations" in capsys.readouterr().err
    assert run(tmp_path / "none.json", "--out", tmp_path / "parts") == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_real_set(shared: Path, tmp_path: Path) -> None:
    folder = shared / "datasets" / "coco_tiny"
    assert run(folder / "annotations" / "train.json", "--out", tmp_path, "--shares", "a=0.5", "b=0.5") == 0
    sizes = []
    for name in ("a", "b"):
        document = load(tmp_path / f"{name}.json", folder / "images")
        sizes.append(len(document["images"]))
        persons = {a["image_id"] for a in document["annotations"] if a["category_id"] == 1}
        sizes.append(len(persons))
    assert abs(sizes[0] - sizes[2]) <= 5
    assert abs(sizes[1] - sizes[3]) <= 3
