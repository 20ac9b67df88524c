from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BitConfig, BitForImageClassification, FunnelConfig, FunnelForSequenceClassification
from transformers.models.falcon.modeling_falcon import FalconLinear

import hf_lipschitz
from hf_lipschitz.conversion import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from tests.families import FAMILIES, HEADLESS, example, output
from tests.families.linear_maps import exact_norm, linear_maps


METHODS = ("gram", "rescaling", "aol", "sll", "cpl")
MODELS = {**FAMILIES, **HEADLESS}
CONSTANT = 0.05


def exact_norms(model: nn.Module) -> dict[str, float]:
    return {
        f"{layer.name}.{layer.tensor_name}": exact_norm(layer.module, layer.tensor_name, layer.effective_weight)
        for layer in constrained_layers(model)
    }


def assert_under_the_constant(model: nn.Module) -> None:
    norms = exact_norms(model)
    assert not {name: norm for name, norm in norms.items() if not norm <= CONSTANT * (1 + 1e-6)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_every_effective_weight_is_under_its_constant(family: str, method: str) -> None:
    model = MODELS[family]().train()
    maps = linear_maps(model)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in maps}
    lipschitzify(model, layer_lipschitz=CONSTANT, method=method)
    norms = exact_norms(model)
    assert set(norms) == maps
    assert not {name: norm for name, norm in norms.items() if not norm <= CONSTANT * (1 + 1e-6)}
    if method == "gram":
        modules = dict(model.named_modules())
        for name, weight in before.items():
            owner, _, tensor_name = name.rpartition(".")
            if weight.dim() == 2 and exact_norm(modules[owner], tensor_name, weight) > CONSTANT:
                assert norms[name] >= CONSTANT * (1 - 2e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output(model, example(model)).square().sum().backward()
    optimizer.step()
    assert_under_the_constant(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert_under_the_constant(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "mixtral", "xlnet", "siglip_vision", "wav2vec2", "convnext"])
def test_gradients_reach_every_raw_weight(family: str, method: str) -> None:
    # A channel that is under the constant and left as it is has no use for its weight q.
    model = lipschitzify(MODELS[family]().eval(), layer_lipschitz=0.5, method=method, mode="exact")
    output(model, example(model, batch=4)).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in idle if "parametrizations" in name}


@pytest.mark.parametrize("family", MODELS)
def test_no_constant_changes_no_output(family: str) -> None:
    model = MODELS[family]().eval()
    inputs = example(model)
    expected = output(model, inputs)
    lipschitzify(model, layer_lipschitz=None)
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("family", MODELS)
def test_every_parameter_is_constrained_or_reported(family: str) -> None:
    model = MODELS[family]()
    parameters, maps = [name for name, _ in model.named_parameters()], linear_maps(model)
    lipschitzify(model, layer_lipschitz=0.1)
    assert set(exact_norms(model)) == maps
    report = hf_lipschitz.inspect(model)
    assert sum(row.lipschitz is not None for row in report.layers) == len(maps)
    # A row is named after its module, or after its tensor where the module has several.
    named = {row.name for row in report.layers} | {module.name for module in report.uncovered}
    named |= {row.name.removesuffix(f".{x.tensor_name}") for x in constrained_layers(model) for row in report.layers}
    owners = {name: name.rpartition(".")[0].removesuffix(".parametrizations.weight") for name in parameters}
    assert not {name for name, owner in owners.items() if owner not in named}


@pytest.mark.parametrize("family", MODELS)
def test_layers_that_are_left_out_are_reported(family: str) -> None:
    model = MODELS[family]()
    maps = linear_maps(model)
    lipschitzify(model, exclude_modules=r".*(attn|attention|mlp|pos_conv).*")
    constrained = set(exact_norms(model))
    report = hf_lipschitz.inspect(model)
    uncovered = {module.name for module in report.uncovered}
    for name in maps - constrained:
        assert name.rpartition(".")[0] in uncovered, name


@pytest.mark.parametrize("family", ["xlnet", "siglip_vision"])
def test_attention_whose_matrices_are_constrained_is_still_uncovered(family: str) -> None:
    report = hf_lipschitz.inspect(lipschitzify(MODELS[family]()))
    kinds = {module.kind: module.reason for module in report.uncovered}
    kind = {"xlnet": "XLNetRelativeAttention", "siglip_vision": "MultiheadAttention"}[family]
    assert "dot-product attention has no global Lipschitz constant" in kinds[kind]


@pytest.mark.parametrize("family", ["swin", "t5", "deberta_v2", "gpt_oss", "xlnet"])
def test_tables_and_biases_are_no_linear_maps(family: str) -> None:
    tables = ("position_bias_table", "attention_bias", "rel_embeddings", "shared", "proj_bias", "w_bias", "seg_embed")
    model = lipschitzify(MODELS[family](), layer_lipschitz=0.01)
    assert not {name for name in exact_norms(model) if name.endswith(tables)}


def test_a_forward_that_changes_the_weight_is_an_obstacle() -> None:
    """BiT standardises the weight of its convolutions after any constraint."""
    config = BitConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2, num_labels=3)
    model = BitForImageClassification(config)
    lipschitzify(model, layer_lipschitz=0.1)
    standardised = {n for n, m in model.named_modules() if "WeightStandardized" in type(m).__name__}
    assert standardised
    assert not standardised & {layer.name for layer in constrained_layers(model)}
    reasons = {module.name: module.reason for module in hf_lipschitz.inspect(model).uncovered}
    assert all("has a forward of its own" in reasons[name] for name in standardised)
    with pytest.raises(ValueError, match="strict=True, and .*WeightStandardizedConv2d has a forward of its own"):
        lipschitzify(BitForImageClassification(config), strict=True)


def test_forwards_that_only_add_to_that_of_the_base_are_none() -> None:
    class Padded(nn.Conv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (3, 0)))

    class Squared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.square())

    model = nn.Sequential(Padded(2, 2, 3), Squared(4, 4), FalconLinear(4, 4))
    lipschitzify(model)
    assert {layer.name for layer in constrained_layers(model)} == {"0", "2"}


def test_einsum_tensors_of_funnel_and_biases_beside_them() -> None:
    sizes = {"vocab_size": 60, "block_sizes": [1, 1], "d_model": 24, "n_head": 2, "d_head": 12, "d_inner": 40}
    model = FunnelForSequenceClassification(FunnelConfig(**sizes, num_labels=3))
    lipschitzify(model, layer_lipschitz=0.1)
    found = {layer.full_name: layer for layer in constrained_layers(model) if layer.tensor_name == "r_kernel"}
    assert len(found) == 2
    for layer in found.values():
        assert torch.linalg.matrix_norm(layer.effective_weight.flatten(1).double(), 2) <= 0.1 * (1 + 1e-6)
    reasons = {module.kind: module.reason for module in hf_lipschitz.inspect(model).uncovered}
    assert "parameters of its own: r_w_bias, r_r_bias" in reasons["FunnelRelMultiheadAttention"]
