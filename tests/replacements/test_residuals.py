"""replace="residuals": shares of the budget, and the product over depth that they bound."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.dataflow import residual_ends
from hf_lipschitz.replacements import residuals
from tests.families import FAMILIES
from tests.operators import dense_norm


def config(budget: float = 1.0, strict: bool = False) -> SimpleNamespace:
    return SimpleNamespace(residual_budget=budget, strict=strict)


@pytest.mark.parametrize(("family", "calls", "layers"), [("bert", 4, 4), ("albert", 4, 2), ("t5", 10, 10)])
def test_the_shares_of_all_calls_add_up_to_the_budget(family: str, calls: int, layers: int) -> None:
    model = FAMILIES[family]()
    names = residuals.find(model, config())
    residuals.apply(model, config(0.6), names)
    marked = {n: m.lipschitz_share for n, m in model.named_modules() if hasattr(m, "lipschitz_share")}
    assert len(names) == calls
    assert len(marked) == layers
    assert sum(marked[name] for name in names) == pytest.approx(0.6)
    assert set(marked.values()) == {0.6 / calls}


def test_meta_models_are_marked_alike() -> None:
    model = FAMILIES["vit"]()
    names = residuals.find(model, config())
    empty = model.to("meta")
    residuals.apply(empty, config(2.0), names)
    assert all(empty.get_submodule(name).lipschitz_share == 0.5 for name in names)


def test_branches_without_a_share_are_told_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(residuals.find(FAMILIES["mixtral"](), config())) == 2
    assert "2 of the residual branches" in caplog.text
    with pytest.raises(ValueError, match="strict"):
        residuals.find(FAMILIES["mixtral"](), config(strict=True))
    with pytest.raises(ValueError, match="no PreTrainedModel"):
        residuals.find(nn.Linear(2, 2), config())


class Chain(nn.Module):
    """Branches whose rest is 1-Lipschitz, made so that each sum stretches one direction by all it may."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(depth))
        self.ends = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for inner, end in zip(self.inner, self.ends, strict=True):
            x = x + end(inner(x))
        return x


def test_the_product_over_depth_stays_under_the_exponential_and_comes_near_it() -> None:
    for depth in (1, 4, 64):
        model = Chain(depth)
        names = residual_ends(model, {"x": torch.randn(2, 4)}).layers
        residuals.apply(model, config(1.5), names)
        with torch.no_grad():
            for inner, end in zip(model.inner, model.ends, strict=True):
                inner.weight.copy_(torch.eye(4))
                end.weight.copy_(torch.eye(4) * end.lipschitz_share)
            norm = dense_norm(model.double()(torch.eye(4, dtype=torch.float64)))
        assert norm == pytest.approx((1 + 1.5 / depth) ** depth, rel=1e-5)
        assert norm <= math.exp(1.5)
