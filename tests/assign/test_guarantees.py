"""What every rule promises, whatever it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detector.assign import Assigner, Fcos, Rule, around
from detector.assign.schedule import Changing
from detector.structures import BACKGROUND, IGNORED, Assignment, Objects, Predictions, Priors
from detector.train.length import Horizon
from tests.assign.make import EXACT, ONE_ANCHOR, POINT, batch, pyramid, random_boxes

SIZE = (200, 264)
RULES: list[Assigner] = [rule() for rule in get_args(get_args(Rule)[0])]


class Told:
    """A rule that is told `fitting` predictions where it looks at some and the test has no opinion on them."""

    def __init__(self, rule: Assigner) -> None:
        self.rule = rule

    def __call__(self, priors: Priors, objects: Objects, said: Predictions | None = None) -> Assignment:
        if said is None and self.rule.uses_predictions:
            said = fitting(priors, objects.batch_size)
        return self.rule(priors, objects, said)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)


@pytest.fixture(params=RULES, ids=lambda rule: rule.type)
def rule(request: pytest.FixtureRequest) -> Told:
    return Told(request.param)


@pytest.fixture(params=[POINT, ONE_ANCHOR, EXACT], ids=["points", "one", "three"])
def priors(request: pytest.FixtureRequest) -> Priors:
    return pyramid(SIZE, shapes=request.param)


def predictions(priors: Priors, images: int, dtype: torch.dtype = torch.float32) -> Predictions:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(images, len(priors), 3, generator=random)
    boxes = priors.boxes + torch.randn(images, len(priors), 4, generator=random)
    return Predictions(logits.to(dtype), boxes.to(dtype), logits[..., 0].to(dtype))


def fitting(priors: Priors, images: int) -> Predictions:
    """Boxes around the priors and any logits: the same in every image, and again every 128 pixels."""
    said = []
    for level, g in enumerate(priors.grids):
        cells = max(1, 128 // g.stride)
        random = torch.Generator().manual_seed(level)
        block = torch.randn(cells, cells, len(g.shapes), 8, generator=random)
        across = (-(-g.height // cells), -(-g.width // cells), 1, 1)
        said.append(block.repeat(across)[: g.height, : g.width].reshape(-1, 8))
    logits, boxes, quality = torch.cat(said).split([3, 4, 1], 1)
    boxes = priors.boxes + (boxes * 8).round() / 8
    low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
    whole = (logits, torch.cat([low, high], 1), quality.squeeze(1))
    return Predictions(*(x.expand(images, *x.shape) for x in whole))


def exclusive(rule: Assigner) -> None:
    if rule.shares:
        pytest.skip("a prior may learn several objects: tests/assign/test_shared.py asks this of pairs")


def test_no_object(rule: Assigner, priors: Priors) -> None:
    objects = batch([], [])
    found = rule(priors, objects, predictions(priors, 2))
    assert (found.per_prior() == BACKGROUND).all()
    assert found.per_prior().shape == (2, len(priors))


def test_an_image_without_objects_among_others(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    boxes = random_boxes(5, SIZE, 0)
    found = rule(priors, batch(boxes, [], boxes)).per_prior()
    assert (found[1] == BACKGROUND).all()
    assert torch.equal(found[0], torch.where(found[2] >= 0, found[2] - 5, found[2]))


def test_one_plain_object_gets_priors(rule: Assigner, priors: Priors) -> None:
    found = rule(priors, batch([[20.0, 20, 85, 84]]))
    assert (found.per_prior() >= 0).sum() >= 1
    kept = found.weight > 0
    assert (found.quality[kept] <= 1).all() if rule.soft_quality else (found.quality[kept] == 1).all()
    assert (found.quality[kept] > 0).any()
    assert (found.quality[~kept] == 0).all()


def test_batch_equals_loop_over_images(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    images = [random_boxes(n, SIZE, n) for n in (7, 0, 40, 1)]
    regions = [random_boxes(n, SIZE, 9 + n) for n in (0, 2, 1, 3)]
    sizes = torch.tensor([[200.0, 264], [120, 130], [199, 100], [64, 64]])
    objects = batch(*images, ignore=regions, sizes=sizes)
    whole = rule(priors, objects).per_prior()
    start = 0
    for i, boxes in enumerate(images):
        alone = rule(priors, objects.select_image(i)).per_prior()[0]
        assert torch.equal(whole[i], torch.where(alone >= 0, alone + start, alone))
        start += len(boxes)


def test_a_thousand(rule: Assigner, priors: Priors) -> None:
    found = rule(priors, batch(random_boxes(1000, SIZE, 0), random_boxes(10, SIZE, 1))).per_prior()
    assert (found[1] >= 1000).sum() > 0
    assert (found[0] < 1000).all()


def test_only_crowds(rule: Assigner, priors: Priors) -> None:
    found = rule(priors, batch([], [], ignore=[torch.tensor([[0.0, 0, 200, 200]]), torch.zeros(0, 4)])).per_prior()
    low, high = priors.boxes[:, :2], priors.boxes[:, 2:]
    share = (high.clamp(max=200) - low.clamp(min=0)).clamp(min=0).prod(1) / (high - low).prod(1)
    assert torch.equal(found[0] == IGNORED, share > 0.5)
    assert (found[0] == IGNORED).any()
    assert (found[1] == BACKGROUND).all()


def test_an_object_in_a_crowd_keeps_its_priors(rule: Assigner, priors: Priors) -> None:
    boxes = torch.tensor([[40.0, 40, 104, 104]])
    crowd = torch.tensor([[0.0, 0, 150, 150]])
    plain = rule(priors, batch(boxes)).per_prior()
    found = rule(priors, batch(boxes, ignore=[crowd])).per_prior()
    assert torch.equal(found >= 0, plain >= 0)
    assert ((found == IGNORED) & (plain == BACKGROUND)).any()


def test_crowd_coverage_is_a_parameter(priors: Priors) -> None:
    crowd = [torch.tensor([[0.0, 0, 100, 100]])]
    count = [(Fcos(crowd_coverage=c)(priors, batch([], ignore=crowd)).ignored).sum() for c in (0.0, 0.5, 0.9, 1.0)]
    assert count[0] > count[1] > count[2] > count[3] == 0


def test_priors_outside_the_image_are_ignored(rule: Assigner) -> None:
    priors = pyramid(SIZE)
    objects = batch([[4.0, 4, 40, 40]], [], sizes=torch.tensor([[200.0, 264], [100, 65]]))
    found = rule(priors, objects).per_prior()
    assert not (found[0, : priors.level_sizes[0]] == IGNORED).any()
    x, y = priors.centers[: priors.level_sizes[0]].T
    # Stride 8: the row at y 100 (96 to 104) is cut by the edge and stays, the next, at y 108, lies outside.
    assert torch.equal(found[1, : priors.level_sizes[0]] == IGNORED, (x >= 69) | (y >= 104))


@pytest.mark.parametrize(
    "box",
    [
        [101.3, 57.2, 101.9, 57.6],
        [-300.0, -200, 900, 800],
        [0.0, 0, 264, 1],
        [50.0, 60, 50, 60],
        [300.0, 300, 310, 320],
    ],
    ids=["tiny", "larger than the image", "thin", "of no area", "outside"],
)
def test_odd_objects(rule: Assigner, priors: Priors, box: list[float]) -> None:
    exclusive(rule)
    plain = [[30.0, 30, 90, 90]]
    found = rule(priors, batch([box], plain)).per_prior()
    alone = rule(priors, batch(plain)).per_prior()[0]
    assert torch.equal(found[1], torch.where(alone >= 0, alone + 1, alone))
    assert found.min() >= IGNORED


def test_of_twins_the_first_wins(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    twins = batch([[40.0, 40, 104, 104], [40.0, 40, 104, 104]])
    found = rule(priors, replace(twins, labels=torch.zeros_like(twins.labels))).per_prior()
    if rule.type == "hungarian":  # one prior for each object, come what may
        assert ((found == 0).sum(), (found == 1).sum()) == (1, 1)
        return
    assert (found == 0).any()
    assert not (found == 1).any()


def test_levels_with_fewer_cells_than_candidates(rule: Assigner) -> None:
    priors = pyramid((40, 24), strides=(8, 16, 32))
    found = rule(priors, batch([[2.0, 3, 23, 38]])).per_prior()
    assert (found >= 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_change_nothing_or_little(
    rule: Assigner, priors: Priors, dtype: torch.dtype
) -> None:
    objects = batch(random_boxes(6, SIZE, 0), random_boxes(2, SIZE, 1))
    half = rule(priors, objects, predictions(priors, 2, dtype))
    assert half.quality.dtype == half.weight.dtype == torch.float32
    assert rule.uses_predictions or torch.equal(half.per_prior(), rule(priors, objects).per_prior())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = rule(priors, objects, predictions(priors, 2, dtype))
    assert torch.equal(under.per_prior(), half.per_prior())


@pytest.mark.parametrize("field", ["class_logits", "boxes", "quality_logits"])
@pytest.mark.parametrize("images", [[], [[20.0, 20, 85, 84]]], ids=["empty", "one"])
def test_nan_predictions_are_an_error(rule: Assigner, priors: Priors, field: str, images: list[list[float]]) -> None:
    said = predictions(priors, 1)
    value = getattr(said, field).clone()
    value.view(-1)[17] = torch.nan
    with pytest.raises(RuntimeError, match="predictions hold NaN"):
        rule(priors, batch(images), replace(said, **{field: value}))


def test_permuting_objects_permutes_the_result(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    boxes = random_boxes(40, SIZE, 3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    objects = batch(boxes)
    permuted = replace(objects, boxes=boxes[order], labels=objects.labels[order])
    plain, other = rule(priors, objects).per_prior(), rule(priors, permuted).per_prior()
    assert torch.equal(torch.where(other >= 0, order[other.clamp(min=0)], other), plain)


def test_permuting_images_permutes_the_result(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    a, b = random_boxes(8, SIZE, 3), random_boxes(5, SIZE, 4)
    one, two = rule(priors, batch(a, b)).per_prior(), rule(priors, batch(b, a)).per_prior()
    assert torch.equal(one[0] >= 0, two[1] >= 0)
    assert torch.equal(torch.where(one[1] >= 0, one[1] - 8, one[1]), two[0])


def test_objects_need_no_order_by_image(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    boxes = random_boxes(6, SIZE, 5)
    image = torch.tensor([1, 0, 1, 1, 0, 0])
    none = torch.zeros(0, dtype=torch.long)
    mixed = Objects(boxes, torch.zeros_like(image), image, torch.zeros(0, 4), none, 2)
    order = image.argsort(stable=True)
    sorted_ = replace(mixed, boxes=boxes[order], image=image[order])
    found = rule(priors, sorted_).per_prior()
    assert torch.equal(rule(priors, mixed).per_prior(), torch.where(found >= 0, order[found.clamp(min=0)], found))


def test_translation_by_a_stride_changes_nothing(rule: Assigner, priors: Priors) -> None:
    exclusive(rule)
    # Far from all borders, by the largest stride.
    shapes = tuple((w / 8, h / 8) for w, h in priors.grids[0].shapes)
    wide = pyramid((1280, 1280), shapes=shapes)
    boxes = (random_boxes(20, (256, 256), 6) * 8).round() / 8 + 512
    one, two = rule(wide, batch(boxes)).per_prior()[0], rule(wide, batch(boxes + 128)).per_prior()[0]
    start = 0
    for g in wide.grids:
        a, b = (x[start : start + g.size].view(g.height, g.width, -1) for x in (one, two))
        cells = 128 // g.stride
        assert torch.equal(a[:-cells, :-cells], b[cells:, cells:])
        start += g.size


def test_deterministic(rule: Assigner, priors: Priors) -> None:
    objects = batch(random_boxes(300, SIZE, 0), random_boxes(20, SIZE, 1))
    one, two = rule(priors, objects), rule(priors, objects)
    for name in ("prior", "object", "quality", "weight", "ignored"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(rule(priors, objects).per_prior(), one.per_prior())
    finally:
        torch.use_deterministic_algorithms(False)


class NeverWaits(TorchDispatchMode):
    """Refuses what would make the host wait for the device, and constants sent to it anew."""

    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "masked_scatter",
        "unique",
        "bincount",
        "histc",
        "repeat_interleave.Tensor",
        "equal.default",
        "is_nonzero",
        "lift_fresh",
    )
    unseen = ("tolist", "numpy", "cpu")  # a CPU's tensors need no operation for these

    def __enter__(self) -> Any:
        for name in self.unseen:
            setattr(Tensor, name, self.refuse(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name in self.unseen:
            delattr(Tensor, name)  # torch's own is that of its base class
        super().__exit__(*error)

    @staticmethod
    def refuse(name: str) -> Any:
        def refused(*given: Any, **named: Any) -> Any:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.forbidden), func
        if "aten.index" in str(func) and isinstance(args[1], list | tuple):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), func
        return func(*args, **(kwargs or {}))


ASKS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask assignment": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "new constant": lambda x: x + torch.tensor([1.0]),
}


@pytest.mark.parametrize("name", ASKS)
def test_what_would_wait_is_refused(name: str) -> None:
    with pytest.raises(AssertionError), NeverWaits():
        ASKS[name](torch.ones(3))
    ASKS[name](torch.ones(3))  # and nothing is left behind


@pytest.mark.parametrize("count", [3, 300])  # in one piece, in several
def test_never_waits_for_the_device(rule: Told, priors: Priors, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if rule.synchronises:
        pytest.skip("solved on the host, and says so")
    monkeypatch.setattr(around, "may_ask", lambda device: False)  # as on a device that is not its own host
    sizes = torch.tensor([[200.0, 264], [100, 65]])
    objects = batch(random_boxes(count, SIZE, 0), [], ignore=[random_boxes(2, SIZE, 1)] * 2, sizes=sizes)
    said = predictions(priors, 2)
    plain = replace(said, quality_logits=None)
    changing = rule.rule if isinstance(rule.rule, Changing) else None
    each = [rule.rule] if changing else [rule.rule, rule.rule.model_copy(update={"keep_one": True})]
    if changing:  # as it is in the first step, too
        each.append(changing.at(0, Horizon(total=60, images=100, batch=10)))
    for one in each:
        one(priors, objects, said)  # tables are made once
        with NeverWaits():
            one(priors, objects, said)
            one(priors, objects, plain)


def pairs_in_order(found: Assignment) -> tuple[Tensor, Tensor]:
    """(P, 2) prior and object of the pairs that weigh something, and (P, 2) their quality and weight."""
    kept = found.weight > 0
    index, values = torch.stack([found.prior, found.object], 1)[kept], torch.stack([found.quality, found.weight], 1)
    order = (index[:, 0] * (1 << 32) + index[:, 1]).argsort()
    return index[order], values[kept][order]


@pytest.mark.parametrize("count", [3, 150])
def test_a_device_that_may_be_asked_gives_the_same(
    rule: Assigner, priors: Priors, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule.synchronises:
        pytest.skip("asks every device")
    sizes = torch.tensor([[200.0, 264], [100, 65]])
    objects = batch(random_boxes(count, SIZE, 0), random_boxes(5, SIZE, 2), sizes=sizes)
    said = predictions(priors, 2)
    asked = rule(priors, objects, said)
    monkeypatch.setattr(around, "may_ask", lambda device: False)
    never = rule(priors, objects, said)
    assert torch.equal(pairs_in_order(asked)[0], pairs_in_order(never)[0])
    torch.testing.assert_close(pairs_in_order(asked)[1], pairs_in_order(never)[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(asked.ignored, never.ignored)
    torch.testing.assert_close(asked.background_weight, never.background_weight, rtol=1e-5, atol=1e-6)


def test_shapes_are_known_without_values(rule: Assigner, priors: Priors) -> None:
    if rule.synchronises:
        pytest.skip("solved on the host, and says so")
    objects = batch(random_boxes(7, SIZE, 0), [], ignore=[random_boxes(2, SIZE, 1)] * 2)
    said = predictions(priors, 2)
    real = rule(priors, objects, said)
    away = Predictions(*(t.to("meta") for t in (said.class_logits, said.boxes, said.quality_logits)))
    found = rule(priors.to("meta"), objects.to("meta"), away)
    assert found.prior.shape == real.prior.shape
    assert found.ignored.shape == real.ignored.shape


def test_no_graph(rule: Assigner, priors: Priors) -> None:
    said = predictions(priors, 1)
    live = Predictions(said.class_logits.requires_grad_(), said.boxes.requires_grad_(), said.quality_logits)
    found = rule(priors, batch([[20.0, 20, 85, 84]]), live)
    assert not found.quality.requires_grad
    assert not found.weight.requires_grad


def test_a_prior_in_a_pair_is_not_ignored_and_is_owned_once(rule: Assigner, priors: Priors) -> None:
    objects = batch(random_boxes(30, SIZE, 0), ignore=[random_boxes(3, SIZE, 1)], sizes=torch.tensor([[100.0, 100]]))
    found = rule(priors, objects)
    mine = found.prior[found.weight > 0]
    assert not found.ignored.view(-1)[mine].any()
    assert rule.shares or len(mine.unique()) == len(mine)


@pytest.mark.parametrize("count", [1, 30, 400])
def test_memory_grows_with_objects_not_with_all_pairs(rule: Assigner, priors: Priors, count: int) -> None:
    found = rule(priors, batch(random_boxes(count, SIZE, 0)))
    assert len(found.prior) <= max(len(priors), count * 256 * len(priors.grids[0].shapes))


def bad(change: Any) -> tuple[Priors, Objects, Predictions | None]:
    priors = pyramid(SIZE)
    return change(priors, batch([[20.0, 20, 85, 84]]), predictions(priors, 1))


def cxcywh(boxes: Tensor) -> Tensor:
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, o, s: (p, replace(o, boxes=o.boxes.half()), s), r"objects.boxes is torch.float16"),
        (lambda p, o, s: (replace(p, boxes=p.boxes.double()), o, s), r"priors.boxes is torch.float64"),
        (lambda p, o, s: (p, replace(o, labels=o.labels.int()), s), r"objects.labels is torch.int32"),
        (lambda p, o, s: (p, replace(o, labels=o.labels[:0]), s), r"objects.labels has shape \(0,\), expected \(1\)"),
        (lambda p, o, s: (p, o, replace(s, boxes=s.boxes[:, 1:])), r"predictions.boxes has shape"),
        (lambda p, o, s: (p, o, replace(s, class_logits=s.class_logits[0])), r"predictions.class_logits has shape"),
        (lambda p, o, s: (p, o.to("meta"), s), r"objects.boxes is on meta"),
        (lambda p, o, s: (replace(p, level_sizes=(3,)), o, s), r"do not sum to"),
        (lambda p, o, s: (replace(p, grids=p.grids[:1]), o, s), r"priors.grids have"),
        (lambda p, o, s: (replace(p, boxes=cxcywh(p.boxes)), o, s), r"priors.boxes are not x1 y1 x2 y2"),
        (lambda p, o, s: (p, replace(o, boxes=cxcywh(o.boxes + 60)), s), r"objects.boxes are not x1 y1 x2 y2"),
        (lambda p, o, s: (p, replace(o, boxes=o.boxes * torch.nan), s), r"hold NaN"),
    ],
)
def test_wrong_input_is_named(rule: Assigner, change: Any, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        rule(*bad(change))
