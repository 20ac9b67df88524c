"""Exact answers about stored floating-point numbers, by rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor


def rationals(w: Tensor) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in w.double().tolist()]


def is_positive_definite(a: list[list[Fraction]]) -> bool:
    """By the signs of the pivots of a symmetric matrix; singular matrices are not."""
    a = [row[:] for row in a]
    n = len(a)
    for k in range(n):
        if a[k][k] <= 0:
            return False
        for i in range(k + 1, n):
            factor = a[i][k] / a[k][k]
            for j in range(k + 1, n):
                a[i][j] -= factor * a[k][j]
    return True


def norm_is_below(w: Tensor, value: float) -> bool:
    """Whether σ₁(w) < value, exactly: value² I - wᵀw is positive definite."""
    rows = rationals(w)
    n = len(rows[0])
    square = Fraction(value) ** 2
    gap = [
        [(square if i == j else 0) - sum((row[i] * row[j] for row in rows), Fraction(0)) for j in range(n)]
        for i in range(n)
    ]
    return is_positive_definite(gap)
