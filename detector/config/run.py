"""The whole of a run as one checked, frozen tree: what `configs/*.yaml` spell out.

Each section is declared where its component is; this file only puts them together and checks what concerns several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from detector.assign import Rule
from detector.assign.atss import Atss
from detector.config.node import Node
from detector.data.config import Data
from detector.data.mosaic import Mixup
from detector.data.perspective import RandomPerspective
from detector.data.steps import Combination
from detector.data.transforms import Transform
from detector.decode import DecodeConfig
from detector.evaluate.config import EvaluateConfig
from detector.losses.criteria import WITHOUT_RULE, AnyCriterion
from detector.losses.dense import DenseCriterionConfig
from detector.losses.two_stage import CrossEntropy, TwoStageCriterionConfig
from detector.models import Model, Network
from detector.pixels import Statistics
from detector.train.config import TrainConfig


class RunFolder(Node):
    """Where a run keeps its files."""

    dir: Path | None = Field(None, description="default: runs/<name>")


class RunConfig(Node):
    """Everything that decides a run.  Equal configurations give equal weights on equal machines."""

    name: str = Field(min_length=1, description="default: the recipe's file name")
    seed: int = Field(0, ge=0)
    imports: tuple[str, ...] = Field((), description="Python files of your own whose sections join the slots they fit")
    run: RunFolder = RunFolder()
    data: Data
    augment: tuple[Transform, ...] = Field((), description="training only, in this order, before the resize")
    model: Model
    weights: str | None = Field(
        None,
        min_length=1,
        description="start from this whole detector: a checkpoint (best.pt, or what convert_weights wrote), or"
        " torchvision://fasterrcnn_resnet50_fpn and the like; replaces model.backbone.pretrained",
    )
    assigner: Rule | None = Field(Atss(), description="null for criteria that match priors to objects by themselves")
    criterion: AnyCriterion = DenseCriterionConfig()
    train: TrainConfig
    decode: DecodeConfig = DecodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def network(self, num_classes: int, *, load_weights: bool = True) -> Network:
        """The model for images as the data have them; `load_weights=False` leaves the backbone random, for a
        checkpoint that follows."""
        return self.model.build(num_classes, load_weights=load_weights, pixels=self.data.pixels)

    @property
    def folder(self) -> Path:
        return self.run.dir if self.run.dir is not None else Path("runs") / self.name

    @model_validator(mode="before")
    @classmethod
    def _rule_by_default(cls, values: Any) -> Any:
        """A criterion that does without a rule has none by default."""
        if not isinstance(values, dict) or "assigner" in values or not isinstance(values.get("criterion"), dict):
            return values
        criterion = values["criterion"]
        given = criterion.get("type") == "two_stage" and criterion.get("rpn", {}) is None
        alone = given or criterion.get("type") in WITHOUT_RULE
        return {**values, "assigner": None} if alone else values

    @model_validator(mode="after")
    def _rule_where_it_counts(self) -> RunConfig:
        kind = self.criterion.type
        if isinstance(self.criterion, TwoStageCriterionConfig) and self.criterion.rpn is None:
            if self.assigner is not None:
                raise ValueError("criterion.rpn is null, so nothing would use the assigner: set assigner=null")
            return self
        if self.criterion.uses_assigner and self.assigner is None:
            raise ValueError(f"criterion.type {kind!r} needs a rule of label assignment: set assigner")
        if not self.criterion.uses_assigner and self.assigner is not None:
            raise ValueError(f"criterion.type {kind!r} matches priors to objects by itself: set assigner=null")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> RunConfig:
        if self.weights is not None and self.model.backbone.weights is not None:
            raise ValueError("weights and model.backbone.weights are both set: leave one out")
        return self

    @model_validator(mode="after")
    def _weights_where_they_count(self) -> RunConfig:
        weighing = next((i for i, step in enumerate(self.augment) if isinstance(step, Mixup) and step.weights), None)
        if weighing is not None and self.criterion.type != "dense":
            raise ValueError(
                f"augment.{weighing}.weights is true, but criterion.type {self.criterion.type!r} does not know weights"
                " of single objects: set it to false, or criterion.type=dense"
            )
        return self

    @model_validator(mode="after")
    def _pixels_fit(self) -> RunConfig:
        """Every step of `augment` and the backbone can take what the images hold."""
        pixels, backbone = self.data.pixels, self.model.backbone
        for i, step in enumerate(self.augment):
            objection = step.objection(pixels)
            if objection is not None:
                raise ValueError(f"augment.{i}: {objection}")
        if isinstance(pixels.normalize, Statistics) and not (backbone.mean is None and backbone.std is None):
            raise ValueError(
                "data.pixels.normalize.type is 'statistics' and model.backbone.mean or std is set: leave one out"
            )
        kinds = [one.type for one in self.data.sources.values()] if self.data.type == "several" else [self.data.type]
        if "shapes" in kinds and (pixels.channels, pixels.bits) != (3, 8):
            raise ValueError("data.type 'shapes' makes RGB of 8 bits: leave data.pixels.channels and bits out")
        return self

    @model_validator(mode="after")
    def _proposals_where_they_count(self) -> RunConfig:
        wanted = self.model.type != "dense" and self.model.rpn is None
        given = self.data.proposals
        if given is None:
            if wanted:
                raise ValueError(
                    "model.rpn is null, so proposals must be given: set data.proposals.train and data.proposals.val"
                    " (tools/make_proposals.py makes the files)"
                )
            return self
        if not wanted:
            raise ValueError(
                f"data.proposals is set, but model.type {self.model.type!r} makes its own: take it out, or use"
                " model.type=two_stage with model.rpn=null, criterion.rpn=null and assigner=null"
            )
        if self.data.type == "several":
            raise ValueError("data.proposals: goes with a single data set, not with data.type 'several'")
        step = next((i for i, s in enumerate(self.augment) if isinstance(s, Combination | RandomPerspective)), None)
        if step is not None:
            raise ValueError(
                f"augment.{step}: {self.augment[step].type!r} makes an image that data.proposals do not fit: take it"
                " out; flip, color, random_scale_crop, large_scale_jitter, cutout and grid_mask can stay"
            )
        return self

    @model_validator(mode="after")
    def _something_for_the_device(self) -> RunConfig:
        can = bool(self.data.resize.multi_scale) or (len(self.augment) > 0 and self.augment[-1].on_device)
        if self.data.augment_on == "device" and not can:
            raise ValueError(
                "data.augment_on is 'device' but there is nothing that the device could do: put flip or color last in"
                " augment, set data.resize.multi_scale, or set data.augment_on=workers"
            )
        return self

    @model_validator(mode="after")
    def _criterion_fits_the_model(self) -> RunConfig:
        model, criterion = self.model, self.criterion
        if (model.type == "dense") != (criterion.type != "two_stage"):
            raise ValueError(
                f"model.type {model.type!r} does not go with criterion.type {criterion.type!r}:"
                f" set criterion.type={'dense' if model.type == 'dense' else 'two_stage'}"
            )
        if model.type == "dense":
            return self._dense_head_fits()
        assert criterion.type == "two_stage"
        if (model.rpn is None) != (criterion.rpn is None):
            raise ValueError(
                "model.rpn and criterion.rpn go together: set both, or both to null (with assigner=null and"
                " data.proposals)"
            )
        if len(model.stages) != len(criterion.stage_weights):
            raise ValueError(
                f"the model has {len(model.stages)} box heads, but criterion.stage_weights are"
                f" {list(criterion.stage_weights)}: give one for each"
            )
        softmax = isinstance(criterion.classification, CrossEntropy)
        if softmax != (model.head.classifier == "softmax"):
            raise ValueError(
                f"model.head.classifier is {model.head.classifier!r} but criterion.classification is"
                f" {criterion.classification.type!r}: softmax goes with cross_entropy, sigmoid with bce and focal"
            )
        return self

    def _dense_head_fits(self) -> RunConfig:
        assert self.model.type == "dense"
        head, criterion = self.model.head, self.criterion
        if (criterion.type == "iqdet") != (self.model.encoder is not None):
            raise ValueError(
                "criterion.type 'iqdet' trains an encoder, but model.encoder is null: set model.encoder={}"
                if criterion.type == "iqdet"
                else "model.encoder is set but nothing would train it: set criterion.type=iqdet, or model.encoder=null"
            )
        path = {"dense": "criterion.quality", "iqdet": "criterion.dense.quality"}.get(criterion.type)
        if criterion.uses_quality and not head.quality:
            what = f"{path} is set" if path else f"criterion.type {criterion.type!r} needs an objectness"
            instead = f", or {path}=null" if path else ""
            raise ValueError(f"{what} but model.head.quality is false: set model.head.quality=true{instead}")
        if not criterion.uses_quality and head.quality:
            also = f"set {path}, or " if path else "set "
            raise ValueError(f"model.head.quality is true but nothing would train it: {also}model.head.quality=false")
        losses = criterion.dense if criterion.type == "iqdet" else criterion
        initial = losses.initial_box if losses.type == "dense" else None
        if head.type == "refined" and head.refine.needs_initial_loss and initial is None:
            path = {"dense": "criterion.initial_box", "iqdet": "criterion.dense.initial_box"}.get(criterion.type)
            also = f"{path}={{type: giou, weight: 1.5}}, or " if path else ""
            raise ValueError(
                f"nothing would train the boxes that model.head.refine.type {head.refine.type!r} starts from: set"
                f" {also}model.head.refine.type=boundary"
            )
        objection = criterion.objection(head.output_coder, head.initial_coder)
        if objection is not None:
            raise ValueError(objection)
        return self
