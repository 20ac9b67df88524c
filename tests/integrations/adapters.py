"""Constrained tiny models with adapters, and what their layers compute, worked out without the library."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lipschitz import lipschitzify
from hf_lipschitz.integrations.lora_layer import LipschitzLoraLinear
from tests import families


TARGETS = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"]}


def constrained(family: str = "bert", **config: object) -> PreTrainedModel:
    """A lipschitzified model whose plain weights have norms of 2 to 5, so that a constant of 1 matters."""
    torch.manual_seed(0)
    model = getattr(families, family)()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return lipschitzify(model, **config).eval()


def adapted_layers(model: nn.Module) -> list[LipschitzLoraLinear]:
    return [m for m in model.modules() if isinstance(m, LipschitzLoraLinear)]


@torch.no_grad()
def matrix(layer: nn.Module) -> Tensor:
    """The matrix of what a Linear computes, (in, out), from its outputs alone."""
    eye = torch.eye(layer.in_features)
    was_training = layer.training
    layer.eval()
    outputs = (layer(eye) - layer(torch.zeros_like(eye))).double()
    layer.train(was_training)
    return outputs


def raw_sum(layer: LipschitzLoraLinear, *adapters: str) -> Tensor:
    """W + Σ s B A in float64, (in, out)."""
    weight = layer.base_layer.parametrizations.weight.original.detach().double()
    weight = weight if layer.fan_in_fan_out else weight.mT
    for name in adapters:
        a, b = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
        weight = weight + layer.scaling[name] * (b @ a).mT
    return weight


def capped(weight: Tensor, constant: float = 1.0) -> Tensor:
    return weight * min(1.0, constant / torch.linalg.matrix_norm(weight, 2).item())


def norm(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.double(), 2).item()


@torch.no_grad()
def shake(model: PeftModel, size: float = 0.3) -> None:
    """Moves the adapters as an optimizer would not: through the tensors, in the back of every hook."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(size * torch.randn_like(parameter))


def steps(model: PeftModel, count: int, learning_rate: float = 0.1) -> None:
    inputs = families.example(model.get_base_model())
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(count):
        optimizer.zero_grad()
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.eval()(**families.example(base)).logits
