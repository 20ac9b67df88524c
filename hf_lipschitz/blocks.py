"""Residual feed-forward pairs of transformers models as SLL or CPL blocks."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hf_lipschitz.nn.activations import SlopeCorrected
from hf_lipschitz.nn.blocks import BLOCK_KINDS, BlockKind, TiedParametrization


logger = logging.getLogger(__name__)


class FeedForward(NamedTuple):
    """Where a layer of transformers holds x + outer(activation(inner(norm(x)))); `norm` is `None` if there is none."""

    inner: str
    activation: str
    outer: str
    norm: str | None = None


_BERT = FeedForward("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
_WAV2VEC2 = FeedForward(
    "feed_forward.intermediate_dense", "feed_forward.intermediate_act_fn", "feed_forward.output_dense"
)
_STABLE_WAV2VEC2 = _WAV2VEC2._replace(norm="final_layer_norm")
_VIT = FeedForward("mlp.fc1", "mlp.activation_fn", "mlp.fc2", "layernorm_after")
_CLIP = _VIT._replace(norm="layer_norm2")
_BART = FeedForward("fc1", "activation_fn", "fc2")
_WHISPER = _BART._replace(norm="final_layer_norm")

# By folder of transformers.models and class: the same submodules may be added up in another order elsewhere.
LAYOUTS: dict[str, FeedForward] = {
    "albert.AlbertLayer": FeedForward("ffn", "activation", "ffn_output"),
    "audio_spectrogram_transformer.ASTLayer": _VIT,
    "bart.BartDecoderLayer": _BART,
    "bart.BartEncoderLayer": _BART,
    "bert.BertLayer": _BERT,
    "camembert.CamembertLayer": _BERT,
    "clip.CLIPEncoderLayer": _CLIP,
    "data2vec.Data2VecTextLayer": _BERT,
    "deberta.DebertaLayer": _BERT,
    "deberta_v2.DebertaV2Layer": _BERT,
    "deit.DeiTLayer": _VIT,
    "distilbert.TransformerBlock": FeedForward("ffn.lin1", "ffn.activation", "ffn.lin2"),
    "electra.ElectraLayer": _BERT,
    "ernie.ErnieLayer": _BERT,
    "gpt2.GPT2Block": FeedForward("mlp.c_fc", "mlp.act", "mlp.c_proj", "ln_2"),
    "hubert.HubertEncoderLayer": _WAV2VEC2,
    "hubert.HubertEncoderLayerStableLayerNorm": _STABLE_WAV2VEC2,
    "layoutlm.LayoutLMLayer": _BERT,
    "mpnet.MPNetLayer": _BERT,
    "roberta.RobertaLayer": _BERT,
    "siglip.SiglipEncoderLayer": _CLIP,
    "swin.SwinLayer": _VIT,
    "t5.T5LayerFF": FeedForward("DenseReluDense.wi", "DenseReluDense.act", "DenseReluDense.wo", "layer_norm"),
    "vit.ViTLayer": _VIT,
    "wav2vec2.Wav2Vec2EncoderLayer": _WAV2VEC2,
    "wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm": _STABLE_WAV2VEC2,
    "wavlm.WavLMEncoderLayer": _WAV2VEC2,
    "wavlm.WavLMEncoderLayerStableLayerNorm": _STABLE_WAV2VEC2,
    "whisper.WhisperDecoderLayer": _WHISPER,
    "whisper.WhisperEncoderLayer": _WHISPER,
    "xlm_roberta.XLMRobertaLayer": _BERT,
    "xlnet.XLNetFeedForward": FeedForward("layer_1", "activation_function", "layer_2"),
}
# Submodules of gated feed-forward parts, a product of two branches.
_GATED = ("gate_proj", "gate_up_proj", "wi_0", "Wi")
_FEED_FORWARD_NAMES = ("mlp", "ffn", "feedforward", "feed_forward", "layerff", "densereludense", "denseactdense")


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers of a model whose residual feed-forward pair can be an SLL or CPL block.

    The pairs are those of [`LAYOUTS`], a Linear or `Conv1D` of transformers each. Feed-forward parts that are none,
    e.g. gated ones (Llama, gated T5, ModernBERT) or those with a layer scale (ConvNeXt, DINOv2), are named in the log.

    Args:
        model (`torch.nn.Module`):
            Holds its weights, plain ones.

    Returns:
        `tuple[str, ...]`: of the layers that hold the residual sum, for [`apply_blocks`].

    Raises:
        ValueError: there are none, or one cannot be a block: its activation has no known slopes or is not elementwise,
            its weights are in half precision, shared or parametrized already, or its input and output differ in size.
            The message names the layer.
    """
    names = tuple(name for name, module in model.named_modules() if layout_of(module) is not None)
    others = unrecognised_feed_forwards(model, names)
    if not names:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(others.items())[:3])
        raise ValueError(
            f"{type(model).__name__} has no residual feed-forward pair that can be a block"
            + (f" ({listed})" if listed else "")
            + "; leave sll_blocks=False"
        )
    uses: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), set()).add(f"{name}.{key}")
    for name in names:
        parent = model.get_submodule(name)
        _check_pair(name, parent, layout_of(parent), uses)
    for name, reason in others.items():
        logger.warning("no block: %s: %s", name, reason)
    return names


def apply_blocks(model: nn.Module, names: tuple[str, ...], kind: BlockKind = "sll", num_iterations: int = 1) -> None:
    r"""Makes the named layers compute the 1-Lipschitz block \(x - 2V^TT^{-1}s(Vx + b) + b_{out}\), in place.

    The inner layer keeps its weight V and bias; the weight of the outer one becomes [`TiedParametrization`] and its
    trained value is lost, its bias stays; the activation gets slopes in [0, 1] ([`SlopeCorrected`]); a norm in front
    of the branch becomes `nn.Identity`, since the sum x + f(norm(x)) is no block. The sum is the model's own.

    The part from the input of the inner layer to the residual sum is then 1-Lipschitz at evaluation: a **sound bound**
    at every weight. In training, dropout inside the branch scales what it keeps up. Half precision and autocast round
    the tied weights apart, so that the bound holds up to that rounding only.

    Depends on the structure and the names alone, so that it works before weights are read, on the meta device.

    Args:
        model (`torch.nn.Module`):
            The model.
        names (`tuple[str, ...]`):
            From [`find_blocks`].
        kind (`str`, *optional*, defaults to `"sll"`):
            `"sll"` or `"cpl"`.
        num_iterations (`int`, *optional*, defaults to 1):
            N of SLL: more is nearer to the spectral norm and costs one more product of h × h matrices.

    Raises:
        ValueError: a name is not that of a known layer, or the kind is unknown.
    """
    if kind not in BLOCK_KINDS:
        raise ValueError(f"kind must be one of {', '.join(BLOCK_KINDS)}, got {kind!r}")
    for name in names:
        parent = model.get_submodule(name)
        layout = layout_of(parent)
        if layout is None:
            raise ValueError(f"layer {name}: {type(parent).__name__} holds no feed-forward pair that can be a block")
        _tie(name, parent, layout, kind, num_iterations)


def block_layers(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the inner and outer layers of the blocks, which no other constraint may touch."""
    found = []
    for name in names:
        layout = layout_of(model.get_submodule(name))
        if layout is not None:
            found += [f"{name}.{layout.inner}", f"{name}.{layout.outer}"]
    return tuple(found)


def describe_blocks(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """One line a block: what became of the layer."""
    lines = []
    for name in names:
        layout = layout_of(model.get_submodule(name))
        if layout is None:
            raise ValueError(f"layer {name} holds no feed-forward pair that can be a block")
        norm = f", {layout.norm} removed" if layout.norm else ""
        lines.append(f"block: {layout.outer} tied to {layout.inner}, {layout.activation} with slopes in [0, 1]{norm}")
    return tuple(lines)


def has_blocks(model: nn.Module) -> bool:
    """Whether [`apply_blocks`] changed the model."""
    return any(isinstance(module, TiedParametrization) for module in model.modules())


def layout_of(module: nn.Module) -> FeedForward | None:
    """Where the layer holds its feed-forward pair; `None` for one that is not known or whose pair is gated."""
    package = type(module).__module__.split(".")
    if package[:2] != ["transformers", "models"] or len(package) < 3:
        return None
    layout = LAYOUTS.get(f"{package[2]}.{type(module).__name__}")
    if layout is None or not all(_has(module, path) for path in (layout.inner, layout.outer)):
        return None
    return layout


def unrecognised_feed_forwards(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, str]:
    """Why the other feed-forward parts of a model cannot be blocks, by name, in a few words."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in (*blocks, *found) if block):
            continue
        if _is_feed_forward(module) and any(hasattr(part, gate) for part in module.modules() for gate in _GATED):
            found[name] = f"{type(module).__name__} is gated, and a product of two branches has no slopes"
        elif _is_feed_forward(module):
            found[name] = f"{type(module).__name__} is not in the table of known residual pairs"
    return found


def _is_feed_forward(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return any(word in kind for word in _FEED_FORWARD_NAMES)


def _tie(name: str, parent: nn.Module, layout: FeedForward, kind: BlockKind, num_iterations: int) -> None:
    inner, outer = parent.get_submodule(layout.inner), parent.get_submodule(layout.outer)
    corrected = SlopeCorrected(_activation(name, parent, layout))
    tied = TiedParametrization(
        parent,
        layout.inner,
        layout.outer,
        kind=kind,
        num_iterations=num_iterations,
        inner_is_transposed=isinstance(inner, Conv1D),
        outer_is_transposed=isinstance(outer, Conv1D),
        name=name,
    )
    parametrize.register_parametrization(outer, "weight", tied, unsafe=True)
    if kind == "cpl":
        outer.parametrizations["weight"].original.requires_grad_(False)
    _put(parent, layout.activation, corrected)
    if layout.norm is not None:
        _put(parent, layout.norm, nn.Identity())


def _put(parent: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, child = path.rpartition(".")
    setattr(parent.get_submodule(holder), child, module.train(parent.training))


def _has(module: nn.Module, path: str) -> bool:
    for child in path.split("."):
        module = getattr(module, child, None)
        if module is None:
            return False
    return isinstance(module, (nn.Linear, Conv1D))


def _activation(name: str, parent: nn.Module, layout: FeedForward) -> nn.Module:
    holder, _, child = layout.activation.rpartition(".")
    activation = getattr(parent.get_submodule(holder), child, None)
    if not isinstance(activation, nn.Module):
        raise ValueError(
            f"layer {name}: its activation {layout.activation} is not a module, so its slopes are not known; give the "
            "configuration the name of an activation, e.g. 'gelu'"
        )
    return activation


def _check_pair(name: str, parent: nn.Module, layout: FeedForward, uses: dict[int, set[str]]) -> None:
    try:
        SlopeCorrected(_activation(name, parent, layout))
    except ValueError as error:
        raise ValueError(f"layer {name} cannot be a block: {error}") from error
    inner, outer = parent.get_submodule(layout.inner), parent.get_submodule(layout.outer)
    for path, layer in ((layout.inner, inner), (layout.outer, outer)):
        where = f"layer {name} cannot be a block: the weight of {path}"
        if parametrize.is_parametrized(layer):
            raise ValueError(f"{where} is parametrized already; remove that parametrization first")
        if layer.weight.dtype.itemsize < 4 or not layer.weight.is_floating_point():
            raise ValueError(
                f"{where} has dtype {layer.weight.dtype}, whose rounding breaks the tie of the two weights; load the "
                "model in float32"
            )
        if len(uses[id(layer.weight)]) > 1:
            raise ValueError(f"{where} is shared with {', '.join(sorted(uses[id(layer.weight)]))}; untie it first")
    inner_shape, outer_shape = (
        tuple(m.weight.mT.shape if isinstance(m, Conv1D) else m.weight.shape) for m in (inner, outer)
    )
    if inner_shape != outer_shape[::-1]:
        raise ValueError(
            f"layer {name} cannot be a block: {layout.inner} maps {inner_shape[1]} to {inner_shape[0]} features and "
            f"{layout.outer} maps {outer_shape[1]} to {outer_shape[0]}"
        )
