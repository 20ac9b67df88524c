import pytest
import torch
from tiny_models import vit
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hf_lipschitz.nn.modes import evaluating
from hf_lipschitz.training.smoothing_attack import smooth_adversary
from hf_lipschitz.training.smoothing_losses import smoothed_cross_entropy


DIRECTIONS = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)


def linear(x):
    return x @ DIRECTIONS.T


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 3)).double()


def test_a_linear_classifier_has_its_adversary_against_the_difference_of_rows():
    x, noise = normal(3, 2), 0.5 * normal(4, 3, 2, seed=1)
    found = smooth_adversary(linear, x, torch.tensor([0, 1, 0]), noise, radius=0.25, num_steps=3)
    signs = torch.tensor([[-1.0], [1.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(found, x + 0.25 * signs * torch.tensor([0.6, 0.8], dtype=torch.float64))


def test_one_step_is_that_of_autograd_on_the_mean_score():
    model, x, noise = net(), normal(4, 2, seed=3), 0.3 * normal(5, 4, 2, seed=4)
    labels = torch.tensor([0, 1, 2, 0])
    found = smooth_adversary(model, x, labels, noise, radius=10.0, num_steps=1, step_size=0.2)
    for row in range(4):
        leaf = x[row].clone().requires_grad_()
        scores = torch.stack([F.softmax(model(leaf + delta), -1) for delta in noise[:, row]]).mean(0)
        (gradient,) = torch.autograd.grad(-scores[labels[row]].log(), leaf)
        torch.testing.assert_close(found[row], x[row] + 0.2 * gradient / gradient.norm(), rtol=1e-9, atol=1e-12)


def test_every_step_sees_the_same_noise_copy_after_copy():
    model, x, noise = net(), normal(3, 2), normal(4, 3, 2, seed=1)
    seen = []

    def logits_of(inputs):
        seen.append(inputs.detach())
        return model(inputs)

    labels = torch.tensor([0, 1, 2])
    found = smooth_adversary(logits_of, x, labels, noise, radius=0.5, num_steps=4)
    assert len(seen) == 4
    for inputs in seen:
        centres = inputs.view(4, 3, 2) - noise
        torch.testing.assert_close(centres, centres[:1].expand_as(centres))
    torch.testing.assert_close(seen[0].view(4, 3, 2)[0] - noise[0], x)
    assert not torch.equal(seen[0], seen[1])
    again = smooth_adversary(model, x, labels, noise, radius=0.5, num_steps=4)
    assert torch.equal(found, again)


def test_it_raises_the_loss_and_stays_in_the_ball():
    model, x, noise = net(), normal(8, 2), 0.25 * normal(6, 8, 2, seed=1)
    labels = model(x).argmax(-1)

    def loss(inputs):
        return smoothed_cross_entropy(model(inputs + noise), labels).item()

    values = [loss(x)]
    for radius in (0.1, 0.4, 1.0):
        found = smooth_adversary(model, x, labels, noise, radius=radius, num_steps=8)
        distances = (found - x).norm(dim=1)
        assert (distances <= radius * (1 + 1e-12)).all()
        assert distances.max() >= radius * (1 - 1e-6)
        values.append(loss(found))
    assert values == sorted(values)
    # The best of many points of the sphere is hardly better.
    angles = torch.linspace(0, 6.2832, 400, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], -1)
    per_example = [
        max(-F.softmax(model(x[i] + s + noise[:, i]), -1).mean(0)[labels[i]].log().item() for s in circle)
        for i in range(8)
    ]
    assert values[-1] >= 0.95 * sum(per_example) / 8


def test_bounds_hold_and_examples_do_not_depend_on_each_other():
    model, noise = net(), normal(3, 4, 2, seed=1)
    x = torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])
    values = {"radius": 2.0, "num_steps": 5, "bounds": (0.0, 1.0)}
    found = smooth_adversary(model, x, labels, noise, **values)
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found == 0) | (found == 1)).any()
    alone = smooth_adversary(model, x[2:3], labels[2:3], noise[:, 2:3], **values)
    torch.testing.assert_close(found[2:3], alone)


def test_confident_predictions_are_attacked_as_well():
    # Gradients of 1e-35, whose squares are no float32 numbers.
    x, noise = torch.tensor([[16.0, 0.0]]), torch.zeros(1, 1, 2)
    weight = torch.tensor([[2.5, 0.0], [-2.5, 0.0]])
    found = smooth_adversary(lambda z: z @ weight.T, x, torch.tensor([0]), noise, radius=1.0, num_steps=2)
    torch.testing.assert_close(found, torch.tensor([[15.0, 0.0]]))


def test_flat_logits_move_nothing():
    x = normal(2, 2)
    found = smooth_adversary(
        lambda z: 0 * z, x, torch.tensor([0, 1]), torch.zeros(2, 2, 2), radius=1.0, num_steps=2, bounds=(-9.0, 9.0)
    )
    assert torch.equal(found, x)


def test_parameters_buffers_and_random_numbers_are_left_alone():
    model = vit(hidden_dropout_prob=0.5).train()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()

    def attack():
        with torch.no_grad(), evaluating(model):
            return smooth_adversary(
                lambda z: model(pixel_values=z).logits, x, torch.tensor([0, 1]), noise, radius=0.5, num_steps=2
            )

    found = attack()
    assert torch.equal(found, attack())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not found.requires_grad
    assert (found - x).flatten(1).norm(dim=1).tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


def test_half_precision_is_computed_in_float32():
    model = net().float()
    x, noise = normal(3, 2).bfloat16(), normal(2, 3, 2, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = smooth_adversary(model, x, torch.tensor([0, 1, 2]), noise, radius=0.5, num_steps=2)
    assert found.dtype == torch.float32
    assert ((found - x.float()).norm(dim=1) <= 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"radius": 0.0}, ValueError, "radius must be finite and > 0"),
    ({"num_steps": 0}, ValueError, "leave the attack out"),
    ({"step_size": -1.0}, ValueError, "step_size must be finite and > 0"),
    ({"bounds": (1.0, 0.0)}, ValueError, "least < largest"),
    ({"noise": torch.zeros(2, 2)}, ValueError, r"noise must have shape \(m, 2, 2\)"),
    ({"noise": torch.zeros(0, 2, 2)}, ValueError, "noise must have shape"),
    ({"inputs": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "attack embeddings"),
    ({"labels": torch.tensor([0, 2])}, ValueError, r"labels must be in \[0, 2\)"),
    ({"logits_of": lambda z: z[:1]}, ValueError, "1 rows for 4 inputs"),
    ({"logits_of": lambda z: z.detach()}, ValueError, "do not depend on the inputs"),
    ({"logits_of": lambda z: z * torch.nan}, ValueError, "NaN or inf"),
])  # fmt: skip
def test_errors_name_the_fix(changes, error, message):
    values = {
        "logits_of": lambda z: z, "inputs": torch.zeros(2, 2), "labels": torch.tensor([0, 1]),
        "noise": torch.zeros(2, 2, 2), "radius": 1.0, "num_steps": 1, **changes,
    }  # fmt: skip
    positional = [values.pop(name) for name in ("logits_of", "inputs", "labels", "noise")]
    with pytest.raises(error, match=message):
        smooth_adversary(*positional, **values)
