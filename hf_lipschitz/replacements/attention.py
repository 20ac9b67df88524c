"""Ball-clipped attention: queries, keys and values projected onto balls inside transformers' attention registry."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.nn.attention import BallRadii
from hf_lipschitz.replacements.probe import probe_outputs


CHILD = "lipschitz_balls"
BALL_ATTENTION = "hf_lipschitz_ball"
EAGER_BALL_ATTENTION = "hf_lipschitz_ball_eager"

# What each implementation of transformers becomes; the others have kernels of their own.
_CLIPPED = {"sdpa": BALL_ATTENTION, "eager": EAGER_BALL_ATTENTION}
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def register_attention() -> None:
    """Registers the clipped implementations and their masks with transformers; safe to repeat."""
    AttentionInterface.register(BALL_ATTENTION, ball_attention)
    AttentionMaskInterface.register(BALL_ATTENTION, sdpa_mask)
    AttentionInterface.register(EAGER_BALL_ATTENTION, eager_ball_attention)
    AttentionMaskInterface.register(EAGER_BALL_ATTENTION, eager_mask)


def ball_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' scaled dot-product attention of queries, keys and values clipped by the balls of `module`.

    Masks, causality, sliding windows, grouped queries, additive biases, scaling and dropout are those of the plain
    implementation, which is called. Rotary positions are applied before, so that they do not change what is clipped.
    """
    query, key, value = _balls(module)(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def eager_ball_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """[`ball_attention`] with the eager implementation of the family, which may return the attention weights."""
    query, key, value = _balls(module)(query, key, value)
    return _eager(module)(module, query, key, value, attention_mask, **kwargs)


def find(model: nn.Module, config: LipschitzConfig) -> tuple[str, ...]:
    """Names of all modules that compute attention, once it is proved that all of them can be clipped.

    The proof is a forward pass in which every one of them calls the clipped implementation and, with infinite radii,
    the outputs are those of the plain model. A model of which some attention would stay as it is has no bound, so it
    is all or nothing.

    Args:
        model (`torch.nn.Module`):
            A plain model that holds its weights; it is unchanged afterwards.
        config (`LipschitzConfig`):
            Not read.

    Returns:
        `tuple[str, ...]`: empty for a model without attention.

    Raises:
        ValueError: attention is computed outside transformers' registry, which the message names, or the proof fails.
    """
    names, bypassing = _attention_modules(model)
    if bypassing:
        shown = ", ".join(f"{name or 'the model'} ({type(module).__name__})" for name, module in bypassing[:3])
        raise ValueError(
            f'replace="attention" cannot clip {shown}{" and others" if len(bypassing) > 3 else ""}: their attention '
            'does not go through the attention registry of transformers. Leave "attention" out of replace'
        )
    if not names:
        return ()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f'replace="attention" works through the attention registry of transformers, and {type(model).__name__} is '
            "no PreTrainedModel: lipschitzify the transformers model inside it"
        )
    _implementation(model, names)
    plain = probe_outputs(model)
    with _applied(model, config, names):
        balls = {name: getattr(model.get_submodule(name), CHILD) for name in names}
        for ball in balls.values():
            ball.begin_calibration()
        probe_outputs(model)
        silent = [name for name, ball in balls.items() if not ball.has_data]
        for ball in balls.values():
            ball.cancel_calibration()
        clipped = probe_outputs(model)
    if silent:
        raise ValueError(
            f'replace="attention" cannot clip {", ".join(silent[:3])} of {type(model).__name__}: no forward pass that '
            "could be tried reached it through the attention registry of transformers. Leave "
            '"attention" out of replace'
        )
    _check_same(model, plain, clipped)
    return names


def apply(model: PreTrainedModel, config: LipschitzConfig, names: tuple[str, ...]) -> None:
    """Gives each named module its [`BallRadii`], infinite at first, and the model the clipped implementation.

    On the meta device the radii are, too, and come from the checkpoint under `<name>.lipschitz_balls.radii`. From
    then on another attention implementation is an error at the next forward pass, for it would not clip.

    Args:
        model (`PreTrainedModel`):
            Changed in place.
        config (`LipschitzConfig`):
            Not read.
        names (`tuple[str, ...]`):
            From [`find`].

    Raises:
        ValueError: the family does not let its implementation be set, or uses one that cannot be clipped.
    """
    if not names:
        return
    register_attention()
    _set_implementation(model, names)
    for name in names:
        module = model.get_submodule(name)
        if module.config._attn_implementation not in _CLIPPED.values():
            raise ValueError(
                f'replace="attention" cannot clip {name} ({type(module).__name__}): {type(model).__name__} does not '
                "let its attention implementation be set"
            )
        device = next((parameter.device for parameter in module.parameters()), None)
        setattr(module, CHILD, BallRadii(device).train(module.training))
        module.register_forward_pre_hook(_refuse_other_implementations)


def clipped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of attention that [`apply`] has clipped."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, CHILD, None), BallRadii):
            yield name, module


def _attention_modules(model: nn.Module) -> tuple[tuple[str, ...], list[tuple[str, nn.Module]]]:
    """Names of modules whose forward reads the registry, and modules that look like attention and do not."""
    modules = dict(model.named_modules())
    names = tuple(name for name, module in modules.items() if _reads_registry(module))
    related = {part for name in names for part in _ancestors(name)}

    def bypasses(name: str, module: nn.Module) -> bool:
        is_inside = any(part in names for part in _ancestors(name))
        return _looks_like_attention(module) and name not in related and not is_inside

    found = [name for name, module in modules.items() if bypasses(name, module)]
    outer = {part for name in found for part in _ancestors(name) if part != name}
    return names, [(name, modules[name]) for name in found if name not in outer]


def _reads_registry(module: nn.Module) -> bool:
    return _REGISTRY in _names_in_forward(module) and hasattr(module, "config")


def _looks_like_attention(module: nn.Module) -> bool:
    names = _names_in_forward(module)
    is_direct = "scaled_dot_product_attention" in names or (_REGISTRY in names and not hasattr(module, "config"))
    is_by_hand = "softmax" in names and not _PRODUCTS.isdisjoint(names)
    is_named = isinstance(module, nn.MultiheadAttention) or "Attention" in type(module).__name__
    return is_direct or is_by_hand or is_named


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names


def _ancestors(name: str) -> Iterator[str]:
    """The name itself and the names of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _set_implementation(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    implementation = _implementation(model, names)
    model.set_attn_implementation(implementation)
    # transformers up to 5.17 passes over models inside whose config is a copy of one class, such as the stacks of T5.
    owners = {id(model.get_submodule(name).config) for name in names}
    for inner in model.modules():
        is_owner = isinstance(inner, PreTrainedModel) and id(inner.config) in owners
        if is_owner and inner.config._attn_implementation != implementation:
            inner.set_attn_implementation(implementation)


def _implementation(model: PreTrainedModel, names: Iterable[str]) -> str:
    """The clipped counterpart of what the named modules use at present."""
    used = {model.get_submodule(name).config._attn_implementation for name in names}
    if len(used) == 1:
        (one,) = used
        if one in _CLIPPED or one in _CLIPPED.values():
            return _CLIPPED.get(one, one)
    raise ValueError(
        f'replace="attention" clips models that use sdpa or eager attention throughout, and {type(model).__name__} '
        f'uses {", ".join(sorted(map(str, used)))}: load it with attn_implementation="sdpa" or "eager"'
    )


@contextmanager
def _applied(model: PreTrainedModel, config: LipschitzConfig, names: tuple[str, ...]) -> Iterator[None]:
    """[`apply`], undone afterwards."""
    hooks = {name: model.get_submodule(name)._forward_pre_hooks.copy() for name in names}
    before = [(owner, owner._attn_implementation) for owner in _configs(model)]
    try:
        apply(model, config, names)
        yield
    finally:
        for name in names:
            module = model.get_submodule(name)
            module._modules.pop(CHILD, None)
            for key in set(module._forward_pre_hooks) - set(hooks[name]):
                del module._forward_pre_hooks[key]
        for owner, implementation in before:
            # The setter would change the configurations below as well.
            owner._attn_implementation_internal = implementation


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """All configurations in a model, each once."""
    found: dict[int, PreTrainedConfig] = {}
    open_ones = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    while open_ones:
        config = open_ones.pop()
        if id(config) not in found:
            found[id(config)] = config
            below = (getattr(config, key, None) for key in config.sub_configs)
            open_ones += [sub for sub in below if isinstance(sub, PreTrainedConfig)]
    return list(found.values())


def _check_same(model: PreTrainedModel, plain: list[Tensor], clipped: list[Tensor]) -> None:
    for a, b in zip(plain, clipped, strict=True):
        scale = a.abs().nan_to_num(0.0).max() if a.numel() else a.new_zeros(())
        tolerance = 30 * torch.finfo(a.dtype).eps * scale.item()
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
            raise ValueError(
                f'replace="attention" changes the outputs of {type(model).__name__} even with infinite radii: the '
                'family treats its own attention implementations differently. Leave "attention" out of replace'
            )


def _balls(module: nn.Module) -> BallRadii:
    balls = getattr(module, CHILD, None)
    if balls is None:
        raise RuntimeError(
            f"a plain {type(module).__name__} is set to clipped attention: its configuration is that of a "
            'lipschitzified model. Give it a copy of its own, or call model.set_attn_implementation("sdpa")'
        )
    return balls


def _eager(module: nn.Module) -> Attention:
    return sys.modules[type(module).__module__].eager_attention_forward


def _refuse_other_implementations(module: nn.Module, args: tuple[Any, ...]) -> None:
    if module.config._attn_implementation not in _CLIPPED.values():
        raise RuntimeError(
            f"attention of {type(module).__name__} is clipped, and its implementation was set to "
            f"{module.config._attn_implementation!r}, which does not clip: call "
            f"model.set_attn_implementation({BALL_ATTENTION!r})"
        )
