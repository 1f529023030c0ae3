"""The loader: every byte a function of seed and step, and trouble with images or workers told in one sentence."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from detector.data.batch import PADDING, collate
from detector.data.coco import CocoData, CocoIndex
from detector.data.loader import Loader, eval_loader, train_loader
from detector.data.resize import Fixed, Letterbox, ShortEdge, Sizing
from detector.data.sampler import InOrder, Key, Stream
from detector.data.shapes import ShapeSet, ensure
from detector.data.transforms import Augmentation, Color, Flip, RandomScaleCrop
from detector.errors import DataError, UserError
from detector.structures import Batch
from tests.data.test_resize import make_sample

AUGMENT: tuple[Augmentation, ...] = (Flip(), Color(), RandomScaleCrop())
COUNT = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    ensure(folder, ShapeSet("plain", COUNT, (48, 64), seed=1))
    return folder


@pytest.fixture
def data(folder: Path) -> CocoData:
    return CocoData(CocoIndex.load(folder / "annotations.json", folder / "images"))


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., CocoData]:
    """A set of which some images are damaged after it was indexed."""

    def make(*images: int) -> CocoData:
        folder = tmp_path / "set"
        ensure(folder, ShapeSet("plain", COUNT, (48, 64), seed=1))
        data = CocoData(CocoIndex.load(folder / "annotations.json", folder / "images"))
        for i in images:
            data.index.image_path(i).write_bytes(b"no image")
        return data

    return make


def training(data: CocoData, start: int = 0, stop: int = 8, workers: int = 0, **other: object) -> Loader:
    settings = {"augment": AUGMENT, "resize": ShortEdge(short=40, long=80), "batch_size": 4, "seed": 5} | other
    return train_loader(data, start_step=start, stop_step=stop, workers=workers, **settings)  # type: ignore[arg-type]


def same(a: list[Batch], b: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        truth = batch.objects
        return [
            *(batch.images, batch.ids, batch.original_sizes, batch.scale, batch.offset, batch.sizes),
            *(truth.boxes, truth.labels, truth.image, truth.ignore, truth.ignore_image),
        ]

    def dtypes_and_values(x: Batch, y: Batch) -> bool:
        pairs = zip(tensors(x), tensors(y), strict=True)
        return x.failures == y.failures and all(
            p.dtype == q.dtype and torch.equal(p.nan_to_num(-7), q.nan_to_num(-7)) for p, q in pairs
        )

    return len(a) == len(b) and all(map(dtypes_and_values, a, b))


def test_workers_and_restarts_change_no_byte(data: CocoData) -> None:
    resize = ShortEdge(short=40, long=80, multi_scale=(32, 40, 56))
    straight = list(training(data, resize=resize))
    assert len(straight) == 8
    for workers in (1, 2):
        assert same(straight, list(training(data, workers=workers, resize=resize)))
    for start in (1, 3, 7):
        assert same(straight[start:], list(training(data, start, workers=start % 3, resize=resize)))
    assert not same(straight, list(training(data, resize=resize, seed=6)))


def test_the_global_generators_are_left_alone(data: CocoData) -> None:
    torch.manual_seed(0)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(training(data))
    list(eval_loader(data, resize=Fixed(size=(32, 32)), batch_size=4, workers=1))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpys, np.random.get_state()[1])  # noqa: NPY002


def test_every_epoch_sees_every_image_once_and_nothing_is_dropped() -> None:
    keys = [key for batch in Stream(10, batch_size=4, seed=3, start_step=0, stop_step=10) for key in batch]
    assert len(keys) == 40
    for epoch in range(4):
        part = keys[10 * epoch : 10 * epoch + 10]
        assert {k.epoch for k in part} == {epoch}
        assert sorted(k.image for k in part) == list(range(10))
    assert [k.image for k in keys[:10]] != [k.image for k in keys[10:20]]


def test_a_batch_may_span_several_epochs() -> None:
    (batch,) = Stream(3, batch_size=8, seed=0, start_step=0, stop_step=1)
    assert [k.epoch for k in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_stream_starts_anywhere_and_splits_over_ranks() -> None:
    def stream(batch: int = 6, start: int = 0, rank: int = 0, world: int = 1) -> list[list[Key]]:
        return list(
            Stream(7, batch_size=batch, seed=1, start_step=start, stop_step=9, choices=3, rank=rank, world=world)
        )

    whole = stream()
    assert stream(start=4) == whole[4:]
    ranks = [stream(batch=2, rank=r, world=3) for r in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert {k.choice for batch in whole for k in batch} == {0, 1, 2}
    assert all(len({k.choice for k in batch}) == 1 for batch in whole), "one size in a batch"


def test_multi_scale_gives_batches_of_the_chosen_sizes(data: CocoData) -> None:
    resize = Letterbox(size=(48, 64), multi_scale=(32, 64, 96))
    shapes = {tuple(b.images.shape[2:]) for b in training(data, stop=12, resize=resize, pad_multiple=8)}
    assert shapes == {(24, 32), (48, 64), (72, 96)}


def test_evaluation_is_in_order_and_repeats(data: CocoData) -> None:
    loader = eval_loader(data, resize=ShortEdge(short=40, long=80), batch_size=4, workers=1)
    first, second = list(loader), list(loader)
    assert same(first, second)
    assert torch.cat([b.ids for b in first]).tolist() == data.index.image_ids.tolist()
    assert [len(b) for b in first] == [4, 4, 3]
    assert len(loader) == 3
    shares = [[k.image for batch in InOrder(COUNT, batch_size=2, rank=r, world=3) for k in batch] for r in range(3)]
    assert sorted(chain(*shares)) == list(range(COUNT))


def test_batch_holds_the_truth_of_its_images(data: CocoData) -> None:
    resize = ShortEdge(short=40, long=80)
    (batch,) = eval_loader(data, resize=resize, batch_size=COUNT, workers=0)
    for i in range(COUNT):
        sample, mine = resize(data[i]), batch.objects.select_image(i)
        assert np.array_equal(mine.boxes.numpy(), sample.boxes)
        assert np.array_equal(mine.labels.numpy(), sample.labels)
        assert np.array_equal(mine.ignore.numpy(), sample.crowd)
        h, w = sample.image.shape[:2]
        assert batch.sizes[i].tolist() == [h, w]
        assert np.array_equal(batch.images[i, :, :h, :w].permute(1, 2, 0).numpy(), sample.image)
    assert batch.original_sizes.tolist() == [[48, 64]] * COUNT


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_channels_last_and_padded_at_right_and_bottom(data: CocoData, workers: int) -> None:
    (batch,) = eval_loader(data, resize=ShortEdge(short=40, long=80), batch_size=COUNT, workers=workers)
    assert batch.images.shape == (COUNT, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    padding = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None]
    assert (batch.images[:, :, 40:] == padding).all()
    assert (batch.images[:, :, :, 53:] == padding).all()


def test_collate_pads_to_the_largest_or_to_a_canvas() -> None:
    samples = [make_sample((20, 70)), make_sample((33, 10))]
    assert collate(samples, pad_multiple=32).images.shape == (2, 3, 64, 96)
    assert collate(samples, pad_multiple=1).images.shape == (2, 3, 33, 70)
    assert collate(samples, pad_multiple=16, canvas=(40, 80)).images.shape == (2, 3, 48, 80)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_training_image_is_replaced_by_the_next_and_named(
    damaged: Callable[..., CocoData], workers: int
) -> None:
    data = damaged(3, 4)
    batches = list(training(data, stop=11, workers=workers))
    ids = torch.cat([b.ids for b in batches]).tolist()
    assert len(ids) == 44, "no place is left empty"
    assert not {4, 5} & set(ids)
    assert ids.count(6) == 12, "image 6 stands in for 4 and 5"
    failures = [line for b in batches for line in b.failures]
    assert any("000004.png" in line for line in failures)
    assert all("000004.png" in line or "000005.png" in line for line in failures)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_end_the_run(damaged: Callable[..., CocoData], workers: int) -> None:
    data = damaged(1, 4, 7)
    loader = training(data, stop=20, workers=workers, max_unreadable=2)
    with pytest.raises(DataError, match=r"3 images could not be read, more than data.max_unreadable=2.*\.png"):
        list(loader)
    assert len(loader.unreadable) == 3


def test_one_image_that_fails_in_every_epoch_counts_once(damaged: Callable[..., CocoData]) -> None:
    loader = training(damaged(2), stop=30, max_unreadable=1)
    assert len(list(loader)) == 30


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_sentence(damaged: Callable[..., CocoData], workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(training(damaged(*range(COUNT)), workers=workers, max_unreadable=100))
    assert "in a row could not be read" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_unreadable_evaluation_image_stays_in_its_place(damaged: Callable[..., CocoData]) -> None:
    data = damaged(2)
    loader = eval_loader(data, resize=Fixed(size=(32, 32)), batch_size=4, workers=0)
    batches = list(loader)
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(1, COUNT + 1))
    assert len(batches[0].failures) == 1
    assert "000003.png" in batches[0].failures[0]
    assert (batches[0].images[2] == torch.tensor(PADDING, dtype=torch.uint8)[:, None, None]).all()
    with pytest.raises(DataError, match="max_unreadable=0"):
        list(eval_loader(data, resize=Fixed(size=(32, 32)), batch_size=4, workers=0, max_unreadable=0))


def test_a_users_mistake_in_a_worker_arrives_without_a_traceback(data: CocoData) -> None:
    class Fails(Flip):
        def __call__(self, sample: object, rng: object) -> object:  # type: ignore[override]
            raise UserError("this cannot be done")

    with pytest.raises(UserError) as caught:
        list(training(data, workers=1, augment=(Fails(),)))
    assert str(caught.value) == "this cannot be done"


def test_a_worker_that_disappears_is_explained(data: CocoData) -> None:
    loader = training(data, stop=500, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._loader._iterator._workers  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):
        next(batches)
    assert worker.is_alive(), "workers leave Ctrl-C to the main process"
    os.kill(worker.pid, signal.SIGTERM)
    with pytest.raises(DataError, match=r"data worker was ended .* data.workers"):
        list(batches)


def test_a_worker_that_the_system_kills_is_named_and_the_others_end(data: CocoData) -> None:
    """As when memory runs out."""
    loader = training(data, stop=500, workers=2)
    batches = iter(loader)
    next(batches)
    workers = loader._loader._iterator._workers  # type: ignore[union-attr]
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"a data worker was ended from outside.*memory ran out.*data\.workers"
    ) as caught:
        list(batches)
    assert f"process {workers[0].pid}: signal 9" in str(caught.value)
    del batches, loader, caught  # the error's frames hold the loader, too
    gc.collect()
    deadline = time.monotonic() + 30
    while any(_runs(worker.pid) for worker in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


def test_a_set_without_images_cannot_train(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    data = CocoData(CocoIndex.load(tmp_path / "a.json", tmp_path))
    with pytest.raises(DataError, match=r"a\.json: holds no image"):
        training(data)
    assert list(eval_loader(data, resize=Fixed(), batch_size=4, workers=0)) == []


@pytest.mark.parametrize("resize", [ShortEdge(short=40, long=80), Letterbox(size=(64, 48)), Fixed(size=(33, 57))])
def test_batches_lead_back_to_original_pixels(data: CocoData, resize: Sizing) -> None:
    (batch,) = eval_loader(data, resize=resize, batch_size=COUNT, workers=0)
    scale, offset = batch.scale[batch.objects.image].repeat(1, 2), batch.offset[batch.objects.image].repeat(1, 2)
    found = (batch.objects.boxes - offset) / scale
    expected = np.concatenate([data[i].boxes for i in range(COUNT)])
    assert np.abs(found.numpy() - expected).max() < 1e-3


def test_flip_and_color_give_the_same_on_either_side_of_the_resize(data: CocoData) -> None:
    class Early(Flip):
        commutes = False

    def batches(flip: Flip) -> list[Batch]:
        augment = (RandomScaleCrop(), flip, Color(probability=1))
        return list(training(data, augment=augment, resize=Fixed(size=(24, 32)), workers=0))

    for late, early in zip(batches(Flip()), batches(Early()), strict=True):
        assert torch.allclose(late.objects.boxes, early.objects.boxes, atol=1e-4)
        assert torch.allclose(late.scale, early.scale)
        assert (late.images.int() - early.images.int()).abs().max() <= 3


ORPHANS = """
import multiprocessing, sys, time
from pathlib import Path

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    from detector.data.coco import CocoData, CocoIndex
    from detector.data.loader import eval_loader
    from detector.data.resize import ShortEdge

    data = CocoData(CocoIndex.load(Path(sys.argv[2]), Path(sys.argv[3])))
    loader = eval_loader(data, resize=ShortEdge(short=64, long=96), batch_size=1, workers=2)
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in loader._loader._iterator._workers), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_end_with_a_main_process_that_is_killed(start: str, data: CocoData, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    main = subprocess.Popen(
        [sys.executable, str(script), start, str(data.index.annotations), str(data.index.images)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert main.stdout is not None
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 2
    main.kill()
    main.wait()
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its main process"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Whether the process is there, and not only waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
