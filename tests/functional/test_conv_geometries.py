"""Convolution bounds against the exact operator, over random geometries of every kind torch has."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_lipschitz.functional import conv_spectral_norm_bound
from hf_lipschitz.functional.boundary import most_copies, smallest_size
from hf_lipschitz.functional.geometry import conv_geometry, kernel_to_operator
from tests.operators import kernel_norm, large_input_norm


Case = tuple[torch.Tensor, tuple[int, ...], dict[str, Any]]

MOST_TAPS = {1: 8, 2: 4, 3: 3}
MOST_PADDING = {1: 6, 2: 3, 3: 2}
EXTRA_POINTS = {1: 14, 2: 5, 3: 2}
ROUNDING_OF_THE_SVD = 1e-13


def random_kernel(rng: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    """Gaussian, or of the kinds whose norm the boundary moves most: one sign, constant, one tap, alternating."""
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    kind = rng.choice(["gaussian", "gaussian", "one sign", "constant", "one tap", "alternating"])
    if kind == "one sign":
        return kernel.abs()
    if kind == "constant":
        return torch.ones(shape)
    if kind == "one tap":
        taps = math.prod(shape[2:])
        keep = torch.zeros(taps).index_fill(0, torch.tensor(rng.randrange(taps)), 1.0)
        return kernel * keep.reshape(shape[2:])
    return kernel.abs() * (-1.0) ** torch.arange(shape[-1]) if kind == "alternating" else kernel


def random_case(rng: random.Random) -> Case:
    """A kernel, the size of an input and the other arguments; often at the edge of what torch accepts."""
    axes = rng.choice([1, 1, 2, 2, 3])
    transposed = rng.random() < 0.25
    mode = "zeros" if transposed else rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    several = lambda most: tuple(rng.randint(1, most) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation = several(MOST_TAPS[axes]), several(5 - axes), several(5 - axes)
    stride = rng.choice([stride, stride, (1,) * axes])
    dilation = rng.choice([dilation, (1,) * axes, stride])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = [(rng.randint(0, MOST_PADDING[axes]), rng.randint(0, MOST_PADDING[axes])) for _ in range(axes)]
    if transposed or rng.random() < 0.4:
        pads = [(before, before) for before, _ in pads]
    elif rng.random() < 0.4:
        pads = [((r - 1) // 2, r // 2) for r in reach]
    extra = [rng.randint(0, max(s, d) - 1) if transposed else 0 for s, d in zip(stride, dilation, strict=True)]
    size = []
    for axis in range(axes):
        least = smallest_size(mode, pads[axis], reach[axis])
        if transposed:
            least = max(1, -((reach[axis] + extra[axis] - 1 - sum(pads[axis])) // stride[axis]) + 1)
        size.append(least + rng.choice([0, 0, 0, 1, 1, 2, rng.randint(0, EXTRA_POINTS[axes])]))
    groups = rng.choice([1, 1, 1, 2, 3])
    channels = groups * rng.randint(1, 2), rng.randint(1, 2 if axes == 1 else 1 + rng.randint(0, 1))
    options = {
        "stride": stride,
        "padding": [before for before, _ in pads] if transposed else pads,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
        "transposed": transposed,
        "output_padding": extra,
    }
    return random_kernel(rng, (*channels, *kernel)), tuple(size), options


def random_cases(seed: int, count: int, most_inputs: int = 250) -> Iterator[Case]:
    rng = random.Random(seed)
    cases = iter(lambda: random_case(rng), None)
    small = (c for c in cases if c[0].shape[1] * c[2]["groups"] * math.prod(c[1]) <= most_inputs)
    return itertools.islice(small, count)


def check_case(case: Case) -> None:
    kernel, size, options = case
    exact = kernel_norm(kernel, size, **options)
    for method in ("auto", "size_free", "fft", "autocorrelation"):
        asked = {} if method in ("size_free", "autocorrelation") else {"input_size": size}
        single = conv_spectral_norm_bound(kernel, method=method, **asked, **options).item()
        certified = conv_spectral_norm_bound(kernel, method=method, certified=True, **asked, **options).item()
        assert exact <= single, (method, "float32", exact / single, kernel.shape, size, options)
        rounded = certified * (1 + ROUNDING_OF_THE_SVD)
        assert exact <= rounded, (method, "certified", exact / certified, kernel.shape, size, options)


@pytest.mark.parametrize("seed", range(4))
def test_no_bound_is_below_the_exact_norm(seed: int) -> None:
    for case in random_cases(seed, 80):
        check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 116))
def test_no_bound_is_below_the_exact_norm_in_thousands(seed: int) -> None:
    for case in random_cases(seed, 250):
        check_case(case)


def test_one_size_free_bound_holds_for_many_sizes() -> None:
    for kernel, size, options in random_cases(5, 20, most_inputs=40):
        bound = conv_spectral_norm_bound(kernel, certified=True, **options).item()
        for extra in range(6):
            larger = [n + extra for n in size]
            if math.prod(larger) <= 200:
                assert kernel_norm(kernel, larger, **options) <= bound * (1 + ROUNDING_OF_THE_SVD)


def test_the_known_size_never_makes_it_worse() -> None:
    for kernel, size, options in random_cases(6, 100):
        free = conv_spectral_norm_bound(kernel, certified=True, **options)
        known = conv_spectral_norm_bound(kernel, input_size=size, certified=True, **options)
        assert known <= free


def test_kernel_to_operator_bounds_every_kernel() -> None:
    for kernel, size, options in random_cases(8, 200):
        geometry = conv_geometry(kernel.shape, **options)
        factor = kernel_to_operator(kernel.shape, geometry)
        assert kernel_norm(kernel, size, **options) <= factor * kernel.double().norm().item() * (1 + 1e-13)


def test_size_free_slack_on_large_inputs_with_zero_padding() -> None:
    """A power iteration stands for the exact norm: it is below it, so the slack is overstated."""
    rng, ratios = random.Random(7), []
    for index in range(60):
        axes = 1 + index % 3
        shape = (rng.randint(1, 4), rng.randint(1, 4), *(rng.randint(1, 5 if axes < 3 else 3) for _ in range(axes)))
        kernel = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        options = {"stride": rng.randint(1, 2), "dilation": rng.randint(1, 2), "padding": rng.randint(0, 2)}
        bound = conv_spectral_norm_bound(kernel, rtol=1e-4, certified=True, **options).item()
        ratios.append(bound / large_input_norm(kernel, {1: 400, 2: 64, 3: 24}[axes], **options))
    assert min(ratios) >= 1 - 1e-6
    assert sorted(ratios)[len(ratios) // 2] <= 1.05


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((2, 3, 5), (7,), {"padding": 2}),
        ((2, 3, 5), (7,), {"padding": [(1, 3)]}),
        ((3, 2, 3, 4), (6, 4), {"padding": [(1, 1), (0, 3)]}),
        ((2, 2, 3, 3), (6, 8), {"padding": 1, "stride": 2}),
        ((4, 2, 3, 3), (5, 7), {"padding": 2, "dilation": 2, "groups": 2}),
        ((2, 1, 3), (5,), {"padding": 1, "stride": 5}),
        ((1, 2, 3, 3, 3), (3, 4, 2), {"padding": 1}),
        ((2, 2, 4), (5,), {"padding": "same"}),
        ((2, 2, 9), (5,), {"padding": 4}),
    ],
)
def test_circular_padding_of_a_known_size_is_exact(
    shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any]
) -> None:
    kernel = torch.randn(shape, dtype=torch.float64)
    exact_options = dict(options)
    if options["padding"] == "same":
        exact_options["padding"] = [((k - 1) // 2, k // 2) for k in shape[2:]]
    exact = kernel_norm(kernel, size, padding_mode="circular", **exact_options)
    for method in ("auto", "fft"):
        bound = conv_spectral_norm_bound(
            kernel, input_size=size, padding_mode="circular", method=method, rtol=1e-8, **options
        )
        assert bound.item() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((3, 2, 5, 5), (13, 9), {"stride": 5}),
        ((3, 2, 3), (30,), {"stride": 9, "dilation": 3}),
        ((3, 2, 3, 2), (11, 7), {"stride": (3, 4), "dilation": (2, 3)}),
        ((3, 2, 3, 2), (4, 5), {"stride": 3, "transposed": True, "output_padding": 1}),
        ((3, 2, 4, 4), (4, 4), {}),
        ((4, 2, 4, 4), (1, 1), {"groups": 2, "transposed": True}),
    ],
    ids=["patches", "stride over dilation", "coprime", "transposed", "one output", "one input, transposed"],
)
def test_dense_cases_are_exact(shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any]) -> None:
    kernel = torch.randn(shape, dtype=torch.float64)
    exact = kernel_norm(kernel, size, **options)
    assert conv_spectral_norm_bound(kernel, input_size=size, rtol=1e-8, **options).item() == pytest.approx(exact)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_norm_of_padding_is_the_root_of_the_copies(mode: str) -> None:
    for before, after, size in itertools.product(range(4), range(4), range(1, 9)):
        if size >= smallest_size(mode, (before, after), 1):
            exact = kernel_norm(torch.ones(1, 1, 1), [size], padding=[(before, after)], padding_mode=mode)
            assert math.sqrt(most_copies(mode, (before, after), size)) == pytest.approx(exact)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("taps", range(1, 7))
def test_same_padding_puts_the_odd_point_where_torch_puts_it(taps: int) -> None:
    kernel, size = torch.randn(1, 1, taps, dtype=torch.float64), (7,)
    for mode in ("replicate", "reflect", "circular"):
        pairs = [((taps - 1) // 2, taps // 2)]
        spelled_out = conv_spectral_norm_bound(kernel, input_size=size, padding=pairs, padding_mode=mode)
        assert conv_spectral_norm_bound(kernel, input_size=size, padding="same", padding_mode=mode) == spelled_out
    zeros = kernel_norm(kernel, size, padding="same")
    assert zeros == pytest.approx(kernel_norm(kernel, size, padding=pairs))
