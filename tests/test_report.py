from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from hf_lipschitz.conversion import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.report import inspect
from tests.families import FAMILIES, bert, gpt2
from tests.families.linear_maps import exact_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_sound_tight_and_under_the_constant(family: str) -> None:
    model = lipschitzify(FAMILIES[family](), layer_lipschitz=0.2)
    layers = {layer.full_name.removesuffix(".weight"): layer for layer in constrained_layers(model)}
    report = inspect(model)
    assert {row.name for row in report.layers} == set(layers)
    for row in report.layers:
        assert row.norm_after <= row.lipschitz == 0.2
        layer = layers[row.name]
        for norm, weight in (
            (row.norm_before, layer.parametrization.original),
            (row.norm_after, layer.effective_weight),
        ):
            exact = exact_norm(layer.module, layer.tensor_name, weight)
            assert exact * (1 - 1e-9) <= norm
            if layer.parametrization.layout.geometry is None:
                assert norm <= exact * 1.0011


def test_everything_else_is_listed_as_uncovered() -> None:
    report = inspect(lipschitzify(bert()))
    kinds = {module.kind for module in report.uncovered}
    assert {"Embedding", "LayerNorm", "BertSelfAttention", "GELUActivation", "Tanh"} <= kinds
    norms = [module for module in report.uncovered if module.kind == "LayerNorm"]
    assert len(norms) == sum(isinstance(m, nn.LayerNorm) for m in bert().modules())


def test_a_layer_that_is_not_constrained_is_uncovered() -> None:
    report = inspect(lipschitzify(bert(), target_modules=["query"]))
    free = {row.name for row in report.layers if row.lipschitz is None}
    assert "classifier" in free
    assert free <= {module.name for module in report.uncovered}
    plain = inspect(bert())
    assert all(row.lipschitz is None and row.norm_before == row.norm_after for row in plain.layers)
    assert plain.config is None


@pytest.mark.parametrize("model", [bert, gpt2])
def test_the_table_cannot_be_taken_for_a_guarantee(model: object) -> None:
    text = str(inspect(lipschitzify(model())))
    assert "NOT covered" in text
    assert "NOT a bound for the model" in text
    assert not re.search(r"certified|guarantee", text, re.IGNORECASE)


def test_what_is_printed_is_a_bound_too() -> None:
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = torch.diag(torch.tensor([1.00004, 0.5, 0.1]))
    assert "1.001" in str(inspect(linear))


def test_to_dict_is_json() -> None:
    values = json.loads(json.dumps(inspect(lipschitzify(bert())).to_dict()))
    assert values["is_model_bound"] is False
    assert len(values["layers"]) == 14


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        inspect("bert")
    model = bert()
    model.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer classifier"):
        inspect(model)
