"""The cache of decoded images: no byte differs, nothing stale or half written is used, what does not fit
is refused."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from detector.data import cache as caches
from detector.data.cache import ImageCache, available_memory, open_cache
from detector.data.coco import CocoData, CocoIndex
from detector.data.config import ShapesData
from detector.data.copy_paste import CopyPaste
from detector.data.erase import Cutout, GridMask
from detector.data.loader import eval_loader, train_loader
from detector.data.mosaic import Mixup, Mosaic
from detector.data.perspective import RandomPerspective
from detector.data.resize import Fixed, ShortEdge
from detector.data.shapes import ShapeSet, ensure
from detector.data.transforms import Color, Flip, RandomScaleCrop
from detector.errors import DataError
from tests.data.test_loader import same

COUNT = 10
KINDS: tuple[Literal["memory", "file"], ...] = ("memory", "file")
Make = Callable[..., CocoData]

if not hasattr(os, "memfd_create"):
    KINDS = ("file",)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    ensure(tmp_path / "set", ShapeSet("plain", COUNT, (48, 64), seed=1))
    return tmp_path / "set"


@pytest.fixture
def make(made: Path, tmp_path: Path) -> Make:
    """The set with a cache, or without."""

    def load(kind: str = "file", least: Any = None) -> CocoData:
        index = CocoIndex.load(made / "annotations.json", made / "images")
        if kind == "none":
            return CocoData(index, least)
        return CocoData(index, least, open_cache(index, least, kind, tmp_path / "cache"))  # type: ignore[arg-type]

    return load


def batches(data: CocoData, workers: int = 0, start: int = 0, **other: Any) -> list[Any]:
    steps = (
        CopyPaste(), Mosaic(size=(48, 48)), Mixup(), RandomPerspective(), RandomScaleCrop(), Cutout(), GridMask(),
        Flip(), Color(probability=1),
    )  # fmt: skip
    settings = {"augment": steps, "resize": Fixed(size=(48, 48)), "batch_size": 4, "seed": 2} | other
    return list(train_loader(data, start_step=start, stop_step=8, workers=workers, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_differs_with_any_number_of_workers_and_after_a_restart(make: Make, kind: str) -> None:
    straight = batches(make("none"))
    data = make(kind)
    assert data.cache is not None
    assert data.cache.filled == 0
    for workers in (0, 1, 2):
        assert same(straight, batches(data if workers != 1 else make(kind), workers))
        assert data.cache.filled == COUNT
    assert same(straight[3:], batches(data, 2, start=3))
    plain = {"augment": (), "resize": ShortEdge(short=48, long=64)}  # nothing between the stored pixels and the batch
    assert same(batches(make("none"), **plain), batches(data, **plain))
    evaluated = [
        list(eval_loader(d, resize=ShortEdge(short=48, long=64), batch_size=4, workers=0)) for d in (make("none"), data)
    ]
    assert same(*evaluated)


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_process_has_decoded_no_other_decodes(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(kind)
    straight = batches(data, workers=2)

    def refuse(*_: Any) -> Any:
        raise AssertionError("decoded again")

    monkeypatch.setattr(CocoData, "_decoded", refuse)
    assert same(straight, batches(data))
    assert same(straight, batches(data, workers=2))
    if kind == "file":  # in a later run, too
        assert same(straight, batches(make(kind)))


def _first_bytes(cache: ImageCache, paths: list[str], queue: Any) -> None:
    def refuse() -> Any:
        raise AssertionError("decoded again")

    queue.put([cache.read(i, path, refuse)[0].tobytes() for i, path in enumerate(paths)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_workers_see_it_however_they_are_started(make: Make, kind: str, start: str) -> None:
    data = make(kind)
    images = [data.reduced(i).image.tobytes() for i in range(3)]
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    paths = [str(data.index.image_path(i)) for i in range(3)]
    process = context.Process(target=_first_bytes, args=(data.cache, paths, queue))
    process.start()
    assert queue.get(timeout=60) == images
    process.join()


def test_a_changed_image_is_decoded_anew(make: Make) -> None:
    data = make()
    before = [data.reduced(i).image.copy() for i in range(COUNT)]
    path = data.index.image_path(4)
    cv2.imwrite(str(path), np.full((48, 64, 3), 77, dtype=np.uint8))
    for again in (data, make()):
        assert (again.reduced(4).image == 77).all()
        assert np.array_equal(again.reduced(5).image, before[5])
    path.unlink()
    with pytest.raises(DataError, match=r"000005\.png"):
        data.reduced(4)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000005\.png"):
        data.reduced(4)


def test_what_a_crash_left_half_done_is_decoded_anew(make: Make) -> None:
    """Records without their pixels, pixels without their records, and a record that is nonsense."""
    data = make()
    expected = [data.reduced(i).image.copy() for i in range(COUNT)]
    assert data.cache is not None
    data.cache._pixels[data.cache.offsets[1] + 100] ^= 1
    data.cache._pixels[data.cache.offsets[2] : data.cache.offsets[3]] = 0
    data.cache._records["stored"][3] = 0
    data.cache._records["height"][4] = 10**6
    data.cache._records["width"][5] = -3
    data.cache._records["height"][6], data.cache._records["width"][6] = 1, 3
    again = make()
    for _ in range(2):
        for i in range(COUNT):
            assert np.array_equal(again.reduced(i).image, expected[i]), i
    assert again.cache is not None
    assert again.cache.filled == COUNT


def test_a_damaged_file_is_made_anew(make: Make, tmp_path: Path) -> None:
    data = make()
    expected = data.reduced(0).image.copy()
    assert data.cache is not None
    path = Path(data.cache.path)
    content = path.read_bytes()
    for wrong in (b"", content[:-64], b"x" * len(content)):
        path.unlink()
        path.write_bytes(wrong)
        again = make()
        assert again.cache is not None
        assert again.cache.filled == 0
        assert np.array_equal(again.reduced(0).image, expected)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_another_set_or_reading_has_another_file(make: Make, made: Path, tmp_path: Path) -> None:
    def path(data: CocoData) -> str:
        assert data.cache is not None
        return data.cache.path

    first = path(make())
    assert path(make()) == first
    index = CocoIndex.load(made / "annotations.json", made / "images")
    shutil.copytree(made, tmp_path / "copy")
    copy = CocoIndex.load(tmp_path / "copy" / "annotations.json", tmp_path / "copy" / "images")
    assert open_cache(copy, None, "file", tmp_path / "cache").path != first
    for i in range(COUNT):
        index.image_path(i).rename(index.image_path(i).with_suffix(".jpg"))
    text = (made / "annotations.json").read_text().replace(".png", ".jpg")
    (made / "annotations.json").write_text(text)
    assert path(make()) != first
    assert path(make(least=lambda size: (10, 10))) != path(make())


def test_reduced_jpegs_are_kept_reduced(make: Make, made: Path) -> None:
    """And what could not be reduced, as its slot was made for, is decoded each time."""
    index = CocoIndex.load(made / "annotations.json", made / "images")
    for i in range(COUNT):
        image = cv2.imread(str(index.image_path(i)))
        target = index.image_path(i).with_suffix(".jpg")
        if i == 3:  # a PNG by another name
            index.image_path(i).rename(target)
        else:
            cv2.imwrite(str(target), image)
    (made / "annotations.json").write_text((made / "annotations.json").read_text().replace(".png", ".jpg"))

    def least(size: tuple[int, int]) -> tuple[int, int]:
        return 20, 20

    plain, data = make("none", least), make("file", least)
    for _ in range(2):
        for i in range(COUNT):
            one, other = plain.reduced(i), data.reduced(i)
            assert one.image.shape[:2] == ((48, 64) if i == 3 else (24, 32))
            for key in ("image", "boxes", "scale", "offset"):
                assert np.array_equal(getattr(one, key), getattr(other, key)), key
    assert data.cache is not None
    assert data.cache.filled == COUNT - 1
    assert data.cache.offsets[-1] < COUNT * 48 * 64 * 3 / 3


def test_what_does_not_fit_is_refused_with_numbers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "available_memory", lambda: 100_000)
    if "memory" in KINDS:
        with pytest.raises(DataError) as caught:
            make("memory")
        for text in ("10 decoded images", "0.1 MiB, but of memory 0.1 MiB are free", "set data.cache=file"):
            assert text in str(caught.value)
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 50_000, 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"0\.1 MiB, but on the disk of .* 0\.0 MiB are free: set data\.cache_dir"):
        make("file")


def test_a_disk_that_is_full_after_all_leaves_nothing_behind(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    for kind in KINDS:
        with pytest.raises(DataError, match=r"No space left on device"):
            make(kind)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write the cache of decoded images .*: set data\.cache_dir"):
        make("file")


@pytest.mark.skipif("memory" not in KINDS, reason="needs memfd")
def test_several_processes_are_not_to_hold_a_copy_each(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(DataError, match=r"each of the 4 processes .* set data\.cache=file"):
        make("memory")
    make("file")


def test_memory_that_is_free_is_within_the_machines() -> None:
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() < pages


RUN = """
import sys
from pathlib import Path
from detector.data.cache import open_cache
from detector.data.coco import CocoData, CocoIndex

index = CocoIndex.load(Path(sys.argv[1]) / "annotations.json", Path(sys.argv[1]) / "images")
data = CocoData(index, None, open_cache(index, None, "file", Path(sys.argv[2])))
print("open", flush=True)
for _ in range(10**6):
    data.cache._records["stored"][:] = 0  # store without end
    for i in range(len(data)):
        data.reduced(i)
"""


def test_a_run_that_is_killed_while_it_writes_and_one_beside_it_do_no_harm(
    make: Make, made: Path, tmp_path: Path
) -> None:
    plain = make("none")
    expected = [plain.reduced(i).image for i in range(COUNT)]
    script = tmp_path / "script.py"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for _ in range(2):
        arguments = [sys.executable, str(script), str(made), str(tmp_path / "cache")]
        other = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        until = time.monotonic() + 1
        data = make()
        while time.monotonic() < until:
            for i in range(COUNT):
                assert np.array_equal(data.reduced(i).image, expected[i])
        other.send_signal(signal.SIGKILL)
        other.wait()
        again = make()
        for i in range(COUNT):
            assert np.array_equal(again.reduced(i).image, expected[i])
    assert len(list((tmp_path / "cache").iterdir())) == 1, "both have used one file"


def test_the_section_gives_a_cache_to_those_who_ask(tmp_path: Path) -> None:
    config = ShapesData(
        root=tmp_path / "shapes", size=(48, 64), train=3, val=2, cache="file", cache_dir=tmp_path / "cache"
    )
    assert config.open("train").cache is None
    train, val = config.open("train", cached=True), config.open("val", cached=True)
    assert train.cache is not None
    assert val.cache is not None
    assert train.cache.path != val.cache.path
    assert Path(train.cache.path).parent == tmp_path / "cache"
    assert ShapesData(root=tmp_path / "shapes", size=(48, 64), train=3).open("train", cached=True).cache is None
    with pytest.raises(ValidationError, match="cache_dir is set, but cache is 'none'"):
        ShapesData(cache_dir=tmp_path)
    with pytest.raises(ValidationError):
        ShapesData(cache="disk")


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert caches.default_folder() == Path("/somewhere/detector")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caches.default_folder() == Path.home() / ".cache" / "detector"


def test_an_empty_set_and_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    index = CocoIndex.load(tmp_path / "a.json", tmp_path)
    for kind in KINDS:
        cache = open_cache(index, None, kind, tmp_path / "cache")
        assert pickle.loads(pickle.dumps(cache)).filled == cache.filled == 0
