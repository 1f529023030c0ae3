"""The peers' own answers (mmdetection) for rules that look at predictions.

Not one entry differs, those included that are marked as contested: where twins tie, the peer's `argmin` takes the first
object, and so do we; its `topk` promises no order, and on these inputs takes the first prior, as we always do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detector.assign import Assigner, DynamicSoftLabel, Hungarian, SimOta, TaskAligned
from detector.structures import Objects, Predictions, Priors

SCENES = ["border", "elongated", "ignore", "integer", "many", "one", "overlap", "tiny", "typical", "zero"]
RULES: dict[str, Assigner] = {
    "simota": SimOta(),
    "simota_radius1p5_k5_iou2_cls1p5": SimOta(center_radius=1.5, candidate_topk=5, iou_weight=2.0, class_weight=1.5),
    "dynamic_soft_label": DynamicSoftLabel(),
    "task_aligned": TaskAligned(),
    "task_aligned_k9_a0p5_b4": TaskAligned(topk=9, alpha=0.5, beta=4.0),
}


def points(where: Tensor, count: int, offset: float) -> Priors:
    """Squares of one stride around x, y; where: (R, 4) x, y, stride, stride of cells' corners."""
    center, stride = where[:count, :2] + offset * where[:count, 2:3], where[:count, 2]
    half = stride[:, None] / 2
    sizes = [int((stride == s).sum()) for s in stride.unique()]
    return Priors(torch.cat([center - half, center + half], 1), stride.contiguous(), tuple(sizes))


def targets(priors: Priors, objects: Objects, rule: Assigner, said: Predictions) -> tuple[Tensor, Tensor]:
    """(B, R) object or -1, and class target."""
    found = rule(priors, objects, said)
    quality = torch.zeros(found.ignored.numel())
    kept = found.weight > 0
    quality[found.prior[kept]] = found.quality[kept]
    return found.per_prior(), quality.view_as(found.ignored)


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("scene", SCENES)
def test_dynamic(golden: Any, scene: str, case: str) -> None:
    """The peer's rules look at no regions here, nor do ours."""
    data = golden("dynamic").scenario(scene)
    count = len(data[f"{case}/matched"])
    where = golden("dynamic").scenario(f"points{int(data['points_index'])}")["points"]
    priors = points(where, count, offset=0.5 if case.startswith("simota") else 0.0)
    objectness = data["pred_objectness"][None, :count] if case.startswith("simota") else None
    said = Predictions(data["pred_logits"][None, :count], data["pred_boxes"][None, :count], objectness)
    objects = Objects.collate([data["gt"]], [data["labels"]])
    index, quality = (x[0] for x in targets(priors, objects, RULES[case], said))
    assert torch.equal(index, data[f"{case}/matched"].long())
    name = "normalised_metric" if case.startswith("task_aligned") else "max_overlaps"
    positive = index >= 0
    torch.testing.assert_close(quality[positive], data[f"{case}/{name}"][positive], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scene", SCENES)
def test_hungarian(golden: Any, scene: str) -> None:
    data = golden("hungarian").scenario(scene)
    count = len(data["pred_boxes"])
    priors = Priors(data["pred_boxes"], torch.ones(count), (count,))
    objects = Objects.collate([data["gt"]], [data["labels"]], sizes=data["image_hw"][None].float())
    said = Predictions(data["pred_logits"][None], data["pred_boxes"][None])
    rule = Hungarian()
    index, _ = targets(priors, objects, rule, said)
    assert torch.equal(index[0].clamp(min=-1), data["detr/matched"].long())
    if len(objects):
        cost = rule.cost(priors, objects, said).T
        torch.testing.assert_close(cost, data["detr/cost"], atol=1e-5, rtol=1e-5)
        for name, one in (
            ("class", Hungarian(class_cost=2, l1_cost=0, giou_cost=0)),
            ("l1", Hungarian(class_cost=0, l1_cost=5, giou_cost=0)),
            ("giou", Hungarian(class_cost=0, l1_cost=0, giou_cost=2)),
        ):
            if f"detr/cost_{name}" in data:
                part = one.cost(priors, objects, said).T
                torch.testing.assert_close(part, data[f"detr/cost_{name}"], atol=1e-5, rtol=1e-5)


HEADS = ["many_nested", "tiny_elongated", "typical_one", "zero_typical", "zero_zero"]


def both(data: dict[str, Tensor]) -> Objects:
    return Objects.collate([data["gt0"], data["gt1"]], [data["labels0"], data["labels1"]])


def labels_of(index: Tensor, objects: Objects, background: int) -> Tensor:
    if not len(objects):
        return torch.full_like(index, background)
    return torch.where(index >= 0, objects.labels[index.clamp(min=0)], background)


@pytest.mark.parametrize("scene", HEADS)
def test_task_aligned_in_toods_head(golden: Any, scene: str) -> None:
    """Two images at once; the peer is given probabilities and boxes in strides."""
    setup, data = (golden("head_tood").scenario(name) for name in ("setup", scene))
    anchors = setup["anchors"]
    sizes = tuple(int(h * w) for h, w in setup["featmaps"].tolist())
    stride = torch.cat([torch.full((n,), float(s)) for n, s in zip(sizes, setup["strides"].tolist(), strict=True)])
    said = Predictions(data["in_cls"].double().logit().float(), data["in_box"] * stride[:, None])
    objects = both(data)
    index, quality = targets(Priors(anchors, stride, sizes), objects, TaskAligned(), said)
    assert torch.equal(labels_of(index, objects, 5), data["t_labels"].long())
    torch.testing.assert_close(quality, data["t_alignment"], atol=1e-5, rtol=1e-5)
    if len(objects):
        assert torch.equal(objects.boxes[index[index >= 0]], data["t_boxes"][index >= 0])


@pytest.mark.parametrize("scene", HEADS)
def test_simota_in_yoloxs_head(golden: Any, scene: str) -> None:
    setup, data = (golden("head_yolox").scenario(name) for name in ("setup", scene))
    where = setup["points_strides"]
    said = Predictions(data["in_cls"], data["decoded"], data["in_objectness"].squeeze(-1))
    objects = both(data)
    index, quality = targets(points(where, len(where), 0.5), objects, SimOta(), said)
    for i in range(2):
        positive = index[i] >= 0
        assert torch.equal(positive, data[f"t_foreground{i}"] > 0)
        if positive.any():
            own = index[i][positive]
            assert torch.equal(objects.boxes[own], data[f"t_boxes{i}"])
            target = torch.nn.functional.one_hot(objects.labels[own], 5) * quality[i][positive, None]
            torch.testing.assert_close(target, data[f"t_class{i}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scene", HEADS)
def test_dynamic_soft_label_in_rtmdets_head(golden: Any, scene: str) -> None:
    setup, data = (golden("head_rtmdet").scenario(name) for name in ("setup", scene))
    where = setup["points_strides"]
    at, sides = where[:, :2], data["in_box"]
    said = Predictions(data["in_cls"], torch.cat([at - sides[..., :2], at + sides[..., 2:]], -1))
    objects = both(data)
    index, quality = targets(points(where, len(where), 0.0), objects, DynamicSoftLabel(), said)
    assert torch.equal(labels_of(index, objects, 5), data["t_labels"].long())
    torch.testing.assert_close(quality, data["t_quality"], atol=1e-5, rtol=1e-5)
