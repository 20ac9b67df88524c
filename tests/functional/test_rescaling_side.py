"""Spectral rescaling of the input channels of a convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_lipschitz.functional import conv_spectral_rescaling, rescale_rows, spectral_rescaling
from hf_lipschitz.functional.geometry import conv_geometry
from hf_lipschitz.functional.rescaling import rescaling_of_matrix
from hf_lipschitz.functional.rescaling_conv import rescale_kernel, rescaling_of_kernel
from tests.functional.test_rescaling import ONE, closed_form, convolutions, options_of, rescaled_conv_norm
from tests.operators import dense_norm, unit_inputs


def columns_of(module: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    """One row an entry of the input: the transpose of the matrix of the layer."""
    with torch.no_grad():
        return module(unit_inputs(module.in_channels, size)).flatten(1)


@settings(max_examples=300)
@given(convolutions(), st.integers(1, 3), st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_convolutions_with_rescaled_inputs_are_1_lipschitz(
    case: tuple[nn.Module, tuple[int, ...]], num_iterations: int, is_weighted: bool, dtype: torch.dtype
) -> None:
    module, size = case
    module.weight.data = module.weight.data.to(dtype).double()
    q = torch.exp(2 * torch.randn(module.in_channels)) if is_weighted else None
    num_iterations = min(num_iterations, 2) if module.weight.dim() == 5 else num_iterations
    kernel, options = module.weight.detach().to(dtype), options_of(module)
    columns = columns_of(module, size)
    for certified in (False, True):
        t = conv_spectral_rescaling(
            kernel, side="input", num_iterations=num_iterations, q=q, certified=certified, **options
        )
        assert t.shape == (module.in_channels,)
        each = t.double().repeat_interleave(columns.shape[0] // module.in_channels)
        assert dense_norm(rescale_rows(columns, each)) <= ONE


@settings(max_examples=100)
@given(convolutions(), st.sampled_from(["output", "input"]))
def test_the_divided_kernel_is_that_of_the_divided_operator(
    case: tuple[nn.Module, tuple[int, ...]], side: str
) -> None:
    module, size = case
    columns, t = columns_of(module, size), torch.rand(getattr(module, f"{side[:-3]}_channels"))
    t[0] = 0
    geometry = conv_geometry(module.weight.shape, **options_of(module))
    if side == "input":
        expected = rescale_rows(columns, t.double().repeat_interleave(columns.shape[0] // t.numel()))
    else:
        expected = rescale_rows(columns.mT, t.double().repeat_interleave(columns.shape[1] // t.numel())).mT
    module.weight.data = rescale_kernel(module.weight.data, geometry, t, side=side)
    torch.testing.assert_close(columns_of(module, size), expected)


@pytest.mark.parametrize("num_iterations", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_inputs_against_the_dense_matrix(stride: int, num_iterations: int) -> None:
    """In the middle of a long input all lags are there; with a stride the larger of the two phases counts."""
    module = nn.Conv1d(2, 3, 4, stride=stride, bias=False).double()
    q = torch.tensor([0.2, 3.0], dtype=torch.float64)
    matrix = columns_of(module, (80,))
    expected = closed_form(matrix, q.repeat_interleave(80), num_iterations).reshape(2, 80)[:, 39:41].amax(1)
    t = conv_spectral_rescaling(
        module.weight.detach(), stride=stride, side="input", num_iterations=num_iterations, q=q
    )
    torch.testing.assert_close(t, expected, rtol=1e-10, atol=0)


def test_the_inputs_of_a_convolution_are_the_outputs_of_its_adjoint() -> None:
    kernel, q = torch.randn(4, 3, 5, 3), torch.rand(6)
    options = {"stride": (2, 3), "groups": 2, "num_iterations": 2, "q": q}
    for transposed in (False, True):
        weights = torch.rand(4) if transposed else q
        ours = conv_spectral_rescaling(kernel, **{**options, "q": weights}, transposed=transposed, side="input")
        adjoint = conv_spectral_rescaling(kernel, **{**options, "q": weights}, transposed=not transposed)
        torch.testing.assert_close(ours, adjoint, rtol=0, atol=0)
    padded = conv_spectral_rescaling(kernel, groups=2, padding=2, padding_mode="replicate", side="input")
    plain = conv_spectral_rescaling(kernel, groups=2, side="input")
    torch.testing.assert_close(padded / plain, torch.full((6,), 5.0), rtol=1e-5, atol=0)


def test_the_unchecked_forms_are_those_that_check() -> None:
    w, kernel = torch.randn(5, 4, 3), torch.randn(4, 3, 5)
    q = torch.rand(4, dtype=torch.float64)
    t = rescaling_of_matrix(w, num_iterations=3, q=q.expand(5, 4))
    assert t.dtype == torch.float64
    torch.testing.assert_close(t.float(), spectral_rescaling(w, 3, q), rtol=0, atol=0)
    geometry = conv_geometry(kernel.shape, stride=2, padding=1)
    t = rescaling_of_kernel(kernel, geometry, side="output", num_iterations=2, q=q)
    expected = conv_spectral_rescaling(kernel, stride=2, padding=1, num_iterations=2, q=q)
    torch.testing.assert_close(t.float(), expected, rtol=0, atol=0)


def test_float64_compiles_as_one_graph_under_autocast() -> None:
    w, q = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    geometry = conv_geometry(w.shape, stride=2, groups=2)

    def function(x: torch.Tensor) -> torch.Tensor:
        rows = rescaling_of_matrix(x[0], num_iterations=2)
        return torch.cat([rows, rescaling_of_kernel(x, geometry, side="input", num_iterations=2, q=q)])

    expected = function(w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(function(w), expected, rtol=0, atol=0)
        compiled = torch.compile(function, backend="eager", fullgraph=True)(w)
    torch.testing.assert_close(compiled, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"transposed": True, "stride": 2}])
def test_gradients(options: dict[str, object]) -> None:
    geometry = conv_geometry((2, 1, 3), groups=2, **options)
    kernel = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    free = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t = rescaling_of_kernel(x, geometry, side="input", q=y.exp())
        return rescale_kernel(x, geometry, t, side="input")

    assert torch.autograd.gradcheck(function, (kernel, free))
    assert torch.autograd.gradgradcheck(function, (kernel, free))


def test_bad_sides_and_divisors_are_named() -> None:
    kernel = torch.randn(4, 3, 3)
    with pytest.raises(ValueError, match="'output' or 'input'"):
        conv_spectral_rescaling(kernel, side="left")
    with pytest.raises(ValueError, match="one entry a row"):
        conv_spectral_rescaling(kernel, side="input", q=torch.ones(4))
    with pytest.raises(ValueError, match=r"one entry a channel of the input, shape \(3,\)"):
        rescale_kernel(kernel, conv_geometry(kernel.shape), torch.ones(4), side="input")


def test_the_output_side_is_unchanged() -> None:
    module = nn.Conv2d(2, 3, 3, stride=2, bias=False).double()
    t = conv_spectral_rescaling(module.weight.detach(), stride=2, side="output")
    assert rescaled_conv_norm(module, t, (9, 9)) <= ONE
