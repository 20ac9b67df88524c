"""Ball-clipped attention in models: found by proof, unchanged at first, bounded once the radii are small."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    WhisperConfig,
    WhisperModel,
)

from hf_lipschitz.calibration import calibrate
from hf_lipschitz.configuration import LipschitzConfig
from hf_lipschitz.demo.data import tweets
from hf_lipschitz.demo.models import text_model
from hf_lipschitz.functional.attention import ball_attention_bound
from hf_lipschitz.nn.attention import BallRadii
from hf_lipschitz.replacements.attention import (
    BALL_ATTENTION,
    EAGER_BALL_ATTENTION,
    apply,
    clipped_modules,
    find,
    register_attention,
)
from tests.families import FAMILIES, example, output


CONFIG = LipschitzConfig()
COVERED = {
    "bert": 2,
    "roberta": 2,
    "distilbert": 2,
    "albert": 1,
    "electra": 2,
    "modernbert": 2,
    "gpt2": 2,
    "llama": 2,
    "mixtral": 2,
    "gpt_oss": 2,
    "t5": 6,
    "vit": 2,
    "swin": 2,
    "clip": 2,
    "segformer": 2,
    "wav2vec2": 2,
    "ast": 2,
    "whisper": 2,
}
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


def balls(model: nn.Module) -> list[BallRadii]:
    return [module.lipschitz_balls for _, module in clipped_modules(model)]


def clipped(model: PreTrainedModel) -> PreTrainedModel:
    apply(model, CONFIG, find(model, CONFIG))
    return model


def with_visible_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of the attention modules large enough for its weights to differ from uniform ones."""
    for name in find(model, CONFIG):
        for parameter in model.get_submodule(name).parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3 / parameter.std())
    return model


def padded(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" not in inputs or model.config.model_type == "t5":
        return inputs
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -4:] = 0
    return inputs | {"attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("name", COVERED)
def test_family_is_unchanged_with_infinite_radii_and_after_calibration(name: str) -> None:
    model = with_visible_attention(FAMILIES[name]().eval())
    inputs = padded(model, example(model))
    plain, attention, keys = output(model, inputs), model.config._attn_implementation, set(model.state_dict())
    names = find(model, CONFIG)
    assert len(names) == COVERED[name]
    assert model.config._attn_implementation == attention
    assert set(model.state_dict()) == keys
    assert torch.equal(output(model, inputs), plain)

    apply(model, CONFIG, names)
    assert {f"{name}.lipschitz_balls.radii" for name in names} == set(model.state_dict()) - keys
    assert torch.equal(output(model, inputs), plain)

    calibrate(model, [inputs], margin=0.05)
    assert all(math.isfinite(radius) for ball in balls(model) for radius in (ball.query, ball.key, ball.value))
    assert torch.equal(output(model, inputs), plain)

    # Radii are those of the data: half of each changes what comes out.
    for kind in ("query", "key", "value"):
        before = [getattr(ball, kind) for ball in balls(model)]
        for ball, radius in zip(balls(model), before, strict=True):
            ball.set_radii(**{kind: radius / 2})
        assert not torch.allclose(output(model, inputs), plain, rtol=0, atol=1e-7)
        for ball, radius in zip(balls(model), before, strict=True):
            ball.set_radii(**{kind: radius})
    assert torch.equal(output(model, inputs), plain)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("deberta_v2", "DisentangledSelfAttention"), ("xlnet", "XLNetRelativeAttention"), ("siglip", "head.attention")],
)
def test_family_that_bypasses_the_registry_is_refused_by_name(name: str, attention: str) -> None:
    with pytest.raises(ValueError, match=attention):
        find(FAMILIES[name](), CONFIG)


@pytest.mark.parametrize("name", ["resnet", "convnext", "mobilenet_v2"])
def test_model_without_attention_has_nothing_to_clip(name: str) -> None:
    assert find(FAMILIES[name](), CONFIG) == ()


def test_modules_around_a_model_and_torch_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="no PreTrainedModel"):
        find(nn.Sequential(BertModel(BertConfig(**TINY))), CONFIG)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        find(nn.TransformerEncoderLayer(8, 2), CONFIG)


class PoolingByHand(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weights = torch.softmax(torch.matmul(hidden_states, hidden_states.mT), -1)
        return torch.matmul(weights, hidden_states)[:, 0]


class PoolingByTorch(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)[:, 0]


@pytest.mark.parametrize("pooler", [PoolingByHand(), PoolingByTorch()])
def test_attention_beside_the_registry_is_refused_by_name(pooler: nn.Module) -> None:
    model = BertModel(BertConfig(**TINY))
    model.pooler = pooler
    with pytest.raises(ValueError, match=f"pooler \\({type(pooler).__name__}\\)"):
        find(model, CONFIG)


def test_module_that_no_forward_pass_shows_to_call_the_registry_is_refused() -> None:
    model = BertModel(BertConfig(**TINY))
    layer = model.encoder.layer[0].attention
    layer.self.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(ValueError, match="no forward pass"):
        find(model, CONFIG)
    assert not balls(model)
    assert model.config._attn_implementation == "sdpa"


def test_family_that_treats_the_implementation_differently_is_refused() -> None:
    model = BertModel(BertConfig(**TINY))
    forward = model.pooler.forward
    model.pooler.forward = lambda x: forward(x) * (1 + 1e-3 * (model.config._attn_implementation == "sdpa"))
    with pytest.raises(ValueError, match="changes the outputs"):
        find(model, CONFIG)
    assert not balls(model)


def test_family_whose_implementation_cannot_be_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BertModel(BertConfig(**TINY))
    monkeypatch.setattr(BertModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="does not let its attention implementation be set"):
        find(model, CONFIG)


def test_model_with_a_kernel_of_its_own_is_refused() -> None:
    model = BertModel(BertConfig(**TINY))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        find(model, CONFIG)


def test_model_that_cannot_be_probed_is_refused() -> None:
    model = BertModel(BertConfig(**TINY))
    model.embeddings.forward = lambda *args, **kwargs: torch.zeros(0, 0)
    with pytest.raises(ValueError, match="cannot be probed"):
        find(model, CONFIG)


def test_finding_leaves_mode_and_random_state_alone() -> None:
    model = BertForSequenceClassification(BertConfig(**TINY))
    model.train()
    model.bert.encoder.eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    find(model, CONFIG)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.bert.encoder.layer[0].training


@torch.no_grad()
def test_eager_attention_stays_eager_and_gives_its_weights() -> None:
    model = BertModel(BertConfig(**TINY, attn_implementation="eager")).eval()
    inputs = {"input_ids": torch.arange(6)[None]}
    plain = model(**inputs, output_attentions=True)
    clipped(model)
    assert model.config._attn_implementation == EAGER_BALL_ATTENTION
    after = model(**inputs, output_attentions=True)
    assert torch.equal(after.last_hidden_state, plain.last_hidden_state)
    assert torch.equal(after.attentions[0], plain.attentions[0])


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: BartForSequenceClassification, lambda: WhisperModel, lambda: CLIPModel])
def test_encoder_decoders_and_two_towers_are_clipped_everywhere(make: Callable[[], type]) -> None:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    kind = make()
    if kind is CLIPModel:
        text = TINY | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        vision = {key: value for key, value in TINY.items() if key != "vocab_size"} | {
            "image_size": 8,
            "patch_size": 4,
        }
        model, count = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), 2
    elif kind is WhisperModel:
        config = WhisperConfig(**sizes, **special, num_mel_bins=4, max_source_positions=6, max_target_positions=20)
        model, count = WhisperModel(config), 3
    else:
        model, count = BartForSequenceClassification(BartConfig(**sizes, **special)), 3
    clipped(model)
    assert len(balls(model)) == count
    assert {module.config._attn_implementation for _, module in clipped_modules(model)} == {BALL_ATTENTION}


@torch.no_grad()
def test_setting_another_implementation_is_an_error_at_the_next_pass() -> None:
    model = clipped(BertModel(BertConfig(**TINY)).eval())
    inputs = {"input_ids": torch.arange(6)[None]}
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=f"set_attn_implementation\\('{BALL_ATTENTION}'\\)"):
        model(**inputs)
    model.set_attn_implementation(BALL_ATTENTION)
    model(**inputs)
    with pytest.raises(RuntimeError, match="configuration is that of a lipschitzified model"):
        BertModel(model.config)(**inputs)


@torch.no_grad()
def test_copies_and_casts_clip_as_well(tmp_path: Path) -> None:
    model = clipped(BertModel(BertConfig(**TINY)).eval())
    inputs = {"input_ids": torch.arange(6)[None]}
    for ball in balls(model):
        ball.set_radii(query=0.01, key=0.01, value=0.01)
    expected = model(**inputs).last_hidden_state
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).last_hidden_state, expected)
    balls(copied)[0].set_radii(value=1.0)
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(**inputs).last_hidden_state, expected)
    half = copied.to(torch.bfloat16)
    assert balls(half)[0].radii.dtype == torch.float32
    assert half(**inputs).last_hidden_state.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "swin", "gpt_oss"])
def test_empty_model_takes_its_radii_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = clipped(FAMILIES[name]().eval())
    inputs = example(model)
    for ball in balls(model):
        ball.set_radii(query=0.1, key=0.2, value=0.3)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    assert "hf_lipschitz_ball" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))

    config = type(model.config).from_pretrained(tmp_path)
    with torch.device("meta"):
        loaded = type(model)(config).eval()
    names = tuple(name for name, _ in clipped_modules(model))
    apply(loaded, CONFIG, names)
    assert all(ball.radii.is_meta for ball in balls(loaded))
    loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    for ball in balls(loaded):
        ball.check()
    # Not in the state dict.
    buffers = dict(model.named_buffers())
    for key, buffer in loaded.named_buffers():
        buffer.copy_(buffers[key])
    assert torch.equal(output(loaded, inputs), expected)


def attention_norm(forward: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> float:
    """The largest Jacobian norm on the way of a gradient ascent from `x`."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    best = 0.0
    for _ in range(steps):
        jacobian = torch.autograd.functional.jacobian(forward, x, create_graph=True)
        norm = torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), ord=2)
        best = max(best, norm.item())
        optimizer.zero_grad()
        (-norm).backward()
        optimizer.step()
    return best


@torch.no_grad()
def with_weights(module: nn.Module, std: float) -> nn.Module:
    for parameter in module.parameters():
        parameter.normal_(0, std)
    return module


def attention_of(family: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], tuple[Tensor | float, ...], dict]:
    """A clipped attention layer of a model, in float64, as a function of its input, with what its bound takes."""
    eager = {"attn_implementation": "eager"}
    if family == "bert":
        model = clipped(BertModel(BertConfig(**TINY, **eager)).double().eval())
        module = with_weights(model.encoder.layer[0].attention.self, 1.0)
        return module, lambda x: module(x)[0], (module.query.weight, module.key.weight, module.value.weight, 1.0), {}
    if family == "gpt2":
        model = clipped(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, **eager)).double().eval())
        module = with_weights(model.h[0].attn, 1.0)
        weights = (*module.c_attn.weight.T.split(8), module.c_proj.weight.T)
        mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~torch.ones(4, 4).tril().bool(), -1e300)
        return module, lambda x: module(x, attention_mask=mask)[0], weights, {"mask": "causal"}
    model = clipped(LlamaModel(LlamaConfig(**TINY, num_key_value_heads=1, **eager)).double().eval())
    module = with_weights(model.layers[0].self_attn, 1.0)
    weights = (module.q_proj.weight, module.k_proj.weight, module.v_proj.weight, module.o_proj.weight)
    positions = model.rotary_emb(torch.zeros(1, 4, 8, dtype=torch.float64), torch.arange(4)[None])
    return (
        module,
        lambda x: module(x, position_embeddings=positions, attention_mask=None)[0],
        weights,
        {"num_key_value_heads": 1},
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_jacobian_of_the_attention_of_a_model_stays_below_the_bound(family: str) -> None:
    module, forward, weights, given = attention_of(family)
    radii = {"query": 0.8, "key": 0.7, "value": 0.4}
    bound = ball_attention_bound(
        *weights, **{f"radius_{kind[0]}": radius for kind, radius in radii.items()}, num_heads=2, num_keys=4, **given
    )
    module.lipschitz_balls.set_radii(**radii)
    starts = [torch.randn(1, 4, 8, dtype=torch.float64) * scale for scale in (0.1, 0.3, 1.0)]
    reached = [attention_norm(forward, x, steps=8) for x in starts]
    assert 0.2 * bound < max(reached) <= bound
    # Without the balls the same ascent leaves the bound behind.
    module.lipschitz_balls.set_radii(query=math.inf, key=math.inf, value=math.inf)
    assert max(attention_norm(forward, x, steps=4) for x in starts) > bound


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "swin", "gpt_oss"])
def test_clipped_models_export_and_clip_in_the_graph(name: str) -> None:
    model = clipped(FAMILIES[name]().eval())
    inputs = example(model)
    if name in ("llama", "gpt_oss"):
        inputs["use_cache"] = False
    plain = output(model, inputs)
    for ball in balls(model):
        ball.set_radii(query=0.1, key=0.2, value=0.01)
    expected = output(model, inputs)
    exported = torch.export.export(model, (), inputs).module()
    found = output(exported, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - plain).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clipped_models_compile_whole(attention: str) -> None:
    model = clipped(BertModel(BertConfig(**TINY, attn_implementation=attention)).eval())
    inputs = {"input_ids": torch.arange(6)[None]}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for radius in (math.inf, 0.1):
        balls(model)[0].set_radii(value=radius)
        expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_gradients_reach_all_projections_through_clipped_attention() -> None:
    model = clipped(BertModel(BertConfig(**TINY)))
    balls(model)[0].set_radii(query=0.01, key=0.01, value=0.01)
    model(input_ids=torch.arange(6)[None]).last_hidden_state.square().sum().backward()
    attention = model.encoder.layer[0].attention.self
    for layer in (attention.query, attention.key, attention.value):
        assert layer.weight.grad.isfinite().all()
        assert layer.weight.grad.abs().max() > 0


@torch.no_grad()
def test_generation_with_a_cache_is_that_without_one() -> None:
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    with_weights(model, 0.7)
    inputs = {"inputs": torch.arange(2, 14).reshape(2, 6), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs)
    clipped(model)
    assert torch.equal(model.generate(**inputs), plain)
    for ball in balls(model):
        ball.set_radii(query=0.5, key=0.5, value=0.2)
    changed = model.generate(**inputs)
    assert not torch.equal(changed, plain)
    assert torch.equal(model.generate(**inputs, use_cache=False), changed)


def test_registering_again_changes_nothing() -> None:
    register_attention()
    model = clipped(BertModel(BertConfig(**TINY)).eval())
    register_attention()
    with torch.no_grad():
        model(input_ids=torch.arange(6)[None])


@torch.no_grad()
def test_minilm_on_the_tweets_is_unchanged_after_calibration() -> None:
    data = tweets()
    model, tokenizer = text_model(data, None)
    model.eval()

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        texts = sorted(texts, key=len)
        return [
            dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=48, return_tensors="pt"))
            for i in range(0, len(texts), 32)
        ]

    seen, unseen = batches(data.train["input"][:64]), batches(data.test["input"][:32])
    plain = [model(**batch).logits for batch in seen + unseen]
    clipped(model)
    calibrate(model, seen, margin=0.1)
    after = [model(**batch).logits for batch in seen + unseen]
    assert all(torch.equal(a, b) for a, b in zip(plain[: len(seen)], after[: len(seen)], strict=True))
    assert max((a - b).abs().max().item() for a, b in zip(plain, after, strict=True)) <= 1e-6
    for ball in balls(model):
        assert 1 < ball.query < 100
        ball.set_radii(value=ball.value / 4)
    changed = [model(**batch).logits for batch in seen]
    assert max((a - b).abs().max().item() for a, b in zip(plain, changed, strict=False)) > 1e-3
