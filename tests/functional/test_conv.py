from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lipschitz.conversion import lipschitzify, merge
from hf_lipschitz.functional import conv_spectral_norm_bound
from hf_lipschitz.functional.conv import OVERSAMPLING, conv_bound_and_direction
from hf_lipschitz.functional.geometry import conv_geometry
from tests.operators import conv_norm, dense_norm, kernel_norm


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


def flattened_norm(kernel: torch.Tensor) -> float:
    """What `torch.nn.utils.parametrizations.spectral_norm` divides by, once its power iteration has converged."""
    return dense_norm(kernel.flatten(1))


def grid_norm(kernel: torch.Tensor, n: int) -> float:
    """The largest singular value of the transform on a square grid of n points an axis; longer axes are cropped."""
    axes = range(2, kernel.dim())
    transformed = torch.fft.fftn(kernel.double(), s=[n] * len(axes), dim=list(axes))
    return dense_norm(transformed.permute(*axes, 0, 1))


def one_tap(axes: int, k: int) -> torch.Tensor:
    return torch.eye(1, k**axes).reshape(1, 1, *[k] * axes)


def test_trap_flattened_kernel() -> None:
    for kernel in (torch.randn(8, 8, 3, 3), torch.rand(8, 8, 3, 3)):
        exact = kernel_norm(kernel, (8, 8), padding=1)
        assert flattened_norm(kernel) < exact <= conv_spectral_norm_bound(kernel, padding=1)
        assert exact <= conv_spectral_norm_bound(kernel, padding=1, input_size=8)


@pytest.mark.parametrize(("mode", "k"), [("reflect", 3), ("replicate", 5)])
def test_trap_flattened_kernel_times_the_mean_number_of_taps_that_meet_the_input(mode: str, k: int) -> None:
    kernel, n = torch.ones(1, 1, k, k), 8
    half = k // 2
    peer = flattened_norm(kernel) * (k * n - half * (half + 1)) / n
    exact = kernel_norm(kernel, (n, n), padding=half, padding_mode=mode)
    assert peer < exact
    for size in (None, n):
        assert exact <= conv_spectral_norm_bound(kernel, padding=half, padding_mode=mode, input_size=size)


@pytest.mark.parametrize("axes", [1, 2])
def test_trap_stride_equal_to_dilation_overlaps(axes: int) -> None:
    """Counting ⌈k/s⌉ overlaps a stride, as for a kernel without dilation, gives one where there are k."""
    kernel = torch.ones(1, 1, *[3] * axes)
    peer = flattened_norm(kernel) * math.prod(math.sqrt(math.ceil(3 / 3)) for _ in range(axes))
    exact = kernel_norm(kernel, (21,) * axes, stride=3, dilation=3)
    assert peer < exact
    for size in (None, 21):
        assert exact <= conv_spectral_norm_bound(kernel, stride=3, dilation=3, input_size=size)


@pytest.mark.parametrize(("mode", "k", "ratio"), [("reflect", 3, 2), ("replicate", 5, 3)])
def test_trap_orthogonal_with_circular_padding_is_not_with_another(mode: str, k: int, ratio: float) -> None:
    kernel, n = one_tap(2, k), 8
    peer, exact = grid_norm(kernel, n), kernel_norm(kernel, (n, n), padding=k // 2, padding_mode=mode)
    assert peer == pytest.approx(1)
    assert exact == pytest.approx(ratio)
    for size in (None, n):
        assert exact <= conv_spectral_norm_bound(kernel, padding=k // 2, padding_mode=mode, input_size=size)


def test_trap_product_over_groups_instead_of_the_maximum() -> None:
    kernel = torch.tensor([0.1, 0.5, 0.2]).reshape(3, 1, 1, 1)
    exact = kernel_norm(kernel, (2, 2), groups=3)
    assert kernel.prod() < exact
    assert conv_spectral_norm_bound(kernel, groups=3).item() == pytest.approx(exact, rel=5e-5)
    wide = torch.randn(6, 2, 3, 3) / 10
    each = [kernel_norm(part, (6, 6)) for part in wide.split(2)]
    assert math.prod(each) < kernel_norm(wide, (6, 6), groups=3) == pytest.approx(max(each))
    assert max(each) <= conv_spectral_norm_bound(wide, groups=3)


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (2, 3, 2, 7)])
def test_trap_rectangular_kernels_on_a_square_grid(shape: tuple[int, ...]) -> None:
    kernel = torch.randn(shape)
    exact = kernel_norm(kernel, (4, 16))
    assert grid_norm(kernel, shape[2]) < exact
    for size in (None, (4, 16)):
        assert exact <= conv_spectral_norm_bound(kernel, input_size=size)


def test_trap_grid_of_the_size_of_the_kernel() -> None:
    kernel = torch.randn(2, 3, 3, 3)
    exact = kernel_norm(kernel, (16, 16), padding=1)
    assert grid_norm(kernel, 3) < exact <= conv_spectral_norm_bound(kernel, padding=1)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_trap_grid_of_the_size_of_the_input(mode: str) -> None:
    kernel = torch.tensor([[[-2.0, 1.0, -2.0]]]) if mode == "zeros" else one_tap(1, 3)
    exact = kernel_norm(kernel, (3,), padding=1, padding_mode=mode)
    assert grid_norm(kernel, 3) < exact
    assert exact <= conv_spectral_norm_bound(kernel, padding=1, padding_mode=mode, input_size=3)


def test_trap_grid_for_half_a_kernel_of_padding_where_there_is_more() -> None:
    """Taps at both ends, and room between them for the whole input: on too small a grid they cancel."""
    kernel = torch.tensor([[[1.0, 0.0, 0.0, -1.0]]])
    exact = kernel_norm(kernel, (1,), padding=3)
    wrapped = kernel[..., :3] + kernel[..., 3:] * one_tap(1, 3)
    assert grid_norm(wrapped, 1 + 4 // 2) < exact
    assert exact <= conv_spectral_norm_bound(kernel, padding=3, input_size=1)


@pytest.mark.parametrize("options", [{"padding": 5}, {"padding": [(4, 0), (0, 3)]}])
def test_more_padding_than_input(options: dict[str, Any]) -> None:
    kernel = torch.rand(2, 2, 3, 3)
    for size in (None, 2):
        assert kernel_norm(kernel, (2, 2), **options) <= conv_spectral_norm_bound(kernel, input_size=size, **options)


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


def test_the_factor_between_grid_and_all_frequencies_is_attained() -> None:
    """I + R e^{iω}, R a rotation by half a step of the grid: norm 2 between two frequencies of the grid."""
    angle = torch.tensor(math.pi / OVERSAMPLING[1], dtype=torch.float64)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    kernel = torch.stack([torch.eye(2, dtype=torch.float64), rotation], dim=-1)
    bound = conv_spectral_norm_bound(kernel, rtol=1e-9).item()
    assert 2 - 1e-12 <= bound <= 2 + 1e-7
    assert kernel_norm(kernel, (300,)) <= bound


def test_patch_embedding_is_its_matrix() -> None:
    module = nn.Conv2d(3, 24, 4, stride=4)
    assert bound(module, rtol=1e-6) == pytest.approx(dense_norm(module.weight.flatten(1)), rel=5e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"groups": 2, "dilation": 2},
        {"stride": 3},
        {"stride": 4, "dilation": 2, "padding_mode": "replicate", "padding": [(0, 1), (2, 0)]},
        {"stride": 2, "groups": 2, "transposed": True, "output_padding": 1},
    ],
)
def test_direction_is_the_gradient_of_the_bound(options: dict[str, Any]) -> None:
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
@pytest.mark.parametrize("method", ["auto", "size_free", "fft", "autocorrelation"])
def test_scale_does_not_matter(scale: float, method: str) -> None:
    kernel = torch.randn(3, 2, 3, 3)
    options = {"padding": 1, "input_size": 6, "method": method}
    scaled = conv_spectral_norm_bound((kernel * scale).float(), **options).item()
    assert scaled == pytest.approx(conv_spectral_norm_bound(kernel, **options).item() * scale, rel=1e-5)


@pytest.mark.parametrize("method", ["auto", "size_free", "fft", "autocorrelation"])
def test_zero_kernel_has_norm_zero(method: str) -> None:
    for options in ({}, {"stride": 2, "padding": 1}, {"transposed": True}):
        assert conv_spectral_norm_bound(torch.zeros(2, 2, 3, 3), input_size=5, method=method, **options) == 0


def test_taps_that_only_meet_padding_do_not_count() -> None:
    kernel = torch.tensor([[[100.0, 1.0, 100.0]]])
    assert conv_spectral_norm_bound(kernel, input_size=1, padding=1, stride=3).item() == pytest.approx(1, rel=1e-4)
    assert conv_spectral_norm_bound(kernel[..., :1], input_size=1, padding=1, stride=2) == 0


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (torch.ones(0, 1, 3), ValueError, "empty"),
        (torch.ones(2, 1, 3, dtype=torch.int64), TypeError, "floating-point"),
        (torch.ones(2, 1, 3, dtype=torch.complex64), TypeError, "complex"),
        (torch.tensor([[[1.0, torch.inf]]]), ValueError, "NaN or inf"),
        (torch.ones(3), ValueError, "must have shape"),
        (torch.ones(3, 3), ValueError, "must have shape"),
        (torch.ones(1, 1, 1, 1, 1, 1), ValueError, "must have shape"),
    ],
)
def test_bad_kernels_are_named(kernel: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv_spectral_norm_bound(kernel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 4}, "kernel reaches over 5 points on axis 0 and the padded input has 4: enlarge input_size"),
        ({"input_size": (9, 9)}, "input_size must be a positive int or 1 of them"),
        ({"input_size": 0, "padding": 4}, "input_size must be a positive int"),
        ({"input_size": 2, "padding": 2, "padding_mode": "reflect"}, "reflect padding .* does not fit input size 2"),
        ({"input_size": 2, "padding": 3, "padding_mode": "circular"}, "circular padding .* does not fit input size 2"),
        ({"input_size": 1, "padding": 3, "transposed": True}, "leaves no output: enlarge input_size or lower padding"),
        ({"output_padding": 1}, "pass transposed=True"),
        ({"output_padding": 1, "transposed": True}, "output_padding must be smaller than the stride or the dilation"),
        ({"padding_mode": "reflect", "transposed": True}, "padding_mode 'zeros' only"),
        ({"padding": "same", "transposed": True}, "padding as an int"),
        ({"padding": [(0, 1)], "transposed": True}, "padding as an int"),
        ({"padding": [(0, 1), (1, 0)]}, "pairs"),
        ({"padding": [(0, 1, 2)]}, "padding pair"),
        ({"groups": 2, "transposed": True}, "does not divide the 3 input channels"),
        ({"method": "fft"}, "pass input_size"),
        ({"method": "svd"}, "unknown method 'svd'; known: auto, size_free, fft, autocorrelation"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_spectral_norm_bound(torch.ones(3, 2, 5), **options)


def test_sizes_are_refused_where_torch_refuses_them() -> None:
    grid = itertools.product((1, 2, 3, 4), (1, 2, 4), (0, 1, 2, 3), (1, 2), (1, 3), (0, 1, 2))
    for size, taps, padding, stride, dilation, extra in grid:
        kernel = torch.ones(1, 1, taps)
        plain = {"stride": stride, "padding": padding, "dilation": dilation}
        cases = [plain | {"padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")]
        for options in [*(cases if extra == 0 else []), plain | {"transposed": True, "output_padding": extra}]:
            assert is_refused(conv_spectral_norm_bound, kernel, input_size=size, **options) == is_refused(
                kernel_norm, kernel, (size,), **options
            ), (size, taps, options)


def is_refused(function: Callable[..., Any], *args: Any, **options: Any) -> bool:
    try:
        function(*args, **options)
    except (ValueError, RuntimeError):
        return True
    return False


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


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.ConvTranspose1d(3, 4, 5, stride=2, padding=1, output_padding=1), (9,)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (6, 5)),
        (nn.ConvTranspose2d(3, 2, 2, stride=2), (4, 4)),
        (nn.ConvTranspose3d(2, 2, 2, dilation=2), (3, 3, 3)),
    ],
)
def test_transposed_layers_keep_their_constant(module: nn.Module, size: tuple[int, ...]) -> None:
    plain = copy.deepcopy(module)
    lipschitzify(module, layer_lipschitz=0.3, mode="exact")
    for scale in (1, 50):
        module.parametrizations.weight.original.data.add_(scale * torch.randn_like(module.weight))
        plain.weight.data = module.weight.detach().float()
        assert conv_norm(plain.float(), size) <= 0.3
    module.eval()
    plain.weight.data = module.weight.detach().float()
    assert 0.2 <= conv_norm(plain.float(), size) <= 0.3
    assert merge(module).weight.shape == plain.weight.shape


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 3, 3, stride=2, dilation=2, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(2, 3, 3, stride=2),
    ],
)
def test_constrained_convolutions_compile_in_one_graph(module: nn.Module) -> None:
    module, x = lipschitzify(copy.deepcopy(module), layer_lipschitz=0.5), torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))
