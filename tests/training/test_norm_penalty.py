import math

import pytest
import torch
from tiny_models import Examples, bert, gpt2, resnet, vit
from torch import nn
from torch.nn.utils import parametrizations

from hf_lipschitz import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.norm_penalty import norm_penalty, penalised_norms
from tests.operators import conv_norm


def penalty(model, target, *, power=2, **which):
    return norm_penalty(penalised_norms(model, **which), target, power=power)


def linear_weights(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def exact_penalty(weights, target, power):
    norms = [torch.linalg.matrix_norm(w.double().flatten(1), 2) for w in weights]
    return sum((norm - target).clamp_min(0) ** power for norm in norms)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("build", [bert, vit])
def test_value_and_gradient_are_those_of_the_singular_values(build, power):
    model = build(initializer_range=0.6)
    weights = linear_weights(model)
    norms = {n: torch.linalg.matrix_norm(w.detach().double().flatten(1), 2).item() for n, w in weights.items()}
    # Between two norms as far apart as there are, so that no excess is as small as the width of a bracket.
    ordered = sorted(norms.values())
    gap, target = max((high - low, (low + high) / 2) for low, high in zip(ordered, ordered[1:], strict=False))
    assert gap > 0.1
    value = penalty(model, target, power=power, rtol=1e-6)
    expected = exact_penalty(weights.values(), target, power)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert value >= expected
    found = torch.autograd.grad(value, weights.values(), allow_unused=True)
    wanted = torch.autograd.grad(expected, weights.values(), allow_unused=True)
    for name, mine, theirs in zip(weights, found, wanted, strict=True):
        if norms[name] < target:
            assert (mine == 0).all()
        else:
            torch.testing.assert_close(mine, theirs.float(), rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


def test_double_precision_is_kept():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    value = penalty(model, 0.1, rtol=1e-10)
    assert value.dtype == torch.float64
    expected = exact_penalty([model[0].weight, model[1].weight], 0.1, 2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-8)
    for mine, theirs in zip(
        torch.autograd.grad(value, [model[0].weight, model[1].weight]),
        torch.autograd.grad(expected, [model[0].weight, model[1].weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def circular_norm(kernel, points):
    """The largest singular value over a fine grid of frequencies, by an SVD of each transfer matrix."""
    transformed = torch.fft.fft2(kernel, s=(points, points)).permute(2, 3, 0, 1)
    return torch.linalg.matrix_norm(transformed, 2).max()


def test_convolutions_are_bounded_on_every_input_size():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False).double()
    value = penalty(conv, 0.0, power=1).item()
    assert conv_norm(conv, (9, 9)) <= value
    supremum = circular_norm(conv.weight.detach(), 96).item()
    assert supremum <= value <= 1.05 * supremum
    assert value >= conv_norm(conv, (12, 12)) * 1.0001


def test_gradient_of_a_convolution_is_that_of_the_dense_operator_at_its_worst_frequency():
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    (mine,) = torch.autograd.grad(penalty(conv, 0.0, power=1), conv.weight)
    # 8 (k - 1) frequencies an axis, and the factor between them (M. Riesz) on each.
    factor = math.cos(math.pi * 2 / (2 * 16)) ** -2
    (theirs,) = torch.autograd.grad(factor * circular_norm(conv.weight, 16), conv.weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    (finer,) = torch.autograd.grad(circular_norm(conv.weight, 96), conv.weight)
    assert (mine * finer).sum() / (mine.norm() * finer.norm()) > 0.97


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (4, 4)])
def test_kernels_no_longer_than_the_stride_are_matrices(kernel, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride=stride).double()
    value = penalty(conv, 0.3, rtol=1e-9)
    expected = exact_penalty([conv.weight], 0.3, 2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert value.item() == pytest.approx((conv_norm(conv, (2 * stride, 2 * stride)) - 0.3) ** 2, rel=1e-6)
    (mine,) = torch.autograd.grad(value, conv.weight)
    (theirs,) = torch.autograd.grad(expected, conv.weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_every_projection_inside_a_layer_counts():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2)
    blocks = [*attention.in_proj_weight.split(6), attention.out_proj.weight]
    value = penalty(attention, 0.2, rtol=1e-6)
    expected = exact_penalty(blocks, 0.2, 2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    (mine,) = torch.autograd.grad(value, attention.in_proj_weight)
    (theirs,) = torch.autograd.grad(expected, attention.in_proj_weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


def test_raw_weights_of_capped_layers_count_and_exact_layers_do_not():
    model = bert(initializer_range=0.6)
    plain = penalty(model, 0.5)
    lipschitzify(model, layer_lipschitz=0.5, mode="cap")
    value = penalty(model, 0.5)
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    value.backward()
    for layer in constrained_layers(model):
        assert layer.parametrization.original.grad.abs().max() > 0
    exact = lipschitzify(
        bert(initializer_range=0.6), layer_lipschitz=0.5, mode="exact", exclude_modules=["pooler.dense"]
    )
    (only,) = torch.autograd.grad(penalty(exact, 0.5), exact.bert.pooler.dense.weight)
    assert only.abs().max() > 0
    expected = exact_penalty([exact.bert.pooler.dense.weight], 0.5, 2).item()
    assert penalty(exact, 0.5).item() == pytest.approx(expected, rel=5e-3)
    with pytest.raises(ValueError, match="leave the penalty out"):
        penalty(lipschitzify(bert(), mode="exact"), 0.5)


@pytest.mark.parametrize("constrained", [False, True])
def test_gradients_go_through_weight_norm(constrained):
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)))
    weight = 3 * model[0].weight.detach()
    if constrained:
        lipschitzify(model, layer_lipschitz=0.25)
        model[0].parametrizations.weight[0].magnitude.data.mul_(3)
    else:
        model[0].parametrizations.weight.original0.data.mul_(3)
    value = penalty(model, 0.5, rtol=1e-6)
    assert value.item() == pytest.approx(exact_penalty([weight], 0.5, 2).item(), rel=1e-3)
    magnitude_and_direction = [p for p in model.parameters() if p.dim() == 2]
    gradients = torch.autograd.grad(value, magnitude_and_direction)
    assert [bool((g != 0).any()) for g in gradients] == [True, True]


def test_frozen_and_excluded_layers_are_left_out_and_shared_ones_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model[2].weight = model[1].weight
    expected = exact_penalty([model[1].weight, model[3].weight], 0.1, 2).item()
    assert penalty(model, 0.1).item() == pytest.approx(expected, rel=1e-2)
    only = exact_penalty([model[3].weight], 0.1, 2).item()
    assert penalty(model, 0.1, exclude_modules=["1"]).item() == pytest.approx(only, rel=1e-2)
    assert penalty(model, 0.1, target_modules="3").item() == pytest.approx(only, rel=1e-2)


def test_values_under_autocast_and_of_half_precision_weights_are_those_of_float32():
    model = gpt2()
    expected = penalty(model, 0.01).item()
    with torch.autocast("cpu", torch.bfloat16):
        value = penalty(model, 0.01)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-6)
    half = gpt2().bfloat16()
    rounded = penalty(half, 0.01)
    assert rounded.item() == pytest.approx(penalty(half.float(), 0.01).item(), rel=1e-3)
    half = gpt2().bfloat16()
    (gradient,) = torch.autograd.grad(penalty(half, 0.01), half.score.weight)
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().max() > 0


def test_zero_weights_have_no_penalty_and_no_nan():
    layer = nn.Linear(3, 3)
    layer.weight.data.zero_()
    value = penalty(layer, 0.0)
    value.backward()
    assert value == 0
    assert torch.isfinite(layer.weight.grad).all()


def test_descent_brings_the_norms_to_the_target():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 3, padding=1))
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    first = penalty(model, 1.0).item()
    for _ in range(200):
        optimizer.zero_grad()
        penalty(model, 1.0).backward()
        optimizer.step()
    assert first > 10
    assert penalty(model, 1.0) < 0.01 * first
    assert 1 < torch.linalg.matrix_norm(model[0].weight, 2) < 1.25


def test_it_adds_to_the_loss_of_a_trainer(tmp_path):
    class Penalised(LipschitzTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + 10 * penalty(model, 0.2) if model.training else loss
            return (loss, outputs) if return_outputs else loss

    model = resnet()
    before = penalty(model, 0.2).item()
    args = LipschitzTrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-2,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Penalised(model, args, train_dataset=Examples(model, 8)).train()
    assert penalty(model, 0.2).item() < 0.5 * before


@pytest.mark.parametrize(("values", "message"), [
    ({"target": -1.0}, "target must be finite and >= 0"),
    ({"target": float("nan")}, "target must be finite"),
    ({"target": 1.0, "power": 3}, "power must be 1 or 2"),
    ({"target": 1.0, "target_modules": ["nowhere"]}, "matches no layer"),
    ({"target": 1.0, "exclude_modules": ["0", "1"]}, "leaves no layer"),
    ({"target": 1.0, "rtol": 0.0}, "rtol must be"),
])  # fmt: skip
def test_errors_name_the_fix(values, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=message):
        penalty(model, **values)


def test_weights_that_are_not_numbers_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: weight holds NaN"):
        penalty(model, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_that_of_the_cpu():
    model = vit(initializer_range=0.6)
    expected = penalty(model, 0.3, rtol=1e-5)
    expected.backward()
    gradient = model.classifier.weight.grad
    on_gpu = vit(initializer_range=0.6).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        value = penalty(on_gpu, 0.3, rtol=1e-5)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(on_gpu.classifier.weight.grad.cpu(), gradient, rtol=1e-2, atol=1e-2)
