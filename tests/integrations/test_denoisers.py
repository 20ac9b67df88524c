from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTImageProcessor

from hf_lipschitz import SmoothedClassifier, SmoothingConfig, certified_accuracy, lipschitz_bound
from hf_lipschitz.integrations.base_classifiers import EMBEDDING_UNIT, PixelClassifier
from hf_lipschitz.integrations.denoisers import LARGEST_GAP, DenoisedClassifier, OneStepDiffusionDenoiser
from tests.families import vit


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS = (1 - BETAS).cumprod(0)
KINDS = ("epsilon", "sample", "v_prediction")
SHAPE = (1, 2, 3)
HEAD = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()


def scheduler(alphas: Any = ALPHAS, kind: Any = "epsilon") -> SimpleNamespace:
    return SimpleNamespace(alphas_cumprod=alphas, config=SimpleNamespace(prediction_type=kind))


def sigma_of(alpha: float, gap: float = 0.0) -> float:
    """The noise in pixels in [0, 1] that is a little more than that of a timestep: by `gap` and by rounding."""
    return math.sqrt((1 - alpha) / alpha) / 2 / (1 - gap) * (1 + 1e-9)


class GaussianModel:
    """The diffusion model that is exact for images u in [-1, 1] with u ~ N(mean, covariance): it is affine."""

    def __init__(self, mean: Tensor, covariance: Tensor, kind: str, alphas: Tensor = ALPHAS) -> None:
        self.mean, self.covariance, self.kind, self.alphas = mean, covariance, kind, alphas

    def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.shape == sample.shape[:1]
        assert timestep.dtype == torch.int64
        (alpha,) = self.alphas[timestep.unique()].tolist()
        a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        whitened = torch.linalg.solve(
            a**2 * self.covariance + b**2 * identity, (sample.double().flatten(1) - a * self.mean).T
        ).T
        image, noise = self.mean + a * whitened @ self.covariance, b * whitened
        output = {"sample": image, "epsilon": noise, "v_prediction": a * noise - b * image}[self.kind]
        return output.reshape(sample.shape).to(sample.dtype)


def prior() -> tuple[Tensor, Tensor]:
    """Mean and covariance, in [-1, 1], of images that are far from white."""
    root = torch.randn(6, 6, dtype=torch.float64) * 0.1
    return 0.2 * torch.randn(6, dtype=torch.float64), root @ root.T + 1e-3 * torch.eye(6, dtype=torch.float64)


def posterior_mean(noisy: Tensor, mean: Tensor, covariance: Tensor, sigma: float) -> Tensor:
    """Of x ~ N(mean, covariance) given noisy = x + N(0, sigma²), without a diffusion model and in pixels in [0, 1]."""
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64))
    return mean + (noisy.flatten(1) - mean) @ gain.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [60, 300, 600])
def test_one_step_is_the_posterior_mean_of_gaussian_images(kind: str, timestep: int) -> None:
    mean, covariance = prior()
    sigma = sigma_of(ALPHAS[timestep].item())
    denoiser = OneStepDiffusionDenoiser(GaussianModel(mean, covariance, kind), scheduler(kind=kind), sigma)
    images = torch.distributions.MultivariateNormal((mean + 1) / 2, covariance / 4).sample((7,))
    noisy = (images + sigma * torch.randn_like(images)).reshape(7, *SHAPE)
    expected = posterior_mean(noisy, (mean + 1) / 2, covariance / 4, sigma).reshape(noisy.shape)
    assert ((expected > 0) & (expected < 1)).all()  # where clipping does nothing
    assert denoiser.timestep == timestep
    torch.testing.assert_close(denoiser(noisy), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoiser(noisy.float()), expected.float(), rtol=1e-4, atol=1e-4)


def test_images_are_clipped_to_zero_and_one() -> None:
    levels = torch.tensor([-3.0, -1.5, -0.5, 0.5, 1.5, 3.0]).reshape(1, *SHAPE)
    denoiser = OneStepDiffusionDenoiser(lambda z, t: levels.expand_as(z), scheduler(kind="sample"), 0.25)
    assert denoiser(torch.rand(2, *SHAPE))[1].flatten().tolist() == [0, 0, 0.25, 0.75, 1, 1]


def test_what_a_unet_may_return() -> None:
    model = GaussianModel(*prior(), "epsilon")
    noisy = torch.rand(4, *SHAPE)
    expected = OneStepDiffusionDenoiser(model, scheduler(), 0.25)(noisy)
    learned = OneStepDiffusionDenoiser(
        lambda z, t: SimpleNamespace(sample=torch.cat([model(z, t), torch.full_like(z, 9.0)], dim=1)),
        scheduler(),
        0.25,
    )
    assert torch.equal(learned(noisy), expected)
    assert torch.equal(
        OneStepDiffusionDenoiser(model, scheduler(ALPHAS.float().numpy()), 0.25)(noisy).round(decimals=4),
        expected.round(decimals=4),
    )


class HalfConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1).to(torch.bfloat16)
        self.eval()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        assert sample.dtype == torch.bfloat16
        return self.conv(sample)


def test_half_precision_is_left_to_the_unet() -> None:
    """Only what the unet says is rounded: without it, the image of the noisy input is exact."""
    unet = HalfConv()
    nn.init.zeros_(unet.conv.weight)
    nn.init.zeros_(unet.conv.bias)
    denoiser = OneStepDiffusionDenoiser(unet, scheduler(), 0.25)
    noisy = torch.rand(3, *SHAPE)
    torch.testing.assert_close(denoiser(noisy), noisy)
    assert OneStepDiffusionDenoiser(unet, scheduler(kind="sample"), 0.25)(noisy).dtype == torch.float32


@given(
    betas=st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=40),
    exponent=st.floats(-7, 3),
    is_terminal=st.booleans(),
)
def test_timestep_against_brute_force(betas: list[float], exponent: float, is_terminal: bool) -> None:
    """The last one whose noise is at most 2 sigma in [-1, 1], in exact arithmetic; none if it is too far below."""
    alphas = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    if is_terminal:
        alphas = torch.cat([alphas, torch.zeros(1, dtype=torch.float64)])
    sigma = math.exp(exponent)
    fitting = [t for t, a in enumerate(alphas.tolist()) if 1 - Fraction(a) <= 4 * Fraction(sigma) ** 2 * Fraction(a)]
    if not fitting or sigma_of(alphas[fitting[-1]].item()) < (1 - LARGEST_GAP) * sigma:
        with pytest.raises(ValueError, match="no timestep fits sigma"):
            OneStepDiffusionDenoiser(lambda z, t: z, scheduler(alphas), sigma)
    else:
        assert OneStepDiffusionDenoiser(lambda z, t: z, scheduler(alphas), sigma).timestep == fitting[-1]


def test_noise_of_exactly_a_timestep_is_that_timestep() -> None:
    alphas = torch.tensor([0.8, 0.5, 0.2])  # of noise 0.25, 0.5 and 1 in pixels
    denoiser = OneStepDiffusionDenoiser(lambda z, t: z, scheduler(alphas), 0.5)
    assert denoiser.timestep == 1
    assert "sigma=0.5, timestep=1, signal=0.707106781186547" in repr(DenoisedClassifier(denoiser, HEAD))
    with pytest.raises(ValueError, match=r"nearest is 0\.2502 and 0\.5005"):
        OneStepDiffusionDenoiser(lambda z, t: z, scheduler(alphas), math.nextafter(0.5, 0))


@given(timestep=st.integers(100, 900), share=st.floats(0.01, 0.99))
def test_timestep_between_two_of_the_usual_schedule(timestep: int, share: float) -> None:
    below, above = (sigma_of(ALPHAS[t].item()) for t in (timestep, timestep + 1))
    denoiser = OneStepDiffusionDenoiser(lambda z, t: z, scheduler(), below + share * (above - below))
    assert denoiser.timestep == timestep


def test_largest_gap_costs_one_percent_of_the_error() -> None:
    gap, alphas = LARGEST_GAP - 1e-6, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    sigma, q = sigma_of(0.5, gap), (1 - gap) ** 2
    excess = []
    for variance in sigma**2 * torch.logspace(-2, 2, 81, dtype=torch.float64):
        model = GaussianModel(torch.zeros(6), 4 * variance * torch.eye(6, dtype=torch.float64), "epsilon", alphas)
        denoiser = OneStepDiffusionDenoiser(model, scheduler(alphas), sigma)
        center = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
        weight = ((denoiser(center + 0.01) - 0.5) / 0.01).mean()
        error = (1 - weight) ** 2 * variance + weight**2 * sigma**2
        excess.append((error / (variance * sigma**2 / (variance + sigma**2)) - 1).item())
    bound = (1 - q) ** 2 / (4 * q)
    assert 0.99 * bound < max(excess) <= bound * (1 + 1e-6)
    assert bound == pytest.approx(0.011, rel=0.02)


@pytest.mark.parametrize("gap", [0.0, 0.09])
def test_radius_is_the_distance_to_the_plane_of_the_composition(gap: float) -> None:
    """Sound and nearly tight where the composition is affine, whether or not the timestep matches sigma."""
    mean, covariance = prior()
    alphas = torch.tensor([0.97, 0.9, 0.5], dtype=torch.float64)
    sigma = sigma_of(0.9, gap)
    denoiser = OneStepDiffusionDenoiser(GaussianModel(mean, covariance, "epsilon", alphas), scheduler(alphas), sigma)
    center, normal = ((mean + 1) / 2).float().reshape(1, *SHAPE), torch.randn(6)
    at_center = (denoiser(center).flatten(1) @ normal).item()
    slope = torch.autograd.functional.jacobian(lambda x: denoiser(x).flatten(1) @ normal, center).norm().item()

    def classifier(images: Tensor) -> Tensor:
        """Two logits that meet on the plane at distance sigma from the center, measured before the denoiser."""
        margin = images.flatten(1) @ normal - at_center + sigma * slope
        return torch.stack([margin, torch.zeros(len(images))], dim=1)

    base = DenoisedClassifier(denoiser, classifier)
    config = SmoothingConfig(sigma=sigma, n=10_000, certificate="one_class")
    certificate = SmoothedClassifier(base, 2, config, unit=base.unit).certify(center[0])
    assert certificate.prediction == 0
    assert certificate.unit == "pixels in [0, 1]"
    assert 0.9 * sigma < certificate.radius < sigma


def test_it_is_a_base_classifier_like_any_other() -> None:
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.2, 0.3, 0.4])
    model, pool = vit().eval(), nn.AvgPool2d(3, stride=1, padding=1).eval()
    base = DenoisedClassifier(pool, PixelClassifier(model, processor))
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    config = SmoothingConfig(sigma=0.25, n0=50, n=200, alpha=0.01, certificate="lvm")
    ours = SmoothedClassifier(base, 4, config, unit=base.unit).certify(base.encode(image), index=3)
    by_hand = SmoothedClassifier(
        lambda x: model(pixel_values=(pool(x) - mean) / std).logits, 4, config, unit="pixels in [0, 1]"
    ).certify(image / 255, index=3)
    assert ours.p_lower == pytest.approx(by_hand.p_lower, rel=1e-6)
    assert (ours.prediction, ours.unit, ours.dtype) == (by_hand.prediction, by_hand.unit, "float32")


def test_unit_and_logits_are_those_of_the_classifier() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()
    head.unit = EMBEDDING_UNIT
    assert DenoisedClassifier(nn.Identity().eval(), head).unit == EMBEDDING_UNIT
    plain = DenoisedClassifier(lambda x: x / 2, lambda x: SimpleNamespace(logits=x.flatten(1)))
    assert plain.unit == "pixels in [0, 1]"
    assert torch.equal(plain(torch.ones(2, *SHAPE)), torch.full((2, 6), 0.5))


class Halving(nn.Module):
    """A unet that halves."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return 0.5 * sample


def test_lipschitz_bound_is_of_the_two_together() -> None:
    scale, head = nn.Conv2d(1, 1, 1).eval(), nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()
    base = DenoisedClassifier(scale, head)
    product = abs(scale.weight.item()) * torch.linalg.matrix_norm(head[1].weight, 2).item()
    assert lipschitz_bound(base, {"noisy": torch.rand(1, *SHAPE)}).value == pytest.approx(product, rel=1e-2)
    diffusion = OneStepDiffusionDenoiser(Halving(), scheduler(kind="sample"), 0.25)
    bound = lipschitz_bound(DenoisedClassifier(diffusion, head), {"noisy": torch.rand(1, *SHAPE)}).value
    exact = diffusion.signal * 0.5 * torch.linalg.matrix_norm(head[1].weight, 2).item()
    assert exact <= bound <= 1.01 * exact


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 1), nn.BatchNorm2d(1)])
def test_norms_of_one_row_at_a_time_are_let_through(norm: nn.Module) -> None:
    base = DenoisedClassifier(norm.eval(), HEAD)
    SmoothedClassifier(base, 3, SmoothingConfig(sigma=0.5, n=100)).certify(torch.rand(SHAPE))


def test_denoisers_whose_rows_see_each_other_are_refused() -> None:
    base = DenoisedClassifier(lambda x: x - x.mean(0, keepdim=True), HEAD)
    with pytest.raises(RuntimeError, match="other rows of its batch"):
        SmoothedClassifier(base, 3, SmoothingConfig(sigma=0.5, n=100)).certify(torch.rand(SHAPE))


@pytest.mark.parametrize(
    ("denoiser", "error", "message"),
    [
        (lambda x: x[:, :, :1], ValueError, r"\(2, 1, 2, 3\) into \(2, 1, 1, 3\); it must keep the shape"),
        (lambda x: x[:1], ValueError, "must keep the shape"),
        (lambda x: (x, x), TypeError, "must return a tensor of images, got tuple; wrap it"),
        (lambda x: x / 0, RuntimeError, "denoiser returned NaN or infinity; check its weights"),
        (lambda x: x * math.nan, RuntimeError, "denoiser returned NaN or infinity"),
    ],
)
def test_outputs_that_are_no_images_are_refused(denoiser: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        DenoisedClassifier(denoiser, HEAD)(torch.rand(2, *SHAPE))


@pytest.mark.parametrize(
    ("unet", "error", "message"),
    [
        (lambda z, t: z[..., :1], ValueError, "use a model of images of 1 channels and this size"),
        (lambda z, t: z.repeat(1, 3, 1, 1), ValueError, "twice the channels for a learned variance"),
        (lambda z, t: (z,), TypeError, "a tensor or an object with .sample, got tuple"),
        (lambda z, t: torch.full_like(z, -math.inf), RuntimeError, "unet returned NaN or infinity"),
        (lambda z, t: z * math.nan, RuntimeError, "unet returned NaN or infinity"),
    ],
)
def test_outputs_of_a_unet_that_are_no_prediction_are_refused(unet: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        OneStepDiffusionDenoiser(unet, scheduler(), 0.25)(torch.rand(2, *SHAPE))


@pytest.mark.parametrize(
    ("schedule", "sigma", "error", "message"),
    [
        (scheduler(ALPHAS.flip(0)), 0.25, ValueError, "decreases within"),
        (scheduler(ALPHAS.repeat(2, 1)), 0.25, ValueError, r"of shape \(2, 1000\), must be a vector"),
        (scheduler(ALPHAS + 1), 0.25, ValueError, "decreases within"),
        (scheduler(ALPHAS - 0.5), 0.25, ValueError, "decreases within"),
        (scheduler(ALPHAS * math.nan), 0.25, ValueError, "decreases within"),
        (scheduler(ALPHAS[:0]), 0.25, ValueError, "decreases within"),
        (scheduler([0.0]), 0.25, ValueError, "decreases within"),
        (SimpleNamespace(), 0.25, TypeError, "no alphas_cumprod"),
        (SimpleNamespace(alphas_cumprod=ALPHAS), 0.25, TypeError, "no config.prediction_type; set it to one of eps"),
        (
            scheduler(kind="velocity"),
            0.25,
            ValueError,
            "Unknown prediction_type 'velocity'; known: epsilon, sample, v_",
        ),
        (scheduler(), 0.004, ValueError, r"nearest is 0\.005005, in .* from 0\.005 to 78\.7"),
        (scheduler(), 0.25 * 255 * 2, ValueError, r"nearest is 78\.78, in .*Give sigma in that unit"),
        (scheduler(ALPHAS[::100]), 0.25, ValueError, r"nearest is 0\.1713 and 0\.3622, in .*smooth with one of"),
        (scheduler([0.9, 0.0]), 5.0, ValueError, r"nearest is 0\.1668, in .* from 0\.1667 to 0\.1667"),
        (scheduler(), 0.0, ValueError, "sigma must be positive"),
        (scheduler(), math.inf, ValueError, "sigma must be positive"),
        (scheduler(), math.nan, ValueError, "sigma must be positive"),
        (scheduler(), "0.25", TypeError, "sigma must be a float"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(schedule: Any, sigma: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        OneStepDiffusionDenoiser(lambda z, t: z, schedule, sigma)


@given(step=st.integers(0, 8), share=st.floats(0.2, 0.8))
def test_noise_that_the_error_names_is_accepted(step: int, share: float) -> None:
    coarse = scheduler(ALPHAS[::100])
    below, above = (sigma_of(coarse.alphas_cumprod[t].item()) for t in (step, step + 1))
    with pytest.raises(ValueError, match="no timestep fits") as caught:
        OneStepDiffusionDenoiser(lambda z, t: z, coarse, below + share * (above - below))
    named = re.search(r"nearest is (\S+) and (\S+),", str(caught.value)).groups()
    timesteps = [OneStepDiffusionDenoiser(lambda z, t: z, coarse, float(sigma)).timestep for sigma in named]
    assert timesteps == [step, step + 1]


def test_embeddings_are_no_images_of_a_diffusion_model() -> None:
    with pytest.raises(ValueError, match="denoises images"):
        OneStepDiffusionDenoiser(lambda z, t: z, scheduler(), 0.25)(torch.rand(2, 5, 8))


def test_train_mode_is_refused() -> None:
    training = nn.Sequential(nn.Dropout()).eval()
    training[0].train()
    with pytest.raises(RuntimeError, match=r"call denoiser\.eval\(\) first"):
        DenoisedClassifier(training, HEAD)
    with pytest.raises(RuntimeError, match=r"call classifier\.eval\(\) first"):
        DenoisedClassifier(nn.Identity().eval(), training)
    with pytest.raises(RuntimeError, match=r"call unet\.eval\(\) first"):
        OneStepDiffusionDenoiser(training, scheduler(), 0.25)
    with pytest.raises(TypeError, match="denoiser must be callable, got float"):
        DenoisedClassifier(0.5, HEAD)
    base = DenoisedClassifier(OneStepDiffusionDenoiser(HalfConv(), scheduler(), 0.25), HEAD)
    assert not any(module.training for module in base.modules())
    with pytest.raises(RuntimeError, match="train mode"):
        SmoothedClassifier(base.train(), 3, SmoothingConfig(sigma=0.25, n=100)).certify(torch.rand(SHAPE))
    base.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 of them, 8 x 8, in a fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(data.target)[order]


NUM_TRAIN, NUM_TEST, SIGMA = 1500, 80, 0.5


def fit(module: nn.Module, loss_of: Callable[[Tensor], Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam(module.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.randint(NUM_TRAIN, (64,))).backward()
        optimizer.step()
        schedule.step()
    module.eval().requires_grad_(False)


def classifier_of_clean_digits(images: Tensor, labels: Tensor) -> nn.Module:
    classifier = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    fit(classifier, lambda i: functional.cross_entropy(classifier(images[i]), labels[i]), steps=200)
    return classifier


def denoiser_at(sigma: float, images: Tensor, classifier: nn.Module) -> nn.Module:
    """Trained, as by Salman et al., on the squared error and on the predictions for clean images; not on labels."""
    denoiser = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 128, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 32, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )

    def loss_of(i: Tensor) -> Tensor:
        denoised = denoiser(images[i] + sigma * torch.randn(len(i), 1, 8, 8))
        stability = functional.cross_entropy(classifier(denoised), classifier(images[i]).softmax(-1))
        return (denoised - images[i]).square().mean() + 0.1 * stability

    fit(denoiser, loss_of, steps=600)
    return denoiser


def test_denoiser_makes_a_classifier_of_clean_digits_certifiable(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier = classifier_of_clean_digits(images, labels)
    denoiser = denoiser_at(SIGMA, images, classifier)
    config = SmoothingConfig(sigma=SIGMA, n=400, batch_size=500)
    test = slice(NUM_TRAIN, NUM_TRAIN + NUM_TEST)

    def accuracy(base: nn.Module) -> float:
        smoothed = SmoothedClassifier(base, 10, config)
        found = dict(smoothed.certify_together(list(images[test])))
        return certified_accuracy([found[i] for i in range(NUM_TEST)], labels[test].tolist(), [0.25])[0]

    without, with_denoiser = accuracy(classifier), accuracy(DenoisedClassifier(denoiser, classifier))
    print(f"certified accuracy at 0.25: {without:.3f} without, {with_denoiser:.3f} with a denoiser")
    assert with_denoiser > 0.5
    assert with_denoiser > without + 0.2
