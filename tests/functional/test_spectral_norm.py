from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lipschitz.functional import spectral_norm_bound
from hf_lipschitz.functional.eigenvalue import eigenvalue_brackets, largest_eigenvalue_bracket
from hf_lipschitz.functional.lanczos import leading_vectors
from hf_lipschitz.functional.semidefinite import semidefinite_defect
from hf_lipschitz.functional.spectral_norm import cholesky_bracket, norm_bracket
from hf_lipschitz.functional.transfer import largest_transfer_norm, transfer_gradient, transfer_matrices
from tests.functional.exact import is_positive_definite as is_exactly_positive_definite
from tests.functional.exact import norm_is_below, rationals
from tests.functional.test_gram import matrices
from tests.operators import dense_norm


def small_matrix(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 4, generator=generator, dtype=dtype)
    return w.abs() if seed % 3 == 0 else w


@pytest.mark.parametrize("method", ["cholesky", "gram"])
def test_certified_ends_hold_in_exact_arithmetic(method: str) -> None:
    """Where the exact answer is known the ends never fail, and a plain float32 norm is too small every other time."""
    too_small = 0
    for seed in range(60):
        w = small_matrix(seed)
        lower, upper = spectral_norm_bound(w, 1e-9, certified=True, method=method)
        assert norm_is_below(w, upper.item())
        assert not norm_is_below(w, lower.item())
        assert upper.item() <= lower.item() * (1 + 2e-8)
        too_small += norm_is_below(w, torch.linalg.matrix_norm(w, 2).item()) is False
    assert too_small > 10


@pytest.mark.parametrize("method", ["cholesky", "gram"])
def test_float32_ends_hold_in_exact_arithmetic(method: str) -> None:
    for seed in range(30):
        w = small_matrix(seed)
        lower, upper = spectral_norm_bound(w, 1e-6, method=method)
        assert norm_is_below(w, upper.item())
        assert not norm_is_below(w, lower.item())


@given(matrices(), st.sampled_from([1e-1, 1e-3, 1e-9]), st.sampled_from([torch.float32, torch.float64]))
def test_cholesky_and_gram_agree(w: torch.Tensor, rtol: float, dtype: torch.dtype) -> None:
    stored = w.to(dtype)
    exact = dense_norm(stored)
    for method in ("cholesky", "gram"):
        # Gram iteration stops at 24 steps, which may be before clusters of singular values part.
        slack = 8e-5 if dtype is torch.float32 else 1e-10 if method == "cholesky" else 1e-6
        lower, upper = spectral_norm_bound(stored, rtol, method=method)
        assert lower.item() <= exact * (1 + 1e-14)
        assert upper.item() >= exact * (1 - 1e-14)
        assert upper.item() <= lower.item() * (1 + rtol + slack) + 1e-300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(700, 600), (130, 400), (5, 7, 90, 70), (1, 1), (2, 1, 9), (12, 300, 200)])
def test_cholesky_bracket_against_svd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape, dtype=dtype)
    bracket = cholesky_bracket(w, 1e-3)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = torch.linalg.matrix_norm(w.to(wide), 2)
    assert bracket.lower.shape == bracket.upper.shape == shape[:-2]
    assert (bracket.lower <= exact).all()
    assert (exact <= bracket.upper).all()
    assert (bracket.upper / bracket.lower - 1 <= 1e-3 + 8e-5).all()
    value = (bracket.left.conj() * (w @ bracket.right.unsqueeze(-1)).squeeze(-1)).sum(-1).real
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [512, 3072, 30522])
def test_float32_sums_of_one_sign(rows: int) -> None:
    for w in (torch.full((rows, 64), 0.837), torch.rand(rows, 600) + 0.5, 1 + 1e-4 * torch.randn(rows, 100)):
        lower, upper = spectral_norm_bound(w, method="cholesky")
        exact = dense_norm(w)
        assert lower.item() <= exact <= upper.item()


def test_matrices_of_one_batch_may_have_any_scales() -> None:
    base = torch.randn(30, 20)
    w = torch.stack([base, base * 1e-30, base * 1e30, torch.zeros_like(base), torch.full_like(base, 1e-42)])
    lower, upper = spectral_norm_bound(w, method="cholesky")
    exact = torch.linalg.matrix_norm(w.double(), 2)
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    assert upper[3] == 0
    assert (upper[:3] <= exact[:3] * 1.0011).all()


@pytest.mark.parametrize("start", ["wrong", "orthogonal", "zero", "right"])
def test_a_start_costs_time_at_most(start: str) -> None:
    w = torch.block_diag(2 * torch.eye(40), torch.randn(50, 60) / 20).double()
    vectors = {
        "wrong": torch.randn(100, dtype=torch.float64),
        "orthogonal": torch.eye(100, dtype=torch.float64)[-1],
        "zero": torch.zeros(100, dtype=torch.float64),
        "right": torch.eye(100, dtype=torch.float64)[0],
    }
    tall = torch.cat([w, torch.zeros(20, 100, dtype=torch.float64)])
    bracket = norm_bracket(tall, 1e-6, method="cholesky", start=vectors[start])
    assert 2 * (1 - 1e-6) <= bracket.lower.item() <= 2 <= bracket.upper.item() <= 2 * (1 + 1e-6)


def test_lanczos_stays_stable_in_float32() -> None:
    """One pass of orthogonalisation is not enough: the coefficients then grow without end."""
    for seed in range(4):
        w = torch.empty(1536, 384).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(seed))
        g = (w.mT @ w)[None]
        v = leading_vectors(g, 1e-9, max_steps=200)
        assert (v[0] @ g[0] @ v[0]).item() == pytest.approx(torch.linalg.eigvalsh(g)[0, -1].item(), rel=1e-4)


def test_lanczos_finds_what_its_own_start_is_orthogonal_to() -> None:
    g = torch.diag_embed(torch.tensor([[1.0, 5.0, 2.0], [3.0, 1.0, 7.0]], dtype=torch.float64))
    v = leading_vectors(g.repeat(5, 1, 1), 1e-9, start=torch.eye(3, dtype=torch.float64)[:1].expand(10, 3))
    torch.testing.assert_close((v.unsqueeze(1) @ g.repeat(5, 1, 1) @ v.unsqueeze(2)).flatten()[:2], g.amax((1, 2)))


def symmetric(seed: int, smallest: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    values = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    values[0] = smallest
    a = q @ torch.diag(values) @ q.mT
    return (a + a.mT) / 2


@pytest.mark.parametrize("smallest", [1.0, 1e-8, 1e-15, 1e-16, 0.0, -1e-16, -1e-15, -1e-8])
def test_defect_is_sound_in_exact_arithmetic(smallest: float) -> None:
    for seed in range(12):
        a = symmetric(seed, smallest)
        defect = semidefinite_defect(a[None]).item()
        if defect < float("inf"):
            entries = rationals(a)
            lifted = [[x + (i == j) * rationals(torch.tensor([[defect]]).double())[0][0] for j, x in enumerate(row)]
                      for i, row in enumerate(entries)]  # fmt: skip
            assert is_exactly_positive_definite(lifted)
            assert smallest > -1e-13
        if smallest >= 1e-8:
            assert defect < 1e-13


@pytest.mark.parametrize("n", [5, 63, 64, 65, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_defect_does_not_believe_the_factor(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library returns as a factor, what it misses is measured."""
    w = torch.randn(2, n, n, dtype=dtype)
    a = w @ w.mH + torch.eye(n)
    honest = semidefinite_defect(a)
    assert (honest < 1e-10 * n * n).all()
    real = torch.linalg.cholesky_ex

    def sloppy(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, info = real(matrix)
        factor[..., -1, 0] += 1e-6
        return factor, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", sloppy)
    factor, _ = sloppy(a)
    missed = torch.linalg.matrix_norm(a - factor @ factor.mH, 2)
    assert (semidefinite_defect(a) >= missed).all()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: (torch.zeros_like(m), torch.zeros(len(m))))
    assert torch.isinf(semidefinite_defect(a)).all()


def test_eigenvalue_brackets_hold_their_members() -> None:
    w = torch.randn(40, 30, 20, dtype=torch.float64)
    w[3] = 0
    g = w.mT @ w
    loss = torch.full((40,), 1e-13, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(g)[:, -1]
    each = eigenvalue_brackets(g, loss, 1e-4, verify=True)
    assert (each.lower <= exact + 1e-12).all()
    assert (exact <= each.upper).all()
    largest, index = largest_eigenvalue_bracket(g, loss, 1e-4, verify=True)
    assert index.item() == exact.argmax().item()
    assert largest.lower <= exact.max() <= largest.upper <= exact.max() * (1 + 3e-4)
    above, nowhere = largest_eigenvalue_bracket(g, loss, 1e-4, verify=True, floor=2 * exact.max())
    assert nowhere.item() == -1
    assert above.upper >= 2 * exact.max()


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 1, 1, 2, 3), (1, 1, 1, 4, 1, 2)])
@pytest.mark.parametrize("grid_scale", [2, 5])
def test_transfer_norms_hold_to_fifty_digits(shape: tuple[int, ...], grid_scale: int) -> None:
    """Scalars at each frequency, so that high-precision arithmetic knows the answer."""
    taps = shape[3:]
    grid = [grid_scale * k + 1 for k in taps]
    for seed in range(5):
        kernel = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        bracket, _ = largest_transfer_norm(kernel.double(), grid)
        with mpmath.workdps(50):
            exact = max(
                abs(
                    mpmath.fsum(
                        mpmath.mpf(kernel[(g, 0, 0, *t)].item())
                        * mpmath.expjpi(
                            -2 * sum(mpmath.mpf(j) * s / n for j, s, n in zip(frequency, t, grid, strict=True))
                        )
                        for t in itertools_product(taps)
                    )
                )
                for g in range(shape[0])
                for frequency in itertools_product(grid)
            )
            assert mpmath.mpf(bracket.lower.item()) <= exact <= mpmath.mpf(bracket.upper.item())
        assert bracket.upper.item() <= bracket.lower.item() * (1 + 1e-11)


def itertools_product(sizes: tuple[int, ...] | list[int]) -> list[tuple[int, ...]]:
    return [tuple(index) for index in torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes)).tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 6, 4, 3, 3), (16, 16)),
        ((1, 4, 6, 3, 3), (5, 7)),
        ((3, 2, 2, 4), (9,)),
        ((2, 3, 3, 2, 2, 2), (4, 6, 3)),
        ((1, 5, 5, 7), (4,)),
        ((40, 2, 3, 2, 2), (64, 64)),
        ((1, 90, 80, 3, 3), (8, 8)),
    ],
)
def test_transfer_norm_is_the_largest_over_the_whole_grid(
    shape: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype
) -> None:
    kernel = torch.randn(shape, dtype=dtype)
    bracket, where = largest_transfer_norm(kernel, grid, 1e-4)
    axes = tuple(range(3, kernel.dim()))
    taps = [-(-k // n) * n for k, n in zip(shape[3:], grid, strict=True)]
    whole = torch.fft.fftn(kernel.double(), s=taps, dim=axes)
    every = whole[(..., *(slice(None, None, t // n) for t, n in zip(taps, grid, strict=True)))]
    exact = torch.linalg.svdvals(every.movedim((1, 2), (-2, -1)))[..., 0]
    assert bracket.lower.item() <= exact.max().item() <= bracket.upper.item()
    assert bracket.upper.item() <= exact.max().item() * (1 + 1.7e-4)
    assert exact[tuple(w.item() for w in where)].item() == pytest.approx(exact.max().item(), rel=1e-4)


def test_transfer_gradient_is_that_of_the_norm() -> None:
    kernel = torch.randn(2, 4, 3, 3, 2, dtype=torch.float64)
    grid = (7, 6)
    bracket, where = largest_transfer_norm(kernel, grid, 1e-9)
    gradient = transfer_gradient(kernel, grid, where, bracket)
    leaf = kernel.clone().requires_grad_()
    torch.linalg.svdvals(transfer_matrices(leaf, grid)).max().backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="known: auto, gram, cholesky"):
        spectral_norm_bound(torch.eye(2), method="svd")


@pytest.mark.parametrize("small", [0.9995, 1.0005])
@pytest.mark.parametrize("columns", [1, 2, 8, 40])
@pytest.mark.parametrize("rows", [256, 384, 512, 1024])
def test_float32_sums_that_stand_still(rows: int, columns: int, small: float) -> None:
    """One large row and many just under, or over, half a unit of the sum so far: nothing in float32 loses more."""
    w = torch.full((rows, columns), small)
    w[0] = 4096.0
    exact = dense_norm(w)
    for method in ("cholesky", "gram"):
        for rtol in (1e-3, 1e-6):
            lower, upper = spectral_norm_bound(w, rtol, method=method)
            assert lower.item() <= exact <= upper.item()


def test_float32_sums_over_many_lags_that_stand_still() -> None:
    kernel = torch.ones(1, 1, 1, 4096)
    kernel[..., :2] = 2.0**25 * 1.01
    bracket, _ = largest_transfer_norm(kernel, [4099])
    assert bracket.lower.item() <= kernel.double().sum().item() <= bracket.upper.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taps", [[1.0, 2.0**-54, -1.0], [1.0, 3 * 2.0**-54, -1.0], [1.0, 1e-4, -1.0]])
def test_taps_that_cancel_where_they_are_wrapped(taps: list[float], dtype: torch.dtype) -> None:
    kernel = torch.tensor(taps, dtype=dtype).reshape(1, 1, 1, 3)
    exact = abs(sum(rationals(kernel.reshape(1, 3))[0]))
    bracket, _ = largest_transfer_norm(kernel, [1])
    assert bracket.lower.item() <= exact <= bracket.upper.item()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_start_that_is_no_number_costs_time_at_most(value: float) -> None:
    w = torch.randn(100, 90)
    bracket = norm_bracket(w, method="cholesky", start=torch.full((90,), value))
    assert bracket.lower.item() <= dense_norm(w) <= bracket.upper.item()


@pytest.mark.parametrize("rtol", [0.0, -1.0, float("nan"), 1e200])
@pytest.mark.parametrize("method", ["cholesky", "gram"])
def test_widths_that_mean_nothing_are_named(method: str, rtol: float) -> None:
    with pytest.raises(ValueError, match=r"rtol must be in \(0, 1\]"):
        spectral_norm_bound(torch.eye(2), rtol, method=method)
