import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.certification.radius import smoothing_radius
from hf_lipschitz.training.smoothing_losses import consistency, macer, smoothed_cross_entropy


def random_logits(copies=3, rows=5, classes=4, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(copies, rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def logits_of_scores(*copies):
    """Logits (m, 1, K) whose softmax has the given rows."""
    return torch.tensor(copies, dtype=torch.float64).log()[:, None]


def test_smoothed_cross_entropy_is_minus_the_log_of_the_mean_score():
    logits, labels = random_logits()
    scores = special.softmax(logits.numpy(), axis=-1).mean(0)
    expected = -np.log(scores[np.arange(5), labels]).mean()
    assert smoothed_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    one = logits[:1]
    assert smoothed_cross_entropy(one, labels).item() == pytest.approx(F.cross_entropy(one[0], labels).item())
    assert smoothed_cross_entropy(logits, labels) < F.cross_entropy(logits.flatten(0, 1), labels.repeat(3))


def test_consistency_of_two_copies_by_hand():
    # p̂ = (0.5, 0.5): KL(p̂ ‖ p_i) = -log(4 · 0.2 · 0.8) / 2 for both copies, H(p̂) = log 2.
    logits = logits_of_scores([0.2, 0.8], [0.8, 0.2])
    divergence = -0.5 * math.log(4 * 0.2 * 0.8)
    value = consistency(logits, kl_weight=3.0, entropy_weight=0.25).item()
    assert value == pytest.approx(3 * divergence + 0.25 * math.log(2), rel=1e-12)
    assert consistency(logits).item() == pytest.approx(10 * divergence + 0.5 * math.log(2), rel=1e-12)
    assert consistency(logits, kl_weight=2.0, entropy_weight=0.0).item() == pytest.approx(2 * divergence, rel=1e-12)


def test_consistency_is_that_of_scipy_and_of_the_published_code():
    logits, _ = random_logits()
    p = special.softmax(logits.numpy(), axis=-1)
    mean = p.mean(0)
    divergence = np.mean([stats.entropy(mean, copy, axis=-1) for copy in p], axis=0)
    expected = (7 * divergence + 0.3 * stats.entropy(mean, axis=-1)).mean()
    value = consistency(logits, kl_weight=7.0, entropy_weight=0.3)
    assert value.item() == pytest.approx(expected, rel=1e-12)

    average = sum(F.softmax(copy, 1) for copy in logits) / 3
    kls = [F.kl_div(F.log_softmax(copy, 1), average, reduction="none").sum(1) for copy in logits]
    entropy = -(average * average.clamp(min=1e-20).log()).sum(1)
    assert value.item() == pytest.approx((7 * sum(kls) / 3 + 0.3 * entropy).mean().item(), rel=1e-12)


def test_copies_that_agree_have_no_divergence():
    logits, _ = random_logits(copies=1)
    same = logits.expand(4, -1, -1)
    assert consistency(same, entropy_weight=0.0).item() == pytest.approx(0, abs=1e-12)
    entropy = stats.entropy(special.softmax(logits[0].numpy(), axis=-1), axis=-1).mean()
    assert consistency(same, entropy_weight=2.0).item() == pytest.approx(2 * entropy, rel=1e-12)


def macer_by_hand(logits, labels, sigma, gamma, beta):
    scores = special.softmax(beta * logits.numpy(), axis=-1).mean(0)
    total = 0.0
    for row, label in zip(scores, labels.tolist(), strict=True):
        other = max(p for k, p in enumerate(row) if k != label)
        if row[label] >= other:
            total += sigma / 2 * max(0.0, gamma - (stats.norm.ppf(row[label]) - stats.norm.ppf(other)))
    return total / len(labels)


@pytest.mark.parametrize(("sigma", "gamma", "beta"), [(0.25, 8.0, 1.0), (1.0, 1.0, 0.5), (0.5, 3.0, 2.0)])
def test_macer_is_the_formula(sigma, gamma, beta):
    logits, labels = random_logits(rows=40, scale=0.5)
    value = macer(logits, labels, sigma=sigma, gamma=gamma, beta=beta)
    assert value.item() == pytest.approx(macer_by_hand(logits, labels, sigma, gamma, beta), rel=1e-10)
    assert value > 0


def test_macer_by_hand_and_against_the_certified_radius():
    logits = logits_of_scores([0.7, 0.2, 0.1], [0.9, 0.06, 0.04])
    label = torch.tensor([0])
    radius = 0.25 * (stats.norm.ppf(0.8) - stats.norm.ppf(0.13)) / 2
    loss = macer(logits, label, sigma=0.25, gamma=8.0, beta=1.0).item()
    assert loss == pytest.approx(0.25 * 8 / 2 - radius, rel=1e-12)
    assert radius == pytest.approx(smoothing_radius(0.8, 0.13, sigma=0.25), rel=1e-9)
    # ξ = 1.97 is above γ = 1.9 and not above 2.
    assert macer(logits, label, sigma=0.25, gamma=1.9, beta=1.0) == 0
    assert macer(logits, label, sigma=0.25, gamma=2.0, beta=1.0) > 0
    assert macer(logits, torch.tensor([1]), sigma=0.25, beta=1.0) == 0
    sharpened = special.softmax(16 * logits.numpy(), axis=-1).mean(0)[0]
    expected = 0.125 * (8 - stats.norm.ppf(sharpened[0]) + stats.norm.ppf(sharpened[1]))
    assert macer(logits, label, sigma=0.25).item() == pytest.approx(max(expected, 0), rel=1e-9)


def test_macer_is_a_mean_over_the_whole_batch():
    logits = logits_of_scores([0.7, 0.3], [0.9, 0.1]).repeat(1, 4, 1)
    one = macer(logits[:, :1], torch.tensor([0]), sigma=0.5, beta=1.0)
    assert macer(logits, torch.tensor([0, 1, 1, 1]), sigma=0.5, beta=1.0).item() == pytest.approx(one.item() / 4)


def test_gradients_are_those_of_the_values():
    logits, labels = random_logits(copies=2, rows=3)
    logits = 0.3 * logits + F.one_hot(labels, 4)
    leaf = logits.requires_grad_()
    assert macer(leaf, labels, sigma=0.5, beta=2.0) > 0
    for loss in (
        lambda z: smoothed_cross_entropy(z, labels),
        lambda z: consistency(z, kl_weight=2.0),
        lambda z: macer(z, labels, sigma=0.5, beta=2.0),
    ):
        assert torch.autograd.gradcheck(loss, leaf)


EXTREMES = {
    "certain": [[[60.0, 0, 0]], [[70.0, 0, 0]]],
    "certain of two classes": [[[1e3, 0, 0]], [[0, 1e3, 0]]],
    "underflow": [[[2e4, -2e4, 0]], [[3e4, 0, -2e4]]],
    "wrong and certain": [[[-1e4, 1e4, 0]], [[-1e4, 2e4, 0]]],
    "tie": [[[0.0, 0, 0]], [[0.0, 0, 0]]],
    "almost all of float32": [[[1e37, -1e37, 0]], [[-1e37, 1e37, 0]]],
    "a score of 1 - 5e-11": [[[1.52, 0, 0]], [[1.52, 0, 0]]],
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_extreme_scores(case, dtype):
    label = torch.tensor([0])
    for loss in (
        lambda z: smoothed_cross_entropy(z, label),
        consistency,
        lambda z: macer(z, label, sigma=0.5),
        lambda z: macer(z, label, sigma=0.5, gamma=13.9),
    ):
        leaf = torch.tensor(EXTREMES[case], dtype=dtype, requires_grad=True)
        value = loss(leaf)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(leaf.grad).all()


def test_underflowing_scores_have_their_logarithm():
    logits = torch.tensor([[[0.0, 300.0]], [[0.0, 500.0]]])
    assert smoothed_cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(300 + math.log(2), rel=1e-6)


def test_macer_asks_nothing_of_scores_at_the_end():
    logits = torch.tensor([[[60.0, 0.0]]], requires_grad=True)
    value = macer(logits, torch.tensor([0]), sigma=0.5, gamma=13.9)
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


def test_half_precision_logits_are_computed_in_float32():
    logits, labels = random_logits()
    half = (0.3 * logits).bfloat16()
    for loss in (
        smoothed_cross_entropy,
        lambda z, y: consistency(z),
        lambda z, y: macer(z, y, sigma=0.5, beta=1.0),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(half, labels)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(half.double(), labels).item(), rel=1e-5)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda z, y: consistency(z[:1]), ValueError, "at least two, got 1"),
    (lambda z, y: consistency(z, kl_weight=0.0), ValueError, "kl_weight must be finite and > 0"),
    (lambda z, y: consistency(z, entropy_weight=-0.1), ValueError, "entropy_weight must be finite and >= 0"),
    (lambda z, y: consistency(z[0]), ValueError, r"shape \(m, B, K\)"),
    (lambda z, y: macer(z, y, sigma=0.0), ValueError, "sigma must be finite and > 0"),
    (lambda z, y: macer(z, y, sigma=1.0, gamma=0.0), ValueError, "gamma must be finite and > 0"),
    (lambda z, y: macer(z, y, sigma=1.0, gamma=14.0), ValueError, "gamma must be below 14"),
    (lambda z, y: macer(z, y, sigma=1.0, beta=-1.0), ValueError, "beta must be finite and > 0"),
    (lambda z, y: macer(z, y + 4, sigma=1.0), ValueError, r"labels must be in \[0, 4\)"),
    (lambda z, y: macer(z, y.float(), sigma=1.0), TypeError, "class indices"),
    (lambda z, y: macer(z * math.nan, y, sigma=1.0), ValueError, "NaN or inf"),
    (lambda z, y: consistency(z * math.nan), ValueError, "NaN or inf"),
    (lambda z, y: smoothed_cross_entropy(z * math.inf, y), ValueError, "NaN or inf"),
    (lambda z, y: smoothed_cross_entropy(z, y[:2]), ValueError, r"labels must have shape \(5,\)"),
])  # fmt: skip
def test_what_no_loss_can_take_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call(*random_logits())
