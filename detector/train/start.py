"""A whole detector's weights as the start of a training: `weights` of the configuration.

What belongs to a class goes with the class's name: rows of classes that both know are taken over, those of others stay
as they were initialised.  Everything else must fit exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from detector.config.load import from_snapshot
from detector.config.run import RunConfig
from detector.config.yaml import flat
from detector.convert.hub import SCHEME, from_torchvision
from detector.errors import CheckpointError
from detector.models import Network, TwoStageDetector
from detector.models.norms import replace_batch_norms
from detector.models.weights import some
from detector.train.checkpoint import Checkpoint, load_checkpoint

# Settings of the model that do not change what its weights mean.
FREE = (
    "backbone.pretrained",
    "backbone.weights",
    "backbone.freeze_stages",
    "backbone.norm",
    "rpn.train",
    "rpn.test",
    "rpn.nms_iou",
    "rpn.min_size",
    "rules",
    "sampler",
    "add_objects",
    "head.prior_probability",
)
# In these a class's numbers stand together; elsewhere all classes of a prior do, with the background, if any, last.
CLASS_FIRST = ".box."


@torch.no_grad()
def start_from(source: str, network: Network, config: RunConfig, classes: Sequence[str]) -> list[str]:
    """Puts the weights of `source` into `network`, which is of `config` and finds `classes`; says what was loaded.

    `source`: a checkpoint, of which the averaged weights are taken where there are any, or torchvision://NAME.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it fits in more than the classes not.
    """
    content = from_torchvision(source) if source.startswith(SCHEME) else load_checkpoint(Path(source))
    given = _Given(content, source, config.model.backbone.norm)
    own = network.state_dict()
    _check(given.expected(len(classes)), own, source)

    shared = [(old, new) for new, name in enumerate(classes) for old, o in enumerate(given.classes) if o == name]
    everything = list(given.classes) == list(classes)
    rows = {} if everything else given.class_rows()
    kept = []
    for key, value in own.items():
        if key not in rows:
            value.copy_(given.state[key])
        elif shared:
            value.copy_(_carried(value, given.state[key], rows[key], shared, key, (len(given.classes), len(classes))))
        else:
            kept.append(key)
    lines = [f"weights: {source}: {len(own) - len(rows)} of {len(own)} tensors loaded whole"]
    if rows:
        lines.append(f"weights: {_said(rows, kept, shared, given.classes, classes)}")
    return lines + [f"weights: {line}" for line in given.differences(config, network)]


class _Given:
    """The network of the checkpoint."""

    def __init__(self, content: Checkpoint, source: str, norm: str | None) -> None:
        self.config = from_snapshot(content["config"], source, plugins=False)
        self.classes = tuple(content["classes"])
        with torch.random.fork_rng([]):
            self.network = self.config.network(len(self.classes), load_weights=False)
        try:
            self.network.load_state_dict(content["ema"] or content["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{source}: its weights do not fit its own configuration ({reason})") from None
        self._freeze = norm == "frozen_batch" and self.config.model.backbone.norm != "frozen_batch"
        if self._freeze:
            _freeze(self.network)
        self.state = self.network.state_dict()

    def expected(self, classes: int) -> dict[str, Tensor]:
        """Names and shapes that the same network would have for other classes."""
        with torch.device("meta"):
            network = self.config.network(classes, load_weights=False)
        if self._freeze:
            _freeze(network)
        return network.state_dict()

    def class_rows(self) -> dict[str, int]:
        """Of each tensor that depends on the number of classes, how many rows each class has."""
        more = self.expected(len(self.classes) + 1)
        return {k: len(more[k]) - len(v) for k, v in self.state.items() if v.shape != more[k].shape}

    def differences(self, config: RunConfig, network: Network) -> list[str]:
        """Settings that change what the weights mean, without changing their shapes."""
        before, now = (flat(c.model.model_dump(mode="json")) for c in (self.config, config))
        for values, one in ((before, self.network), (now, network)):
            # Those that the network uses, where the configuration leaves them to timm.
            values |= {f"backbone.{k}": [round(v, 2) for v in getattr(one.backbone, k)] for k in ("mean", "std")}
        keys = [k for k in {**before, **now} if not f"{k}.".startswith(tuple(f"{free}." for free in FREE))]
        return [
            f"made with model.{key} {before.get(key)!r}, the recipe has {now.get(key)!r}: they have to adapt to it"
            for key in keys
            if before.get(key) != now.get(key)
        ]


def _freeze(network: Network) -> None:
    """Folds the backbone's batch norms, those of a stage that became the box heads' first part (C4) too."""
    stages = [head.stage for head in network.heads] if isinstance(network, TwoStageDetector) else []
    for part in (network.backbone.features, *stages):
        if isinstance(part, nn.Module):
            replace_batch_norms(part, "frozen_batch")


def _check(expected: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Raises `CheckpointError` where more than the number of classes differs."""
    missing = [k for k in own if k not in expected]
    foreign = [k for k in expected if k not in own]
    misfits = [k for k in own if k in expected and own[k].shape != expected[k].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors of the recipe's model are not there ({some(missing)})")
    if foreign:
        problems.append(f"{len(foreign)} that are there have no place in it ({some(foreign)})")
    if misfits:
        shapes = [f"{k} {tuple(expected[k].shape)} instead of {tuple(own[k].shape)}" for k in misfits]
        problems.append(f"{len(misfits)} have another shape ({some(shapes)})")
    if problems:
        raise CheckpointError(
            f"{source}: not the weights of the recipe's model: {'; '.join(problems)}: make the recipe's model as that"
            " of the weights, or start from others (weights, model.backbone.weights)"
        )


def _carried(
    fresh: Tensor, old: Tensor, per_class: int, shared: Sequence[tuple[int, int]], key: str, counts: tuple[int, int]
) -> Tensor:
    """`fresh` with the rows of `shared` classes (old label, new label), and of the background, from `old`."""
    before, after = counts
    new = fresh.clone()
    theirs, ours = (list(labels) for labels in zip(*shared, strict=True))
    if key.startswith("heads.") and CLASS_FIRST in key:
        new.unflatten(0, (after, per_class))[ours] = old.unflatten(0, (before, per_class))[theirs]
        return new
    background = len(fresh) - per_class * after
    a = new[: per_class * after].unflatten(0, (per_class, after))
    a[:, ours] = old[: per_class * before].unflatten(0, (per_class, before))[:, theirs]
    if background:
        new[-background:] = old[-background:]
    return new


def _said(
    rows: Mapping[str, int],
    kept: Sequence[str],
    shared: Sequence[tuple[int, int]],
    before: Sequence[str],
    now: Sequence[str],
) -> str:
    what = f"({len(before)} classes there, {len(now)} here)"
    if kept:
        return f"freshly initialised, since no class is the same {what}: {', '.join(kept)}"
    names = {now[label] for _, label in shared}
    fresh = [name for name in now if name not in names]
    others = f"those of {some(fresh, 8)} are freshly initialised" if fresh else "none are new"
    return f"in {', '.join(rows)} the rows of {some(sorted(names), 8)} were loaded, {others} {what}"
