import copy

import pytest
import torch
from curvature_cases import BATCH, LABELS, PIXELS, double_batch, draws, run, small_net, task_of
from peft import LoraConfig, get_peft_model
from tiny_models import Examples, bert, gpt2, resnet, vit
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lipschitz import lipschitzify
from hf_lipschitz.training.curvature import task_curvature
from hf_lipschitz.training.sam import ascent
from hf_lipschitz.training.selection import curvature_layers
from hf_lipschitz.training.weights import replaced, trained_weights


def sam_step(model, batch, weights, rho):
    """SAM as it is written down: climb in place, take the gradient there, climb down. Returns L(w + ε) and it all."""
    model.zero_grad()
    model(**batch).loss.backward()
    norm = sum(weight.grad.pow(2).sum() for weight in weights).sqrt()
    steps = [rho * weight.grad / norm for weight in weights]
    starts = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, step in zip(weights, steps, strict=True):
            weight.add_(step)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    with torch.no_grad():
        for weight, start in zip(weights, starts, strict=True):
            weight.copy_(start)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("choice", ["all", "last block and head"])
@pytest.mark.parametrize("build", [bert, gpt2, vit, resnet])
def test_loss_and_penalty_have_the_gradient_of_sam(build, choice):
    model = build(**({} if build is resnet else {"initializer_range": 0.3, "attn_implementation": "sdpa"})).double()
    model.eval()
    batch = double_batch(model)
    layers = None if choice == "all" else list(curvature_layers(model).values())
    weights = list(model.parameters()) if layers is None else [layer.weight for layer in layers]
    expected_loss, expected = sam_step(model, batch, weights, 0.4)
    plain_loss = model(**batch).loss
    (plain_gradient,) = torch.autograd.grad(plain_loss, weights[0], retain_graph=True)
    loss = plain_loss + run(model, batch, "sam", layers=layers, radius=0.4)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-10)
    assert loss.item() > plain_loss.item() + 1e-3
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)
    assert (plain_gradient - weights[0].grad).norm() > 1e-2 * plain_gradient.norm()


def test_tied_weights_move_together():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=40, initializer_range=0.3)
    model = GPT2LMHeadModel(config).double().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.randint(3, 40, (3, 7), generator=draws())
    batch = {"input_ids": ids, "labels": ids}
    for layers, weights in ((None, list(model.parameters())), ([model.lm_head], [model.lm_head.weight])):
        expected_loss, expected = sam_step(model, batch, weights, 0.4)
        loss = model(**batch).loss + run(model, batch, "sam", layers=layers, radius=0.4)
        loss.backward()
        assert loss.item() == pytest.approx(expected_loss, rel=1e-10)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)
        model.zero_grad()


def test_adapters_and_the_copy_of_the_head_move():
    model = bert(initializer_range=0.3, attn_implementation="sdpa").double()
    batch = double_batch(model)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(weights) == 10
    expected_loss, expected = sam_step(model, batch, weights, 0.4)
    loss = model(**batch).loss + run(model, batch, "sam", layers=None, radius=0.4)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-10)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)

    constrained = lipschitzify(bert(initializer_range=0.3), layer_lipschitz=0.5)
    constrained = get_peft_model(constrained, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    assert run(constrained, Examples(bert()).batch(), "sam", layers=None) > 0


@pytest.mark.parametrize("method", ["gram", "rescaling"])
def test_effective_weights_move_and_the_gradient_goes_through_the_constraint(method):
    model = lipschitzify(small_net(hidden=3), method=method, layer_lipschitz=0.4)
    layers = [model[1], model[3]]
    with parametrize.cached():
        effective = [layer.weight for layer in layers]
        others = {"1.bias": model[1].bias, "3.bias": model[3].bias}
        plain = small_net(hidden=3)

        def loss_at(first, second):
            logits = functional_call(plain, {"1.weight": first, "3.weight": second, **others}, PIXELS)
            return cross_entropy(logits, LABELS)

        gradients = torch.autograd.grad(loss_at(*effective), effective, retain_graph=True)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        moved = [w + 0.3 * g / norm for w, g in zip(effective, gradients, strict=True)]
        expected = loss_at(*moved) - loss_at(*effective)
        parameters = list(model.parameters())
        expected_gradients = torch.autograd.grad(expected, parameters)
    penalty = task_curvature(model, layers, task_of(model), BATCH, draws(), "sam", 0.3)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, parameters), expected_gradients)
    assert penalty > 1e-3


def test_small_radii_give_the_norm_of_the_gradient():
    model = small_net()
    weights = list(model.parameters())
    gradients = torch.autograd.grad(cross_entropy(model(PIXELS), LABELS), weights)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    penalty = task_curvature(model, None, task_of(model), BATCH, draws(), "sam", 1e-4)
    assert penalty.item() / 1e-4 == pytest.approx(norm, rel=1e-3)


def test_ascent_has_one_norm_for_all_weights():
    steps = ascent([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], 0.5)
    torch.testing.assert_close(steps, [torch.tensor([0.3, 0.0]), torch.tensor([[0.4]])])
    assert all(torch.equal(step, torch.zeros(2)) for step in ascent([torch.zeros(2), torch.zeros(2)], 0.5))
    (step,) = ascent([torch.ones(4000, dtype=torch.bfloat16)], 1.0)
    assert step.dtype == torch.bfloat16
    assert step.float().norm().item() == pytest.approx(1.0, rel=0.01)


def test_weights_are_replaced_and_come_back():
    model = lipschitzify(small_net(), layer_lipschitz=0.4, target_modules=["1"])
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with parametrize.cached():
        weights = trained_weights(model)
        assert [tuple(w.shape) for w in weights] == [(2,), (2, 2), (2, 2), (2,)]
        assert not any(w is model[1].parametrizations.weight.original for w in weights)
        values = [torch.zeros_like(w) for w in weights]
        with replaced(model, weights, values):
            assert model[1].weight is values[1]
            assert torch.equal(model(PIXELS), torch.zeros(5, 2, dtype=torch.float64))
        with pytest.raises(KeyError), replaced(model, weights, values):
            raise KeyError
        assert model[1].weight is weights[1]
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model(PIXELS).abs().sum() > 0


def test_other_weights_of_a_parametrized_module_stay():
    torch.manual_seed(0)
    attention = lipschitzify(nn.MultiheadAttention(4, 2, kdim=3, vdim=5), layer_lipschitz=0.5)
    query, key, value = torch.randn(2, 1, 4), torch.randn(6, 1, 3), torch.randn(6, 1, 5)
    with parametrize.cached():
        expected = attention(query, key, value)[0]
        weight = attention.q_proj_weight
        with replaced(attention, [weight], [weight.clone()]):
            torch.testing.assert_close(attention(query, key, value)[0], expected)
        with replaced(attention, [weight], [weight * 3]):
            assert (attention(query, key, value)[0] - expected).abs().max() > 1e-3


def test_recurrent_layers_are_an_error():
    model = nn.LSTM(2, 3)
    weights = trained_weights(model)
    with pytest.raises(ValueError, match="name other modules"), replaced(model, weights, weights):
        pass
