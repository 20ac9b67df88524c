"""The import-time side effects of the library, all of them, each safe to repeat."""

from __future__ import annotations

from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.integrations.loading import LipschitzConfigReader, LipschitzLoader
from hf_lipschitz.integrations.lora import register_lora
from hf_lipschitz.nn.parametrizations import refresh_after_step
from hf_lipschitz.pipelines import CertifiedClassificationPipeline
from hf_lipschitz.replacements.attention import register_attention


TASK = "certified-classification"


_done = False


def register() -> None:
    """Registers the loading hook, the optimizer hooks, clipped attention, PEFT's adapters and the pipeline task, once
    a process."""
    global _done
    if _done:
        return
    if LipschitzConfig.quant_method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(LipschitzConfig.quant_method)(LipschitzConfigReader)
        register_quantizer(LipschitzConfig.quant_method)(LipschitzLoader)
    register_optimizer_step_post_hook(refresh_after_step)
    register_attention()
    register_lora()
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=CertifiedClassificationPipeline,
        pt_model=(AutoModelForSequenceClassification, AutoModelForImageClassification),
        type="multimodal",
    )
    # With this attribute transformers would copy the pipeline's code into every saved directory, as remote code.
    del CertifiedClassificationPipeline._registered_impl
    _done = True
