"""Two stages as a whole: what the second one learns from, and that detections are whoever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from detector.assign import Atss, MaxIou
from detector.assign.sample import paired
from detector.boxes import all_pairs_iou
from detector.decode import DecodeConfig, decode
from detector.errors import ConfigError
from detector.losses.two_stage import TwoStageCriterionConfig
from detector.models.backbones import BackboneConfig
from detector.models.cascade import CascadeConfig, CascadeStage
from detector.models.fold import fold_batch_norm
from detector.models.stages import TwoStageOutputs
from detector.models.two_stage import TwoStageConfig, TwoStageDetector, compact
from detector.structures import IGNORED, Assignment, Objects

LIGHT: dict[str, Any] = {
    "backbone": {"name": "resnet18", "levels": [2, 3, 4, 5]},
    "neck": {"channels": 16, "extra": "pool", "extra_levels": 1},
    "rpn": {"channels": 16, "train": {"pre_nms": 60, "post_nms": 40}, "test": {"pre_nms": 60, "post_nms": 30}},
    "head": {"channels": 32, "class_agnostic": True},
}
RCNN = {"type": "max_iou", "positive_iou": 0.5, "negative_iou": 0.5, "low_quality": "none"}
SIZES = torch.tensor([[96.0, 128], [64, 100], [96, 128], [90, 60]])


def build(**changes: Any) -> TwoStageDetector:
    """With scores and boxes of order one, so that something is found."""
    torch.manual_seed(0)
    kind = CascadeConfig if "cascade" in changes else TwoStageConfig
    rules = {} if kind is CascadeConfig else {"rules": {"assigner": RCNN, "sampler": {"type": "random", "count": 32}}}
    sections = {**LIGHT, **rules, **changes}
    model = kind.model_validate(sections).build(3)
    with torch.no_grad():
        for module in (model.rpn.head.classes, model.rpn.head.box):
            module.weight.normal_(std=0.1)  # type: ignore[union-attr,operator]
        for head in model.heads:
            head.classes.weight.normal_(std=0.5)  # type: ignore[union-attr,operator]
            head.box.weight.normal_(std=0.5)  # type: ignore[union-attr,operator]
    return model


def images(count: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, 96, 128), dtype=torch.uint8, generator=random)


def objects(empty: tuple[int, ...] = (), crowd: Tensor | None = None) -> Objects:
    boxes = [
        torch.tensor([[10.0, 10, 60, 70], [50, 30, 120, 90]]),
        torch.tensor([[5.0, 5, 40, 50]]),
        torch.tensor([[30.0, 20, 80, 80], [31, 20, 80, 80], [0, 0, 20, 20]]),
        torch.tensor([[10.0, 40, 50, 80]]),
    ]
    boxes = [b[:0] if i in empty else b for i, b in enumerate(boxes)]
    ignore = None if crowd is None else [crowd, *[torch.zeros(0, 4)] * 3]
    return Objects.collate(boxes, [torch.arange(len(b)) % 3 for b in boxes], ignore, SIZES)


def learn(model: TwoStageDetector, truth: Objects) -> TwoStageOutputs:
    outputs = model(images(truth.batch_size), truth)
    assert isinstance(outputs, TwoStageOutputs)
    return outputs


CASCADE = {"cascade": [{}, {"positive_iou": 0.6, "std": [0.05, 0.05, 0.1, 0.1]}, {"positive_iou": 0.7}]}
ONE_MAP = {**LIGHT["rpn"], "priors": {"type": "anchors", "scale": 2, "octave_scales": 1, "octaves": 3}}
C4: dict[str, Any] = {
    "backbone": {"name": "resnet18", "levels": [4]},
    "neck": None,
    "rpn": ONE_MAP,
    "roi": {"type": "align", "size": [4, 4]},
    "head": {"backbone_stage": True, "linear": 0, "class_agnostic": True},
}
CASES: dict[str, dict[str, Any]] = {
    "agnostic": {},
    "per class": {"head": {"channels": 32}},
    "sigmoid": {"head": {"channels": 32, "classifier": "sigmoid"}},
    "4conv1fc": {"head": {"convs": 4, "linear": 1, "conv_channels": 16, "norm": "group", "channels": 32}},
    "pool": {"roi": {"type": "pool"}},
    "precise": {"roi": {"type": "precise", "size": [3, 3]}},
    "ps_align": {"roi": {"type": "ps_align", "bin_channels": 4}},
    "c5 alone": {"backbone": {"name": "resnet18", "levels": [5]}, "neck": {"channels": 16, "extra": "none"}},
    "c4": C4,
    "c4, more layers": {
        **C4,
        "head": {"backbone_stage": True, "convs": 1, "conv_channels": 16, "norm": "group", "linear": 1},
    },
    "c4, cascade": {**C4, **CASCADE},
    "c4 and two layers": {**C4, "head": {"channels": 32}},
    "c5": {**C4, "backbone": {"name": "resnet18", "levels": [5]}, "head": {"channels": 32}},
    "dc5": {**C4, "backbone": {"name": "resnet18", "levels": [4], "output_stride": 16}, "head": {"channels": 32}},
    "ohem": {"rules": {"assigner": RCNN, "sampler": {"type": "ohem", "count": 32}}},
    "iou balanced": {"rules": {"assigner": RCNN, "sampler": {"type": "iou_balanced", "count": 32}}},
    "atss for proposals": {"rules": {"assigner": {"type": "atss"}, "sampler": {"type": "random", "count": 32}}},
    "cascade": CASCADE,
}


def criterion(model: TwoStageDetector) -> nn.Module:
    sigmoid = model._head(0).config.classifier == "sigmoid"
    config = TwoStageCriterionConfig.model_validate(
        {
            "classification": {"type": "focal" if sigmoid else "cross_entropy"},
            "stage_weights": [1.0] * len(model.heads),
        }
    )
    return config.build(MaxIou(positive_iou=0.7, negative_iou=0.3), 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("empty", [(), (0, 1, 2, 3)], ids=["objects", "none"])
def test_every_part_learns(case: str, empty: tuple[int, ...]) -> None:
    """Every parameter is on the graph, with objects or without; without, boxes have nothing to learn."""
    model, truth = build(**CASES[case]), objects(empty)
    losses = criterion(model)(learn(model, truth), truth)
    assert torch.isfinite(losses.total)
    losses.total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    last = model._head(len(model.heads) - 1)
    assert (last.box.weight.grad.abs().sum() == 0) == bool(empty)  # type: ignore[union-attr]
    assert last.classes.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("case", CASES)
def test_one_image_alone_or_among_four(case: str) -> None:
    model = build(**CASES[case]).eval()
    config = DecodeConfig(score_threshold=0.02, nms_iou=0.5)
    with torch.no_grad():
        together = decode(model(images(), sizes=SIZES), SIZES, config)
        for i in range(4):
            (alone,) = decode(model(images()[i : i + 1], sizes=SIZES[i : i + 1]), SIZES[i : i + 1], config)
            assert len(alone) == len(together[i]) > 0
            assert_close(alone.scores, together[i].scores, atol=1e-5, rtol=0)
            assert_close(alone.boxes, together[i].boxes, atol=1e-2, rtol=0)
            assert torch.equal(alone.labels, together[i].labels)


def test_the_second_stage_sees_sampled_proposals_of_its_image() -> None:
    model, truth = build(), objects(empty=(1,))
    (stage,) = learn(model, truth).stages
    boxes, found = stage.outputs.priors.boxes, stage.assignment
    assert boxes.shape == (4, 32, 4)
    assert stage.outputs.class_logits.shape == (4, 32, 4)
    index = found.per_prior()
    assert not (index[1] >= 0).any()
    assert (index[1] != IGNORED).any()
    seen = 0
    for i in (0, 2, 3):
        own = (truth.image == i).nonzero().squeeze(1)
        iou = all_pairs_iou(boxes[i], truth.boxes[own])
        real = index[i] != IGNORED
        assert torch.equal(index[i] >= 0, (iou.amax(1) >= 0.5) & real)
        assert torch.equal(index[i][index[i] >= 0], own[iou.argmax(1)][index[i] >= 0])
        assert (index[i] >= 0).sum() <= 8
        assert (boxes[i] <= SIZES[i].flip(0).repeat(2)).all()
        # The objects are proposals themselves; where positives are few, all of them are picked.
        few = (index[i] >= 0).sum() < 8
        assert not few or (iou.amax(0) == 1).all()
        seen += bool(few)
    assert seen


def test_without_the_objects_among_the_proposals() -> None:
    model = build(rules={"assigner": RCNN, "sampler": {"type": "random", "count": 32}, "add_objects": False})
    (stage,) = learn(model, objects()).stages
    iou = all_pairs_iou(stage.outputs.priors.boxes.flatten(0, 1), objects().boxes)
    assert (iou < 1).all()


def test_objects_without_area_are_no_proposals() -> None:
    truth = Objects.collate([torch.tensor([[10.0, 10, 10, 50], [20, 20, 70, 80]])], [torch.tensor([0, 1])])
    model = build()
    outputs = model(images(1), truth)
    (stage,) = outputs.stages
    assert (stage.assignment.object[stage.assignment.weight > 0] == 1).all()
    assert torch.isfinite(criterion(model)(outputs, truth).total)


def test_crowds_are_no_background() -> None:
    crowd = torch.tensor([[0.0, 0, 128, 96]])
    model = build()
    (stage,) = learn(model, objects(crowd=crowd)).stages
    index = stage.assignment.per_prior()
    assert not (index[0] == -1).any()
    assert (index[0] >= 0).any()
    assert (index[3] == -1).any()


def test_no_proposal_at_all() -> None:
    """Everything too small: training goes on with the objects alone, without objects with nothing; eval finds none."""
    model = build(rpn={**LIGHT["rpn"], "min_size": 1000.0})
    for empty in ((), (0, 1, 2, 3)):
        outputs = learn(model, objects(empty))
        found = outputs.stages[0].assignment
        assert paired(found).sum() == len(objects(empty))
        assert (~found.ignored).sum() == len(objects(empty))
        losses = criterion(model)(outputs, objects(empty))
        assert torch.isfinite(losses.total)
        assert (losses.parts["stage_1_class"] == 0) == bool(empty)
        losses.total.backward()
    found = decode(model.eval()(images(), sizes=SIZES), SIZES, DecodeConfig(score_threshold=0.0))
    assert [len(d) for d in found] == [0] * 4


def test_a_training_step_repeats_and_depends_on_the_step() -> None:
    model, boxes = build(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        boxes.append(learn(model, objects()).stages[0].outputs.priors.boxes)
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


def test_softmax_scores_come_back() -> None:
    model = build().eval()
    with torch.no_grad():
        outputs = model(images(), sizes=SIZES)
        boxes = outputs.priors.boxes
        x = model.neck(model.backbone(torch.addcmul(model.shift, images().float(), model.scale)))
        logits, _ = model._look(0, x, boxes)
    valid = (boxes[..., 2] > boxes[..., 0])[..., None]
    assert_close(outputs.class_logits.sigmoid(), logits.softmax(-1)[..., :-1] * valid)
    assert outputs.class_logits.shape[-1] == 3


def test_a_cascade_refines_and_averages() -> None:
    model = build(**CASCADE).eval()
    with torch.no_grad():
        outputs = model(images(), sizes=SIZES)
        maps = model.neck(model.backbone(torch.addcmul(model.shift, images().float(), model.scale)))
        boxes, valid = model.rpn.propose(model.rpn(maps), SIZES, model.rpn.config.test)
        scores = []
        for i in range(3):
            head = model._head(i)
            last = boxes
            logits, raw = model._look(i, maps, boxes)
            scores.append(logits.softmax(-1)[..., :-1])
            limit = SIZES.flip(1).repeat(1, 2)[:, None]
            boxes = head.config.coder.decode(boxes, torch.ones(1), raw).clamp(min=0)
            boxes = torch.minimum(boxes, limit) * valid[..., None]
    most = int(valid.sum(1).max())
    assert_close(outputs.priors.boxes, last[:, :most], atol=1e-3, rtol=1e-5)
    expected = torch.stack(scores).mean(0) * valid[..., None]
    assert_close(outputs.class_logits.sigmoid(), expected[:, :most], atol=1e-5, rtol=1e-5)
    assert [s.config.coder.std[0] for s in model.heads] == [0.1, 0.05, 0.1]  # type: ignore[union-attr]


def test_a_cascade_asks_for_more_from_stage_to_stage() -> None:
    model, truth = build(**CASCADE), objects()
    outputs = learn(model, truth)
    assert len(outputs.stages) == 3
    before = None
    for stage, least in zip(outputs.stages, (0.5, 0.6, 0.7), strict=True):
        boxes, index = stage.outputs.priors.boxes, stage.assignment.per_prior()
        assert not boxes.requires_grad
        for i in range(4):
            iou = all_pairs_iou(boxes[i], truth.boxes[truth.image == i]).amax(1)
            real = index[i] != IGNORED
            assert torch.equal(index[i] >= 0, (iou >= least) & real)
        if before is not None:  # every proposal is an object, or a box of the stage before
            made = torch.cat([before, truth.boxes.expand(4, -1, -1)], 1)
            assert (boxes[:, :, None] - made[:, None]).abs().amax(-1).amin(-1)[index != IGNORED].max() < 1e-3
        limit = SIZES.flip(1).repeat(1, 2)[:, None]
        before = torch.minimum(stage.outputs.boxes.detach().clamp(min=0), limit)


def test_c4_is_the_backbone_cut_in_two(tmp_path: Path) -> None:
    """Weights of the whole network arrive in both parts, and both together compute what the whole does."""
    torch.manual_seed(1)
    whole = BackboneConfig(name="resnet18", levels=(4, 5)).build().eval()
    torch.save(
        {**whole.features.state_dict(), "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}, tmp_path / "w.pth"
    )
    model = build(**{**C4, **CASCADE, "backbone": {**C4["backbone"], "weights": str(tmp_path / "w.pth")}}).eval()
    assert model.backbone.strides == (16,)
    assert not any("layer4" in name for name in model.backbone.state_dict())
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        (c4,) = model.backbone(x)
        expected = whole(x)
        assert torch.equal(c4, expected[0])
        for head in model.heads:
            assert torch.equal(head.stage(c4), expected[1])  # type: ignore[operator]
    first, second = (next(head.stage.parameters()) for head in list(model.heads)[:2])  # type: ignore[union-attr]
    assert first.data_ptr() != second.data_ptr()


def test_dc5_keeps_the_stride_of_c4() -> None:
    plain, dilated = (
        BackboneConfig(name="resnet18", levels=(level,), output_stride=stride).build().eval()
        for level, stride in ((5, None), (4, 16))
    )
    dilated.load_state_dict(plain.state_dict())
    assert (plain.strides, dilated.strides, dilated.channels) == ((32,), (16,), (512,))
    with torch.no_grad():
        sizes = [tuple(model(torch.rand(1, 3, 64, 96))[0].shape[-2:]) for model in (plain, dilated)]
    assert sizes == [(2, 3), (4, 6)]


def test_compact_keeps_pairs_in_step() -> None:
    prior = torch.tensor([0, 3, 3, 7, 9])
    weight = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0])
    ignored = torch.tensor([[True, False, True, False, False], [False, True, False, True, True]])
    found = Assignment(5, prior, torch.tensor([0, 1, 2, 3, 4]), weight * 0.9, weight, ignored)
    found = Assignment(**{**found.__dict__, "weight": weight * ~ignored.view(-1)[prior]})
    slots, moved = compact(found, 3)
    assert slots[0].tolist() == [3, 1, 4]
    assert slots[1, :2].tolist() == [2, 0]
    assert moved.ignored.tolist() == [[False, False, False], [False, False, True]]
    assert moved.prior[moved.weight > 0].tolist() == [0, 0, 3]
    assert moved.object[moved.weight > 0].tolist() == [1, 2, 3]
    assert moved.weight.tolist() == [0, 1, 0.5, 1, 0]


def test_folded_for_inference() -> None:
    model = build(neck={"channels": 16, "extra": "pool", "extra_levels": 1, "norm": "batch"}).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        config = DecodeConfig(score_threshold=0.02)
        plain = decode(model(images(), sizes=SIZES), SIZES, config)
        folded = fold_batch_norm(model)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        for a, b in zip(decode(folded(images(), sizes=SIZES), SIZES, config), plain, strict=True):
            assert len(a) == len(b) > 0
            assert_close(a.scores, b.scores, atol=1e-4, rtol=0)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValidationError, match="class_agnostic=true"):
        CascadeConfig.model_validate({"head": {"class_agnostic": False}})
    for changes, said in (
        ({"neck": None}, r"levels are \[2, 3, 4, 5\]: without a neck"),
        ({**C4, "neck": {}}, "a neck changes that map"),
        ({**C4, "backbone": {"levels": [5]}}, "nothing follows level 5"),
        ({**C4, "backbone": {"levels": [4], "freeze_stages": 5}}, "at most 4"),
        ({**C4, **CASCADE, "backbone": {"levels": [3, 4]}}, "one map for everything"),
    ):
        with pytest.raises(ValidationError, match=said):
            (CascadeConfig if "cascade" in changes else TwoStageConfig).model_validate(changes)
    for backbone, said in (
        ({"name": "mobilenetv2_100", "levels": [4]}, "do not follow one another as modules"),
        ({"name": "swin_tiny_patch4_window7_224", "levels": [4]}, "do not follow one another as modules"),
        ({"name": "vgg11_bn", "levels": [4]}, "nothing to learn"),
        ({"name": "vgg11_bn", "levels": [4], "output_stride": 16}, "cannot be dilated"),
    ):
        with pytest.raises(ConfigError, match=said):
            TwoStageConfig.model_validate({**C4, "backbone": backbone}).build(3)
    with pytest.raises(ValidationError, match="at least one layer"):
        TwoStageConfig.model_validate({"head": {"convs": 0, "linear": 0}})
    assert CascadeConfig().stages[2][1].assigner == MaxIou(positive_iou=0.7, negative_iou=0.7, low_quality="none")
    assert CascadeStage().positive_iou == 0.5
    assert not Atss.takes_proposals
