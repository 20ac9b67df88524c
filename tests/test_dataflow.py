"""What the autograd graph says about the layers, against what the modeling code of each family says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.dataflow import fusible_batch_norms, residual_ends
from hf_lipschitz.probes import probe_inputs
from tests.families import FAMILIES, HEADLESS


ALL = {**FAMILIES, **HEADLESS}


def layers(pattern: str, *ends: str) -> tuple[str, ...]:
    return tuple(pattern.format(index) + end for index in (0, 1) for end in ends)


# Read off the forward methods: the layer before each `+`.
EXPECTED = {
    "bert": layers("bert.encoder.layer.{}.", "attention.output.dense", "output.dense"),
    "albert": ("attention.dense", "ffn_output") * 2,
    "distilbert": layers("distilbert.transformer.layer.{}.", "attention.out_lin", "ffn.lin2"),
    "gpt2": layers("transformer.h.{}.", "attn.c_proj", "mlp.c_proj"),
    "llama": layers("model.layers.{}.", "self_attn.o_proj", "mlp.down_proj"),
    "modernbert": layers("model.layers.{}.", "attn.Wo", "mlp.Wo"),
    "t5": (
        *layers("transformer.encoder.block.{}.layer.", "0.SelfAttention.o", "1.DenseReluDense.wo"),
        *layers(
            "transformer.decoder.block.{}.layer.", "0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo"
        ),
    ),
    "vit": layers("vit.layers.{}.", "attention.o_proj", "mlp.fc2"),
    "swin": layers("swin.encoder.layers.{}.blocks.0.", "attention.o_proj", "mlp.fc2"),
    "resnet": layers("resnet.encoder.stages.{}.layers.0.", "layer.1.convolution"),
    "convnext": layers("convnext.encoder.stages.{}.layers.0.", "pwconv2"),
    "whisper": layers("encoder.layers.{}.", "self_attn.out_proj", "fc2"),
}
# Branches that end in fused experts, in einsum tensors, in an activation.
OTHERS = {"mixtral": 2, "gpt_oss": 2, "xlnet": 2, "wav2vec2": 1}


@pytest.mark.parametrize("family", EXPECTED)
def test_branches_end_where_the_code_says(family: str) -> None:
    found = residual_ends(FAMILIES[family]()).layers
    expected = EXPECTED[family]
    assert len(found) == len(expected)
    assert all(name.endswith(end) for name, end in zip(found, expected, strict=True))
    assert all(name in dict(FAMILIES[family]().named_modules()) for name in found)


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_branches_and_is_left_as_it_was(family: str) -> None:
    model = ALL[family]().train()
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in parameters]
    modes = [module.training for module in model.modules()]
    ends = residual_ends(model)
    assert ends.layers
    assert ends.others == OTHERS.get(family, 0)
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in parameters)
    # transformers leaves hooks of its own on some models.
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("hf_lipschitz")]


@pytest.mark.parametrize("family", ALL)
def test_batch_norms_follow_the_convolution_beside_them(family: str) -> None:
    pairs = fusible_batch_norms(ALL[family]().requires_grad_(False))
    model = ALL[family]()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm for norm, _ in pairs] == norms
    assert all(layer == norm.replace("normalization", "convolution") for norm, layer in pairs)


class Toy(nn.Module):
    """Batch norms that may be folded, and every reason why one may not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "twice", "returned", "between", "shared_a", "shared_b", "called_twice"):
            self.add_module(name, nn.Conv2d(4, 4, 1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(4))
        self.shared_b.weight = self.shared_a.weight
        self.linear, self.linear_norm = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)
        self.tokens, self.tokens_norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.batch, self.batch_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.plain_norm(self.plain(x))
        y = self.twice(x)
        x = self.twice_norm(y) * y
        returned = self.returned(x)
        x = self.returned_norm(returned)
        x = self.between_norm(self.between(x).relu())
        x = self.shared_a_norm(self.shared_a(x)) + self.shared_b_norm(self.shared_b(x))
        x = self.called_twice_norm(self.called_twice(self.called_twice(x)))
        x = self.batch_norm(self.batch(x))
        x = self.tokens_norm(self.tokens(x.flatten(2))).mean(-1)
        return self.linear_norm(self.linear(x)), returned


def test_batch_norms_that_cannot_be_folded_are_left_out() -> None:
    found = fusible_batch_norms(Toy(), {"x": torch.randn(2, 4, 2, 2)})
    assert found == (("plain_norm", "plain"), ("linear_norm", "linear"))


class Branches(nn.Module):
    """Residual sums of less usual shapes."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("left", "right", "scaled", "inner", "normed", "outer", "main", "deep", "short"):
            self.add_module(name, nn.Linear(4, 4))
        self.norm, self.gain = nn.LayerNorm(4), nn.Parameter(torch.ones(4))
        self.position = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        x = x + (self.left(x) + self.right(x))
        x = self.gain * self.scaled(x.relu()) * 0.5 + x
        x = x + self.norm(self.normed(x))
        x = x + self.outer(self.inner(x) + x)
        return self.main(self.deep(x).relu()) + self.short(x)


def test_sums_of_sums_scaled_branches_and_projected_shortcuts() -> None:
    ends = residual_ends(Branches(), {"x": torch.randn(2, 3, 4)})
    assert ends.layers == ("left", "right", "scaled", "inner", "outer", "main")
    assert ends.others == 1


@pytest.mark.parametrize("family", ALL)
def test_probe_inputs_run_and_are_the_same_each_time(family: str) -> None:
    model = ALL[family]().eval()
    first, second = probe_inputs(model), probe_inputs(model)
    assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)
    with torch.no_grad():
        assert torch.isfinite(model(**first)[0]).all()


def test_models_without_known_inputs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Linear is no PreTrainedModel"):
        residual_ends(nn.Linear(2, 2))
    model = FAMILIES["vit"]()
    model.main_input_name = "past_values"
    with pytest.raises(ValueError, match="vit.*past_values"):
        probe_inputs(model)

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(3)

    with pytest.raises(ValueError, match="do not depend"):
        residual_ends(Constant(), {"x": torch.ones(2)})
