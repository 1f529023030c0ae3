"""`detector-browse-data`: training samples before and after augmentation, exactly as training will see them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from detector.cli.common import run_command

if TYPE_CHECKING:
    from detector.config.run import RunConfig
    from detector.data.coco import CocoData
    from detector.data.sampler import Key


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="browse_data",
        description="Draw training images before and after a recipe's augmentation and resize, with their objects, as"
        " one sheet.  What is drawn for an epoch is what training sees in it (on one process; with several, the size"
        " that multi_scale draws may differ).",
    )
    parser.add_argument("recipe", type=Path, help="a recipe file, or the name of one that ships with the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as augment.0.scale=[0.5,2]")
    parser.add_argument("--out", type=Path, default=Path("samples.jpg"), help="picture file (samples.jpg)")
    parser.add_argument("--epoch", type=_number, default=0, help="from 0 (0)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=_number, nargs="+", metavar="I", help="places in the annotation file, from 0")
    which.add_argument("--id", type=int, nargs="+", metavar="ID", help="image ids of the annotation file")
    which.add_argument("--count", type=_number, default=8, help="how many, from the epoch's beginning (8)")
    parser.add_argument("--columns", type=_number, default=2, help="pairs side by side (2)")
    parser.add_argument("--panel", type=_number, default=360, help="pixels of one image's longer side (360)")
    options = parser.parse_intermixed_args(arguments)
    for name, least in (("columns", 1), ("count", 1), ("panel", 32)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from detector import draw
    from detector.config.load import load_config
    from detector.data.batch import collate
    from detector.data.loader import TrainSource
    from detector.errors import ConfigError
    from detector.train.length import Horizon

    config = load_config(options.recipe, options.overrides)
    data = config.data.open("train")
    settings = config.train
    horizon = Horizon(settings.length.count(len(data), settings.batch_size), len(data), settings.batch_size)
    epochs = horizon.epoch(horizon.total)
    if options.epoch >= epochs:
        raise ConfigError(f"--epoch {options.epoch}: the run has {epochs:.3g} epochs, counted from 0")
    source = TrainSource(
        data,
        augment=config.augment,
        resize=config.data.resize,
        seed=config.seed,
        epochs=epochs,
        pad_multiple=1,
        max_unreadable=config.data.max_unreadable,
        partner_cache=config.data.partner_cache,
    )
    keys = _keys(config, data, options.epoch, _wanted(options, data))
    failures: list[str] = []
    after = [source.sample(key, failures) for key in keys]
    before = [source.reader.read(key.image, failures) for key in keys]
    names = [
        change.step.model_dump()["type"] + (f" ({change.probability:.2g})" if change.probability < 1 else "")
        for change in source.active(options.epoch)
    ]
    titles = [
        f"{data.index.title(key.image)}index {key.image}, epoch {key.epoch}: {', '.join(names) or 'nothing on'}"
        for key in keys
    ]
    sheet = draw.pair_sheet(
        collate(before, pad_multiple=1),
        collate(after, pad_multiple=1),
        data.index.classes,
        titles,
        min(options.columns, len(keys)),
        options.panel,
    )
    draw.write(options.out, sheet)
    for line in dict.fromkeys(failures):
        print(f"replaced: {line}")
    print(f"{options.out}: {len(keys)} images of epoch {options.epoch}, before and after")
    return 0


def _wanted(options: argparse.Namespace, data: CocoData) -> list[int] | int:
    """Places of the images in the index, or how many of the epoch's first."""
    from detector.errors import DataError

    places: list[int] | None = options.index
    if options.id is not None:
        known = {image_id: i for i, image_id in enumerate(data.index.image_ids.tolist())}
        for image_id in options.id:
            if image_id not in known:
                raise DataError(f"--id {image_id}: {data.index.annotations} holds no image of that id")
        places = [known[image_id] for image_id in options.id]
    if places is None:
        return min(int(options.count), len(data))
    for i in places:
        if i >= len(data):
            raise DataError(f"--index {i}: {data.index.annotations} holds {len(data)} images, counted from 0")
    return places


def _keys(config: RunConfig, data: CocoData, epoch: int, wanted: list[int] | int) -> list[Key]:
    """What training asks its workers for when these images' turns come in an epoch."""
    from detector.data.sampler import Stream
    from detector.errors import DataError

    batch = config.train.batch_size // config.train.accumulate
    order = config.data.order.of(data.index, config.seed)
    images, _ = order.epoch(epoch, batch)
    if isinstance(wanted, int):
        places = list(range(wanted))
    else:
        first = {image: place for place, image in reversed(list(enumerate(images.tolist())))}
        for i in wanted:
            if i not in first:
                raise DataError(f"--index {i}: data.order leaves this image out of epoch {epoch}; ask for another one")
        places = [first[i] for i in wanted]
    keys = []
    for place in places:
        step, within = divmod(epoch * len(data) + place, batch)
        stream = Stream(
            len(data),
            batch_size=batch,
            seed=config.seed,
            start_step=step,
            stop_step=step + 1,
            choices=len(config.data.resize.multi_scale),
            order=order,
        )
        keys.append(next(iter(stream))[within])
    return keys


def _number(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("expected at least 0")
    return number
