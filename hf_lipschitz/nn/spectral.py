"""Standalone layers whose weight is divided by a bound of its spectral norm."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_lipschitz.nn.aol import layout_of, orthogonal_start_
from hf_lipschitz.nn.attachment import attach
from hf_lipschitz.nn.parametrizations import GramParametrization


def divide_by_norm(module: nn.Module, *, lipschitz: float, rtol: float) -> None:
    """Gives a new layer an orthogonal weight under an exact [`GramParametrization`]."""
    orthogonal_start_(module)
    layout = layout_of(module)
    parametrization = GramParametrization(layout, exact=True, rtol=rtol, refresh_every=1, name=type(module).__name__)
    attach(module, "weight", parametrization, lipschitz)


class SpectralLinear(nn.Linear):
    r"""x ↦ c W x/b(W) + bias, b ≥ σ₁(W) the Gram bound (Delattre et al. 2023): `lipschitz`-Lipschitz to `rtol`.

    Args:
        args:
            Those of `torch.nn.Linear`.
        lipschitz (`float`, *optional*, defaults to 1.0):
            c, a **sound bound** of the layer.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Width of the bracket.
    """

    def __init__(self, *args: Any, lipschitz: float = 1.0, rtol: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        divide_by_norm(self, lipschitz=lipschitz, rtol=rtol)


class SpectralConv2d(nn.Conv2d):
    """[`SpectralLinear`] for images, for every input size; the first arguments are those of `torch.nn.Conv2d`."""

    def __init__(self, *args: Any, lipschitz: float = 1.0, rtol: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        divide_by_norm(self, lipschitz=lipschitz, rtol=rtol)
