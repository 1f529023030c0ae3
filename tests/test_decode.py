"""From outputs to detections: the peers' answers, a plain version, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from detector.coders import Bins, Coder, Deltas, Distances
from detector.decode import DecodeConfig, _best, _candidates, decode
from detector.models.priors import Anchors
from detector.structures import Detections, Outputs, Priors

SIZES = ((16, 20), (8, 10), (4, 5))


def _outputs(batch: int = 3, num_classes: int = 4, *, seed: int = 0, mean: float = -3, quality: bool = True) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    priors = Anchors(scale=4, octave_scales=1, ratios=(0.5, 1))(SIZES, (8, 16, 32))
    return Outputs(
        priors,
        torch.randn(batch, len(priors), num_classes, generator=generator) * 1.5 + mean,
        torch.randn(batch, len(priors), 4, generator=generator) * 0.3,
        torch.randn(batch, len(priors), generator=generator) if quality else None,
        Deltas(),
    )


def _plain(outputs: Outputs, sizes: Tensor, config: DecodeConfig) -> list[Detections]:
    """One image, one level after the other, everything computed."""
    found = []
    for i in range(len(sizes)):
        scores, boxes, labels = [], [], []
        for logits, box, quality in zip(
            outputs.class_logits[i].split(outputs.priors.level_sizes),
            outputs.boxes[i].split(outputs.priors.level_sizes),
            outputs.quality_logits[i].split(outputs.priors.level_sizes),
            strict=True,
        ):
            score, index = logits.sigmoid().flatten().sort(descending=True)
            index = index[score > config.score_threshold][: config.pre_nms_topk]
            prior, label = index // logits.shape[1], index % logits.shape[1]
            score = logits.sigmoid()[prior, label]
            if config.quality != "ignore":
                score = score * quality[prior].sigmoid()
            scores.append(score.sqrt() if config.quality == "geometric" else score)
            boxes.append(box[prior])
            labels.append(label)
        score, box, label = torch.cat(scores), torch.cat(boxes), torch.cat(labels)
        height, width = sizes[i].tolist()
        box = torch.stack([box[:, k].clamp(0, (width, height)[k % 2]) for k in range(4)], 1)
        keep = ((box[:, 2:] - box[:, :2]) > config.min_size).all(1)
        score, box, label = score[keep], box[keep], label[keep]
        group = label if config.class_aware else torch.zeros_like(label)
        keep = batched_nms(box.double(), score.double(), group, config.nms_iou)[: config.max_detections]
        found.append(Detections(box[keep], score[keep], label[keep]))
    return found


def _same(a: list[Detections], b: list[Detections]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.labels.tolist() == y.labels.tolist()
        torch.testing.assert_close(x.scores, y.scores)
        torch.testing.assert_close(x.boxes, y.boxes)


CONFIGS = (
    DecodeConfig(),
    DecodeConfig(quality="geometric", pre_nms_topk=50, nms_iou=0.3),
    DecodeConfig(quality="ignore", class_aware=False, max_detections=7),
    DecodeConfig(score_threshold=0.3, min_size=20),
    DecodeConfig(score_threshold=0, pre_nms_topk=10000, max_detections=1000),
    DecodeConfig(max_detections=10, nms_iou=0.0),
    DecodeConfig(nms_iou=1.0),
)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_classes", [1, 4])
def test_same_as_the_plain_version(config: DecodeConfig, num_classes: int) -> None:
    outputs = _outputs(num_classes=num_classes)
    sizes = torch.tensor([[128.0, 160], [101, 146], [60, 160]])
    _same(decode(outputs, sizes, config), _plain(outputs, sizes, config))


GOLDEN = {
    "predict_fcos": (Distances(activation="relu"), DecodeConfig(pre_nms_topk=100)),
    "predict_atss": (Deltas(std=(0.1, 0.1, 0.2, 0.2)), DecodeConfig()),
    "predict_gfl": (Bins(), DecodeConfig()),
    "predict_rtmdet": (Distances(activation="none"), DecodeConfig()),
    "predict_retina": (Deltas(), DecodeConfig(nms_iou=0.5)),
    "predict_retina_empty": (Deltas(), DecodeConfig(nms_iou=0.5)),
    "predict_paa": (
        Deltas(std=(0.1, 0.1, 0.2, 0.2)),
        DecodeConfig(quality="geometric", threshold_on="score", score_voting=0.025),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, name: str) -> None:  # type: ignore[no-untyped-def]
    """The peer's NMS is in original pixels, with unequal scales for x and y; IoU is the same in the network's."""
    coder, config = GOLDEN[name]
    file = golden(name)
    setup, given = file.scenario("setup"), file.scenario("in")
    outputs = _golden_outputs(setup, given, coder)
    detections = decode(outputs, setup["image_hw"].float(), config)
    for i, found in enumerate(detections):
        expected, scale = file.scenario(f"image{i}"), setup["scale_factor_wh"][i]
        if name == "predict_paa":  # grouped by class, in each by falling score
            order = expected["scores"].argsort(descending=True)
            expected = {key: value[order] for key, value in expected.items()}
        assert found.labels.tolist() == expected["labels"].tolist()
        torch.testing.assert_close(found.scores, expected["scores"])
        torch.testing.assert_close(found.boxes / scale.repeat(2), expected["boxes"], atol=1e-4, rtol=1e-5)
        # The true original size is a rounded one: up to half a pixel of the resized image's border falls outside.
        back = found.to_original(scale, torch.zeros(2), setup["original_hw"][i])
        torch.testing.assert_close(back.boxes, expected["boxes"], atol=0.5, rtol=0)


def _golden_outputs(setup: dict[str, Tensor], given: dict[str, Tensor], coder: Coder) -> Outputs:
    cells = setup["featmaps"].prod(1)
    count = given["cls"].shape[1]
    level_sizes = (cells * (count // int(cells.sum()))).tolist()
    stride = setup["strides"].float().repeat_interleave(torch.tensor(level_sizes))
    box = given["box"]
    points = setup.get("points", setup.get("points_strides"))
    if points is not None:
        boxes = points[:, :2].repeat(1, 2) + torch.tensor([-1.0, -1, 1, 1]) * stride[:, None]
        box = box / stride[:, None]  # the peer's distances are in pixels
    else:
        boxes = setup["anchors"]
    quality = next((given[k][..., 0] for k in ("centerness", "iou") if k in given), None)
    return Outputs(Priors(boxes, stride, tuple(level_sizes)), given["cls"], box, quality, coder)


def test_score_voting_box_by_box() -> None:
    """Against the definition: only boxes of the same class and image vote, and scores stay."""
    config = DecodeConfig(quality="geometric", threshold_on="score", score_threshold=0.2, max_detections=20)
    outputs, sizes = _outputs(mean=-1), torch.tensor([[128.0, 160], [101, 146], [60, 160]])
    everything = decode(outputs, sizes, config.model_copy(update={"nms_iou": 1.0, "max_detections": 10_000}))
    plain = decode(outputs, sizes, config)
    voted = decode(outputs, sizes, config.model_copy(update={"score_voting": 0.025}))
    moved = 0.0
    for all_of_it, before, after in zip(everything, plain, voted, strict=True):
        assert torch.equal(before.scores, after.scores)
        assert torch.equal(before.labels, after.labels)
        for box, label, found in zip(before.boxes, before.labels, after.boxes, strict=True):
            total, mean = 0.0, torch.zeros(4, dtype=torch.float64)
            same = all_of_it.labels == label
            others, scores = all_of_it.boxes[same], all_of_it.scores[same].tolist()
            for other, score, iou in zip(others, scores, box_iou(box[None], others)[0].tolist(), strict=True):
                if iou > 0.01:
                    vote = score * math.exp(-((1 - iou) ** 2) / 0.025)
                    total, mean = total + vote, mean + vote * other.double()
            torch.testing.assert_close(found.double(), mean / total, rtol=1e-4, atol=1e-4)
            moved += float((found - box).abs().max())
    assert moved > 10


def test_score_voting_of_nothing() -> None:
    outputs = _outputs(mean=-30)
    config = DecodeConfig(score_voting=0.025, threshold_on="score")
    assert [len(x) for x in decode(outputs, torch.full((3, 2), 120.0), config)] == [0, 0, 0]


def test_the_threshold_is_on_the_class_or_on_the_final_score() -> None:
    outputs, sizes = _outputs(), torch.full((3, 2), 120.0)
    by_class = decode(outputs, sizes, DecodeConfig(score_threshold=0.1, max_detections=1000))
    by_score = decode(outputs, sizes, DecodeConfig(score_threshold=0.1, threshold_on="score"))
    assert min(float(x.scores.min()) for x in by_class) < 0.1
    assert min(float(x.scores.min()) for x in by_score) > 0.1


@pytest.mark.parametrize("scenario", ["typical", "crowded", "one", "zero"])
def test_golden_nms(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    arrays = golden("nms").scenario(scenario)
    order = arrays["scores"].argsort(descending=True, stable=True)
    boxes, scores, classes = (arrays[name][order] for name in ("boxes", "scores", "classes"))
    image = torch.zeros_like(order)
    config = DecodeConfig(nms_iou=0.5, max_detections=1000)
    kept = order[_best(boxes, scores, classes.long(), image, 1, config)]
    assert kept.tolist() == arrays["batched_0p5"].tolist()
    for iou in ("0p3", "0p5", "0p7"):
        config = DecodeConfig(nms_iou=float(iou.replace("p", ".")), max_detections=1000)
        assert order[_best(boxes, scores, image, image, 1, config)].tolist() == arrays[f"nms_{iou}"].tolist()


@pytest.mark.parametrize("scenario", ["typical", "crowded", "one"])
def test_golden_multiclass(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    """Every box with every class above the threshold."""
    arrays = {k[11:]: v for k, v in golden("nms").scenario(scenario).items() if k.startswith("multiclass/")}
    boxes = golden("nms").scenario(scenario)["boxes"]
    logits = arrays["class_scores"][:, :-1].double().logit().float()
    priors = Priors(boxes, torch.ones(len(boxes)), (len(boxes),))
    outputs = Outputs(priors, logits[None], torch.zeros(1, len(boxes), 4), None, Deltas())
    (found,) = decode(outputs, torch.full((1, 2), 1e6), DecodeConfig(nms_iou=0.5))
    assert found.labels.tolist() == arrays["labels"].tolist()
    torch.testing.assert_close(found.scores, arrays["scores"])
    torch.testing.assert_close(found.boxes, arrays["boxes"].clamp(min=0), atol=1e-3, rtol=0)


def test_the_best_pairs_are_found_by_the_best_class_of_each_prior() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 300 + 40 + 5, 7)
    prior, label = _candidates(logits, (300, 40, 5), 60)
    assert prior.shape == (2, 60 + 60 + 35)
    for i in range(2):
        for start, size, columns in ((0, 300, slice(0, 60)), (300, 40, slice(60, 120)), (340, 5, slice(120, 155))):
            pairs = logits[i, start : start + size].flatten()
            best = pairs.topk(min(60, len(pairs))).indices + start * 7
            found = prior[i, columns] * 7 + label[i, columns]
            assert found.sort().values.tolist() == best.sort().values.tolist()


def test_many_equal_boxes_before_a_lone_one() -> None:
    """The first candidates that NMS sees leave fewer than the limit, so it has to see the rest."""
    count = 2000
    boxes = torch.tensor([[10.0, 10, 40, 40]]).repeat(count, 1)
    boxes[-1] = torch.tensor([100.0, 100, 140, 140])
    logits = torch.linspace(3, 1, count)[None, :, None]
    outputs = Outputs(Priors(boxes, torch.ones(count), (count,)), logits, torch.zeros(1, count, 4), None, Deltas())
    (found,) = decode(outputs, torch.full((1, 2), 200.0), DecodeConfig(max_detections=10, pre_nms_topk=count))
    torch.testing.assert_close(found.boxes, boxes[[0, -1]])


def test_classes_and_images_do_not_touch() -> None:
    """Neighbours in float32 would merge where class and image move them far: the same boxes in each of 40 x 80."""
    box = torch.tensor([[1000.0, 1000.0, 1001.0, 1001.0], [1000.3, 1000.3, 1001.3, 1001.3]])  # IoU 0.32
    logits = torch.full((40, 2, 80), 2.0) + torch.arange(2)[:, None] * 0.1
    outputs = Outputs(Priors(box, torch.ones(2), (2,)), logits, torch.zeros(40, 2, 4), None, Deltas())
    for iou, each in ((0.31, 80), (0.33, 160)):
        found = decode(outputs, torch.full((40, 2), 1333.0), DecodeConfig(nms_iou=iou, max_detections=200))
        assert [len(x) for x in found] == [each] * 40


def test_detections_fall_in_score_and_lie_in_the_image() -> None:
    sizes = torch.tensor([[128.0, 160], [101, 146], [60, 90]])
    for found, (height, width) in zip(decode(_outputs(), sizes, DecodeConfig()), sizes.tolist(), strict=True):
        assert 0 < len(found) <= 100
        assert (found.scores.diff() <= 0).all()
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= width
        assert found.boxes[:, 3].max() <= height
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert found.labels.dtype == torch.int64
        assert found.boxes.dtype == found.scores.dtype == torch.float32


def test_an_image_alone_is_an_image_in_a_batch() -> None:
    outputs, sizes = _outputs(), torch.full((3, 2), 120.0)
    together = decode(outputs, sizes, DecodeConfig())
    for i in range(3):
        alone = Outputs(
            outputs.priors,
            outputs.class_logits[i : i + 1],
            outputs.box_raw[i : i + 1],
            outputs.quality_logits[i : i + 1],
            outputs.coder,
        )
        _same(decode(alone, sizes[:1], DecodeConfig()), together[i : i + 1])


def test_nothing_above_the_threshold() -> None:
    found = decode(_outputs(mean=-30), torch.full((3, 2), 120.0), DecodeConfig())
    assert [x.boxes.shape for x in found] == [(0, 4)] * 3
    assert [x.scores.shape for x in found] == [(0,)] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_numbers_give_no_broken_detections(bad: float) -> None:
    outputs, sizes = _outputs(), torch.full((3, 2), 120.0)
    outputs.class_logits[0, :5] = bad
    outputs.box_raw[1, ::2] = bad
    outputs.quality_logits[2, ::2] = bad
    for found in decode(outputs, sizes, DecodeConfig()):
        assert len(found)
        assert found.boxes.isfinite().all()
        assert found.scores.isfinite().all()


def test_half_precision_outputs() -> None:
    exact, sizes = _outputs(), torch.full((3, 2), 120.0)
    half = Outputs(
        exact.priors, exact.class_logits.half(), exact.box_raw.half(), exact.quality_logits.half(), exact.coder
    )
    rounded = Outputs(
        exact.priors,
        half.class_logits.float(),
        half.box_raw.float(),
        half.quality_logits.float(),
        exact.coder,
    )
    config = DecodeConfig(pre_nms_topk=10000)
    for a, b in zip(decode(half, sizes, config), decode(rounded, sizes, config), strict=True):
        torch.testing.assert_close(a.scores, b.scores)
        assert a.boxes.dtype == torch.float32
