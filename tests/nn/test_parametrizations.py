from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_lipschitz.conversion import lipschitzify, materialized
from hf_lipschitz.nn import parametrizations, references
from hf_lipschitz.nn.attachment import constrained_layers
from tests.operators import conv_norm, dense_norm


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)


def norms(model: nn.Module) -> list[float]:
    return [dense_norm(layer.effective_weight) for layer in constrained_layers(model)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        # Ascent on the output grows the weights, so that the constraint has work to do.
        (-model(torch.randn(7, 20)).square().sum()).backward()
        optimizer.step()
        assert max(norms(model)) <= 0.5 * (1 + 1e-7)


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("mode", ["cap", "exact"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
        lambda p: torch.optim.Adafactor(p, lr=0.05),
    ],
    ids=["fused adamw", "foreach adamw", "fused sgd", "adafactor"],
)
def test_norms_hold_at_every_read_under_every_optimizer(optimizer: object, mode: str, refresh_every: int) -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5, mode=mode, refresh_every=refresh_every)
    train(model, optimizer(model.parameters()), steps=10)


def test_norms_hold_whatever_changed_the_weights() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    raw = model[0].parametrizations.weight.original
    changes = [
        lambda: raw.data.mul_(7),
        lambda: raw.data.add_(torch.randn_like(raw)),
        lambda: raw.data.copy_(torch.randn_like(raw) * 1e-20),
        lambda: setattr(model[0], "weight", torch.randn(30, 20)),
        lambda: model.load_state_dict(lipschitzify(mlp(), layer_lipschitz=0.5).state_dict()),
        lambda: nn.init.constant_(raw, 3.0),
        lambda: model.double(),
        lambda: model.float(),
        lambda: model.train(not model.training),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        assert max(norms(model)) <= 0.5 * (1 + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_to_the_stored_dtype_is_covered(dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        cast_after = lipschitzify(mlp(), layer_lipschitz=0.5, mode="exact").to(dtype)
        cast_before = lipschitzify(mlp(dtype), layer_lipschitz=0.5, mode="exact")
        for model in (cast_after, cast_before):
            assert {layer.effective_weight.dtype for layer in constrained_layers(model)} == {dtype}
            assert all(0.45 <= norm <= 0.5 for norm in norms(model))


@pytest.mark.parametrize("constant", [1e-2, 9e-5])
def test_rounding_below_the_normal_numbers_of_float16_is_covered(constant: float) -> None:
    linear = nn.Linear(700, 700).half()
    linear.weight.data.fill_(1.0)
    lipschitzify(linear, layer_lipschitz=constant)
    assert dense_norm(linear.weight) <= constant


def test_a_bound_that_is_lost_never_lifts_the_constraint() -> None:
    large = nn.Linear(64, 64)
    large.weight.data = torch.eye(64) * 1e5
    lipschitzify(large, layer_lipschitz=1.0)
    with torch.autocast("cpu", dtype=torch.float16):
        assert dense_norm(large.weight) <= 1
    huge = nn.Linear(100, 100)
    huge.weight.data.fill_(3e38)
    lipschitzify(huge, layer_lipschitz=1.0)
    assert dense_norm(huge.weight) <= 1
    garbage = lipschitzify(nn.Linear(8, 8), layer_lipschitz=1.0)
    garbage.parametrizations.weight[0]._apply(lambda t: torch.full_like(t, torch.nan))
    garbage.parametrizations.weight.original.data.copy_(torch.randn(8, 8) * 10)
    assert dense_norm(garbage.weight) <= 1


def test_a_weight_read_in_another_dtype_than_the_reference_is_covered() -> None:
    linear = nn.Linear(3, 3)
    linear.weight.data.fill_(1.0)
    lipschitzify(linear, layer_lipschitz=1.0)
    linear.parametrizations.weight.original.data = torch.ones(3, 3, dtype=torch.bfloat16)
    assert dense_norm(linear.weight) <= 1


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
def test_a_convolution_far_from_its_reference_is_bounded_as_an_operator(padding_mode: str) -> None:
    """Its operator norm may exceed the Frobenius norm of the kernel: by the root of the number of taps."""
    module = nn.Conv2d(1, 1, 3, padding=1, padding_mode=padding_mode, bias=False)
    lipschitzify(module, layer_lipschitz=0.5, refresh_every=1000)
    module.parametrizations.weight.original.data.fill_(1.0)
    plain = nn.Conv2d(1, 1, 3, padding=1, padding_mode=padding_mode, bias=False)
    plain.weight.data = module.weight.detach()
    assert conv_norm(plain, (24, 24)) <= 0.5


def test_inference_mode_reads_leave_training_possible() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    model[0].weight = torch.randn(30, 20)
    with torch.inference_mode():
        model(torch.randn(3, 20))
    model(torch.randn(3, 20)).sum().backward()


def test_exact_mode_reaches_the_constant_and_cap_mode_leaves_small_layers_alone() -> None:
    plain = mlp()
    exact = lipschitzify(copy.deepcopy(plain), layer_lipschitz=3.0, mode="exact")
    assert norms(exact) == pytest.approx([3.0, 3.0], rel=1e-3)
    capped = lipschitzify(copy.deepcopy(plain), layer_lipschitz=3.0)
    assert torch.equal(capped[0].weight, plain[0].weight)


def test_convolution_is_bounded_as_an_operator() -> None:
    module = nn.Conv2d(4, 6, 3, padding=1)
    lipschitzify(module, layer_lipschitz=0.3)
    plain = nn.Conv2d(4, 6, 3, padding=1)
    plain.weight.data = module.weight.detach()
    assert 0.25 <= conv_norm(plain, (8, 8)) <= 0.3


def test_gradient_against_autograd_through_the_svd() -> None:
    linear = nn.Linear(6, 4).double()
    w = linear.weight.detach().clone().requires_grad_()
    lipschitzify(linear, layer_lipschitz=1.0, mode="exact", rtol=1e-9)
    cotangent = torch.randn(4, 6, dtype=torch.float64)
    (linear.weight * cotangent).sum().backward()
    (w / torch.linalg.matrix_norm(w, 2) * cotangent).sum().backward()
    torch.testing.assert_close(linear.parametrizations.weight.original.grad, w.grad, rtol=1e-4, atol=1e-4)


def test_inactive_cap_has_the_plain_gradient() -> None:
    linear = nn.Linear(6, 4)
    w = linear.weight.detach().clone()
    lipschitzify(linear, layer_lipschitz=100.0)
    cotangent = torch.randn(4, 6)
    (linear.weight * cotangent).sum().backward()
    assert torch.equal(linear.weight, w)
    torch.testing.assert_close(linear.parametrizations.weight.original.grad, cotangent)


def test_copies_live_their_own_lives() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    twin = copy.deepcopy(model)
    before = [w.clone() for w in twin.state_dict().values()]
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, twin.state_dict().values(), strict=True))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    for layer in constrained_layers(twin):
        assert torch.equal(layer.parametrization._reference.weight, layer.parametrization.original)


def test_one_norm_a_layer_and_step_however_often_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = references.norms_and_directions
    monkeypatch.setattr(references, "norms_and_directions", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    assert len(calls) == 2
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        model(torch.randn(3, 20)).sum().backward()
        with torch.no_grad():
            model(torch.randn(3, 20))
    optimizer.step()
    assert len(calls) == 4
    copy.deepcopy(model)(torch.randn(3, 20))
    with materialized(model) as plain:
        plain(torch.randn(3, 20))
    assert len(calls) == 4


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    x = torch.randn(3, 20)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_autocast_does_not_reach_the_norm() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5, mode="exact")
    expected = norms(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norms(model) == expected
        for layer in constrained_layers(model):
            layer.parametrization.original.data.mul_(1.5)
            layer.parametrization.refresh()
        assert max(norms(model)) <= 0.5


def test_compiles_in_one_graph() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 20)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


def test_state_dict_holds_raw_and_effective_weights_and_loads_back() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    state = model.state_dict()
    assert torch.equal(state["0.weight"], model[0].weight)
    assert torch.equal(state["0.parametrizations.weight.original"], model[0].parametrizations.weight.original)
    plain = mlp()
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert missing == []
    assert all("parametrizations" in key for key in unexpected)
    x = torch.randn(3, 20)
    assert torch.equal(plain(x), model(x))
    twin = lipschitzify(mlp(), layer_lipschitz=0.9)
    assert twin.load_state_dict(state).missing_keys == []
    assert torch.equal(twin(x), model(x))
    with pytest.raises(RuntimeError, match=r"lipschitzify\(model\)"):
        twin.load_state_dict(plain.state_dict(), strict=False)


def test_nan_weight_after_a_step_names_the_layer() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model[2].parametrizations.weight.original.grad = torch.full((5, 30), torch.nan)
    with pytest.raises(ValueError, match="layer 2: .*NaN"):
        optimizer.step()


def test_materialized_is_plain_inside_and_untouched_after() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    x = torch.randn(3, 20)
    expected, keys = model(x), list(model.state_dict())
    with materialized(model) as plain:
        assert plain is model
        assert type(plain[0]) is nn.Linear
        assert torch.equal(plain(x), expected)
        assert all(not p.requires_grad for n, p in plain.named_parameters() if "weight" in n)
        torch.save(plain, io.BytesIO())
        with materialized(model) as again:
            assert torch.equal(again(x), expected)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    with materialized(model, copy=True) as plain:
        pass
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(plain(x), expected)


def test_layers_of_one_shape_are_bounded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([*(nn.Linear(20, 20) for _ in range(5)), nn.Linear(20, 7), nn.Conv1d(2, 2, 3)])
    lipschitzify(model, layer_lipschitz=0.5)
    sizes = []
    real = references.norms_and_directions
    monkeypatch.setattr(references, "norms_and_directions", lambda w, *a: sizes.append(len(w)) or real(w, *a))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(layer.weight.sum() for layer in model).backward()
    optimizer.step()
    assert sorted(sizes) == [1, 1, 5]
    assert max(dense_norm(layer.weight) for layer in model[:6]) <= 0.5


def test_one_shape_may_hold_weights_of_any_scale() -> None:
    model = nn.ModuleList([nn.Linear(20, 20) for _ in range(5)])
    for layer, scale in zip(model, (1.0, 0.0, 1e-30, 1e25, 1e-3), strict=True):
        layer.weight.data.mul_(scale)
    lipschitzify(model, layer_lipschitz=None, refresh_every=1000)
    constants = [layer.parametrization.lipschitz.item() for layer in constrained_layers(model)]
    for layer in model:
        layer.parametrizations.weight.original.data.mul_(7)
    for layer, constant in zip(model, constants, strict=True):
        assert dense_norm(layer.weight) <= constant
        assert dense_norm(layer.weight) >= 0.05 * constant
    parametrizations.refresh_all([layer.parametrizations.weight[0] for layer in model])
    for layer, constant in zip(model, constants, strict=True):
        assert dense_norm(layer.weight) == pytest.approx(constant, rel=2e-3)


@pytest.mark.parametrize("refresh_every", [1, 50])
def test_averaged_weights_are_bounded(refresh_every: int) -> None:
    """The average is written in place, by code that knows nothing of optimizers."""
    model = lipschitzify(mlp(), layer_lipschitz=0.5, refresh_every=refresh_every)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = average.module[0].weight.detach().clone()
    for _ in range(6):
        train(model, optimizer, steps=1)
        average.update_parameters(model)
        assert max(norms(average.module)) <= 0.5 * (1 + 1e-7)
    assert not torch.allclose(average.module[0].weight, before)
    average.eval()
    assert norms(average.module) == pytest.approx([0.5, 0.5], rel=2e-3)


def test_a_longer_period_is_paid_for_by_the_distance_since_the_refresh() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5, mode="exact", refresh_every=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reached = []
    for step in range(1, 13):
        model(torch.randn(7, 20)).square().sum().backward()
        optimizer.step()
        reached.append(norms(model)[0])
        parametrization = next(constrained_layers(model)).parametrization
        reference = parametrization._reference
        drift = torch.linalg.vector_norm(parametrization.original - reference.weight).item()
        assert (drift == 0) == (step % 4 == 0)
        paid = dense_norm(parametrization.original) / (reference.bound.item() + drift) * 0.5
        assert reached[-1] == pytest.approx(paid, rel=1e-4)
    assert [norm > 0.4995 for norm in reached] == [step % 4 == 0 for step in range(1, 13)]


@pytest.mark.parametrize("refresh_every", [1, 5])
def test_what_is_saved_does_not_depend_on_how_the_weights_came_about(refresh_every: int) -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5, refresh_every=refresh_every)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), steps=7)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    twin = lipschitzify(mlp(), layer_lipschitz=0.9, refresh_every=refresh_every)
    twin.load_state_dict(saved)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(7):
        x = torch.randn(7, 20, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_compiles_in_one_graph_and_keeps_the_bound(autocast: bool) -> None:
    model = lipschitzify(
        nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Unflatten(1, (3, 10)), nn.Conv1d(3, 4, 3), nn.Flatten()),
        layer_lipschitz=0.5,
    )
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (compiled, plain)]
    compilations = []
    for step in range(4):
        x = torch.randn(7, 20, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((compiled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = -m(x).float().square().sum()
            loss.backward()
            optimizer.step()
        assert dense_norm(model[0].weight) <= 0.5
        kernel = nn.Conv1d(3, 4, 3, bias=False)
        kernel.weight.data = model[3].weight.detach()
        assert conv_norm(kernel, (10,)) <= 0.5
        torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=1e-3, atol=1e-3)
        compilations.append(graphs.frame_count)
    # New references do not make it compile again.
    assert compilations[-1] == compilations[0] > 0
    assert dense_norm(model[0].weight) > 0.499


def test_reads_without_and_with_gradients_agree() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    with torch.no_grad():
        first = model[0].weight
    with torch.inference_mode():
        second = model[0].weight.clone()
    third = model[0].weight
    assert torch.equal(first, third)
    assert torch.equal(second, third)
    assert third.requires_grad


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_training_goes_on_after_evaluation_under_inference_mode(refresh_every: int) -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5, refresh_every=refresh_every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer, steps=1)
        with torch.inference_mode():
            model.eval()
            model(torch.randn(3, 20))
            model.load_state_dict(model.state_dict())
        model.train()
    train(model, optimizer, steps=1)


def test_what_is_saved_after_an_assignment_depends_on_the_weights_alone() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(80, 80) for _ in range(3)))
        twin = lipschitzify(copy.deepcopy(model), layer_lipschitz=0.9)
        lipschitzify(model, layer_lipschitz=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model[0].weight = torch.randn(80, 80)
        model(torch.randn(3, 80)).sum().backward()
        model[0].weight = torch.randn(80, 80)
        optimizer.step()
        twin.load_state_dict(model.state_dict())
        for ours, theirs in zip(constrained_layers(model), constrained_layers(twin), strict=True):
            assert torch.equal(ours.parametrization.reference.bound, theirs.parametrization.reference.bound)
            assert torch.equal(ours.parametrization.reference.right, theirs.parametrization.reference.right)
            assert torch.equal(ours.effective_weight, theirs.effective_weight)


@pytest.mark.parametrize("mode", ["cap", "exact"])
@pytest.mark.parametrize(
    ("scale", "constant"), [(1e25, 1.2e-17), (3e36, 1e-3), (1.0, 1e-38), (1e-42, 1.0), (1e-20, 1e9)]
)
def test_factors_beyond_float32(scale: float, constant: float, mode: str) -> None:
    linear = nn.Linear(6, 5)
    linear.weight.data = torch.randn(5, 6) * scale
    before = dense_norm(linear.weight)
    lipschitzify(linear, layer_lipschitz=constant, mode=mode)
    expected = constant if mode == "exact" else min(constant, before)
    assert expected * 0.998 <= dense_norm(linear.weight) <= expected * (1 + 1e-7)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_weights_with_squares_beyond_float64_are_refused(scale: float) -> None:
    linear = nn.Linear(6, 5).double()
    linear.weight.data.mul_(scale)
    with pytest.raises(ValueError, match="rescale the weight"):
        lipschitzify(linear, layer_lipschitz=1.0)


def test_one_row_of_half_units_stays_under_its_constant() -> None:
    for columns in (384, 385):
        linear = nn.Linear(columns, 1)
        linear.weight.data.fill_(0.9995)[0, 0] = 4096.0
        lipschitzify(linear, layer_lipschitz=0.5)
        assert 0.4999 <= dense_norm(linear.weight) <= 0.5


def test_nan_kernel_after_a_step_names_the_layer() -> None:
    model = lipschitzify(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), layer_lipschitz=0.5)
    raw = model[0].parametrizations.weight.original
    raw.grad = torch.full_like(raw, torch.nan)
    with pytest.raises(ValueError, match="layer 0: .*NaN"):
        torch.optim.SGD(model.parameters(), lr=1.0).step()


def test_assigned_weights_are_read_under_transforms() -> None:
    model = lipschitzify(mlp(), layer_lipschitz=0.5)
    model[0].weight = torch.randn(30, 20)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 20)
    outputs = torch.func.vmap(lambda row: torch.func.functional_call(model, parameters, (row,)))(x)
    torch.testing.assert_close(outputs, model(x))


def test_a_weight_in_a_mapped_file_is_bounded_as_one_in_memory_of_its_own() -> None:
    # A safetensors file is aligned to 8 bytes only, and matrix products choose their kernels by that.
    conv = nn.Conv2d(3, 8, 4, stride=4)
    weight = conv.weight.detach()
    (layer,) = constrained_layers(lipschitzify(nn.Sequential(conv), layer_lipschitz=0.1))
    memory, bounds = torch.empty(weight.numel() + 16), set()
    for offset in range(16):
        mapped = memory[offset : offset + weight.numel()].view(weight.shape)
        mapped.copy_(weight)
        (found,) = references.new_references(["conv"], [mapped], layer.parametrization.layout, 1e-3, [None])
        bounds.add(found.bound.item())
    assert len(bounds) == 1
