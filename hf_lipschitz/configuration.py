"""The configuration of a constrained model: plain data, validated, with an exact JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lipschitz.fields import check_fields, check_int, check_name, names, real
from hf_lipschitz.version import __version__


CONFIG_NAME = "lipschitz_config.json"
MODES = ("cap", "exact")
REPLACEMENTS = ("weights", "norms", "attention", "activations", "residuals")
NORMS = ("floor", "centred")
ACTIVATIONS = ("bounded", "maxmin")
# What `num_iterations=None` stands for.
NUM_ITERATIONS = {"rescaling": 3, "aol": 1, "sll": 1}


@dataclass(frozen=True)
class LipschitzConfig:
    """
    How `lipschitzify` constrains a model. It is saved in the model's `config.json`, under `quantization_config`: that
    is the key under which transformers lets a library take part in `from_pretrained`; nothing is quantized.

    Args:
        method (`str`, *optional*, defaults to `"gram"`):
            What makes a weight W small. `"gram"` divides by an upper bound of the spectral norm (Delattre et al.
            2023). `"rescaling"` divides each output channel by a number of its own (spectral rescaling, Delattre et
            al. 2024), `"aol"` likewise with one iteration (Prach & Lampert 2022). `"sll"` is W T^{-1/2}, which divides
            each input channel, with trained weights q (Araujo et al. 2023); `"cpl"` the same with T = σ²I (Meunier et
            al. 2022). Or a method registered with `register_method`.
        layer_lipschitz (`float`, *optional*, defaults to `1.0`):
            The constant of EACH layer, an upper bound of its spectral norm. `None` keeps each layer's present norm, so
            that the function is unchanged; `LipschitzTrainer` anneals from there. It is the norm in the present dtype:
            cast to half precision first, for casting afterwards makes room for its rounding by scaling layers down.
        mode (`str`, *optional*, defaults to `"cap"`):
            `"cap"` leaves layers under the constant untouched, `"exact"` scales every layer to it. Methods that divide
            by channel do so with each channel.
        target_modules (`str` or `list[str]`, *optional*):
            Layers to constrain, with PEFT's semantics: a list matches whole names or name endings, a string is a
            regular expression for the whole name, `"all-linear"` means every Linear and Conv1D but the output
            embeddings. `None` means every supported layer.
        exclude_modules (`str` or `list[str]`, *optional*):
            Layers to leave alone, with the same semantics.
        refresh_every (`int`, *optional*, defaults to `1`):
            Optimizer steps between two computations of the norms. A longer period is sound all the same: layers are
            scaled down by the distance their weights have moved since.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Relative width of the brackets of the norms.
        num_iterations (`int`, *optional*):
            N of `"rescaling"` and `"sll"`, at most 3 where there are convolutions: more is tighter and costs products.
            `None` means 3 and 1.
        sll_blocks (`bool`, *optional*, defaults to `False`):
            With `method="sll"` or `"cpl"`, whether recognised residual feed-forward pairs x + W_out s(Wx + b) become
            1-Lipschitz blocks x - 2WᵀT⁻¹s(Wx + b) of that kind. The trained W_out is lost.
        replace (`str` or `tuple[str]`, *optional*, defaults to `("weights",)`):
            What is replaced besides: `"norms"`, `"attention"`, `"activations"`, `"residuals"`. `"all"` is every kind
            that the model has. It always holds `"weights"`; `layer_lipschitz=None` leaves them as they are.
        norm (`str`, *optional*, defaults to `"floor"`):
            What norms become: `"floor"` bounds the deviation from below, and `calibrate` sets that bound so that the
            function is unchanged on data; `"centred"` has no division, which changes the function. BatchNorms are
            folded into the layer before them.
        activation (`str`, *optional*, defaults to `"bounded"`):
            What activations with slopes above 1 become: `"bounded"` divides them by their largest slope, `"maxmin"`
            sorts pairs of features.
        residual_budget (`float`, *optional*, defaults to `1.0`):
            B: with n residual branches the constant of the layer in which a branch ends is `layer_lipschitz`·B/n.
        strict (`bool`, *optional*, defaults to `False`):
            Whether a Linear or convolution that is asked for and cannot be constrained is an error, not a line in the
            report.
        layers (`tuple[str]`, *optional*):
            Names of the layers that are constrained; `lipschitzify` sets it, whatever it was.
        replaced (`dict[str, tuple[str]]`, *optional*):
            Names of what was replaced, by kind; `lipschitzify` sets it, whatever it was.
        version (`str`, *optional*):
            Of the library that made the configuration.

    Raises:
        `TypeError`, `ValueError`: a field has a wrong type or value; the message names the field and the fix.
    """

    method: str = "gram"
    layer_lipschitz: float | None = 1.0
    mode: str = "cap"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    refresh_every: int = 1
    rtol: float = 1e-3
    num_iterations: int | None = None
    sll_blocks: bool = False
    replace: tuple[str, ...] = ("weights",)
    norm: str = "floor"
    activation: str = "bounded"
    residual_budget: float = 1.0
    strict: bool = False
    layers: tuple[str, ...] | None = None
    replaced: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    version: str = __version__

    quant_method = "lipschitz"

    def __post_init__(self) -> None:
        if self.layer_lipschitz is not None:
            object.__setattr__(self, "layer_lipschitz", real("layer_lipschitz", self.layer_lipschitz))
            if not 0 < self.layer_lipschitz < math.inf:
                raise ValueError(f"layer_lipschitz must be positive and finite, or None, got {self.layer_lipschitz}.")
        check_name("mode", self.mode, MODES)
        for name in ("target_modules", "exclude_modules", "layers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, names(name, value))
        check_int("refresh_every", self.refresh_every)
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {self.refresh_every}.")
        object.__setattr__(self, "rtol", real("rtol", self.rtol))
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol must be in (0, 1), got {self.rtol}.")
        self._check_method()
        self._check_replacements()

    def _check_method(self) -> None:
        if self.num_iterations is not None:
            check_int("num_iterations", self.num_iterations)
            if self.num_iterations < 1:
                raise ValueError(f"num_iterations must be at least 1, or None, got {self.num_iterations}.")
            if self.method in ("gram", "cpl") or (self.method == "aol" and self.num_iterations != 1):
                raise ValueError(
                    f"num_iterations={self.num_iterations} does not go with method={self.method!r}: leave it None, or "
                    "use method='rescaling' or 'sll'."
                )
        if self.mode == "exact" and self.layer_lipschitz is None and self.method in NUM_ITERATIONS:
            raise ValueError(
                f"mode='exact' with method={self.method!r} scales every channel to the constant, which "
                "layer_lipschitz=None, the present norm, does not leave unchanged: use mode='cap', or give a constant."
            )
        if self.sll_blocks and self.method not in ("sll", "cpl"):
            raise ValueError(f"sll_blocks=True needs method='sll' or 'cpl', got {self.method!r}.")

    def _check_replacements(self) -> None:
        asked = REPLACEMENTS if self.replace == "all" else self.replace
        asked = names("replace", (asked,) if isinstance(asked, str) else asked)
        for kind in asked:
            check_name("replace", kind, ("all", *REPLACEMENTS))
        asked = REPLACEMENTS if "all" in asked else tuple(kind for kind in REPLACEMENTS if kind in asked)
        object.__setattr__(self, "replace", asked)
        if "weights" not in asked:
            raise ValueError(
                f"replace={asked} must hold 'weights' as well: add it, with layer_lipschitz=None to leave the weights "
                "as they are."
            )
        check_name("norm", self.norm, NORMS)
        check_name("activation", self.activation, ACTIVATIONS)
        object.__setattr__(self, "residual_budget", real("residual_budget", self.residual_budget))
        if not 0 < self.residual_budget < math.inf:
            raise ValueError(f"residual_budget must be positive and finite, got {self.residual_budget}.")
        replaced = {kind: tuple(names) for kind, names in self.replaced.items()}
        object.__setattr__(self, "replaced", replaced)

    def asks_like(self, other: LipschitzConfig) -> bool:
        """Whether both ask for the same, whatever they became."""
        found = {"layers": None, "replaced": {}, "version": __version__}
        return dataclasses.replace(self, **found) == dataclasses.replace(other, **found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, with the `quant_method` by which transformers finds the loading hook."""
        values = dataclasses.asdict(self)
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        lists["replaced"] = {kind: list(names) for kind, names in self.replaced.items()}
        return {"quant_method": self.quant_method, **values, **lists}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LipschitzConfig:
        """
        Inverse of `to_dict`.

        Raises:
            `ValueError`: a key is not a field.
        """
        values = {name: value for name, value in values.items() if name != "quant_method"}
        check_fields(cls, values)
        return cls(**values)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `lipschitz_config.json` into `save_directory`, which is made if need be."""
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2, sort_keys=True)
            file.write("\n")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> LipschitzConfig:
        """
        Reads `lipschitz_config.json`, or the configuration of a saved model, from a local directory.

        Raises:
            `ValueError`: the directory holds neither.
        """
        for name in (CONFIG_NAME, "config.json"):
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    values = json.load(file)
                values = values.get("quantization_config") if name == "config.json" else values
                if values is not None:
                    return cls.from_dict(values)
        raise ValueError(f"{directory} holds no {CONFIG_NAME} and no config.json of a lipschitzified model.")
