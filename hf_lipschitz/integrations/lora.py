"""LoRA whose sum with the base weight stays inside the layer's ball: the configuration, and how PEFT finds it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_lipschitz.integrations.lora_guard import register_guard
from hf_lipschitz.integrations.lora_layer import lipschitz_lora_layer, refresh_adapted_after_step


# The `peft_type` in `adapter_config.json`. Where this library is not imported PEFT does not know it, and refuses to
# load the adapter as a plain one. In memory the type is LORA, which is what PEFT's own code asks for.
SAVED_TYPE = "LIPSCHITZ_LORA"
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_VARIANT = "is_lora_variant"
_REFUSED = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters", "megatron_config")


@dataclass
class LipschitzLoraConfig(LoraConfig):
    """
    A `LoraConfig` for the layers of a lipschitzified model; [`lipschitz_lora_config`] makes it from a plain one.

    `save_pretrained` of a PEFT model writes it, and `PeftModel.from_pretrained` and transformers' `load_adapter` read
    it, as any configuration of PEFT.

    Args:
        lipschitz (`bool`, *optional*, defaults to `True`):
            Always true. PEFT treats it as a variant of LoRA, so that plain layers refuse the configuration.

    Raises:
        ValueError: an option is set that changes how the layer computes, or writes into the base weight.
    """

    lipschitz: bool = field(
        default=True,
        metadata={"help": "Keep the norm of the adapted weight at most the layer's constant.", _VARIANT: True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)
        self._register_custom_module({nn.Module: lipschitz_lora_layer})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": SAVED_TYPE}


def lipschitz_lora_config(config: LoraConfig) -> LipschitzLoraConfig:
    r"""The configuration of LoRA adapters that keep \\(\|P(W + \sum s B A)\|_2 \le c\\) in each adapted layer.

    W is the raw weight of a layer that `lipschitzify` constrained, P its parametrization and c its constant, whatever
    the method is. At B = 0 the function is that of the base model, bit by bit; the bound is a **sound bound** at every
    read, and `merge_and_unload` adds sBA to W, after which the model is a lipschitzified one without adapters and
    computes the same. Any number of adapters may be active at once; their sum is what P takes.

    With `lora_dropout` it is the input of the branch sBA, scaled as P scales the whole, that is dropped. As with
    any dropout the bound is that of the expectation, which is what evaluation uses.

    Args:
        config (`peft.LoraConfig`):
            Left as it is. `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora`, `lora_dropout`, `bias`,
            `modules_to_save` and the targets mean what they mean in PEFT. The targets have to be Linear or
            transformers `Conv1D` layers that `lipschitzify` constrained.

    Returns:
        `LipschitzLoraConfig`: for `get_peft_model`, `add_adapter` and `PeftModel.from_pretrained(..., config=...)`.

    Raises:
        TypeError: `config` is not a `LoraConfig`, but perhaps one of a method derived from it.
        ValueError: an option is set that changes how the layer computes, or writes into the base weight.

    Example::

        model = hf_lipschitz.lipschitzify(model)
        model = get_peft_model(model, hf_lipschitz.lipschitz_lora_config(LoraConfig(task_type="SEQ_CLS")))
    """
    if type(config) not in (LoraConfig, LipschitzLoraConfig):
        raise TypeError(f"lipschitz_lora_config takes a peft.LoraConfig, got {type(config).__name__}")
    if type(config) is LoraConfig and config._custom_modules:
        raise ValueError("config has layers registered by _register_custom_module: pass one without them")
    fields = [f.name for f in dataclasses.fields(config) if f.init]
    return LipschitzLoraConfig(**{name: getattr(config, name) for name in fields})


@functools.cache
def register_lora() -> None:
    """Teaches PEFT to load saved [`LipschitzLoraConfig`]s, and watches over plain adapters. Safe to repeat."""
    PEFT_TYPE_TO_CONFIG_MAPPING[SAVED_TYPE] = LipschitzLoraConfig
    register_optimizer_step_post_hook(refresh_adapted_after_step)
    register_guard()


def _check(config: LipschitzLoraConfig) -> None:
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get(_VARIANT) and f.name != "lipschitz"]
    for name in dict.fromkeys((*_REFUSED, *variants)):
        value = getattr(config, name, None)
        if value:
            raise ValueError(f"{name}={value!r} is not supported within the ball: leave it out of the LoraConfig")
    if not config.lipschitz:
        raise ValueError("lipschitz=False: use a plain peft.LoraConfig")
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported within the ball, for it may write into "
            f"the base weight: choose one of {', '.join(map(repr, INITIALISATIONS))}"
        )
