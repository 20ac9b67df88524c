"""lipschitz_bound and verify_lipschitz: both ends of the Lipschitz constant of a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.bounds import BoundedGraph, LipschitzBound, lipschitz_lower_bound
from hf_lipschitz.bounds.export import check_model, chosen_input
from hf_lipschitz.conversion import materialized
from hf_lipschitz.integrations.preprocessing import PIXELS, PixelInput
from hf_lipschitz.replacements.recognition import bounded_norm, is_norm


EMBEDDINGS, TOKENS = "inputs_embeds", "input_ids"


def lipschitz_bound(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    wrt: str | None = None,
    output: str | None = None,
    radius: float | None = None,
    center: Tensor | None = None,
    image_processor: Any = None,
) -> LipschitzBound:
    r"""A **sound bound** of the Lipschitz constant of a whole model, or inf with what is to blame.

    The smallest number known here with \(\|f(x) - f(y)\|_F \le L\,\|x - y\|_F\) for all x and y, or for those in a
    ball. It is read off the graph of `torch.export`; see [`BoundedGraph`] for how, and `bounds/rules` for the proofs.
    Transformers as they are released have astronomical global constants, or none: `print` the result to see which
    parts cost what, and what `lipschitzify(model, replace=...)` does about them.

    Args:
        model (`torch.nn.Module`):
            In evaluation mode; constrained layers are materialised meanwhile.
        example_inputs (`Mapping[str, Any]` or `Sequence[Any]`):
            Arguments of `forward`, by name or by position. The bound is for their shapes, and for the values of all
            but `wrt`: masks, positions, token types.
        wrt (`str`, *optional*):
            The input, a floating-point tensor; defaults to the only one. `"inputs_embeds"` (the default for texts)
            replaces `input_ids` by their word embeddings. `"pixels"` is an image in [0, 1] before resizing and
            normalisation, passed under this name, and needs `image_processor`.
        output (`str`, *optional*):
            Of what the model returns. Defaults to the logits, and to all floating-point outputs together where there
            are none.
        radius (`float`, *optional*):
            For a bound on the ball of this radius around `center`, in the Frobenius norm of the whole input: with a
            batch, each row may use all of it. It is never above the global one.
        center (`Tensor`, *optional*):
            Defaults to the input in `example_inputs`.
        image_processor (`BaseImageProcessor`, *optional*):
            For `wrt="pixels"`: its resizing and normalisation are part of the function.

    Returns:
        [`LipschitzBound`]: of the function in exact arithmetic of the stored weights. On balls, values at the center
        are computed in float64, with an allowance for their rounding that is carried from operator to operator.

    Raises:
        TypeError: the model is no module, or `wrt` no floating-point tensor.
        ValueError: the model is in training mode, a weight holds NaN or inf, an input or the output is not there.
            Whatever the model raises on these inputs.

    Example::

        bound = lipschitz_bound(model, tokenizer("a good film", return_tensors="pt"))
        print(bound)   # what it is made of, and what to do about it
        lipschitz_bound(model, {"pixel_values": x}, radius=0.1).value
    """
    function, inputs, wrt = function_of(model, example_inputs, wrt, output, image_processor)
    if radius is None and center is not None:
        raise ValueError("center needs a radius: the ball on which the bound is to hold")
    if radius is not None and center is None:
        center = inputs[wrt]
    with materialized(model):
        return graph_of(function, inputs, wrt).bound(center=center, radius=radius)


def verify_lipschitz(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    wrt: str | None = None,
    output: str | None = None,
    radius: float | None = None,
    center: Tensor | None = None,
    image_processor: Any = None,
    starts: int = 8,
    steps: int = 20,
    power_iterations: int = 8,
    seed: int = 0,
) -> float:
    """A **lower bound** of what [`lipschitz_bound`] bounds, found by an attack; it never exceeds it.

    Power iteration on the Jacobian, gradient ascent on its norm over inputs and projected ascent on pairs of inputs,
    in float64 on a copy of the model; see [`lipschitz_lower_bound`].

    Args:
        model, example_inputs, wrt, output, radius, center, image_processor:
            As in [`lipschitz_bound`].
        starts (`int`, *optional*, defaults to 8):
            Inputs from which it climbs, the example among them.
        steps (`int`, *optional*, defaults to 20):
            Of the ascent.
        power_iterations (`int`, *optional*, defaults to 8):
            At each input.
        seed (`int`, *optional*, defaults to 0):
            Of the starts; the global random state is left alone.

    Returns:
        `float`: a ratio that was met, deflated by its rounding. 0 where the output does not depend on the input.

    Raises:
        TypeError, ValueError: as in [`lipschitz_bound`]; a number of rounds is below 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    with materialized(model, copy=True) as plain:
        check_model(plain)
        _fix_eps(plain, example_inputs)
        wide = plain.double()
    function, inputs, wrt = function_of(wide, _wide(example_inputs), wrt, output, image_processor)
    if radius is None and center is not None:
        raise ValueError("center needs a radius: the ball on which the bound is to hold")
    start = inputs[wrt] if center is None else center.double()
    others = {name: value for name, value in inputs.items() if name != wrt}

    def of_input(x: Tensor) -> Tensor:
        return function(**others, **{wrt: x})

    return lipschitz_lower_bound(
        of_input, start, radius=radius, starts=starts, steps=steps, power_iterations=power_iterations, seed=seed
    )


def graph_of(function: nn.Module, inputs: Mapping[str, Any], wrt: str | None) -> BoundedGraph:
    """The exported graph, with norms written out by hand as single nodes."""
    return BoundedGraph(function, inputs, wrt=wrt, stand_ins=_norms_by_hand(function), prefix="model.")


class _Output(nn.Module):
    """Of what a model returns, the chosen part as one tensor or a tuple of tensors."""

    def __init__(self, model: nn.Module, output: str | None, pixels: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.train(model.training)
        self.model, self.output, self.pixels = model, output, pixels

    def forward(self, **inputs: Any) -> Any:
        if self.pixels is not None:
            inputs["pixel_values"] = self.pixels(inputs.pop(PIXELS))
        return _picked(self.model(**inputs), self.output)


def _picked(found: Any, output: str | None) -> Any:
    if isinstance(found, Mapping):
        if output is not None:
            if output not in found:
                raise ValueError(f"output={output!r} is not returned; the model returns {', '.join(found)}")
            return found[output]
        return found["logits"] if "logits" in found else _tensors(tuple(found.values()))
    if output is not None:
        raise ValueError(f"output={output!r} needs a model that returns outputs by name, got {type(found).__name__}")
    return found if isinstance(found, Tensor) else _tensors(found)


def _tensors(found: Any) -> tuple[Tensor, ...]:
    if isinstance(found, Tensor):
        return (found,) if found.is_floating_point() else ()
    if not isinstance(found, (tuple, list)):
        raise ValueError(
            f"the model returns a {type(found).__name__} among its outputs, as caches are: pass use_cache=False, or "
            "name the output"
        )
    return tuple(tensor for part in found for tensor in _tensors(part))


def function_of(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    wrt: str | None,
    output: str | None,
    image_processor: Any,
) -> tuple[nn.Module, dict[str, Any], str]:
    """The model as a module from named inputs to the chosen output, those inputs, and the name of the chosen one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = _named(model, example_inputs)
    parameters = inspect.signature(model.forward).parameters
    floating = [key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    wants_embeddings = wrt == EMBEDDINGS or (wrt is None and not floating and EMBEDDINGS in parameters)
    if wants_embeddings and EMBEDDINGS not in inputs and TOKENS in inputs:
        inputs = _embedded(model, inputs)
        wrt = EMBEDDINGS
    pixels = None
    if wrt == PIXELS:
        if image_processor is None:
            raise ValueError('wrt="pixels" needs image_processor=..., whose resizing and normalisation are part of it')
        if PIXELS not in inputs:
            raise ValueError('wrt="pixels" needs the images in [0, 1] as example_inputs["pixels"]')
        pixels = PixelInput(image_processor)
        pixels.check(image_processor, *inputs[PIXELS].shape[-3:])
    if "use_cache" in parameters:
        inputs.setdefault("use_cache", False)
    return _Output(model, output, pixels), inputs, chosen_input(inputs, wrt)


def _named(model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        names = list(inspect.signature(model.forward).parameters)
        if len(example_inputs) > len(names):
            raise ValueError(f"{len(example_inputs)} inputs for forward({', '.join(names)})")
        return dict(zip(names, example_inputs, strict=False))
    raise TypeError(
        "example_inputs must be a dict of forward's keyword arguments or a tuple of its positional ones, got "
        f"{type(example_inputs).__name__}"
    )


def _embedded(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    embeddings = getattr(model, "get_input_embeddings", None)
    if embeddings is None or EMBEDDINGS not in inspect.signature(model.forward).parameters:
        raise TypeError(
            f"{TOKENS} are integers, and {type(model).__name__} takes no {EMBEDDINGS}: a Lipschitz constant needs a "
            "floating-point input"
        )
    with torch.no_grad():
        embedded = embeddings()(inputs[TOKENS])
    others = {name: value for name, value in inputs.items() if name != TOKENS}
    return {EMBEDDINGS: embedded, **others}


def _fix_eps(model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any]) -> None:
    """Gives norms without an eps the one of the dtype they compute in, before that becomes float64."""
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    dtypes = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            dtype = module.weight.dtype if module.weight is not None else next(iter(dtypes), torch.float32)
            module.eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _wide(example_inputs: Mapping[str, Any] | Sequence[Any]) -> Any:
    def of(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(example_inputs, Mapping):
        return {name: of(value) for name, value in example_inputs.items()}
    return [of(value) for value in example_inputs]


def _norms_by_hand(function: nn.Module) -> dict[str, nn.Module]:
    """Norms that torch has no operator for, each with the bounded norm that computes the same."""
    found = {}
    for name, module in function.named_modules():
        if is_norm(module) and not type(module).__module__.startswith(("torch.", "hf_lipschitz.")):
            try:
                found[name] = bounded_norm(module, "floor")
            except ValueError:
                continue
    return found
