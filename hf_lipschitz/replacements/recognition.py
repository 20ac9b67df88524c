"""Which bounded norm a norm of any model corresponds to, found out by comparing the two on random inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from hf_lipschitz.nn.normalization import CentredNorm, FloorStdGroupNorm, FloorStdLayerNorm, FloorStdRMSNorm


Maker = Callable[[nn.Parameter | None, nn.Parameter | None], nn.Module]

BATCH_NORM_KINDS = ("BatchNorm", "InstanceNorm")
# Relative to the largest output; norms of transformers differ by the order of float32 operations at most.
_TOLERANCE = 1e-5
# Of the gains that models store as an offset from 1.
_OFFSETS = (0.0, 1.0)
# Squares of deviations below it are no normal float32 numbers.
_LEAST_EPS = 1e-30


def is_norm(module: nn.Module) -> bool:
    """Whether the class is called a norm and the module has no children; batch norms are another matter."""
    kind = type(module).__name__
    return "Norm" in kind and not any(k in kind for k in BATCH_NORM_KINDS) and not list(module.children())


def bounded_norm(module: nn.Module, norm: str) -> nn.Module:
    """The bounded norm that takes the place of `module`, around its own parameters.

    It is the first candidate that computes what a copy of `module` with random parameters computes on random inputs;
    only the structure counts, so that it is the same on the meta device. The order of roundings of RMS norms is then
    chosen by bit-equality in bfloat16.

    Args:
        module (`torch.nn.Module`):
            A norm as [`is_norm`] finds them.
        norm (`str`):
            `"floor"` or `"centred"`.

    Raises:
        ValueError: no candidate agrees; the message says in a few words why.
    """
    # Loading runs under the meta device and the dtype of the checkpoint; what is compared here needs data, in float32.
    with torch.device("cpu"):
        maker = _maker(module, norm)
    replacement = maker(module._parameters.get("weight"), module._parameters.get("bias"))
    return replacement.train(module.training)


def _maker(module: nn.Module, norm: str) -> Maker:
    parameters = dict(module.named_parameters())
    if not set(parameters) <= {"weight", "bias"} or list(module.buffers()):
        raise ValueError("it has tensors other than weight and bias")
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(required) != 1:
        raise ValueError("its forward takes more than one argument")
    eps = _eps_of(module)
    if not isinstance(eps, float) or eps <= 0:
        raise ValueError(f"its eps is {eps}, and a floor needs a positive one")
    if eps < _LEAST_EPS:
        raise ValueError(f"its eps is {eps}, too small for float32 to show what it does")
    original = _with_random_parameters(module)
    weight, bias = original._parameters.get("weight"), original._parameters.get("bias")
    found = [pair for pair in _candidates(original, eps) if _agree(original, pair[0](weight, bias), original)]
    if not found:
        raise ValueError("it computes neither a layer norm nor an RMS norm nor a group norm")
    floor, centred = min(found, key=lambda pair: _difference_in_bfloat16(original, pair[0]))
    if norm == "floor":
        return floor
    if centred is None:
        raise ValueError('a group norm has no centred form; norm="floor" covers it')
    return centred


def _eps_of(module: nn.Module) -> float | None:
    return getattr(module, "eps", getattr(module, "variance_epsilon", None))


def _candidates(module: nn.Module, eps: float) -> Iterator[tuple[Maker, Maker | None]]:
    """Floor and centred norms, the likely ones first."""
    if isinstance(module, nn.GroupNorm):
        groups, channels = module.num_groups, module.num_channels
        yield lambda w, b: FloorStdGroupNorm(groups, channels, eps, weight=w, bias=b), None
        return
    weight = module._parameters.get("weight")
    shape = tuple(weight.shape) if weight is not None else getattr(module, "normalized_shape", None)
    if shape is not None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        axes = (-1, 1) if len(shape) == 1 else (-1,)
        for offset in _OFFSETS[: 1 if weight is None else 2]:
            for axis in axes:
                yield (
                    partial(_layer_norm, shape, eps, axis, offset),
                    partial(_centred_norm, shape, axis, offset, True),
                )
    if module._parameters.get("bias") is None and (shape is None or len(shape) == 1):
        for offset in _OFFSETS[: 1 if weight is None else 2]:
            for wide, follows_weight in ((False, False), (False, True), (True, False)):
                centred = None if shape is None else partial(_centred_norm, shape, -1, offset, False)
                yield partial(_rms_norm, eps, offset, wide, follows_weight), centred


def _layer_norm(
    shape: tuple[int, ...], eps: float, axis: int, offset: float, w: nn.Parameter | None, b: nn.Parameter | None
) -> nn.Module:
    return FloorStdLayerNorm(shape, eps, weight=w, bias=b, axis=axis, offset=offset)


def _rms_norm(
    eps: float, offset: float, wide: bool, follows_weight: bool, w: nn.Parameter | None, b: nn.Parameter | None
) -> nn.Module:
    return FloorStdRMSNorm(w, eps, offset=offset, gain_in_float32=wide, follows_weight=follows_weight)


def _centred_norm(
    shape: tuple[int, ...],
    axis: int,
    offset: float,
    is_centred: bool,
    w: nn.Parameter | None,
    b: nn.Parameter | None,
) -> nn.Module:
    return CentredNorm(shape, weight=w, bias=b, axis=axis, offset=offset, is_centred=is_centred)


def _with_random_parameters(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float32, whatever the device of the module."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    twin = copy.deepcopy(module, memo).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) + 0.5)
    return twin


def _probes(module: nn.Module) -> Iterator[Tensor]:
    """Inputs with the features last and with the features second, of deviations from far below √eps to 10."""
    weight = module._parameters.get("weight")
    own = getattr(module, "num_channels", getattr(module, "normalized_shape", None))
    shape = tuple(weight.shape) if weight is not None else (own,) if isinstance(own, int) else tuple(own or (16,))
    # Sizes that cannot be taken for the features.
    sizes = [size for size in (5, 3, 7, 6) if size not in shape]
    layouts = [(4, *shape), (4, sizes[0], *shape), (4, sizes[0], sizes[1], *shape)]
    if len(shape) == 1:
        layouts += [(4, *shape, sizes[0]), (4, *shape, sizes[0], sizes[1])]
    generator = torch.Generator().manual_seed(1)
    for layout in layouts:
        scale = torch.tensor([10.0, 1.0, 1e-2, 0.1 * _eps_of(module) ** 0.5], dtype=torch.float32)
        scale = scale.reshape(-1, *[1] * (len(layout) - 1))
        yield scale * (torch.randn(layout, generator=generator, dtype=torch.float32) + 0.3)


@torch.no_grad()
def _agree(original: nn.Module, replacement: nn.Module, of: nn.Module) -> bool:
    """On every probe that the original takes, of which there must be one."""
    taken = 0
    for x in _probes(of):
        expected = _run(original, x)
        if expected is None:
            continue
        taken += 1
        got = _run(replacement, x)
        if got is None or got.shape != expected.shape:
            return False
        if not bool(((got - expected).abs() <= _TOLERANCE * expected.abs().amax()).all()):
            return False
    return taken > 0


@torch.no_grad()
def _difference_in_bfloat16(original: nn.Module, maker: Maker) -> float:
    half = copy.deepcopy(original).to(torch.bfloat16)
    replacement = maker(half._parameters.get("weight"), half._parameters.get("bias"))
    worst = 0.0
    for x in _probes(original):
        # Next to parts in float32 as well, where the dtype of the result is what differs.
        for given in (x.to(torch.bfloat16), x):
            expected, got = _run(half, given), _run(replacement, given)
            if expected is not None and got is not None:
                if expected.dtype != got.dtype:
                    return torch.inf
                worst = max(worst, (expected.float() - got.float()).abs().max().item())
    return worst


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """None where the module does not take the shape of `x`."""
    try:
        y = module(x)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    return y if isinstance(y, Tensor) else None
