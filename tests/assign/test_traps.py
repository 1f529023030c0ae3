"""What goes wrong in the peers' code, and the answer of ours."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from detector.assign import Atss, Fcos, MaxIou, Rule
from detector.errors import ConfigError
from detector.structures import BACKGROUND, IGNORED, Grid, Priors
from tests.assign.make import ONE_ANCHOR, batch, on_grids, pyramid
from tests.reference.assign_dense import dense


def loose(boxes: list[list[float]]) -> Priors:
    return Priors(torch.tensor(boxes), torch.full((len(boxes),), 8.0), (len(boxes),))


def test_low_quality_takes_no_prior_from_a_better_owner() -> None:
    # IoU with the objects: [1, .8] and [.09, 0]; the second object's best prior belongs to the first.
    priors = loose([[0.0, 0, 100, 100], [90.0, 90, 110, 100]])
    objects = batch([[0.0, 0, 100, 100], [0, 0, 100, 80]])
    assert MaxIou()(priors, objects).per_prior().tolist() == [[0, BACKGROUND]]


def test_low_quality_of_two_objects_goes_to_the_higher_iou() -> None:
    priors = loose([[0.0, 0, 100, 100], [500, 500, 600, 600]])
    objects = batch([[0.0, 0, 100, 20], [0, 0, 100, 30], [0, 0, 100, 10]])
    assert MaxIou()(priors, objects).per_prior().tolist() == [[1, BACKGROUND]]


def test_low_quality_gives_the_prior_to_the_object_that_it_is_best_for() -> None:
    # The first prior overlaps object 0 more (.36), but object 0 has the second (1.0); object 1 has only the first.
    priors = loose([[0.0, 0, 100, 100], [40, 40, 100, 100]])
    objects = batch([[40.0, 40, 100, 100], [0, 0, 30, 100]])
    assert MaxIou()(priors, objects).per_prior().tolist() == [[1, 0]]


def test_low_quality_needs_overlap_and_the_minimum() -> None:
    priors = loose([[0.0, 0, 100, 100], [500, 500, 600, 600]])
    far, thin = [[200.0, 200, 210, 210]], [[0.0, 0, 100, 20]]
    assert (MaxIou()(priors, batch(far)).per_prior() == BACKGROUND).all()
    assert (MaxIou(min_positive_iou=0.21)(priors, batch(thin)).per_prior() == BACKGROUND).all()
    assert (MaxIou(min_positive_iou=0.19)(priors, batch(thin)).per_prior()[0, 0]) == 0
    assert (MaxIou(low_quality="none")(priors, batch(thin)).per_prior() == BACKGROUND).all()


def test_thresholds_of_max_iou_are_inclusive_where_the_paper_is() -> None:
    priors = loose([[0.0, 0, 100, 50], [0, 0, 100, 49.9], [0, 0, 100, 40], [0, 0, 100, 39.9], [0, 0, 100, 100]])
    found = MaxIou()(priors, batch([[0.0, 0, 100, 100]])).per_prior()[0]
    assert found.tolist() == [0, IGNORED, IGNORED, BACKGROUND, 0]


def test_of_equal_overlaps_the_nearest_prior_counts() -> None:
    # A tiny object inside many anchors: all overlap it equally.  It lies in the middle between two cells' centres.
    priors = pyramid((128, 128), shapes=ONE_ANCHOR)
    objects = batch([[62.0, 59, 66, 61]])
    everywhere = MaxIou()(priors, objects).per_prior()[0].nonzero()
    found = (MaxIou()(priors, objects).per_prior()[0] == 0).nonzero()[:, 0]
    assert priors.centers[found].tolist() == [[60.0, 60], [68, 60]]
    assert len(everywhere) > 2
    first = (MaxIou(low_quality="first")(priors, objects).per_prior()[0] == 0).nonzero()[:, 0]
    assert first.tolist() == found[:1].tolist()


def test_atss_keeps_candidates_of_equal_iou() -> None:
    # Priors all larger than the object and holding it whole: equal IoUs, whose float32 mean exceeds each of them.
    grid = Grid(8, 8, 4, ((100.0, 100.0),))
    priors, objects = on_grids((grid,)), batch([[5.0, 5, 27.3, 26.7]])
    for reachable in (True, False):
        assert (Atss(reachable=reachable)(priors, objects).per_prior() == 0).sum() == 9


def test_atss_with_a_single_candidate() -> None:
    priors, objects = on_grids((Grid(1, 1, 64, ((64.0, 64.0),)),)), batch([[10.0, 10, 60, 60]])
    for rule in (Atss(), Atss(reachable=False), Atss(topk=1)):
        assert rule(priors, objects).per_prior().tolist() == [[0]]


def test_atss_threshold_above_every_candidate() -> None:
    # One good level, one bad: candidates .44 and 0.02; mean .23 plus deviation .3 is more than either.
    priors = on_grids((Grid(1, 1, 60, ((60.0, 60.0),)), Grid(1, 1, 60, ((300.0, 300.0),))))
    objects = batch([[10.0, 10, 50, 50]])
    assert Atss()(priors, objects).per_prior().tolist() == [[0, BACKGROUND]]
    assert Atss(reachable=False)(priors, objects).per_prior().tolist() == [[BACKGROUND, BACKGROUND]]


def test_atss_needs_the_centre_inside() -> None:
    priors = on_grids((Grid(1, 2, 8, ((64.0, 64.0),)),))
    assert (Atss()(priors, batch([[4.0, 0, 12, 8]])).per_prior() == BACKGROUND).all()
    assert (Atss()(priors, batch([[3.98, 0, 12.02, 8]])).per_prior() == 0).all()


def test_fcos_tells_areas_apart_that_float32_cannot() -> None:
    priors = pyramid((8192, 4224), strides=(64, 128))
    boxes = torch.tensor([[0.0, 0, 4099, 8191.9995], [0.0, 0, 4099, 8191.999]])
    assert boxes[0, 3] > boxes[1, 3]
    assert boxes[:, 2:].prod(1).unique().numel() == 1
    found = Fcos(limits=(100,))(priors, batch(boxes)).per_prior()
    assert (found == 1).any()
    assert not (found == 0).any()


def test_fcos_tells_areas_apart_by_less_than_eight() -> None:
    priors = pyramid((256, 256))
    found = Fcos()(priors, batch([[50.0, 50, 100, 100.1], [50.0, 50, 100, 100]])).per_prior()
    assert (found == 1).any()
    assert not (found == 0).any()


def test_fcos_ranges_include_both_ends() -> None:
    priors = pyramid((128, 128), strides=(8, 16))
    point = ((priors.centers == 60).all(1) & (priors.stride == 8)).nonzero().item()
    at = [[56.0, 56, 124, 64]]  # 64 px from the point to the right side
    assert Fcos(center_radius=None)(priors, batch(at)).per_prior()[0, point] == 0
    beyond = [[56.0, 56, 124.5, 64]]
    assert Fcos(center_radius=None)(priors, batch(beyond)).per_prior()[0, point] == BACKGROUND


def test_fcos_last_level_has_no_end() -> None:
    priors = pyramid((256, 256))
    objects = batch([[-4000.0, -4000, 4256, 4256]])
    found = Fcos(center_radius=None)(priors, objects).per_prior()[0]
    assert (found[-priors.level_sizes[-1] :] == 0).all()


@pytest.mark.parametrize("strides", [(8,), (8, 16), (4, 8, 16, 32, 64, 128, 256)])
def test_fcos_default_suits_any_number_of_levels(strides: tuple[int, ...]) -> None:
    priors, objects = pyramid((256, 256), strides), batch([[20.0, 20, 60, 60], [0, 0, 250, 250]])
    assert set(Fcos()(priors, objects).per_prior().unique().tolist()) == {BACKGROUND, 0, 1}
    assert torch.equal(Fcos()(priors, objects).per_prior(), dense(Fcos(), priors, objects))


def test_fcos_says_how_many_limits_to_write() -> None:
    with pytest.raises(ConfigError, match="limits has 1 numbers, but the model has 5 levels: write 4"):
        Fcos(limits=(64,))(pyramid((64, 64)), batch([[0.0, 0, 9, 9]]))
    with pytest.raises(ValidationError, match="must rise"):
        Fcos(limits=(64, 32))


def test_wrong_parameters_are_refused() -> None:
    rules = TypeAdapter(Rule)
    assert rules.validate_python({"type": "atss", "topk": 15}) == Atss(topk=15)
    for wrong in ({"type": "atss", "topk": 0}, {"type": "max_iou", "negative_iou": 0.6}, {"type": "fcos", "radius": 1}):
        with pytest.raises(ValidationError):
            rules.validate_python(wrong)


def test_coordinates_keep_their_pixels_under_autocast() -> None:
    # 701.3 is 701.5 in half precision: the point at 701.4 would leave the object.
    priors = Priors(torch.tensor([[697.4, 697.4, 705.4, 705.4]]), torch.tensor([8.0]), (1,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Fcos()(priors, batch([[701.3, 701.3, 702.0, 702.0]])).per_prior().item() == 0
