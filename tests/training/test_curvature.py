import copy
import itertools

import pytest
import torch
from tiny_models import Examples, bert, resnet, vit
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hf_lipschitz import lipschitzify
from hf_lipschitz.conversion import materialized
from hf_lipschitz.training.curvature import curvature_penalty, hessian_vector_square, hutchinson, rademacher
from hf_lipschitz.training.selection import curvature_layers


INPUTS = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 1, 0, 1])


def small_net(hidden=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()


def loss_of_flat(flat, model):
    weights = {"0.weight": flat[:4].view(2, 2), "2.weight": flat[4:].view(2, 2)}
    return cross_entropy(functional_call(model, weights, INPUTS), TARGETS)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mean_over_all_sign_vectors_is_the_square_frobenius_norm():
    model = small_net()
    weights = [model[0].weight, model[2].weight]
    flat = torch.cat([w.detach().flatten() for w in weights])
    hessian = torch.func.hessian(loss_of_flat)(flat, model)
    values = []
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        v = torch.tensor(signs, dtype=torch.float64)
        loss = cross_entropy(model(INPUTS), TARGETS)
        value = hessian_vector_square(loss, weights, [v[:4].view(2, 2), v[4:].view(2, 2)])
        torch.testing.assert_close(value, (hessian @ v).pow(2).sum())
        values.append(value)
    torch.testing.assert_close(torch.stack(values).mean(), hessian.pow(2).sum())


def test_probes_are_signs_from_the_generator_alone():
    weights = [torch.empty(30, 20, dtype=torch.float64), torch.empty(50)]
    state = torch.get_rng_state()
    first, again, other = (rademacher(weights, draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c, w in zip(first, again, other, weights, strict=True):
        assert a.dtype == w.dtype
        assert set(a.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.mean().abs() < 5 / a.numel() ** 0.5


def test_gradient_of_the_penalty_is_its_derivative():
    model = small_net()
    names = ["0.weight", "2.weight"]

    def penalty(*weights):
        loss = cross_entropy(functional_call(model, dict(zip(names, weights, strict=True)), INPUTS), TARGETS)
        return hutchinson(loss, weights, draws())

    weights = [model.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(penalty, weights)


def penalty_of(model, seed=0):
    layers = [model[0], model[2]]
    return curvature_penalty(model, layers, lambda: cross_entropy(model(INPUTS), TARGETS), draws(seed), "hutchinson")


def test_constrained_layers_count_by_their_effective_weights():
    model = lipschitzify(small_net(), layer_lipschitz=0.4, rtol=1e-6)
    with materialized(model, copy=True) as plain:
        plain.requires_grad_()
        expected = penalty_of(plain)
    penalty = penalty_of(model)
    torch.testing.assert_close(penalty, expected)
    raw = model[0].parametrizations.weight.original
    with torch.no_grad():
        raw.mul_(7.0)
    model[0].parametrizations.weight[0].refresh()
    torch.testing.assert_close(penalty_of(model), expected, rtol=2e-5, atol=0)


def test_gradient_through_the_constraint_is_the_derivative():
    model = lipschitzify(small_net(), layer_lipschitz=0.4, rtol=1e-12)
    raw = model[0].parametrizations.weight.original
    (gradient,) = torch.autograd.grad(penalty_of(model), raw)
    step = 1e-5
    for index in itertools.product(range(2), range(2)):
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            moved_layer = moved[0].parametrizations.weight
            with torch.no_grad():
                moved_layer.original[index] += sign * step
            moved_layer[0].bind(moved_layer, 0.4)
            values.append(penalty_of(moved).item())
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


def finite_differences(model, layers, batch, seed):
    """‖Hv‖² from gradients at w ± εv: no second derivative is taken."""
    weights = [layer.weight for layer in layers]
    starts, vectors, step = [w.detach().clone() for w in weights], rademacher(weights, draws(seed)), 1e-5

    def gradients_at(distance):
        with torch.no_grad():
            for weight, start, vector in zip(weights, starts, vectors, strict=True):
                weight.copy_(start + distance * vector)
        return torch.autograd.grad(model(**batch).loss, weights)

    pairs = zip(gradients_at(step), gradients_at(-step), strict=True)
    square = sum(((a - b) / (2 * step)).pow(2).sum() for a, b in pairs).item()
    gradients_at(0.0)
    return square


@pytest.mark.parametrize("build", [bert, vit, resnet])
def test_penalty_of_a_model_in_training_mode_is_that_of_its_evaluation(build):
    overrides = {} if build is resnet else {"hidden_dropout_prob": 0.5, "attn_implementation": "sdpa"}
    model = build(**overrides).double()
    batch = Examples(model, 4).batch()
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    layers = list(curvature_layers(model).values())
    model.eval()
    expected = finite_differences(model, layers, batch, seed=5)
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    penalty = curvature_penalty(model, layers, lambda: model(**batch).loss, draws(5), "hutchinson")
    penalty.backward()
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers)


def test_default_weights_are_the_last_block_and_the_head():
    names = list(curvature_layers(bert()))
    assert names[-1] == "classifier"
    assert len(names) == 7
    assert all(name.startswith("bert.encoder.layer.1.") for name in names[:-1])
    names = list(curvature_layers(resnet()))
    assert names[-1] == "classifier.1"
    assert all(name.startswith("resnet.encoder.stages.1.") for name in names[:-1])


def test_named_modules_are_found_by_their_endings():
    names = list(curvature_layers(bert(), ["layer.0", "pooler"]))
    assert len(names) == 7
    assert names[-1] == "bert.pooler.dense"
    assert list(curvature_layers(bert(), ["query"])) == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]


def test_frozen_weights_are_left_out():
    model = bert()
    model.bert.requires_grad_(False)
    assert list(curvature_layers(model)) == ["classifier"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trained weight"):
        curvature_layers(model)


def test_selection_errors_name_the_fix():
    with pytest.raises(ValueError, match="no module 'keys'"):
        curvature_layers(bert(), ["keys"])
    with pytest.raises(ValueError, match="curvature_modules"):
        curvature_layers(small_net())
    model = bert()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        curvature_layers(model)
