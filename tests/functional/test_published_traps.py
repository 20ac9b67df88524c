"""What published code gets wrong about matrices: each formula is shown to fail where ours holds.

Those about convolutions are in `test_conv.py`, as `test_trap_...`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lipschitz import lipschitzify
from hf_lipschitz.functional import conv_spectral_rescaling, gram_norm, rescale_rows, spectral_rescaling
from tests.operators import dense_norm


def test_trap_power_iteration_is_a_lower_bound() -> None:
    """torch's `spectral_norm` makes layers of norm 1 that have up to 1.05; it divides by what it has found so far."""
    worst = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        linear = nn.Linear(200, 200, bias=False)
        ours = lipschitzify(nn.Linear(200, 200, bias=False), layer_lipschitz=1.0, mode="exact")
        nn.utils.parametrizations.spectral_norm(linear)
        worst = max(worst, dense_norm(linear.eval().weight))
        assert 0.999 <= dense_norm(ours.weight) <= 1
    assert worst > 1.01


def test_trap_backward_pass_of_one_gram_step() -> None:
    """A backward pass that stops after one of N steps gives the gradient of another norm."""
    w = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(gram_norm(w, 4), w)
    step = 1e-6 * torch.randn_like(w)
    with torch.no_grad():
        difference = gram_norm(w + step, 4) - gram_norm(w - step, 4)
        singular_values = torch.linalg.svdvals(w)
        one_step = w @ w.mT @ w * (singular_values**4).sum() ** (1 / 4 - 1)
    assert (ours * step).sum().item() == pytest.approx(difference.item() / 2, rel=1e-6)
    assert abs((one_step * step).sum().item() / (difference.item() / 2) - 1) > 0.01


def test_trap_epsilon_in_one_of_two_weights_of_the_rows() -> None:
    """SLL's first code divided by q + ε: where q is small the divisor is too small, and the layer not 1-Lipschitz."""
    w = torch.randn(12, 12, dtype=torch.float64)
    q = torch.logspace(-6, -8, 12, dtype=torch.float64)
    with_epsilon = ((w @ w.mT).abs() * q[None, :] / (q[:, None] + 1e-6)).sum(1).sqrt()
    assert dense_norm(w / with_epsilon[:, None]) > 2
    assert dense_norm(rescale_rows(w, spectral_rescaling(w, 1, q=q))) <= 1 + 1e-14


def test_trap_weights_of_the_channels_that_cancel() -> None:
    """In SLL's second convolution code q cancels and never trains: the ratio belongs after the sum over space."""
    kernel = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    q = torch.rand(4, dtype=torch.float64, requires_grad=True)
    t = conv_spectral_rescaling(kernel, padding=1, q=q)
    (gradient,) = torch.autograd.grad(t.sum(), q)
    assert gradient.abs().min() > 1e-3
