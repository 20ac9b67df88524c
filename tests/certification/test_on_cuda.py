"""What only a GPU can show of certification. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_lipschitz.certification import SmoothedClassifier, SmoothingConfig
from hf_lipschitz.certification.noise import NOISES, NoiseKey, Stage
from tests.certification.exact import Slabs, place


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIG = SmoothingConfig(sigma=0.5, n=2000, n0=70)
HALF_PLANES = Slabs((0.0,), (0, 1), 2)
LEVELS = torch.arange(256) / 255
CERTIFICATES = ["one_class", "two_class", "class_partition", "lvm"]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*layers).cuda().eval()


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("noise", NOISES)
def test_certificates_there_do_not_depend_on_the_batch_size(noise: str, certificate: str) -> None:
    if noise == "exact" and certificate == "lvm":
        pytest.skip("scores need noise with a Lipschitz constant")
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)).mul(255).round().div(255).cuda()
    config = replace(CONFIG, certificate=certificate, noise=noise, sigma=0.05)
    found = [
        SmoothedClassifier(small_network(), 5, replace(config, batch_size=size)).certify(x, index=3)
        for size in (1, 137, 2000)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_bounds_there_are_those_of_the_closed_form(certificate: str) -> None:
    """The same point on either device: other noise, and the same radius but for sampling, never above the distance."""
    config = replace(CONFIG, certificate=certificate, n=100_000)
    smoothed = SmoothedClassifier(lambda batch: HALF_PLANES(batch.cpu()).to(batch.device), 2, config)
    found = [smoothed.certify(place(0.4).to(device)) for device in ("cpu", "cuda")]
    assert found[0].prediction == found[1].prediction == 1
    assert found[0].radius == pytest.approx(found[1].radius, abs=0.01)
    assert all(0 < certificate.radius <= 0.4 for certificate in found)


def test_bfloat16_base_models_get_float32_noise_and_the_certificate_is_repeatable() -> None:
    network = small_network().bfloat16()
    seen: list[torch.dtype] = []

    def base(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return network(x.bfloat16()).float()

    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)).cuda()
    first, again = (SmoothedClassifier(base, 5, CONFIG).certify(x) for _ in range(2))
    assert first == again
    assert set(seen) == {torch.float32}


def test_exact_noise_there_hands_on_the_same_levels_as_on_cpu() -> None:
    for device in ("cpu", "cuda"):
        noisy = NOISES["exact"].perturb(LEVELS.to(device), 0.5, NoiseKey(0, 0, Stage.SELECTION, 0), device).cpu()
        assert torch.equal(noisy, (noisy * 255).round() / 255)
