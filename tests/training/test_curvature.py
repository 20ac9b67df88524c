import copy
import itertools
import math

import pytest
import torch
from curvature_cases import BATCH, LABELS, PIXELS, double_batch, draws, run, small_net, task_of
from peft import LoraConfig, get_peft_model
from tiny_models import Examples, bert, gpt2, resnet, vit
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from hf_lipschitz import lipschitzify
from hf_lipschitz.conversion import materialized
from hf_lipschitz.training.curvature import CURVATURES, _fill_cache, check_curvature, curvature_radius, task_curvature
from hf_lipschitz.training.curvature_problem import CurvatureProblem
from hf_lipschitz.training.hessian import (
    hessian_vector_product,
    hutchinson,
    inner,
    rademacher,
    square_norm,
    trace,
)
from hf_lipschitz.training.selection import curvature_layers


KINDS = list(CURVATURES)
DRAWN = ["hutchinson", "trace", "gauss_newton"]


def loss_of_flat(flat, model):
    weights = {"1.weight": flat[:4].view(2, 2), "3.weight": flat[4:].view(2, 2)}
    return cross_entropy(functional_call(model, weights, PIXELS), LABELS)


def test_means_over_all_sign_vectors_are_the_square_frobenius_norm_and_the_trace():
    model = small_net()
    weights = [model[1].weight, model[3].weight]
    flat = torch.cat([w.detach().flatten() for w in weights])
    hessian = torch.func.hessian(loss_of_flat)(flat, model)
    squares, forms = [], []
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        v = torch.tensor(signs, dtype=torch.float64)
        vectors = [v[:4].view(2, 2), v[4:].view(2, 2)]
        product = hessian_vector_product(cross_entropy(model(PIXELS), LABELS), weights, vectors)
        torch.testing.assert_close(torch.cat([part.flatten() for part in product]), hessian @ v)
        squares.append(square_norm(product))
        forms.append(inner(product, vectors))
    torch.testing.assert_close(torch.stack(squares).mean(), hessian.pow(2).sum())
    torch.testing.assert_close(torch.stack(forms).mean(), hessian.trace())
    variance = 2 * (hessian.pow(2).sum() - hessian.diagonal().pow(2).sum())
    torch.testing.assert_close(torch.stack(forms).var(correction=0), variance)


def test_estimates_are_those_of_the_probe_that_the_generator_draws():
    model = small_net()
    weights = [model[1].weight, model[3].weight]
    flat = torch.cat([w.detach().flatten() for w in weights])
    hessian = torch.func.hessian(loss_of_flat)(flat, model)
    traces = []
    for seed in range(30):
        v = torch.cat([part.flatten() for part in rademacher(weights, draws(seed))])
        assert penalty_of(model, seed, "hutchinson").item() == pytest.approx((hessian @ v).pow(2).sum().item())
        traces.append(penalty_of(model, seed, "trace").item())
        assert traces[-1] == pytest.approx((v @ hessian @ v).item())
    assert len(set(traces)) > 5


def test_trace_is_that_of_the_hessian_where_it_is_negative():
    model = nn.Linear(3, 1, bias=False).double()
    loss = -3.0 * model.weight.pow(2).sum()
    problem = CurvatureProblem(model, [model.weight], lambda inputs: (loss, None), {}, draws())
    assert trace(problem).item() == pytest.approx(-18.0)


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


def test_sums_of_half_precision_are_in_float32():
    part = torch.full((4000,), 0.1, dtype=torch.bfloat16)
    expected = 4000 * part[0].double().item() ** 2
    assert square_norm([part]).item() == pytest.approx(expected, rel=1e-5)
    assert inner([part], [part]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [hutchinson, trace])
def test_gradient_of_the_penalty_is_its_derivative(kind):
    model = small_net()
    names = ["1.weight", "3.weight"]

    def penalty(*weights):
        def task_loss(inputs):
            return cross_entropy(functional_call(model, dict(zip(names, weights, strict=True)), PIXELS), LABELS), None

        return kind(CurvatureProblem(model, weights, task_loss, {}, draws()))

    weights = [model.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(penalty, weights)


def penalty_of(model, seed=0, curvature="hutchinson"):
    return task_curvature(model, [model[1], model[3]], task_of(model), BATCH, draws(seed), curvature)


@pytest.mark.parametrize("curvature", KINDS)
def test_constrained_layers_count_by_their_effective_weights(curvature):
    model = lipschitzify(small_net(), layer_lipschitz=0.4, rtol=1e-6)
    with materialized(model, copy=True) as plain:
        plain.requires_grad_()
        expected = penalty_of(plain, curvature=curvature)
    penalty = penalty_of(model, curvature=curvature)
    assert penalty.abs() > 1e-4
    torch.testing.assert_close(penalty, expected)
    raw = model[1].parametrizations.weight.original
    with torch.no_grad():
        raw.mul_(7.0)
    model[1].parametrizations.weight[0].refresh()
    torch.testing.assert_close(penalty_of(model, curvature=curvature), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("curvature", [kind for kind in KINDS if kind != "sam"])
def test_gradient_through_the_constraint_is_the_derivative(curvature):
    model = lipschitzify(small_net(), layer_lipschitz=0.4, rtol=1e-12)
    raw = model[1].parametrizations.weight.original
    (gradient,) = torch.autograd.grad(penalty_of(model, curvature=curvature), raw)
    assert gradient.abs().max() > 1e-4
    step = 1e-5
    for index in itertools.product(range(2), range(2)):
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            moved_layer = moved[1].parametrizations.weight
            with torch.no_grad():
                moved_layer.original[index] += sign * step
            moved_layer[0].bind(moved_layer, 0.4)
            values.append(penalty_of(moved, curvature=curvature).item())
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)


def finite_differences(model, layers, batch, seed):
    """‖Hv‖² and vᵀHv from gradients at w ± εv: no second derivative is taken."""
    weights = [layer.weight for layer in layers]
    starts, vectors, step = [w.detach().clone() for w in weights], rademacher(weights, draws(seed)), 1e-5

    def gradients_at(distance):
        with torch.no_grad():
            for weight, start, vector in zip(weights, starts, vectors, strict=True):
                weight.copy_(start + distance * vector)
        return torch.autograd.grad(model(**batch).loss, weights)

    pairs = zip(gradients_at(step), gradients_at(-step), strict=True)
    product = [(a - b) / (2 * step) for a, b in pairs]
    gradients_at(0.0)
    return {
        "hutchinson": sum(part.pow(2).sum() for part in product).item(),
        "trace": sum((part * vector).sum() for part, vector in zip(product, vectors, strict=True)).item(),
    }


@pytest.mark.parametrize("curvature", ["hutchinson", "trace"])
@pytest.mark.parametrize("build", [bert, vit, resnet])
def test_penalty_of_a_model_in_training_mode_is_that_of_its_evaluation(build, curvature):
    model = with_dropout(build).double()
    batch = double_batch(model)
    layers = list(curvature_layers(model).values())
    model.eval()
    expected = finite_differences(model, layers, batch, seed=5)[curvature]
    model.train()
    penalty = run(model, batch, curvature)
    penalty.backward()
    assert penalty.item() == pytest.approx(expected, rel=1e-4)
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers)


def with_dropout(build):
    if build is resnet:
        return build()
    names = ("resid_pdrop", "attn_pdrop") if build is gpt2 else ("hidden_dropout_prob", "attention_probs_dropout_prob")
    model = build(attn_implementation="sdpa", **({} if build is gpt2 else dict.fromkeys(names, 0.5)))
    assert build is gpt2 or any(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))
    return model


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("build", [bert, gpt2, vit, resnet])
def test_nothing_but_the_penalty_comes_of_it(build, curvature):
    model = with_dropout(build).double()
    batch = double_batch(model)
    model.eval()
    expected = run(model, batch, curvature).item()
    model.train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state, given, flash = torch.get_rng_state(), dict(batch), torch.backends.cuda.flash_sdp_enabled()
    penalty = run(model, batch, curvature)
    assert penalty.item() == expected
    assert penalty.item() != 0
    assert all(parameter.grad is None for parameter in model.parameters())
    penalty.backward()
    assert all(math.isfinite(p.grad.abs().sum().item()) for p in model.parameters() if p.grad is not None)
    assert all(layer.weight.grad.abs().sum() > 0 for layer in curvature_layers(model).values())
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert all(batch[name] is value for name, value in given.items())
    assert batch.keys() == given.keys()


@pytest.mark.parametrize("curvature", KINDS)
def test_penalties_depend_on_the_generator_alone(curvature):
    model = bert(initializer_range=0.3).double()
    batch = double_batch(model)
    torch.manual_seed(1)
    first = run(model, batch, curvature, seed=0).item()
    torch.manual_seed(2)
    assert run(model, batch, curvature, seed=0).item() == first
    others = {run(model, batch, curvature, seed=seed).item() for seed in range(4)}
    assert len(others) == (4 if curvature in DRAWN else 1)


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("build", [bert, gpt2, vit])
def test_fused_attention_and_checkpointing_change_nothing(build, curvature):
    def value_and_gradients(attention, checkpointing=False):
        model = build(initializer_range=0.3, attn_implementation=attention).double().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert model.is_gradient_checkpointing
        penalty = run(model, double_batch(model), curvature)
        penalty.backward()
        return penalty, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    fused = value_and_gradients("sdpa")
    torch.testing.assert_close(value_and_gradients("sdpa", checkpointing=True), fused)
    # Some models take softmax in float32 where it is eager.
    torch.testing.assert_close(value_and_gradients("eager"), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("build", [bert, vit, resnet])
def test_bfloat16_autocast_is_close(build, curvature):
    model = lipschitzify(build(**({} if build is resnet else {"initializer_range": 0.3})), layer_lipschitz=2.0)
    batch = Examples(model, 4).batch()
    values = {"radius": 0.5} if curvature == "sam" else {}
    expected = run(model, batch, curvature, **values).item()
    with torch.autocast("cpu", torch.bfloat16):
        penalty = run(model, batch, curvature, **values)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(expected, rel=0.1)
    penalty.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("curvature", DRAWN)
def test_penalty_on_all_weights_counts_each_of_them(curvature):
    model = small_net()
    values = {}
    for name, layers in (("all", None), ("chosen", [model[1], model[3]])):
        penalty = task_curvature(model, layers, task_of(model), BATCH, draws(), curvature)
        values[name] = penalty.item()
    model[1].bias.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    without_biases = task_curvature(model, None, task_of(model), BATCH, draws(), curvature).item()
    assert without_biases == values["chosen"]
    assert values["all"] != values["chosen"]


def test_frozen_layers_do_not_count_and_none_left_is_an_error():
    model = small_net()
    model[1].requires_grad_(False)
    only = task_curvature(model, [model[3]], task_of(model), BATCH, draws(), "hutchinson").item()
    assert penalty_of(model).item() == only
    model.requires_grad_(False)
    for curvature in KINDS:
        with pytest.raises(ValueError, match="needs a trained weight"):
            penalty_of(model, curvature=curvature)
        with pytest.raises(ValueError, match="needs a trained weight"):
            task_curvature(model, None, task_of(model), BATCH, draws(), curvature)


def test_errors_name_the_fix():
    model = bert()
    with pytest.raises(ValueError, match="unknown curvature 'ridge'; known: hutchinson"):
        check_curvature(model, "ridge")
    assert (curvature_radius("trace"), curvature_radius("sam"), curvature_radius("sam", 0.2)) == (0, 0.05, 0.2)
    with pytest.raises(ValueError, match="'trace' has no radius, only 'cure' and 'sam' have"):
        curvature_radius("trace", 1.0)
    for radius in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="curvature_radius must be positive and finite"):
            run(model, Examples(model).batch(), "sam", radius=radius)
    for attention in ("flash_attention_2", "flex_attention"):
        model.config._attn_implementation_internal = attention
        for curvature in KINDS:
            if curvature == "sam":
                check_curvature(model, curvature)
                continue
            with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
                run(model, Examples(model).batch(), curvature, layers=[model.classifier])


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


@pytest.mark.parametrize("build", [bert, gpt2, vit, resnet])
def test_constraints_change_nothing_of_the_default_layers(build):
    assert list(curvature_layers(lipschitzify(build(), layer_lipschitz=0.5))) == list(curvature_layers(build()))


def test_a_trained_copy_of_a_frozen_head_counts_by_its_own_weight():
    model = get_peft_model(
        lipschitzify(bert(), layer_lipschitz=0.5), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    )
    head = model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        head.parametrizations.weight.original.mul_(0.01)
    weight = head.weight.detach().clone()
    with parametrize.cached():
        _fill_cache(model)
        assert head.weight.requires_grad
        torch.testing.assert_close(head.weight.detach(), weight)
