from __future__ import annotations

import pytest
import torch

from detector.assign import Fcos
from detector.evaluate.assignments import AssignmentStatistics
from tests.assign.make import batch, pyramid


def test_counts_by_size_and_level() -> None:
    priors = pyramid((256, 256))
    # 40 px -> medium, on stride 8; 200 px -> large, on stride 16; 2 px between four points -> small, nothing
    objects = batch([[20.0, 20, 60, 60], [24, 24, 224, 224]], [[7, 7, 9, 9]])
    statistics = AssignmentStatistics()
    assert statistics.result() == {}
    for _ in range(2):
        statistics.add(priors, objects, Fcos()(priors, objects))
    found = statistics.result()
    positives = Fcos()(priors, objects).per_prior()
    assert found["positives_per_object/medium"] == (positives == 0).sum()
    assert found["positives_per_object/large"] == (positives == 1).sum()
    assert found["positives_per_object/small"] == 0
    assert found["objects_without_positive/small"] == 1
    assert found["objects_without_positive/all"] == pytest.approx(1 / 3)
    on_first = (positives[:, : priors.level_sizes[0]] >= 0).sum() / (positives >= 0).sum()
    assert found["share_of_positives/level_0"] == pytest.approx(float(on_first))
    assert sum(v for k, v in found.items() if k.startswith("share")) == pytest.approx(1)


def test_without_objects() -> None:
    priors, statistics = pyramid((64, 64)), AssignmentStatistics()
    objects = batch([], [])
    statistics.add(priors, objects, Fcos()(priors, objects))
    assert set(statistics.result().values()) == {0.0}
    with pytest.raises(ValueError, match="levels"):
        statistics.add(pyramid((64, 64), strides=(8,)), objects, Fcos()(pyramid((64, 64), strides=(8,)), objects))
    assert torch.equal(statistics.by_size, torch.zeros(3, 3, dtype=torch.long))
