from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_lipschitz.functional import conv_spectral_rescaling, rescale_rows, spectral_rescaling
from tests.operators import dense_norm, unit_inputs


CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
# The SVD is itself only good to a few units of float64.
ONE = 1 + 1e-14


def rescaled_norm(w: torch.Tensor, t: torch.Tensor) -> float:
    wide = w.to(torch.complex128 if w.is_complex() else torch.float64)
    return dense_norm(rescale_rows(wide, t.double()))


def closed_form(w: torch.Tensor, q: torch.Tensor | None = None, num_iterations: int = 1) -> torch.Tensor:
    m = 2 ** (num_iterations - 1)
    power = torch.linalg.matrix_power(w @ w.mH, m).abs()
    q = torch.ones(w.shape[-2], dtype=torch.float64) if q is None else q
    return (power * q / q[:, None]).sum(-1) ** (1 / (2 * m))


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = ["gaussian", "positive", "orthogonal", "rank one", "graded", "reducible", "zero rows", "ones"]
    kind = draw(st.sampled_from(kinds))
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind == "positive":
        w = w.abs()
    elif kind == "orthogonal":
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        w = u @ vh
    elif kind == "rank one":
        w = torch.outer(w[:, 0], w[0])
    elif kind == "graded":
        w = w * 10.0 ** (-35 * torch.rand(rows, 1, generator=generator, dtype=torch.float64))
    elif kind == "reducible":
        w = torch.block_diag(w, 1e-3 * w, 1e3 * w)
    elif kind == "zero rows":
        w[:: draw(st.integers(1, 3))] = 0
    elif kind == "ones":
        w = torch.ones_like(w)
    return w * 10.0 ** draw(st.integers(-30, 30))


@settings(max_examples=400)
@given(matrices(), st.sampled_from([1, 2, 3, 5, 9, 14]), st.sampled_from([None, 0.1, 3.0, 20.0]), st.integers(0, 99))
def test_rescaled_matrices_are_1_lipschitz(
    w: torch.Tensor, num_iterations: int, spread: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = None if spread is None else torch.exp(spread * torch.randn(w.shape[0], generator=generator).clamp(-4, 4))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        stored = w.to(dtype)
        if not torch.isfinite(stored).all():
            continue
        for certified in (False, True):
            t = spectral_rescaling(stored, num_iterations, q, certified=certified)
            assert t.dtype == (torch.float64 if certified or dtype == torch.float64 else torch.float32)
            assert torch.equal(t > 0, stored.ne(0).any(-1))
            assert torch.isfinite(t).all()
            assert rescaled_norm(stored, t) <= ONE


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("num_iterations", [1, 2, 6])
def test_complex_matrices_and_batches(num_iterations: int, dtype: torch.dtype) -> None:
    w = torch.randn(3, 2, 6, 4, dtype=dtype)
    q = torch.rand(2, 6) + 0.1
    t = spectral_rescaling(w, num_iterations, q)
    assert t.shape == (3, 2, 6)
    assert t.dtype == w.real.dtype
    assert rescaled_norm(w, t) <= ONE
    wide = w[1, 1].to(torch.complex128)
    torch.testing.assert_close(t[1, 1].double(), closed_form(wide, q[1].double(), num_iterations), rtol=5e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(700, 300), (300, 1500), (1000, 1000)])
def test_large_matrices_in_their_tight_cases(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Matrices of one sign and rank one meet the bound with equality, and their sums drift low in float32."""
    cases = [torch.full(shape, 0.67), torch.rand(shape[0], 1) + torch.rand(1, shape[1]), torch.eye(*shape)]
    cases.append(torch.outer(torch.rand(shape[0]), torch.rand(shape[1]) * torch.randn(shape[1]).sign()))
    for w in cases:
        for num_iterations in (1, 3):
            t = spectral_rescaling(w.to(dtype), num_iterations)
            # Power iteration of a matrix that has one sign up to signs of its columns converges at once.
            x = rescale_rows(w.double(), t.double())
            v = x.sum(0)
            for _ in range(5):
                v = torch.nn.functional.normalize(x.mT @ (x @ v), dim=0)
            assert 0.5 < torch.linalg.vector_norm(x @ v).item() <= ONE or torch.equal(w, cases[2])
            assert torch.equal(w, cases[0]) or t.max() > 0


def test_a_row_that_underflows_beside_the_others_keeps_a_bound() -> None:
    """Its products flush to zero, which would leave t = 0 or far too small a t for a row that is not zero."""
    for exponent in (-12, -15, -20, -25, -30):
        for num_iterations in (1, 2, 4, 8):
            w = torch.randn(4, 4)
            w[2:] *= 10.0**exponent
            t = spectral_rescaling(w, num_iterations)
            assert (t > 0).all()
            assert rescaled_norm(w, t) <= ONE


def test_one_iteration_is_aol() -> None:
    w = torch.randn(9, 6, dtype=torch.float64)
    expected = (w @ w.mT).abs().sum(1).sqrt()
    torch.testing.assert_close(spectral_rescaling(w), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 4])
def test_it_is_the_closed_form(num_iterations: int) -> None:
    w, q = torch.randn(9, 6, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.1
    t = spectral_rescaling(w, num_iterations, q)
    torch.testing.assert_close(t, closed_form(w, q, num_iterations), rtol=1e-11, atol=0)
    torch.testing.assert_close(spectral_rescaling(w, num_iterations, 1e3 * q), t, rtol=1e-12, atol=0)
    assert not torch.allclose(spectral_rescaling(w, num_iterations), t, rtol=1e-2)


def test_many_iterations_tend_to_spectral_normalization() -> None:
    w = torch.randn(12, 8, dtype=torch.float64)
    sigma = dense_norm(w)
    excess = [(spectral_rescaling(w, n).max() / sigma - 1).item() for n in range(1, 16)]
    assert excess == sorted(excess, reverse=True)
    assert 0 <= excess[-1] < 1e-3
    t = spectral_rescaling(torch.block_diag(w, 0.5 * w), 9)
    torch.testing.assert_close(t, torch.tensor([sigma] * 12 + [0.5 * sigma] * 12).double(), rtol=2e-2, atol=0)


def test_orthogonal_rows_stay_as_they_are() -> None:
    q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    scales = torch.logspace(-1, 1, 64, dtype=torch.float64)
    for num_iterations in (1, 2):
        t = spectral_rescaling(scales[:, None] * q, num_iterations)
        torch.testing.assert_close(t, scales, rtol=1e-6, atol=0)


def test_the_sll_layer_is_1_lipschitz_with_trained_weights_of_the_rows() -> None:
    """An epsilon beside q, as in the first public code of SLL, gives 4.4 where some q is small."""
    w = torch.randn(6, 8, dtype=torch.float64)
    q = torch.exp(torch.tensor([0.0, -40, 5, -3, 30, 0, 1, -20], dtype=torch.float64))
    inverse = 1 / spectral_rescaling(w.mT, 1, q) ** 2
    for slopes in (torch.ones(8), torch.rand(8), (torch.rand(8) > 0.5).float()):
        jacobian = torch.eye(6, dtype=torch.float64) - 2 * w @ torch.diag(inverse * slopes.double()) @ w.mT
        assert dense_norm(jacobian) <= ONE


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_first_and_second_order(num_iterations: int, dtype: torch.dtype) -> None:
    w = torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)
    free = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return spectral_rescaling(x, num_iterations, y.exp())

    assert torch.autograd.gradcheck(function, (w, free))
    assert torch.autograd.gradgradcheck(function, (w, free))


def test_zero_rows_and_zero_matrices_give_no_nan() -> None:
    for dtype in (torch.float32, torch.float64):
        some = torch.randn(4, 3, dtype=dtype)
        some[1] = 0
        for w in (some, torch.zeros(4, 3, dtype=dtype), torch.stack([some, torch.zeros_like(some)])):
            w = w.clone().requires_grad_()
            for num_iterations in (1, 5):
                t = spectral_rescaling(w, num_iterations)
                scaled = rescale_rows(w, t)
                (first,) = torch.autograd.grad((scaled**2).sum() + t.sum(), w, create_graph=True)
                (second,) = torch.autograd.grad((first**2).sum(), w)
                zero_rows = (w == 0).all(-1)
                assert not t[zero_rows].any()
                assert not scaled[zero_rows].any()
                assert torch.isfinite(first).all()
                assert torch.isfinite(second).all()


def test_reduced_precision_settings_do_not_reach_the_products() -> None:
    w, kernel = torch.randn(64, 64), torch.randn(8, 8, 3, 3)
    expected, expected_conv = spectral_rescaling(w, 3), conv_spectral_rescaling(kernel)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, inside_conv = spectral_rescaling(w, 3), conv_spectral_rescaling(kernel)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.testing.assert_close(inside, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(inside_conv, expected_conv, rtol=1e-7, atol=0)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    axes, transposed = draw(st.sampled_from([1, 1, 2, 2, 3])), draw(st.booleans())
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.integers(1, 2))
    per_axis = lambda most: tuple(draw(st.integers(1, most)) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation = per_axis(5 if axes < 3 else 2), per_axis(4 if axes < 3 else 3), per_axis(3)
    padding = tuple(draw(st.integers(0, 3)) for _ in range(axes))
    options: dict[str, object] = {"padding_mode": mode}
    if transposed:
        pairs = zip(stride, dilation, strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in pairs)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module = CONVOLUTIONS[axes, transposed](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=False,
        **options,
    ).double()
    weight = module.weight.data
    kind = draw(st.sampled_from(["gaussian", "gaussian", "positive", "zero row", "graded"]))
    if kind == "positive":
        weight.abs_()
    elif kind == "zero row":
        weight[0] = 0
    elif kind == "graded":
        weight *= 10.0 ** (8 * torch.randn(weight.shape[0], *[1] * (axes + 1), dtype=torch.float64))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    extra = draw(st.integers(0, {1: 9, 2: 4, 3: 1}[axes]))
    if transposed:
        return module, tuple(-(-2 * p // s) + 1 + extra % 4 for p, s in zip(padding, stride, strict=True))
    return module, tuple(max(r - 2 * p + extra, p + 1) for r, p in zip(reach, padding, strict=True))


def rescaled_conv_norm(module: nn.Module, t: torch.Tensor, size: tuple[int, ...]) -> float:
    with torch.no_grad():
        columns = module(unit_inputs(module.in_channels, size))
    channels = rescale_rows(columns.transpose(0, 1).flatten(1), t.double())
    return dense_norm(channels.reshape(columns.shape[1], columns.shape[0], -1).transpose(0, 1).flatten(1))


def options_of(module: nn.Module) -> dict[str, object]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")
    return {name: getattr(module, name) for name in names}


@settings(max_examples=300)
@given(convolutions(), st.integers(1, 3), st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_rescaled_convolutions_are_1_lipschitz(
    case: tuple[nn.Module, tuple[int, ...]], num_iterations: int, is_weighted: bool, dtype: torch.dtype
) -> None:
    module, size = case
    module.weight.data = module.weight.data.to(dtype).double()
    q = torch.exp(2 * torch.randn(module.out_channels)) if is_weighted else None
    options = options_of(module)
    if module.weight.dim() == 5:
        num_iterations = min(num_iterations, 2)
    for certified in (False, True):
        t = conv_spectral_rescaling(
            module.weight.detach().to(dtype), num_iterations=num_iterations, q=q, certified=certified, **options
        )
        assert t.shape == (module.out_channels,)
        assert rescaled_conv_norm(module, t, size) <= ONE


def test_a_1x1_convolution_is_its_matrix() -> None:
    w, q = torch.randn(5, 3), torch.rand(5)
    for num_iterations in (1, 3):
        expected = spectral_rescaling(w, num_iterations, q)
        ours = conv_spectral_rescaling(w[..., None, None], num_iterations=num_iterations, q=q)
        torch.testing.assert_close(ours, expected)
        ours = conv_spectral_rescaling(w.mT[..., None], num_iterations=num_iterations, q=q, transposed=True)
        torch.testing.assert_close(ours, expected)
        patches = conv_spectral_rescaling(w.reshape(5, 1, 3), stride=3, num_iterations=num_iterations, q=q)
        torch.testing.assert_close(patches, expected)


@pytest.mark.parametrize("num_iterations", [1, 2, 3])
def test_a_convolution_against_its_dense_matrix(num_iterations: int) -> None:
    """The middle rows of the matrix of a long enough input have all the lags; the weights act on the channels."""
    module = nn.Conv1d(2, 3, 3, bias=False).double()
    q = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    matrix = module(unit_inputs(2, (60,))).flatten(1).mT.detach()
    rows = closed_form(matrix, q.repeat_interleave(58), num_iterations).reshape(3, 58)
    t = conv_spectral_rescaling(module.weight.detach(), num_iterations=num_iterations, q=q)
    torch.testing.assert_close(t, rows[:, 29], rtol=1e-10, atol=0)
    fixed = conv_spectral_rescaling(module.weight.detach(), num_iterations=num_iterations)
    assert not torch.allclose(t, fixed, rtol=1e-2)


def test_strides_drop_lags_and_dilation_costs_nothing() -> None:
    kernel = torch.randn(4, 3, 5, 5).abs()
    plain, strided = conv_spectral_rescaling(kernel), conv_spectral_rescaling(kernel, stride=2)
    assert (strided < plain).all()
    torch.testing.assert_close(conv_spectral_rescaling(kernel, dilation=3), plain)
    torch.testing.assert_close(conv_spectral_rescaling(kernel, padding=2, padding_mode="circular"), plain)
    replicate = conv_spectral_rescaling(kernel, padding=2, padding_mode="replicate")
    torch.testing.assert_close(replicate / plain, torch.full((4,), 5.0), rtol=1e-5, atol=0)


def test_rectangular_kernels_are_padded_an_axis_at_a_time() -> None:
    module = nn.Conv2d(2, 2, (1, 7), bias=False).double()
    module.weight.data.abs_()
    t = conv_spectral_rescaling(module.weight.detach())
    assert 0.8 < rescaled_conv_norm(module, t, (1, 40)) <= ONE
    swapped = conv_spectral_rescaling(module.weight.detach().transpose(2, 3))
    torch.testing.assert_close(swapped, t)


def test_more_iterations_are_tighter_on_a_convolution() -> None:
    kernel = torch.randn(8, 8, 3, 3)
    values = [conv_spectral_rescaling(kernel, num_iterations=n).max().item() for n in (1, 2, 3)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    kernel = torch.randn(3, 2, 3, 3, requires_grad=True)
    for num_iterations in (1, 3):
        t = conv_spectral_rescaling(kernel, num_iterations=num_iterations)
        (expected,) = torch.autograd.grad(t.sum(), kernel)
        scaled = (kernel.detach() * scale).requires_grad_()
        ours = conv_spectral_rescaling(scaled, num_iterations=num_iterations)
        (gradient,) = torch.autograd.grad(ours.sum(), scaled)
        torch.testing.assert_close(ours.double() / scale, t.double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "groups": 2}, {"transposed": True, "stride": 2, "groups": 2}, {"num_iterations": 2}],
)
def test_gradients_of_convolutions(options: dict[str, object]) -> None:
    groups = options.get("groups", 1)
    kernel = torch.randn(2, 2 // groups, 3, dtype=torch.float64, requires_grad=True)
    free = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return conv_spectral_rescaling(x, q=y.exp(), **options)

    assert torch.autograd.gradcheck(function, (kernel, free))
    assert torch.autograd.gradgradcheck(function, (kernel, free))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_kernels(dtype: torch.dtype) -> None:
    module = nn.Conv2d(3, 4, 3, bias=False).to(dtype)
    t = conv_spectral_rescaling(module.weight.detach(), **options_of(module))
    assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rescaled_conv_norm(module.double(), t, (7, 7)) <= ONE


def test_zero_kernels() -> None:
    kernel = torch.zeros(2, 2, 3, requires_grad=True)
    for options in ({}, {"transposed": True, "stride": 2}, {"num_iterations": 3}):
        t = conv_spectral_rescaling(kernel, **options)
        assert not t.any()
        assert not torch.autograd.grad(t.sum(), kernel)[0].any()


@pytest.mark.parametrize(
    ("w", "options", "kind", "message"),
    [
        (torch.full((2, 2), torch.nan), {}, ValueError, "NaN or inf"),
        (torch.zeros(0, 3), {}, ValueError, "empty"),
        (torch.ones(3), {}, ValueError, "reshape"),
        (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "floating-point"),
        (torch.ones(2, 2), {"num_iterations": 0}, ValueError, "at least 1"),
        (torch.ones(2, 2), {"q": torch.tensor([1.0, 0.0])}, ValueError, "positive"),
        (torch.ones(2, 2), {"q": torch.tensor([1.0, torch.nan])}, ValueError, "positive"),
        (torch.ones(2, 2), {"q": torch.tensor([1.0, torch.inf])}, ValueError, "positive"),
        (torch.ones(2, 2), {"q": torch.ones(3)}, ValueError, "one entry a row"),
        (torch.ones(2, 2), {"q": torch.ones(2, dtype=torch.int64)}, TypeError, "floating-point"),
        (torch.ones(2, 2), {"q": [1.0, 2.0]}, TypeError, "torch.Tensor"),
    ],
)
def test_bad_matrices_and_options_are_named(
    w: torch.Tensor, options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        spectral_rescaling(w, **options)


@pytest.mark.parametrize(
    ("kernel", "options", "kind", "message"),
    [
        (torch.ones(2, 2), {}, ValueError, "must have shape"),
        (torch.ones(2, 2, 3), {"num_iterations": 4}, ValueError, "at most 3"),
        (torch.ones(2, 2, 3), {"num_iterations": 0}, ValueError, "at least 1"),
        (torch.ones(2, 2, 3), {"q": torch.ones(3)}, ValueError, "one entry a row"),
        (torch.ones(2, 2, 3), {"padding_mode": "reflect", "transposed": True}, ValueError, "transposed"),
        (torch.ones(2, 2, 3), {"output_padding": 1}, ValueError, "output_padding"),
        (torch.ones(2, 2, 3, dtype=torch.complex64), {}, TypeError, "complex"),
        (torch.full((1, 1, 3), math.inf), {}, ValueError, "NaN or inf"),
    ],
)
def test_bad_kernels_and_options_are_named(
    kernel: torch.Tensor, options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        conv_spectral_rescaling(kernel, **options)


def test_rescale_rows_wants_one_entry_a_row() -> None:
    with pytest.raises(ValueError, match="one entry a row"):
        rescale_rows(torch.ones(2, 3), torch.ones(3))
