from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lipschitz.functional import spectral_norm_bound
from hf_lipschitz.functional.gram import gram_bracket, largest_gram_bracket
from tests.operators import dense_norm


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["gaussian", "orthogonal", "low rank", "clustered", "ones", "tiny entries"]))
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    rank = min(rows, columns)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    if kind == "orthogonal":
        w = u @ vh
    elif kind == "low rank":
        w = u[:, :1] @ vh[:1]
    elif kind == "clustered":
        w = u @ torch.diag(1 - 1e-7 * torch.rand(rank, generator=generator, dtype=torch.float64)) @ vh
    elif kind == "ones":
        w = torch.ones_like(w)
    elif kind == "tiny entries":
        w = u @ torch.diag(10.0 ** -torch.arange(0, 20 * rank, 20, dtype=torch.float64)) @ vh
    return w * 10.0 ** draw(st.integers(-30, 30))


@given(matrices(), st.sampled_from([1e-1, 1e-3, 1e-9]))
def test_bracket_holds_in_float64(w: torch.Tensor, rtol: float) -> None:
    lower, upper = spectral_norm_bound(w, rtol)
    exact = dense_norm(w)
    # The SVD is itself only good to a few units of float64.
    assert upper.item() >= exact * (1 - 1e-14)
    assert lower.item() <= exact * (1 + 1e-14)
    assert upper.item() <= lower.item() * (1 + max(rtol, 1e-8)) + 1e-300


@given(matrices())
def test_bracket_holds_in_float32_and_float16(w: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        stored = w.to(dtype)
        if torch.isfinite(stored).all() and stored.any():
            lower, upper = spectral_norm_bound(stored)
            exact = dense_norm(stored)
            assert lower.item() <= exact <= upper.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(200, 200), (64, 300), (5, 7, 20, 3), (1, 1), (2, 1, 9)])
def test_bracket_against_svd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape, dtype=dtype)
    lower, upper = spectral_norm_bound(w, 1e-3)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = torch.linalg.matrix_norm(w.to(wide), 2)
    assert lower.shape == upper.shape == shape[:-2]
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    assert (upper / lower - 1 <= 1e-3 + 8e-5).all()


def test_certified_mode_needs_float64_where_float32_products_round_down() -> None:
    """The certified end is above the exact norm of the stored weights; a bare float32 Schatten norm is not always."""
    undershoots = 0
    for seed in range(40):
        w = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))
        exact = dense_norm(w)
        assert spectral_norm_bound(w, 1e-6, certified=True)[1].item() >= exact
        leading = gram_bracket(w, 1e-6).right
        undershoots += torch.linalg.vector_norm(w @ leading).item() < exact
    assert undershoots > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
def test_the_largest_of_a_batch_is_bracketed(spread: float, dtype: torch.dtype) -> None:
    """Also where all matrices are equal or nearly so, and none can be left out early."""
    base = torch.randn(1, 9, 6, dtype=dtype)
    w = base + spread * torch.randn(40, 9, 6, dtype=dtype)
    bracket, index = largest_gram_bracket(w, 1e-4)
    exact = dense_norm(w)
    assert bracket.lower.item() <= exact <= bracket.upper.item() <= exact * (1 + 2e-4)
    assert dense_norm(w[index]) >= exact * (1 - 2e-4)
    image = w[index] @ bracket.right.to(dtype)
    assert torch.linalg.vector_norm(image).item() == pytest.approx(exact, rel=3e-4)
    zeros, _ = largest_gram_bracket(torch.zeros(3, 2, 2, dtype=dtype))
    assert zeros.upper.item() == 0


@pytest.mark.parametrize("rows", [768, 3072, 4096, 30522])
def test_long_sums_of_one_sign_do_not_drift_low(rows: int) -> None:
    for value in (0.51, 0.67, 0.83, 0.99):
        w = torch.full((rows, 2), value)
        lower, upper = spectral_norm_bound(w)
        exact = w[0, 0].double().item() * (2 * rows) ** 0.5
        assert lower.item() <= exact <= upper.item()
    wide = torch.rand(3, 2 * rows // 3) + 0.5
    assert spectral_norm_bound(wide)[1].item() >= dense_norm(wide)


def test_a_nearly_rank_one_matrix_does_not_push_itself_out_of_the_batch() -> None:
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        u, v = (torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0) for _ in range(2))
        q = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
        w = torch.stack([torch.outer(u, v), q @ torch.diag(torch.linspace(0.5, 0.9, 16)) @ q.mT])
        bracket, index = largest_gram_bracket(w)
        assert index.item() == 0
        assert bracket.lower.item() <= dense_norm(w) <= bracket.upper.item()


def test_repeated_singular_values_cost_nothing() -> None:
    q = torch.linalg.qr(torch.randn(512, 512, dtype=torch.float64)).Q
    lower, upper = spectral_norm_bound(q, 1e-6)
    assert 1 - 1e-6 <= lower.item() <= upper.item() <= 1 + 1e-6


def test_reduced_precision_settings_do_not_reach_the_products() -> None:
    w = torch.randn(128, 128)
    expected = spectral_norm_bound(w)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = spectral_norm_bound(w)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.testing.assert_close(inside, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("w", "kind", "message"),
    [
        (torch.full((2, 2), torch.nan), ValueError, "NaN or inf"),
        (torch.full((2, 2), torch.inf), ValueError, "NaN or inf"),
        (torch.zeros(0, 3), ValueError, "empty"),
        (torch.ones(3), ValueError, "reshape"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "floating-point"),
        ([[1.0]], TypeError, "torch.Tensor"),
    ],
)
def test_bad_weights_are_named(w: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        spectral_norm_bound(w)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="rtol"):
        spectral_norm_bound(torch.eye(2), 0.0)
