"""Upper bounds of the spectral norm of a convolution, for every input size at once or for a known one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_lipschitz.functional.checks import check_weight
from hf_lipschitz.functional.geometry import (
    AxisFold,
    ConvGeometry,
    Padding,
    boundary_factor,
    conv_geometry,
    fold,
    folded_kernel,
)
from hf_lipschitz.functional.gram import GramBracket
from hf_lipschitz.functional.known_size import check_input_size, known_size_folds
from hf_lipschitz.functional.products import computation_dtype
from hf_lipschitz.functional.rescaling_conv import conv_spectral_rescaling
from hf_lipschitz.functional.transfer import largest_transfer_norm, transfer_gradient


# A grid of m(k' - 1) frequencies an axis costs at most a factor 1/cos(π/(2m)) an axis: 1.005 in all with one axis of
# several taps, 1.04 with two, 1.026 with three, where small kernels on fine grids are cheap.
OVERSAMPLING = {0: 1, 1: 16, 2: 8, 3: 12}
# Entries of all transfer matrices of an input's own grid, beyond which method="auto" stays with the grid above.
LARGEST_GRID = 2**26
AUTOCORRELATION_STEPS = 2


def conv_spectral_norm_bound(
    kernel: Tensor,
    *,
    input_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    method: str = "auto",
    rtol: float = 1e-3,
    certified: bool = False,
) -> Tensor:
    r"""Bounds the spectral norm of a 1-D, 2-D or 3-D convolution or transposed convolution.

    A stride s and a dilation d are folded exactly into a stride-1 kernel of k' = ⌈k/s'⌉ taps an axis and c_in·∏s'
    input channels, s' = s/gcd(s, d) ([`folded_kernel`]). With zero padding of any amount the operator is a compression
    of the convolution with that kernel on the infinite grid, whose norm is the supremum over frequencies of the norm
    of the transfer matrix \(\hat K(\omega)\), a trigonometric polynomial of degree k'-1 an axis.

    `"size_free"`, for every input that torch accepts (M. Riesz; n_i > k'_i - 1, here 8 to 16 times it):

    \(\sigma_1 \le \max_{\omega \in \text{grid } n_1 \times \dots} \|\hat K(\omega)\| \prod_i
    1/\cos(\pi(k'_i-1)/(2n_i))\)

    `"fft"`, for inputs of `input_size`: the operator is a block of a circulant matrix ([`embedding`]), whose norm is
    the same maximum on that matrix's own grid, without the product. With circular padding, p_l + p_r = k_e - 1, and a
    stride that divides the size or is 1, the operator is that matrix, and the value exact.

    Where k' = 1 (1×1 kernels and kernels no longer than s', such as patch embeddings) the operator is a dense matrix,
    and the value exact to `rtol` unless the stride never fits the input. Groups give the maximum over groups. A
    transposed convolution is the adjoint of a convolution, and has its norm. Padding that copies entries multiplies
    the bound without padding by the norm of the padding, an axis at a time: √(1 + max(p_l, p_r)) for replicate, or
    √(1 + p_l + p_r) where inputs of one point are possible; √2 for reflect and circular, √3 where both sides may copy
    the same entry; 1 for circular padding with stride 1 and p_l + p_r < k_e. Size-free, these are the largest over the
    sizes that torch accepts.

    Args:
        kernel (`Tensor` of shape `(c_out, c_in / groups, k_1[, k_2[, k_3]])`):
            As torch stores it: `(c_in, c_out / groups, ...)` for a transposed convolution.
        input_size (`int` or `Sequence[int]`, *optional*):
            Spatial size of the operator's own input. Without it the bound holds for every size.
        stride, padding, dilation, groups, padding_mode, output_padding:
            As in `torch.nn.Conv1d/2d/3d` and `torch.nn.ConvTranspose1d/2d/3d`. `padding` may be `"same"`, `"valid"` or
            one (before, after) pair an axis, as `torch.nn.functional.pad` before a convolution without padding.
        transposed (`bool`, *optional*, defaults to `False`):
            The kernel is that of a transposed convolution.
        method (`str`, *optional*, defaults to `"auto"`):
            `"size_free"`, `"fft"`, `"autocorrelation"` (the largest divisor of [`conv_spectral_rescaling`], size-free
            and looser), or `"auto"`: the smaller of the first two, leaving the second out without `input_size` or
            where its grid is so large that the size-free one has little to lose.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Asked width of the Gram bracket at each frequency.
        certified (`bool`, *optional*, defaults to `False`):
            Computes in float64, with a term for the rounding of the Fourier transform and of every product.

    Returns:
        `Tensor`, 0-dim float64: a **sound bound**, up to the stated float32 allowance of [`spectral_norm_bound`]
        unless `certified` or float64.

    Raises:
        ValueError: kernel axes, groups, stride, dilation, padding, output padding or padding mode that no convolution
            has; an input size that torch refuses; an unknown method, or `"fft"` without `input_size`; NaN or inf.
        TypeError: `kernel` is not a real floating-point tensor.
    """
    check_weight(kernel, "kernel")
    if kernel.is_complex():
        raise TypeError("kernel is complex; no torch convolution layer has one, so take its real and imaginary parts")
    geometry = conv_geometry(
        kernel.shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    sizes = None if input_size is None else check_input_size(kernel.shape, geometry, input_size)
    return METHODS[method](kernel, geometry, sizes, rtol, certified)


def geometry_bound(kernel: Tensor, geometry: ConvGeometry, rtol: float = 1e-3, *, certified: bool = False) -> Tensor:
    """The size-free [`conv_spectral_norm_bound`] for a geometry that was checked before."""
    bracket, factor, _ = _worst_frequency(kernel, geometry, rtol, certified)
    return bracket.upper * factor


def conv_bound_and_direction(kernel: Tensor, geometry: ConvGeometry, rtol: float = 1e-3) -> tuple[Tensor, Tensor]:
    r"""The size-free bound of [`conv_spectral_norm_bound`] and its gradient with respect to the kernel.

    The gradient is that of \(\mathrm{Re}(u^H \hat K(\omega) v)\) times the Riesz and padding factors, at the frequency
    and the leading pair (u, v) where the maximum is; an estimate, as singular vectors are.

    Returns:
        `tuple[Tensor, Tensor]`: 0-dim float64 sound bound, and a tensor of the shape of `kernel`.
    """
    bracket, factor, where = _worst_frequency(kernel, geometry, rtol, certified=False)
    with torch.enable_grad():
        leaf = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32)).requires_grad_()
        folded = folded_kernel(leaf, geometry)
    at_frequency = transfer_gradient(folded, symbol_grid(folded.shape[3:]), where, bracket)
    (direction,) = torch.autograd.grad(folded, leaf, at_frequency * factor)
    return bracket.upper * factor, direction


def _worst_frequency(
    kernel: Tensor, geometry: ConvGeometry, rtol: float, certified: bool
) -> tuple[GramBracket, float, tuple[Tensor, ...]]:
    """The bracket at the frequency and group of largest upper end, the factor on it, and the index of that matrix."""
    folded = folded_kernel(_working_copy(kernel, certified), geometry)
    taps = folded.shape[3:]
    grid = symbol_grid(taps)
    bracket, where = largest_transfer_norm(folded, grid, rtol)
    riesz = math.prod(1 / math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(taps, grid, strict=True))
    return bracket, riesz * boundary_factor(kernel.shape, geometry) * (1 + 1e-14), where


def symbol_grid(taps: Sequence[int]) -> list[int]:
    oversampling = OVERSAMPLING[sum(k > 1 for k in taps)]
    return [max(1, oversampling * (k - 1)) for k in taps]


def _working_copy(kernel: Tensor, certified: bool) -> Tensor:
    return kernel.detach().to(computation_dtype(kernel.dtype, certified))


def _size_free(
    kernel: Tensor, geometry: ConvGeometry, sizes: Sequence[int] | None, rtol: float, certified: bool
) -> Tensor:
    return geometry_bound(kernel, geometry, rtol, certified=certified)


def _fft(kernel: Tensor, geometry: ConvGeometry, sizes: Sequence[int] | None, rtol: float, certified: bool) -> Tensor:
    if sizes is None:
        raise ValueError("method='fft' bounds the norm on inputs of one size: pass input_size, or method='size_free'")
    candidates = known_size_folds(kernel.shape, geometry, sizes)
    return torch.stack([_circular_norm(kernel, geometry, folds, rtol, certified) for folds in candidates]).min()


def _auto(kernel: Tensor, geometry: ConvGeometry, sizes: Sequence[int] | None, rtol: float, certified: bool) -> Tensor:
    bound = geometry_bound(kernel, geometry, rtol, certified=certified)
    for folds in [] if sizes is None else known_size_folds(kernel.shape, geometry, sizes):
        entries = kernel.shape[0] * kernel.shape[1] * math.prod(part.points * part.stride for part in folds)
        if entries <= LARGEST_GRID:
            bound = torch.minimum(bound, _circular_norm(kernel, geometry, folds, rtol, certified))
    return bound


def _circular_norm(
    kernel: Tensor, geometry: ConvGeometry, folds: Sequence[AxisFold], rtol: float, certified: bool
) -> Tensor:
    folded = fold(_working_copy(kernel, certified), folds, geometry.groups)
    if folded.numel() == 0:  # No tap ever meets the input.
        return folded.new_zeros((), dtype=torch.float64)
    bracket, _ = largest_transfer_norm(folded, [part.points for part in folds], rtol)
    return bracket.upper * (math.prod(part.factor for part in folds) * (1 + 1e-14))


def _autocorrelation(
    kernel: Tensor, geometry: ConvGeometry, sizes: Sequence[int] | None, rtol: float, certified: bool
) -> Tensor:
    t = conv_spectral_rescaling(
        kernel,
        stride=geometry.stride,
        padding=0 if geometry.transposed else geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        padding_mode=geometry.padding_mode,
        transposed=geometry.transposed,
        num_iterations=AUTOCORRELATION_STEPS,
        certified=certified,
    )
    return t.double().max()


METHODS: dict[str, Callable[[Tensor, ConvGeometry, Sequence[int] | None, float, bool], Tensor]] = {
    "auto": _auto,
    "size_free": _size_free,
    "fft": _fft,
    "autocorrelation": _autocorrelation,
}
