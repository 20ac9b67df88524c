from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lipschitz.nn.activations import GroupSort, MaxMin, SlopeCorrected
from hf_lipschitz.nn.cpl import CPLBlock
from hf_lipschitz.nn.sll import SLLBlock, SLLConvBlock2d
from tests.jacobians import attacked_norm, jacobian_norm
from tests.operators import dense_norm


ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.ELU(3.0), nn.Tanh()]


def disturbed(block: nn.Module, scale: float = 1.0) -> nn.Module:
    """In float64, with weights of the rows as training may leave them."""
    for parameter in block.double().parameters():
        nn.init.normal_(parameter, std=scale)
    return block


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_dense_blocks_are_1_lipschitz(activation: nn.Module, num_iterations: int) -> None:
    for features, hidden in ((5, 8), (8, 5), (4, 1)):
        block = disturbed(SLLBlock(features, hidden, activation, num_iterations=num_iterations))
        assert attacked_norm(block, (features,), starts=3, steps=8) <= 1 + 1e-9


def test_the_diagonal_is_the_closed_form() -> None:
    block = disturbed(SLLBlock(5, 8))
    gram, q = (block.weight @ block.weight.mT).abs(), block.log_q.exp()
    torch.testing.assert_close(block.root().square(), 2 / ((gram * q).sum(1) / q), rtol=1e-10, atol=0)


def test_extreme_weights_of_the_rows() -> None:
    """An epsilon beside q gives 4.4."""
    block = disturbed(SLLBlock(6, 8))
    block.log_q.data = torch.tensor([0.0, -40, 5, -3, 300, 0, -900, -20], dtype=torch.float64)
    for _ in range(10):
        assert jacobian_norm(block, 3 * torch.randn(6, dtype=torch.float64)) <= 1 + 1e-9
    gradients = torch.autograd.grad(block(torch.randn(6, dtype=torch.float64)).sum(), list(block.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_the_weights_of_the_channels_train() -> None:
    """In the second public code of the convolution they cancel."""
    for block, shape in ((SLLBlock(4, 6), (3, 4)), (SLLConvBlock2d(2, 3), (1, 2, 5, 5))):
        disturbed(block)(torch.randn(shape, dtype=torch.float64)).square().sum().backward()
        assert (block.log_q.grad.abs() > 1e-6).all()


def test_zero_rows_take_no_part() -> None:
    block = disturbed(SLLBlock(5, 4))
    with torch.no_grad():
        block.weight[1] = 0
    assert block.root().square()[1] == 0
    assert attacked_norm(block, (5,), steps=4) <= 1 + 1e-9
    with torch.no_grad():
        block.weight.zero_()
    x = torch.randn(5, dtype=torch.float64)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    "options", [{}, {"padding": 0}, {"padding": 2}, {"padding": 3}, {"dilation": 2}, {"kernel_size": 1}]
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=repr)
def test_convolutional_blocks_are_1_lipschitz(activation: nn.Module, options: dict[str, int], mode: str) -> None:
    for num_iterations in (1, 2):
        block = disturbed(
            SLLConvBlock2d(2, 3, activation=activation, padding_mode=mode, num_iterations=num_iterations, **options)
        )
        assert attacked_norm(block, (1, 2, 5, 5), starts=2, steps=3) <= 1 + 1e-9


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_way_back_is_the_exact_adjoint(mode: str) -> None:
    """With the identity for s and T = 2 the Jacobian is I - KᵀK, symmetric, K from autograd."""
    block = disturbed(SLLConvBlock2d(2, 3, activation=nn.Identity(), padding_mode=mode, padding=2, bias=False))
    block.root = lambda: torch.ones(3, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(block, x).reshape(40, 40)
    conv = nn.Conv2d(2, 3, 3, padding=2, padding_mode=mode, bias=False).double()
    conv.weight.data = block.weight.data
    k = torch.autograd.functional.jacobian(conv, x).reshape(-1, 40)
    torch.testing.assert_close(jacobian, torch.eye(40, dtype=torch.float64) - k.mT @ k)


def test_gelu_as_it_is_would_be_over_1() -> None:
    block = SLLBlock(4, 4, nn.GELU()).double()
    nn.init.orthogonal_(block.weight)
    slopes = torch.full((4,), 1.1289, dtype=torch.float64)
    v = block.weight.detach()
    jacobian = torch.eye(4, dtype=torch.float64) - v.mT @ torch.diag(block.root().detach().square() * slopes) @ v
    assert dense_norm(jacobian) > 1.25
    assert isinstance(block.activation, SlopeCorrected)


@pytest.mark.parametrize("activation", [MaxMin(), GroupSort(2)], ids=repr)
def test_sorting_is_refused_with_the_reason(activation: nn.Module) -> None:
    for make in (lambda: SLLBlock(4, 4, activation), lambda: SLLConvBlock2d(4, 4, activation=activation)):
        with pytest.raises(ValueError, match="not elementwise.*3-Lipschitz"):
            make()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="padding_mode='reflect' in a block"):
        SLLConvBlock2d(2, 2, padding_mode="reflect")
    with pytest.raises(ValueError, match="at least 1"):
        SLLBlock(2, 2, num_iterations=0)
    with pytest.raises(ValueError, match="at most 3"):
        SLLConvBlock2d(2, 2, num_iterations=4)


@pytest.mark.parametrize("kind", [SLLBlock, CPLBlock])
@pytest.mark.parametrize("exponent", [-25, -20, 0, 20, 22])
def test_weights_far_from_1_in_float32(kind: type[nn.Module], exponent: int) -> None:
    """2/T itself is no float32 number there; s is linear, so that the Jacobian is the block at the unit vectors."""
    block = kind(6, 4, activation=nn.Identity(), bias=False)
    block.weight.data = torch.randn(4, 6) * 10.0**exponent
    jacobian = block(torch.eye(6)).double()
    norm = torch.linalg.matrix_norm(jacobian, 2).item()
    assert 1 - 1e-5 <= norm <= 1 + 1e-5
    assert not torch.allclose(jacobian, torch.eye(6, dtype=torch.float64), atol=0.1)
