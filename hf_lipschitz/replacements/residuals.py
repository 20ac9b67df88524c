"""replace="residuals": a budget for the branches of residual sums, so that depth does not multiply up."""

from __future__ import annotations

import logging

from torch import nn

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.dataflow import residual_ends


logger = logging.getLogger(__name__)


def find(model: nn.Module, config: LipschitzConfig) -> tuple[str, ...]:
    """The layers in which residual branches end, once for each time that the model calls them.

    See [`hf_lipschitz.dataflow.residual_ends`]. Sums whose branch ends in something else get no share of the budget:
    a warning tells how many there are.

    Args:
        model (`torch.nn.Module`):
            Plain, with its weights.
        config (`LipschitzConfig`):
            `strict` makes sums without a share an error.

    Returns:
        `tuple[str]`: for [`apply`].

    Raises:
        ValueError: the model cannot be run on inputs made from its configuration, has no such layer, or has other
            residual sums as well and `config.strict`.
    """
    ends = residual_ends(model)
    if not ends.layers:
        raise ValueError(
            f"{type(model).__name__} has no residual branch that ends in a Linear or a convolution; leave 'residuals' "
            "out of replace"
        )
    if ends.others:
        message = f"{ends.others} of the residual branches of {type(model).__name__} end in no Linear or convolution"
        if config.strict:
            raise ValueError(f"strict=True, and {message}; set strict=False to leave them without a budget")
        logger.warning("replace=residuals: %s and are left without a budget", message)
    return ends.layers


def apply(model: nn.Module, config: LipschitzConfig, names: tuple[str, ...]) -> None:
    r"""Gives each layer that ends a branch its share of the budget, as the attribute `lipschitz_share`.

    With n branches, one for each entry of `names`, and the budget B, the share is B/n: the factor by which the
    constant of the layer is multiplied when it is constrained. Where the rest of a branch is 1-Lipschitz and its last
    layer is constrained to B/n, the sum x + f(x) is (1 + B/n)-Lipschitz, and all n in a row are
    \((1 + B/n)^n \le e^B\).

    That is a statement about the sums alone. The rest of a branch is 1-Lipschitz only if every norm, activation,
    attention, gain (`layer_scale`) and earlier layer in it is; what stands between the sums, such as the norms of BERT
    or the projected shortcuts of ResNet, multiplies with its own constants; and branches that [`find`] counted as
    others are not in the product. So this is no bound of the model by itself.

    Args:
        model (`torch.nn.Module`):
            Plain or on the meta device.
        config (`LipschitzConfig`):
            `residual_budget` is B.
        names (`tuple[str]`):
            From [`find`].

    Raises:
        AttributeError: a name is not that of a module.
    """
    share = config.residual_budget / len(names)
    for name in names:
        model.get_submodule(name).lipschitz_share = share
