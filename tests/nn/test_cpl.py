from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lipschitz.nn.activations import MaxMin
from hf_lipschitz.nn.cpl import CPLBlock, CPLConvBlock2d
from tests.jacobians import attacked_norm, jacobian_norm
from tests.nn.test_sll import ACTIVATIONS, disturbed
from tests.operators import dense_norm


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_dense_blocks_are_1_lipschitz(activation: nn.Module) -> None:
    for features, hidden in ((5, 8), (8, 5), (4, 1)):
        block = disturbed(CPLBlock(features, hidden, activation))
        assert attacked_norm(block, (features,), starts=3, steps=8) <= 1 + 1e-9


def test_the_scale_is_that_of_the_exact_norm_and_never_more() -> None:
    """Power iteration is too low where two singular values are close: 5 % make the block 1.22-Lipschitz."""
    for close in (1.0, 0.999, 0.9):
        u, v = (torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q for _ in range(2))
        block = CPLBlock(6, 6, bias=False).double()
        block.weight.data = u @ torch.diag(torch.tensor([3.0, 3 * close, 1, 1, 1, 1]).double()) @ v
        exact = 2 / dense_norm(block.weight) ** 2
        assert exact * (1 - 3e-3) < block.root().square().item() <= exact
        # All features on: the Jacobian is I - scale VᵀV.
        block.bias = nn.Parameter(torch.full((6,), 100.0, dtype=torch.float64))
        assert 0.99 < jacobian_norm(block, torch.zeros(6, dtype=torch.float64)) <= 1 + 1e-9


def test_the_gradient_is_that_of_the_exact_norm() -> None:
    block = disturbed(CPLBlock(5, 7))
    (ours,) = torch.autograd.grad(block.root().square(), block.weight)
    (exact,) = torch.autograd.grad(2 / torch.linalg.matrix_norm(block.weight, 2) ** 2, block.weight)
    torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("options", [{}, {"padding": 0}, {"padding": 3}, {"dilation": 2}])
def test_convolutional_blocks_are_1_lipschitz(options: dict[str, int], mode: str) -> None:
    for activation in (nn.ReLU(), nn.GELU()):
        block = disturbed(CPLConvBlock2d(2, 3, activation=activation, padding_mode=mode, **options))
        assert attacked_norm(block, (1, 2, 5, 5), starts=2, steps=3) <= 1 + 1e-9


def test_zero_weights_and_refusals() -> None:
    block = CPLBlock(3, 4)
    nn.init.zeros_(block.weight)
    x = torch.randn(2, 3)
    assert torch.equal(block(x), x)
    with pytest.raises(ValueError, match="not elementwise"):
        CPLBlock(4, 4, MaxMin())
    with pytest.raises(ValueError, match="padding_mode='replicate'"):
        CPLConvBlock2d(2, 2, padding_mode="replicate")
