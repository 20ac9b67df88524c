"""Where modules hold linear maps: which of their tensors, and as what."""

from __future__ import annotations

import inspect

from torch import nn
from torch.nn.utils import parametrize
from transformers.models.funnel.modeling_funnel import FunnelRelMultiheadAttention
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.functional.geometry import ConvGeometry, conv_geometry
from hf_lipschitz.functional.layout import WeightLayout
from hf_lipschitz.nn.parametrized import own_parametrizations


DENSE = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Of transformers: their own forward uses the weight as it is stored, on inputs with zeros around them or in parts.
_KNOWN_FORWARDS = ("FalconLinear", "IdeficsDecoupledLinear", "DeepseekV4GroupedLinear", "Conv2dSamePadding")
_QUERIES_KEYS_VALUES = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def weight_layouts(module: nn.Module) -> dict[str, WeightLayout]:
    """The tensors of a module that it uses as linear maps, and how; empty for a module that has none of its own.

    `nn.Linear`, transformers' `Conv1D`, `nn.Conv1d/2d/3d` and `nn.ConvTranspose1d/2d/3d`, the projections inside
    `nn.MultiheadAttention`, the stacked experts of mixtures and the weights of their routers, and the tensors that
    XLNet and Funnel use in einsums. Depends on the structure alone, so that it is the same on the meta device and for
    a parametrized module.
    """
    if isinstance(module, CONVOLUTIONS):
        return {"weight": WeightLayout(_geometry(module))}
    if isinstance(module, DENSE):
        return {"weight": WeightLayout(is_transposed=isinstance(module, Conv1D))}
    if isinstance(module, nn.MultiheadAttention):
        if module._qkv_same_embed_dim:
            return {"in_proj_weight": WeightLayout(count=3)}
        return dict.fromkeys(_QUERIES_KEYS_VALUES, WeightLayout())
    if isinstance(module, XLNetRelativeAttention):
        # Stored as (d_model, heads, d_head), of which d_model is the input but for o.
        return {name: WeightLayout(is_transposed=name != "o") for name in ("q", "k", "v", "o", "r")}
    if isinstance(module, FunnelRelMultiheadAttention):
        return {"r_kernel": WeightLayout(is_transposed=True)}
    if _is_experts(module):
        is_transposed = bool(getattr(module, "is_transposed", False))
        return {
            name: WeightLayout(count=tensor.shape[0], is_transposed=is_transposed)
            for name, tensor in _own_tensors(module).items()
            if tensor.dim() == 3
        }
    if _is_linear_by_hand(module):
        return {"weight": WeightLayout()}
    return {}


def uses_weight_otherwise(module: nn.Module) -> bool:
    """Whether a subclass of a Linear or convolution has a forward of its own that may not use the weight as stored.

    Weight standardisation (BiT) does not. One that only calls that of its base, on a padded input or before something
    else, does.
    """
    kind = _plain_class(module)
    if not issubclass(kind, DENSE + CONVOLUTIONS) or kind.__name__ in _KNOWN_FORWARDS:
        return False
    for parent in kind.__mro__:
        if parent.__module__.startswith("torch.") or parent is Conv1D:
            return False
        for name in ("forward", "_conv_forward"):
            if name in vars(parent):
                code = getattr(inspect.unwrap(vars(parent)[name]), "__code__", None)
                if code is None or "super" not in code.co_names or "weight" in code.co_names:
                    return True
    return False


def _geometry(module: nn.Module) -> ConvGeometry:
    return conv_geometry(
        _own_tensors(module)["weight"].shape,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=module.transposed,
        output_padding=module.output_padding,
    )


def _is_experts(module: nn.Module) -> bool:
    """The experts of a mixture in one module, each a matrix of a tensor of three axes."""
    return "Experts" in _plain_class(module).__name__ and any(t.dim() == 3 for t in _own_tensors(module).values())


def _is_linear_by_hand(module: nn.Module) -> bool:
    """A router or another module of a few lines that calls `F.linear` on a matrix of its own."""
    weight = _own_tensors(module).get("weight")
    if weight is None or weight.dim() != 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)):
        return False
    code = getattr(inspect.unwrap(_plain_class(module).forward), "__code__", None)
    return code is not None and {"linear", "weight"} <= set(code.co_names)


def _own_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the module itself, those under a parametrization with their raw tensor."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    for name, chain in own_parametrizations(module).items():
        # Weight norm keeps the tensor as (magnitude, direction).
        own[name] = chain.original if chain.is_tensor else chain.original1
    return own


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return parametrize.type_before_parametrizations(module)
