from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lipschitz.blocks import apply_blocks, block_layers, describe_blocks, find_blocks, has_blocks, layout_of
from hf_lipschitz.nn.activations import SlopeCorrected
from hf_lipschitz.nn.blocks import TiedParametrization
from tests.jacobians import attacked_norm, jacobian_norm
from tests.operators import dense_norm


TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
}
IMAGE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
BART = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
AST = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}

# Name -> the model and how many blocks it has.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "bert": (lambda: tf.BertModel(tf.BertConfig(**TEXT)), 2),
    "roberta": (lambda: tf.RobertaModel(tf.RobertaConfig(**TEXT)), 2),
    "electra": (lambda: tf.ElectraModel(tf.ElectraConfig(**TEXT, embedding_size=12)), 2),
    "deberta": (lambda: tf.DebertaModel(tf.DebertaConfig(**TEXT, **DEBERTA)), 2),
    "deberta_v2": (lambda: tf.DebertaV2Model(tf.DebertaV2Config(**TEXT, **DEBERTA)), 2),
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**TEXT)), 2),
    "albert": (lambda: tf.AlbertModel(tf.AlbertConfig(**TEXT, embedding_size=12)), 1),
    "distilbert": (
        lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=60, dim=12, n_layers=2, n_heads=2, hidden_dim=20)),
        2,
    ),
    "xlnet": (
        lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=60, d_model=12, n_layer=2, n_head=2, d_inner=20)),
        2,
    ),
    "gpt2": (lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=60, n_embd=12, n_layer=2, n_head=2, n_inner=20)), 2),
    "t5": (
        lambda: tf.T5EncoderModel(tf.T5Config(vocab_size=60, d_model=12, d_ff=20, d_kv=6, num_heads=2, num_layers=2)),
        2,
    ),
    "bart": (lambda: tf.BartModel(tf.BartConfig(vocab_size=60, max_position_embeddings=40, **BART)), 2),
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**IMAGE)), 2),
    "deit": (lambda: tf.DeiTModel(tf.DeiTConfig(**IMAGE)), 2),
    "clip": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGE)), 2),
    "siglip": (lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**IMAGE)), 2),
    "swin": (
        lambda: tf.SwinModel(
            tf.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
        ),
        2,
    ),
    "ast": (lambda: tf.ASTModel(tf.ASTConfig(**{**IMAGE, **AST})), 2),
    "wav2vec2": (lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**AUDIO)), 2),
    "stable wav2vec2": (
        lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**AUDIO, do_stable_layer_norm=True, feat_extract_norm="layer")),
        2,
    ),
    "hubert": (lambda: tf.HubertModel(tf.HubertConfig(**AUDIO)), 2),
    "wavlm": (lambda: tf.WavLMModel(tf.WavLMConfig(**AUDIO)), 2),
    "whisper": (
        lambda: tf.WhisperModel(
            tf.WhisperConfig(
                vocab_size=60, num_mel_bins=8, max_source_positions=10, max_target_positions=10, pad_token_id=0, **BART
            )
        ),
        2,
    ),
}


def build(family: str) -> PreTrainedModel:
    """In float64, in evaluation mode, with weights large enough that an unconstrained pair is far from 1-Lipschitz."""
    model = FAMILIES[family][0]().double().eval()
    for name in find_blocks(model):
        parent = model.get_submodule(name)
        layout = layout_of(parent)
        for path in (layout.inner, layout.outer):
            nn.init.normal_(parent.get_submodule(path).weight)
            if parent.get_submodule(path).bias is not None:
                nn.init.normal_(parent.get_submodule(path).bias)
    return model


def inputs_of(family: str, model: PreTrainedModel) -> dict[str, Tensor]:
    if family in ("vit", "deit", "clip", "siglip", "swin"):
        return {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
    if family == "ast":
        return {"input_values": torch.randn(1, 32, 16, dtype=torch.float64)}
    if family in ("wav2vec2", "stable wav2vec2", "hubert", "wavlm"):
        return {"input_values": torch.randn(1, 400, dtype=torch.float64)}
    ids = torch.randint(3, 60, (1, 5))
    if family == "whisper":
        return {"input_features": torch.randn(1, 8, 20, dtype=torch.float64), "decoder_input_ids": ids}
    return {"input_ids": ids}


def learn_q(model: nn.Module) -> None:
    """Weights of the rows as training may leave them."""
    for module in model.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList) and isinstance(module[0], TiedParametrization):
            nn.init.normal_(module.original, std=1.5)


@pytest.mark.parametrize("kind", ["sll", "cpl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_parts_are_1_lipschitz_and_the_sum_is_the_models_own(family: str, kind: str) -> None:
    model = build(family)
    names = find_blocks(model)
    assert len(names) == FAMILIES[family][1]
    layouts = {name: layout_of(model.get_submodule(name)) for name in names}
    apply_blocks(model, names, kind, num_iterations=2 if family == "vit" else 1)
    learn_q(model)
    assert has_blocks(model)

    seen: dict[str, Tensor] = {}
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name, layout in layouts.items():
        parent = model.get_submodule(name)
        inner, outer = parent.get_submodule(layout.inner), parent.get_submodule(layout.outer)
        hooks.append(inner.register_forward_pre_hook(lambda _, args, name=name: seen.update({f"{name} in": args[0]})))
        hooks.append(outer.register_forward_hook(lambda _, a, out, name=name: seen.update({f"{name} out": out})))
        if layout.norm is None:
            for module in parent.modules():
                if "LayerNorm" in type(module).__name__:
                    hooks.append(
                        module.register_forward_pre_hook(lambda _, args, name=name: sums[name].append(args[0]))
                    )
        else:
            assert isinstance(parent.get_submodule(layout.norm), nn.Identity)
            hooks.append(
                parent.register_forward_hook(
                    lambda _, a, out, name=name: sums[name].append(out[0] if isinstance(out, tuple) else out)
                )
            )
    with torch.no_grad():
        model(**inputs_of(family, model))
    for hook in hooks:
        hook.remove()

    for name, layout in layouts.items():
        x, branch = seen[f"{name} in"], seen[f"{name} out"]
        assert any(y.shape == x.shape and torch.allclose(y, x + branch, rtol=1e-12, atol=1e-12) for y in sums[name])
        parent = model.get_submodule(name)
        inner, outer = parent.get_submodule(layout.inner), parent.get_submodule(layout.outer)
        activation = parent.get_submodule(layout.activation)
        assert isinstance(activation, SlopeCorrected)
        tied = [inner.weight.detach().clone(), outer.weight.detach().clone()]

        def block(v: Tensor, parts: tuple[nn.Module, ...] = (inner, activation, outer)) -> Tensor:
            return v + nn.Sequential(*parts)(v)

        with nn.utils.parametrize.cached():
            assert torch.equal(tied[1], outer.weight)
            assert jacobian_norm(block, x.reshape(-1, x.shape[-1])[0]) <= 1 + 1e-9
            assert 0.9 < attacked_norm(block, (x.shape[-1],), starts=2, steps=6) <= 1 + 1e-9
        break


def test_without_the_correction_gelu_is_over_1() -> None:
    """The published block with GELU as it is reaches 1.26."""
    model = build("bert")
    name = find_blocks(model)[0]
    apply_blocks(model, (name,), "cpl")
    layer = model.get_submodule(name)
    nn.init.orthogonal_(layer.intermediate.dense.weight)
    inner, outer = layer.intermediate.dense, layer.output.dense
    jacobian = torch.eye(12, dtype=torch.float64) + 1.1289 * outer.weight.detach() @ inner.weight.detach()
    assert dense_norm(jacobian) > 1.25
    largest = attacked_norm(lambda v: v + outer(layer.intermediate.intermediate_act_fn(inner(v))), (12,))
    assert 0.95 < largest <= 1 + 1e-9


@pytest.mark.parametrize("family", ["bert", "gpt2", "wav2vec2", "swin", "albert"])
@pytest.mark.parametrize("kind", ["sll", "cpl"])
def test_a_model_on_the_meta_device_takes_the_saved_weights(family: str, kind: str) -> None:
    model = build(family)
    plain_config = copy.deepcopy(model.config)
    names = find_blocks(model)
    apply_blocks(model, names, kind)
    learn_q(model)
    with torch.device("meta"):
        empty = type(model)(plain_config)
    apply_blocks(empty, names, kind)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    other = type(model)(plain_config).double()
    apply_blocks(other, names, kind)
    other.load_state_dict(model.state_dict())
    other.eval()
    inputs = inputs_of(family, model)
    with torch.no_grad():
        assert torch.equal(other(**inputs)[0], model(**inputs)[0])
        assert torch.equal(copy.deepcopy(model)(**inputs)[0], model(**inputs)[0])


def test_copies_have_ties_of_their_own() -> None:
    model = build("bert")
    names = find_blocks(model)
    apply_blocks(model, names)
    twin = copy.deepcopy(model)
    layer, other = model.get_submodule(names[0]), twin.get_submodule(names[0])
    before = layer.output.dense.weight.detach().clone()
    with torch.no_grad():
        other.intermediate.dense.weight.mul_(2)
    torch.testing.assert_close(other.output.dense.weight, before / 2)
    assert torch.equal(layer.output.dense.weight, before)


@pytest.mark.parametrize("kind", ["sll", "cpl"])
def test_training_reaches_every_free_tensor_and_the_bound_stays(kind: str) -> None:
    model = build("vit").train()
    names = find_blocks(model)
    apply_blocks(model, names, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    inputs = inputs_of("vit", model)
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs)[0].square().sum().backward()
        optimizer.step()
    for name in names:
        layer = model.get_submodule(name)
        free = layer.mlp.fc2.parametrizations.weight.original
        assert layer.mlp.fc1.weight.grad.any()
        assert free.shape == ((20,) if kind == "sll" else (0,))
        assert free.requires_grad == (kind == "sll")
        assert kind == "cpl" or (free.grad.any() and free.any())
        assert attacked_norm(lambda v, mlp=layer.mlp: v + mlp(v), (12,), starts=2, steps=5) <= 1 + 1e-9


def test_float32_models_keep_the_bound_up_to_rounding() -> None:
    model = FAMILIES["bert"][0]().eval()
    names = find_blocks(model)
    apply_blocks(model, names)
    layer = model.get_submodule(names[0])
    inner, outer = (m.weight.detach().double() for m in (layer.intermediate.dense, layer.output.dense))
    for slopes in (torch.ones(20), torch.rand(20), (torch.rand(20) > 0.5).float()):
        assert dense_norm(torch.eye(12) + outer @ (slopes.double()[:, None] * inner)) <= 1 + 1e-7


def test_zero_rows_take_no_part() -> None:
    model = build("bert")
    names = find_blocks(model)
    apply_blocks(model, names)
    layer = model.get_submodule(names[0])
    with torch.no_grad():
        layer.intermediate.dense.weight[3:].zero_()
    weight = layer.output.dense.weight
    assert not weight[:, 3:].any()
    assert weight[:, :3].any()
    (gradient,) = torch.autograd.grad(weight.square().sum(), layer.intermediate.dense.weight)
    assert torch.isfinite(gradient).all()


def test_names_and_descriptions() -> None:
    model = build("gpt2")
    assert find_blocks(model) == ("h.0", "h.1")
    assert block_layers(model, ("h.1",)) == ("h.1.mlp.c_fc", "h.1.mlp.c_proj")
    (line,) = describe_blocks(model, ("h.0",))
    assert line == "block: mlp.c_proj tied to mlp.c_fc, mlp.act with slopes in [0, 1], ln_2 removed"
    assert not has_blocks(model)
    assert "removed" not in describe_blocks(build("bert"), ("encoder.layer.0",))[0]


def llama() -> PreTrainedModel:
    return tf.LlamaModel(tf.LlamaConfig(**TEXT, num_key_value_heads=1))


def gated_t5() -> PreTrainedModel:
    config = tf.T5Config(vocab_size=60, d_model=12, d_ff=20, d_kv=6, num_heads=2, num_layers=1)
    config.is_gated_act = True
    return tf.T5EncoderModel(config)


def modernbert() -> PreTrainedModel:
    return tf.ModernBertModel(tf.ModernBertConfig(**TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize(
    ("build_model", "message"),
    [
        (llama, r"layers.0.mlp: LlamaMLP is gated"),
        (gated_t5, r"T5LayerFF is gated"),
        (modernbert, r"ModernBertMLP is gated"),
        (lambda: tf.Dinov2Model(tf.Dinov2Config(**IMAGE)), r"Dinov2MLP is not in the table"),
        (lambda: nn.Linear(3, 3), "Linear has no residual feed-forward pair"),
    ],
)
def test_models_without_known_pairs_are_refused_by_name(build_model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_blocks(build_model())


def test_activations_without_slopes_are_refused_by_name() -> None:
    for act, message in (("relu2", "ReLUSquaredActivation: its slope grows"), ("prelu", "PReLU: its slopes are")):
        with pytest.raises(ValueError, match=f"encoder.layer.0 cannot be a block.*{message}"):
            find_blocks(tf.BertModel(tf.BertConfig(**TEXT, hidden_act=act)))
    model = build("bert")
    for layer in model.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = nn.functional.gelu
    with pytest.raises(ValueError, match="not a module, so its slopes are not known"):
        find_blocks(model)


def test_pairs_that_cannot_be_tied_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="torch.bfloat16, whose rounding breaks the tie"):
        find_blocks(build("bert").to(torch.bfloat16))
    model = build("bert")
    first, second = model.encoder.layer
    second.output.dense.weight = first.output.dense.weight
    with pytest.raises(ValueError, match="is shared with"):
        find_blocks(model)
    model = build("bert")
    nn.utils.parametrizations.weight_norm(model.encoder.layer[1].intermediate.dense)
    with pytest.raises(ValueError, match="encoder.layer.1 .* parametrized already"):
        find_blocks(model)
    model = build("bert")
    with pytest.raises(ValueError, match="kind must be one of sll, cpl"):
        apply_blocks(model, find_blocks(model), "soc")
    with pytest.raises(ValueError, match="layer pooler: BertPooler holds no feed-forward pair"):
        apply_blocks(model, ("pooler",))


def test_a_layer_that_was_replaced_is_noticed() -> None:
    """As adapters do: the tie would hold for their base layer only."""
    for path in ("intermediate", "output"):
        model = build("bert")
        apply_blocks(model, find_blocks(model))
        holder = getattr(model.encoder.layer[0], path)
        holder.dense = nn.Sequential(holder.dense)
        with pytest.raises(RuntimeError, match=rf"{path}.dense was replaced by Sequential.*adapters"):
            model(**inputs_of("bert", model))


def test_other_feed_forward_parts_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    both = nn.ModuleList([build("bert"), llama()])
    with caplog.at_level("WARNING", logger="hf_lipschitz.blocks"):
        assert len(find_blocks(both)) == 2
    assert "1.layers.0.mlp: LlamaMLP is gated" in caplog.text


def test_compiled_blocks_are_the_same() -> None:
    model = build("vit")
    names = find_blocks(model)
    apply_blocks(model, names)
    learn_q(model)
    mlp = model.get_submodule(names[0]).mlp
    x = torch.randn(4, 12, dtype=torch.float64)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-12, atol=1e-12)
