"""Deterministic certificates against exact distances, attacks and the pipeline."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTImageProcessor, pipeline

from hf_lipschitz import ABSTAIN, SmoothedClassifier, SmoothingConfig, certify_deterministic, lipschitz_bound
from hf_lipschitz.certification import Certificate
from tests.families import bert, convnext, gpt2, resnet, vit


def test_a_linear_classifier_has_its_exact_distance() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double().eval(), torch.randn(20, 5, dtype=torch.float64)
    logits = model(x)
    for certificate, z in zip(certify_deterministic(model, (x,)), logits, strict=True):
        best = int(z.argmax())
        distance = min(
            ((z[best] - z[j]) / (model.weight[best] - model.weight[j]).norm()).item() for j in range(4) if j != best
        )
        assert certificate.prediction == best
        assert distance * (1 - 1e-6) <= certificate.radius <= distance
        assert certificate.method == "deterministic"
        assert (certificate.alpha, certificate.n, certificate.sigma, certificate.p_lower) == (0.0, 0, 0.0, None)
        assert Certificate.from_dict(certificate.to_dict()) == certificate


def test_a_tie_abstains() -> None:
    model = nn.Linear(2, 3, bias=False).eval()
    model.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    tie, clear = certify_deterministic(model, (torch.tensor([[1.0, 0.0], [0.0, 1.0]]),))
    assert (tie.prediction, tie.radius) == (ABSTAIN, 0.0)
    assert clear.prediction == 2
    assert clear.radius == pytest.approx(1 / math.sqrt(2), rel=1e-6)


class Mlp(nn.Module):
    def __init__(self, head_last: bool) -> None:
        super().__init__()
        self.first, self.second, self.head_last = nn.Linear(4, 8), nn.Linear(8, 3), head_last

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(torch.relu(self.first(x)))
        return z if self.head_last else z.tanh()


def attack(model: nn.Module, x: Tensor, radius: float, target: int) -> Tensor:
    """PGD on the margin, from several starts."""
    starts = x + radius * nn.functional.normalize(torch.randn(32, *x.shape[1:], dtype=x.dtype), dim=-1)
    y = torch.cat([x, starts])
    for _ in range(40):
        y = y.detach().requires_grad_()
        z = model(y)
        others = z.masked_fill(nn.functional.one_hot(torch.tensor(target), z.shape[-1]).bool(), -math.inf)
        (gradient,) = torch.autograd.grad((others.amax(-1) - z[:, target]).sum(), y)
        moved = y + 0.3 * radius * nn.functional.normalize(gradient, dim=-1) - x
        y = x + moved * (radius / moved.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    return model(y.detach()).argmax(-1)


@pytest.mark.parametrize("head_last", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_no_attack_gets_inside(head_last: bool, local: bool) -> None:
    torch.manual_seed(0)
    model, x = Mlp(head_last).double().eval(), torch.randn(6, 4, dtype=torch.float64)
    everywhere = certify_deterministic(model, (x,))
    certificates = certify_deterministic(model, (x,), local=local)
    for row, certificate, other in zip(x, certificates, everywhere, strict=True):
        assert certificate.radius >= other.radius * (1 - 1e-9)
        reached = attack(model, row[None], certificate.radius * (1 - 1e-6), certificate.prediction)
        assert (reached == certificate.prediction).all()
    if local and head_last:
        assert sum(c.radius for c in certificates) > 1.2 * sum(c.radius for c in everywhere)


def test_a_head_on_every_token_counts_as_a_head() -> None:
    """GPT-2 scores all tokens and picks one."""
    model = gpt2().eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    (certificate,) = certify_deterministic(model, inputs)
    margins = model(**inputs).logits[0]
    best = int(margins.argmax())
    plain = (margins[best] - margins.topk(2).values[1]).item() / (math.sqrt(2) * lipschitz_bound(model, inputs).value)
    assert certificate.unit == "input embeddings"
    assert certificate.radius >= plain
    head = model.score.weight.detach().double()
    largest = torch.cdist(head, head).max().item()
    assert (
        certificate.radius
        == pytest.approx(plain * math.sqrt(2) * torch.linalg.matrix_norm(head, 2).item() / largest, rel=0.02)
        or len(head) > 2
    )


def test_rows_with_masks_of_their_own() -> None:
    model = bert().eval()
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    together = certify_deterministic(model, inputs)
    alone = certify_deterministic(model, inputs, local=True)
    assert all(a.radius > b.radius > 0 for a, b in zip(alone, together, strict=True))


def test_no_constant_is_an_error_that_names_the_operator() -> None:
    class Jumps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.round()

    with pytest.raises(ValueError, match=r"no finite Lipschitz constant.*round"):
        certify_deterministic(Jumps().eval(), (torch.randn(2, 3),))


def test_bad_logits() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, K\)"):
        certify_deterministic(nn.Linear(3, 1).eval(), (torch.randn(2, 3),))
    with pytest.raises(ValueError, match="NaN or inf"):
        certify_deterministic(nn.Linear(3, 2).eval(), (torch.full((2, 3), math.inf),))


@pytest.mark.parametrize("family", [resnet, vit, convnext])
def test_the_pipeline_gives_the_same(family) -> None:
    model = family().eval()
    size = getattr(model.config, "image_size", 32)
    processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    certifier = pipeline(
        "certified-classification", model=model, image_processor=processor, certificate="deterministic"
    )
    images = list(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    found = certifier(images, progress_bar=False)
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in images]).float() / 255
    (first, _) = certify_deterministic(model, {"pixels": pixels}, wrt="pixels", image_processor=processor)
    assert found[0].radius == pytest.approx(first.radius, rel=1e-3)
    assert found[0].unit == first.unit == "pixels in [0, 1]"
    assert found[0].label == model.config.id2label[found[0].prediction]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert certifier(images[0]).radius != found[0].radius


def test_the_configuration_of_no_noise() -> None:
    config = SmoothingConfig(certificate="deterministic")
    assert config.sigma == 0.0
    assert SmoothingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="has no noise"):
        SmoothingConfig(sigma=0.1, certificate="deterministic")
    with pytest.raises(ValueError, match="sigma must be positive"):
        SmoothingConfig()
    with pytest.raises(ValueError, match="certify_deterministic"):
        SmoothedClassifier(nn.Linear(2, 2).eval(), 2, config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sigma = 1.0
