from __future__ import annotations

import pytest
import torch

from hf_lipschitz.functional import gram_norm, spectral_norm_bound
from hf_lipschitz.functional.schatten import GRADIENTS
from tests.operators import dense_norm


def schatten(w: torch.Tensor, p: float) -> torch.Tensor:
    singular_values = torch.linalg.svdvals(w)
    largest = singular_values.amax(-1, keepdim=True).detach()
    return (singular_values / largest).pow(p).sum(-1) ** (1 / p) * largest.squeeze(-1)


def with_singular_values(values: list[float], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=dtype), full_matrices=False)
    return u * torch.tensor(values, dtype=torch.float64) @ vh


def probe_like(w: torch.Tensor) -> torch.Tensor:
    wide = torch.complex128 if w.is_complex() else torch.float64
    return torch.randn(w.shape, dtype=wide, generator=torch.Generator().manual_seed(1)).to(w.dtype)


def second_order(w: torch.Tensor, num_iterations: int, gradient: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient, and its derivative along a fixed direction, of which autograd asks a double backward."""
    w = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(gram_norm(w, num_iterations, gradient).sum(), w, create_graph=True)
    probe = probe_like(w)
    (second,) = torch.autograd.grad((first * probe.conj()).real.sum() * w.detach().abs().max(), w)
    return first.detach(), second


def test_repeated_singular_values() -> None:
    q = torch.linalg.qr(torch.randn(512, 512, dtype=torch.float64)).Q
    assert gram_norm(q, 6).item() == pytest.approx(512 ** (1 / 128), rel=1e-9)


@pytest.mark.parametrize("num_iterations", [1, 2, 5, 9])
def test_it_is_the_schatten_norm(num_iterations: int) -> None:
    w = torch.randn(3, 9, 6, dtype=torch.float64)
    expected = schatten(w, 2.0 ** (num_iterations + 1))
    torch.testing.assert_close(gram_norm(w, num_iterations), expected, rtol=1e-11, atol=0)
    single = schatten(w.float().double(), 2.0 ** (num_iterations + 1))
    assert (gram_norm(w.float(), num_iterations).double() >= single).all()


def test_it_decreases_to_the_spectral_norm() -> None:
    w = torch.randn(40, 30, dtype=torch.float64)
    values = [gram_norm(w, n).item() for n in range(1, 14)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(dense_norm(w), rel=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_value_is_the_same_sound_bound_with_either_gradient(gradient: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        w = torch.randn(20, 7, 9, dtype=torch.float64).to(dtype).requires_grad_()
        value = gram_norm(w, 6, gradient)
        wide = w.detach().to(torch.complex128 if dtype.is_complex else torch.float64)
        assert (value.double() >= torch.linalg.matrix_norm(wide, 2)).all()
        assert torch.equal(value, gram_norm(w, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 3)])
def test_dense_gradient_is_exact_to_second_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gram_norm(x, 3), w)
    assert torch.autograd.gradgradcheck(lambda x: gram_norm(x, 3), w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1), (2, 3, 3)])
def test_rank_one_gradient_is_that_of_the_spectral_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where the bound has become tight; the third derivative is that of the closed form of the second."""
    values = [1.5, 1.0, 0.9, 0.2][: min(shape[-2:])]
    w = with_singular_values(values, shape, dtype).requires_grad_()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return gram_norm(x, 8, "rank_one")

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(norm(x).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(norm, w)
    assert torch.autograd.gradgradcheck(norm, w)
    assert torch.autograd.gradgradcheck(gradient, w)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_first_and_second_order_against_autograd_through_the_svd(shape: tuple[int, int], gradient: str) -> None:
    w = with_singular_values([2.0, 1.4, 1.0, 0.5, 0.1, 0.05][: min(shape)], shape, torch.float64)
    p = 32.0 if gradient == "dense" else 512.0
    ours, ours_twice = second_order(w, 4 if gradient == "dense" else 8, gradient)
    leaf = w.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(schatten(leaf, p), leaf, create_graph=True)
    (theirs_twice,) = torch.autograd.grad((theirs * probe_like(w)).sum() * w.abs().max(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours_twice, theirs_twice, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradient_at_any_scale_and_many_iterations(scale: float, gradient: str) -> None:
    w = with_singular_values([2.0, 1.2, 0.5, 0.1], (6, 4), torch.float64).float() * scale
    first, second = second_order(w, 12, gradient)
    u, _, vh = torch.linalg.svd(w.double() / scale)
    torch.testing.assert_close(first.double(), torch.outer(u[:, 0], vh[0]), rtol=0, atol=1e-4)
    _, expected = second_order(w.double() / scale, 12, gradient)
    torch.testing.assert_close(second.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_rank_one_gradient_of_repeated_singular_values_is_a_subgradient(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for values in ([1.0] * 4 + [0.3], [2.0, 2.0, 1.0, 0.5, 0.0], [1.0] * 5, [1.0, 1 - 1e-9, 0.5, 0.5, 0.0]):
        w = with_singular_values(values[: min(shape)], shape, wide).to(dtype)
        for num_iterations in (1, 7, 12):
            first, second = second_order(w, num_iterations, "rank_one")
            assert torch.isfinite(second).all()
            assert torch.linalg.matrix_norm(first.to(wide), "nuc").item() == pytest.approx(1, rel=1e-5)
            inner = (first.conj() * w).real.sum().item()
            assert inner <= dense_norm(w) * (1 + 1e-5)
            if num_iterations > 1:
                assert inner == pytest.approx(dense_norm(w), rel=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_rank_one_matrices(gradient: str) -> None:
    w = torch.outer(torch.arange(1.0, 4), torch.tensor([1.0, -1.0])).double().requires_grad_()
    (first,) = torch.autograd.grad(gram_norm(w, 3, gradient), w)
    torch.testing.assert_close(first, w.detach() / torch.linalg.vector_norm(w.detach()))
    assert torch.autograd.gradcheck(lambda x: gram_norm(x, 3, gradient), w)
    if gradient == "rank_one":
        assert torch.autograd.gradgradcheck(lambda x: gram_norm(x, 3, gradient), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_zero_matrices_have_norm_and_gradient_zero(gradient: str, dtype: torch.dtype) -> None:
    batch = torch.stack([torch.zeros(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)])
    for w in (torch.zeros(4, 3, dtype=dtype), torch.zeros(3, 4, dtype=dtype), batch):
        assert spectral_norm_bound(w)[1].flatten()[0].item() == 0
        assert gram_norm(w, 5, gradient).flatten()[0].item() == 0
        for x in second_order(w, 5, gradient):
            assert torch.isfinite(x).all()
            assert not x.reshape(-1, 12)[0].any()


def test_dense_gradient_of_the_identity() -> None:
    identity = torch.eye(4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gram_norm(identity, 2), identity)
    torch.testing.assert_close(gradient, torch.eye(4, dtype=torch.float64) * 4 ** (1 / 8 - 1))


def test_at_the_usual_number_of_iterations_the_pair_attains_the_norm_of_a_random_matrix() -> None:
    w = torch.randn(200, 150, requires_grad=True)
    (gradient,) = torch.autograd.grad(gram_norm(w, gradient="rank_one"), w)
    assert (gradient * w).sum().item() >= dense_norm(w) * (1 - 1e-3)


@pytest.mark.parametrize(
    ("w", "kind", "message"),
    [
        (torch.full((2, 2), torch.nan), ValueError, "NaN or inf"),
        (torch.zeros(0, 3), ValueError, "empty"),
        (torch.ones(3), ValueError, "reshape"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "floating-point"),
        ([[1.0]], TypeError, "torch.Tensor"),
    ],
)
def test_bad_weights_are_named(w: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        gram_norm(w)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="num_iterations"):
        gram_norm(torch.eye(2), 0)
    with pytest.raises(ValueError, match="dense, rank_one"):
        gram_norm(torch.eye(2), gradient="exact")
