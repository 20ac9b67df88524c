from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_lipschitz.functional import conv_spectral_norm_bound
from hf_lipschitz.functional.conv import conv_bound_and_direction
from hf_lipschitz.functional.geometry import conv_geometry
from tests.operators import conv_norm, dense_norm


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def bound(module: nn.Module, **options: object) -> float:
    return conv_spectral_norm_bound(
        module.weight,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        **options,
    ).item()


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    axes = draw(st.sampled_from([1, 1, 2, 2, 3]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.integers(1, 3))
    per_axis = lambda most: tuple(draw(st.integers(1, most)) for _ in range(axes))  # noqa: E731
    kernel, stride, dilation = per_axis(5 if axes < 3 else 3), per_axis(3), per_axis(3 if axes < 3 else 2)
    padding = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module = CONVOLUTIONS[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=False,
    )
    if draw(st.booleans()):
        # Kernels of one sign are where boundary effects are largest.
        module.weight.data.abs_()
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    extra = draw(st.integers(0, 5 if axes < 3 else 2))
    size = tuple(max(r - 2 * p + extra, p + 1, 1) for r, p in zip(reach, padding, strict=True))
    return module, size


@settings(max_examples=300)
@given(convolutions())
def test_bound_is_never_below_the_materialised_operator(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, size = case
    single = bound(module)
    certified = bound(module, certified=True)
    exact = conv_norm(module, size)
    assert exact <= single
    assert exact <= certified * (1 + 1e-14)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(3, 4, 3, stride=3, dilation=3), (30,)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (6, 6)),
        (nn.Conv2d(2, 3, 5, padding=2, padding_mode="replicate"), (7, 7)),
        (nn.Conv2d(4, 8, 3, groups=4), (6, 6)),
        (nn.Conv2d(2, 3, (1, 5)), (4, 12)),
        (nn.Conv2d(2, 2, 3, padding=5), (2, 2)),
        (nn.Conv1d(1, 1, 9, padding=4), (2,)),
    ],
    ids=["stride=dilation", "reflect", "replicate", "depthwise", "rectangular", "more padding than input", "long"],
)
def test_geometries_that_published_code_gets_wrong(module: nn.Module, size: tuple[int, ...]) -> None:
    for sign in (1, -1):
        if sign > 0:
            module.weight.data.abs_()
        assert bound(module) >= conv_norm(module, size)


def test_groups_take_the_maximum() -> None:
    module = nn.Conv2d(3, 3, 1, groups=3, bias=False)
    module.weight.data = torch.tensor([0.1, 0.5, 0.2]).reshape(3, 1, 1, 1)
    assert bound(module) == pytest.approx(0.5, rel=2e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 16, 4, stride=4),
        nn.Conv2d(6, 5, 1, stride=2),
        nn.Conv1d(2, 7, 2, stride=3),
        nn.Conv2d(3, 8, (2, 3), stride=(2, 3)),
    ],
)
def test_kernels_no_longer_than_their_stride_are_exact(module: nn.Module) -> None:
    size = [6 * s for s in module.stride]
    certified = bound(module, certified=True, rtol=1e-6)
    assert conv_norm(module, size) == pytest.approx(certified, rel=2e-6)


def test_slack_is_the_stated_one_an_axis() -> None:
    module = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    ratio = bound(module, certified=True) / conv_norm(module, (24, 24))
    assert 1 <= ratio <= 1.002 / math.cos(math.pi / 16) ** 2 * 1.01


def test_patch_embedding_is_its_matrix() -> None:
    module = nn.Conv2d(3, 24, 4, stride=4)
    assert bound(module, rtol=1e-6) == pytest.approx(dense_norm(module.weight.flatten(1)), rel=2e-5)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"stride": 3}])
def test_direction_is_the_gradient_of_the_bound(options: dict[str, int]) -> None:
    kernel = torch.randn(4, 4 // options.get("groups", 1), 3, 3, dtype=torch.float64)
    geometry = conv_geometry(kernel.shape, **options)
    _, direction = conv_bound_and_direction(kernel, geometry, rtol=1e-10)
    step = 1e-6 * torch.randn_like(kernel)
    difference = (
        conv_bound_and_direction(kernel + step, geometry, 1e-10)[0]
        - conv_bound_and_direction(kernel - step, geometry, 1e-10)[0]
    )
    assert (direction * step).sum().item() == pytest.approx(difference.item() / 2, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    kernel = torch.randn(3, 2, 3, 3)
    scaled = conv_spectral_norm_bound((kernel * scale).float(), padding=1).item()
    assert scaled == pytest.approx(conv_spectral_norm_bound(kernel, padding=1).item() * scale, rel=1e-5)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (torch.ones(4, 2), {}, "must have shape"),
        (torch.ones(1, 1, 2, 2, 2, 2), {}, "must have shape"),
        (torch.ones(4, 2, 3), {"groups": 3}, "does not divide"),
        (torch.ones(4, 2, 3), {"stride": 0}, "stride"),
        (torch.ones(4, 2, 3), {"dilation": (1, 2)}, "dilation"),
        (torch.ones(4, 2, 3), {"padding": -1}, "padding"),
        (torch.ones(4, 2, 3), {"padding": "full"}, "padding"),
        (torch.ones(4, 2, 3), {"padding": "same", "stride": 2}, "stride 1"),
        (torch.ones(4, 2, 3), {"padding_mode": "wrap"}, "padding_mode"),
        (torch.full((1, 1, 3), torch.nan), {}, "NaN or inf"),
    ],
)
def test_bad_geometries_are_named(kernel: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_spectral_norm_bound(kernel, **options)
