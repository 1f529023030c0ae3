"""An analysis as one page: opens from the disk, needs no network, fits a phone, prints, follows light and dark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from detector import canvas
from detector.data.images import read_reduced
from detector.errors import DataError
from detector.lab.dataset import tables
from detector.lab.dataset.advice import CHOICE, MOST_ENLARGED, MULTIPLE
from detector.lab.dataset.analysis import Analysis
from detector.lab.dataset.plots import plots
from detector.lab.gallery import uri
from detector.lab.pictures import jpeg

TEMPLATE = Path(__file__).with_name("page.html")
MOST_GROUPS = 12
MOST_OF_A_GROUP = 6
PICTURE = 152  # pixels


@dataclass(frozen=True)
class Picture:
    image: str
    caption: str


def page(found: Analysis) -> str:
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        found=found,
        notes=found.notes(),
        resize=tables.resize_text(found),
        sections=tables.sections(found),
        texts=_texts(found),
        plots=plots(found),
        groups=_groups(found),
        text_columns=tables.text_columns,
    )


def _texts(found: Analysis) -> dict[str, list[str]]:
    a, fits = found.advice, found.anchors
    objects = (
        f"k-means saw {fits.means_from} of the {fits.objects} objects, k-medoids {fits.medoids_from}; fits are measured"
        " on all of them."
    )
    return {
        "Advice": [
            tables.advice_text(found),
            f"The rule: the smallest input (a multiple of {MULTIPLE}) at which {a.wanted:.0%} of the objects have a"
            f" side (square root of the area) of {a.cells:g} cells of the finest level, so that some cell's centre lies"
            f" well inside. Of the strides {' and '.join(map(str, CHOICE))} the first whose input enlarges the median"
            f" image by no more than {MOST_ENLARGED}: enlarging adds pixels but no detail. Coarser levels follow until"
            " 8 strides"
            f" reach the side below which {a.wanted:.0%} of the objects are. Whether it helps, only training shows.",
        ],
        "Overlap": [
            "Objects of one class that overlap more than the IoU of NMS cannot both be kept. An object whose centre"
            " another holds too is ambiguous to rules that go by points. A pair an image: with an IoU above 0.5.",
        ],
        "Images": []
        if found.seen is None
        else [
            f"Two images look alike if a perceptual hash differs in at most {found.settings.distance} of 64 bits and"
            " small grey pictures of them correlate; mirrored, turned and strongly cropped copies are not found."
        ],
        "Anchors": [
            "Widths and heights after the resize, with IoU as the measure: k-means takes means, k-medoids sizes that"
            f" occur. {objects}"
        ],
        "Rules": [
            "Every rule that looks at geometry alone, with its defaults, run on the annotations: an object that no"
            " prior learns cannot be learnt from, whatever the network does. Points stand for squares of 8 strides; the"
            " 9 anchors are RetinaNet's; k anchors are spread over the levels by area."
        ],
    }


def _groups(found: Analysis) -> list[list[Picture]]:
    if found.seen is None:
        return []
    order = sorted(range(len(found.seen.groups)), key=lambda g: not found.seen.leaking[g])  # type: ignore[union-attr]
    made = []
    for g in order[:MOST_GROUPS]:
        group = found.seen.groups[g]
        # One of each split first, so that what leaks is seen.
        firsts = [next(m for m in group if m[0] == s) for s in dict.fromkeys(s for s, _ in group)]
        shown = [*firsts, *(m for m in group if m not in firsts)][:MOST_OF_A_GROUP]
        pictures = [_picture(found, s, i) for s, i in shown]
        if len(group) > len(shown):
            last = pictures[-1]
            pictures[-1] = Picture(last.image, f"{last.caption}, and {len(group) - len(shown)} more")
        made.append(pictures)
    return made


def _picture(found: Analysis, s: int, i: int) -> Picture:
    split = found.splits[s]
    caption = f"{split.name}: {split.file_name(i)}"
    height, width = split.index.sizes[split.images[i]].tolist()
    try:
        image, _ = read_reduced(split.index.image_path(int(split.images[i])), (height, width), (PICTURE, PICTURE))
    except DataError:  # gone since it was looked at
        return Picture("data:,", caption)
    return Picture(uri(jpeg(canvas.fit(image, PICTURE, PICTURE)[0])), caption)
