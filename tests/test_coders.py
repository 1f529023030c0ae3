"""Coders: golden values of mmdetection and torchvision, and that decoding undoes encoding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.testing import assert_close

from detector.boxes import clip
from detector.coders import LEAST_STRIDES, AnyCoder, Bins, Coder, Deltas, Distances

EVERY: list[Coder] = [
    Deltas(),
    Deltas(std=(0.1, 0.1, 0.2, 0.2)),
    Deltas(std=(0.1, 0.2, 0.3, 0.4), mean=(0.01, -0.02, 0.1, 0.0), clamp="above"),
    Distances(activation="relu"),
    Distances(activation="exp"),
    Distances(activation="softplus"),
    Distances(activation="none"),
    Bins(),
    Bins(reg_max=7),
]
NONE = torch.ones(())  # deltas do not look at the stride


def four(values: Tensor) -> tuple[float, float, float, float]:
    a, b, c, d = values.tolist()
    return a, b, c, d


@pytest.mark.parametrize("name", ["delta_unit", "delta_std", "delta_mean_std"])
def test_golden_deltas(golden, name: str) -> None:  # type: ignore[no-untyped-def]
    data = golden("box_coding")
    given, s = data.scenario("in"), data.scenario(name)
    priors, size = given["priors"], given["image_hw"]
    coder = Deltas(std=four(s["stds"]), mean=four(s["means"]))
    assert_close(coder.encode(priors, NONE, given["targets"]), s["encoded"], rtol=1e-5, atol=1e-5)

    deltas = s["deltas"].requires_grad_()
    decoded = coder.decode(priors, NONE, deltas)
    assert_close(decoded, s["decoded"], rtol=1e-5, atol=1e-3)
    assert_close(clip(decoded, size), s["decoded_clipped"], rtol=1e-5, atol=1e-3)
    (decoded * s["out_grad"]).sum().backward()
    assert_close(deltas.grad, s["deltas_grad"], rtol=1e-4, atol=1e-4)

    tight = coder.model_copy(update={"max_ratio": 10.0})
    assert_close(tight.decode(priors, NONE, deltas), s["decoded_ratio_clip_0p1"], rtol=1e-5, atol=1e-3)


def test_golden_deltas_of_yolof(golden) -> None:  # type: ignore[no-untyped-def]
    data = golden("box_coding")
    given, s = data.scenario("in"), data.scenario("delta_center_clamp")
    decoded = Deltas(clamp="above", max_shift=32).decode(given["priors"], NONE, given["deltas"])
    assert_close(clip(decoded, given["image_hw"]), s["decoded_clipped"], rtol=1e-5, atol=1e-3)
    assert_close(decoded, s["decoded"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["tv_delta_1111", "tv_delta_10_10_5_5"])
def test_golden_deltas_of_torchvision(golden, name: str) -> None:  # type: ignore[no-untyped-def]
    data = golden("box_coding")
    given, s = data.scenario("in"), data.scenario(name)
    coder = Deltas(std=four(1 / s["weights"]), clamp="above")
    assert_close(coder.encode(given["priors"], NONE, given["targets"]), s["encoded"], rtol=1e-5, atol=1e-5)
    assert_close(coder.decode(given["priors"], NONE, s["deltas"]), s["decoded"], rtol=1e-5, atol=1e-3)


def test_golden_distances(golden) -> None:  # type: ignore[no-untyped-def]
    s = golden("box_coding").scenario("distance")
    priors = torch.cat([s["points"], s["points"]], 1)  # the centre is all that counts
    stride = torch.ones(len(priors))
    coder = Distances(activation="relu")
    inside = s["encoded"].clamp(min=0)  # points outside have negative distances there, which no head here can say
    assert_close(coder.encode(priors, stride, s["targets"]), inside, rtol=1e-5, atol=1e-4)
    assert (s["distances"] >= 0).all()
    assert_close(coder.decode(priors, stride, s["distances"]), s["decoded"], rtol=1e-5, atol=1e-3)
    for stretch in (4.0, 16.0):
        raw = coder.encode(priors, stride * stretch, s["targets"])
        assert_close(raw * stretch, inside, rtol=1e-5, atol=1e-4)


def test_golden_distances_of_torchvision(golden) -> None:  # type: ignore[no-untyped-def]
    data = golden("box_coding")
    given, s = data.scenario("in"), data.scenario("tv_linear_raw")
    stride = torch.ones(len(given["priors"]))
    coder = Distances(activation="relu")
    positive = (s["deltas"] >= 0).all(1)
    assert positive.any()
    decoded = coder.decode(given["priors"], stride, s["deltas"])
    assert_close(decoded[positive], s["decoded"][positive], rtol=1e-5, atol=1e-3)
    # The fixture's roles are exchanged here: its `priors` as seen from the centres of its `targets`.
    encoded = coder.encode(given["targets"], stride, given["priors"])
    assert_close(encoded, s["encoded"].clamp(min=0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("coder", EVERY, ids=repr)
@settings(deadline=None, max_examples=60)
@given(
    st.floats(0, 800), st.floats(0, 800), st.floats(0.02, 0.98), st.floats(0.02, 0.98),
    st.floats(4, 600), st.floats(4, 600), st.sampled_from([4.0, 8.0, 61.0]), st.floats(1, 8),
)  # fmt: skip
def test_decode_undoes_encode(
    coder: Coder, x: float, y: float, u: float, v: float, w: float, h: float, stride: float, side: float
) -> None:
    """For a prior whose centre lies in the box, at the fractions u, v of its sides."""
    half = stride * side / 2
    prior = torch.tensor([[x - half, y - half, x + half, y + half]])
    box = torch.tensor([[x - u * w, y - v * h, x + (1 - u) * w, y + (1 - v) * h]])
    strides = torch.tensor([stride])
    raw = coder.encode(prior, strides, box)
    assert raw.shape == (1, coder.channels)
    # The log of a distance below a hundredth of a stride is not said.
    tolerance = 0.01 + LEAST_STRIDES * stride if isinstance(coder, Distances) else 0.01
    if isinstance(coder, Deltas):
        ratio = max(w, h, 2 * half) / min(w, h, 2 * half)
        if ratio > coder.max_ratio:
            return
    if isinstance(coder, Bins) and max(u * w, (1 - u) * w, v * h, (1 - v) * h) > coder.reg_max * stride:
        return
    assert_close(coder.decode(prior, strides, raw), box, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("coder", EVERY, ids=repr)
def test_everything_is_finite(coder: Coder) -> None:
    """Targets of points outside their object or of boxes without area; decoded boxes and gradients of wild numbers."""
    priors = torch.tensor([[0.0, 0, 8, 8], [100, 100, 164, 164], [0, 0, 8, 8]])
    stride = torch.tensor([8.0, 64, 8])
    boxes = torch.tensor([[50.0, 50, 60, 60], [132, 132, 132, 132], [-3000, 0, 5000, 5000]])
    assert coder.encode(priors, stride, boxes).isfinite().all()
    raw = torch.tensor([-1e4, -50, 50, 1e4]).repeat(coder.channels // 4).expand(3, -1).clone().requires_grad_()
    decoded = coder.decode(priors, stride, raw)
    assert decoded.isfinite().all()
    assert coder == Distances(activation="none") or (decoded[:, 2:] >= decoded[:, :2]).all()
    decoded.sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("coder", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decoded_in_float32(coder: Coder, dtype: torch.dtype) -> None:
    """701.3 is not a float16: only the raw number may be rounded, never the coordinate."""
    prior, stride = torch.tensor([[697.3, 697.3, 705.3, 705.3]]), torch.tensor([8.0])
    raw = coder.encode(prior, stride, torch.tensor([[600.0, 650, 750, 800]])).to(dtype)
    decoded = coder.decode(prior, stride, raw)
    assert decoded.dtype == torch.float32
    assert_close(decoded, coder.decode(prior, stride, raw.float()), rtol=0, atol=0)


@pytest.mark.parametrize("coder", EVERY, ids=repr)
def test_priors_broadcast_over_the_batch(coder: Coder) -> None:
    priors = torch.tensor([[0.0, 0, 16, 16], [8, 8, 40, 40], [100, 0, 120, 60]])
    stride = torch.tensor([8.0, 16, 8])
    raw = torch.randn(2, 3, coder.channels, generator=torch.Generator().manual_seed(0))
    both = coder.decode(priors, stride, raw)
    assert both.shape == (2, 3, 4)
    for i in range(2):
        assert_close(both[i], coder.decode(priors, stride, raw[i]))
    assert coder.encode(priors, stride, both).shape == (2, 3, coder.channels)


@pytest.mark.parametrize("coder", EVERY, ids=repr)
def test_gradient_of_decode(coder: Coder) -> None:
    generator = torch.Generator().manual_seed(0)
    priors = torch.tensor([[0.0, 0, 16, 16], [8, 8, 40, 40]], dtype=torch.float64)
    stride = torch.tensor([8.0, 16], dtype=torch.float64)
    raw = torch.rand(2, coder.channels, dtype=torch.float64, generator=generator).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: coder.decode(priors, stride, r), (raw,))


def test_growth_is_limited_and_shrinking_where_asked() -> None:
    prior, raw = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 20, -20]])
    both, above = Deltas(max_ratio=4), Deltas(max_ratio=4, clamp="above")
    assert_close(both.decode(prior, NONE, raw), torch.tensor([[-15.0, 3.75, 25, 6.25]]))
    assert_close(above.decode(prior, NONE, raw), torch.tensor([[-15.0, 5, 25, 5]]), rtol=0, atol=1e-5)


def test_softplus_is_inverted_for_near_and_far() -> None:
    prior, stride = torch.zeros(1, 4), torch.ones(1)
    raw = Distances(activation="softplus").encode(prior, stride, torch.tensor([[-0.5, -5.0, 50, 500]]))
    assert_close(raw, torch.tensor([[math.log(math.expm1(0.5)), math.log(math.expm1(5)), 50, 500]]))


def test_chosen_by_type_and_checked() -> None:
    slot: TypeAdapter[Coder] = TypeAdapter(AnyCoder)
    assert slot.validate_python({"type": "distances"}) == Distances()
    with pytest.raises(ValidationError):
        slot.validate_python({"type": "deltas", "std": [0.1, 0.1, 0.2, 0]})
    with pytest.raises(ValidationError):
        slot.validate_python({"type": "deltas", "activation": "exp"})


@pytest.mark.parametrize("scenario", ["extreme", "all_background", "one"])
def test_golden_mean_of_a_distribution(golden, scenario: str) -> None:  # type: ignore[no-untyped-def]
    """mmdetection's integral: four sides after one another, 17 bins each; its gradient too."""
    s = golden("cls_losses").scenario(scenario)
    logits, mean = s["dfl_logits"].requires_grad_(), s["integral/loss"]
    prior = torch.zeros(len(mean), 4)
    decoded = Bins().decode(prior, torch.ones(len(mean)), logits.view(len(mean), -1))
    distances = torch.cat([-decoded[:, :2], decoded[:, 2:]], 1)
    assert_close(distances.detach(), mean, rtol=1e-5, atol=1e-5)
    distances.sum().backward()
    assert_close(logits.grad, s["integral/grad"], rtol=1e-4, atol=1e-5)


def test_golden_distances_of_bins(golden) -> None:  # type: ignore[no-untyped-def]
    """The fixture stays 0.1 below the maximum, which here is a setting of the loss."""
    s = golden("box_coding").scenario("distance")
    priors = torch.cat([s["points"], s["points"]], 1)
    for reg_max, margin, name in ((16, 0.1, "max16_eps0p1"), (8, 0.51, "max7p5_eps0p01")):
        distances = Bins(reg_max=reg_max).distances(priors, torch.ones(len(priors)), s["targets"])
        assert_close(distances.clamp(max=reg_max - margin), s[f"encoded_{name}"], rtol=1e-5, atol=1e-4)


def test_a_distance_is_split_between_its_two_bins() -> None:
    prior = torch.tensor([[0.0, 0, 0, 0]])
    raw = Bins(reg_max=4).encode(prior, torch.tensor([8.0]), torch.tensor([[-10.0, -16, 0, 80]]))
    share = raw.view(4, 5).exp()
    expected = torch.tensor([[0, 0.75, 0.25, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert_close(share, expected, atol=1e-6, rtol=0)


def test_signed_distances_say_boxes_beside_their_prior() -> None:
    prior, stride, box = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([8.0]), torch.tensor([[20.0, -30, 40, -10]])
    coder = Distances(activation="none")
    raw = coder.encode(prior, stride, box)
    assert_close(raw, torch.tensor([[-2.0, 4.25, 4.5, -1.75]]))
    assert_close(coder.decode(prior, stride, raw), box)
