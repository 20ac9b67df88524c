import pytest
import torch
from tiny_heads import (
    albert_tokens,
    ast,
    batch_for,
    bert,
    bert_tokens,
    llama_next,
    resnet,
    t5,
    varied,
    vit,
    wav2vec2,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lipschitz import lipschitzify
from hf_lipschitz.training.module_decay import captured_inputs, decayed_modules, module_decay
from hf_lipschitz.training.naming import matching_modules


def decay_of(model, batch, names, mask="attention_mask"):
    with captured_inputs(model, names) as calls:
        model(**batch)
    return module_decay(model, calls, batch.get(mask))


def hidden_states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states


def mean_square(hidden, mask=None):
    """Over the tokens, one after the other."""
    squares = [
        (hidden[i, t] @ hidden[i, t]).item()
        for i in range(hidden.shape[0])
        for t in range(hidden.shape[1])
        if mask is None or mask[i, t] == 1
    ]
    return sum(squares) / len(squares)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("build", "layers"), [
    (bert_tokens, "bert.encoder.layer"), (llama_next, "model.layers"), (vit, "vit.layers"),
    (ast, "audio_spectrogram_transformer.layers"),
])  # fmt: skip
def test_tokens_that_the_mask_counts(build, layers, constrained):
    model = build().eval()
    if constrained:
        lipschitzify(model, layer_lipschitz=0.5)
    batch = batch_for(model)
    hidden, mask = hidden_states(model, batch), batch.get("attention_mask")
    expected = [mean_square(hidden[i], mask) for i in range(2)]
    for i in range(2):
        assert decay_of(model, batch, [f"{layers}.{i}"]).item() == pytest.approx(expected[i], rel=1e-5)
    names = [f"{layers}.1", f"{layers.split('.')[-1]}.0", f"{layers}.0"]
    assert decay_of(model, batch, names).item() == pytest.approx(sum(expected), rel=1e-5)
    if mask is not None:
        every = mean_square(hidden[1])
        assert decay_of(model, batch, [f"{layers}.1"], mask=None).item() == pytest.approx(every, rel=1e-5)
        assert every != pytest.approx(expected[1], rel=1e-3)


def test_pooled_examples_have_no_mask():
    model = bert().eval()
    batch = batch_for(model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    pooled = model.bert(**inputs).pooler_output
    expected = pooled.pow(2).sum() / len(pooled)
    torch.testing.assert_close(decay_of(model, batch, ["classifier"]), expected, rtol=1e-5, atol=1e-6)


def test_ending_names_one_module_of_each_layer():
    model = bert_tokens().eval()
    batch = batch_for(model)
    expected = 0.0
    for layer, hidden in zip(model.bert.encoder.layer, hidden_states(model, batch), strict=False):
        mask = torch.zeros(4, 1, 1, 7).masked_fill(batch["attention_mask"][:, None, None] == 0, -torch.inf)
        expected += mean_square(layer.attention(hidden, attention_mask=mask)[0], batch["attention_mask"])
    assert decay_of(model, batch, ["intermediate.dense"]).item() == pytest.approx(expected, rel=1e-5)


def test_maps_of_an_image_are_one_row():
    model = resnet().eval()
    batch = batch_for(model)
    maps = hidden_states(model, batch)[1]
    expected = maps.pow(2).sum() / len(maps)
    for name in ("resnet.encoder.stages.1", "resnet.encoder.stages.1.layers.0.layer.0.convolution"):
        torch.testing.assert_close(decay_of(model, batch, [name]), expected, rtol=1e-5, atol=1e-6)


def test_shared_layer_counts_at_each_call():
    model = albert_tokens().eval()
    batch = batch_for(model)
    hidden = hidden_states(model, batch)
    with captured_inputs(model, ["albert_layers.0"]) as calls:
        model(**batch)
    assert [len(of_module) for of_module in calls.values()] == [2]
    expected = sum(mean_square(h, batch["attention_mask"]) for h in hidden[:2])
    assert module_decay(model, calls, batch["attention_mask"]).item() == pytest.approx(expected, rel=1e-5)


def test_mask_over_samples_is_taken_to_frames():
    model = wav2vec2().eval()
    batch = batch_for(model)
    hidden = hidden_states(model, batch)
    frames = [((int(n) - 4) // 3 + 1 - 2) // 2 + 1 for n in batch["attention_mask"].sum(1)]
    assert min(frames) < hidden[0].shape[1]
    mask = [[int(t < count) for t in range(hidden[0].shape[1])] for count in frames]
    for i in range(2):
        decay = decay_of(model, batch, [f"encoder.layers.{i}"])
        assert decay.item() == pytest.approx(mean_square(hidden[i], torch.tensor(mask)), rel=1e-5)
    with captured_inputs(model, ["conv_layers.1.conv"]) as calls:
        model(**batch)
    maps = calls["wav2vec2.feature_extractor.conv_layers.1.conv"][0].activations
    assert maps.shape[:2] == (4, 6)
    torch.testing.assert_close(module_decay(model, calls, batch["attention_mask"]), maps.pow(2).sum() / 4)
    with pytest.raises(RuntimeError, match=r"of shape \(4, 60\), does not say.*conv_layers.1, of shape \(4, 6, 19\)"):
        decay_of(model, batch, ["conv_layers.1"])


def test_tokens_in_one_axis_are_those_of_the_mask():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 3, "num_hidden_layers": 2}
    model = varied(MixtralForCausalLM)(MixtralConfig(**sizes, **experts, vocab_size=40, max_position_embeddings=16))
    batch = batch_for(model)
    with captured_inputs(model, ["layers.0.mlp.gate"]) as calls:
        model(**batch)
    assert calls["model.layers.0.mlp.gate"][0].activations.shape == (4 * 7, 8)
    flat = module_decay(model, calls, batch["attention_mask"])
    torch.testing.assert_close(flat, decay_of(model, batch, ["layers.0.mlp"]))
    assert flat != module_decay(model, calls)


def test_penalty_is_in_float32_and_trains_what_comes_before():
    model = vit().bfloat16()
    batch = batch_for(model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    penalty = decay_of(model, batch, ["vit.layers.1"])
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert model.vit.layers[0].mlp.fc2.weight.grad.abs().max() > 0
    assert model.vit.layers[1].mlp.fc2.weight.grad is None


def test_checkpointed_layers():
    gradients = []
    for kwargs in (None, {"use_reentrant": False}):
        model = bert_tokens().train()
        if kwargs is not None:
            model.gradient_checkpointing_enable(kwargs)
        batch = batch_for(model)
        with captured_inputs(model, ["intermediate.dense"]) as calls:
            loss = model(**batch).loss
        (loss + 0.1 * module_decay(model, calls, batch["attention_mask"])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(len(of_module) == 1 for of_module in calls.values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="no gradient.*use_reentrant=False"):
        decay_of(model, batch, ["intermediate.dense"])


def test_hooks_are_gone_afterwards():
    model = bert()
    with pytest.raises(KeyError), captured_inputs(model, ["classifier"]) as calls:
        raise KeyError
    model(**batch_for(model))
    assert calls == {"classifier": []}


def test_names():
    model = bert()
    layers = [f"bert.encoder.layer.{i}.output" for i in range(2)]
    assert matching_modules(model, ["layer.1.output", "layer.0.output", "1.output"], "these") == layers
    assert matching_modules(model, ["bert"], "these") == ["bert"]
    with pytest.raises(ValueError, match="these: Bert.* no module 'put'; the last are .*classifier"):
        matching_modules(model, ["classifier", "put"], "these")
    for nothing in ([], "classifier"):
        with pytest.raises(ValueError, match="these must be a list of at least one name"):
            matching_modules(model, nothing, "these")
    assert list(decayed_modules(model, ["pooler"])) == ["bert.pooler"]
    with pytest.raises(ValueError, match="activation_decay_modules: .*no module 'score'"):
        decayed_modules(model, ["score"])
    with pytest.raises(ValueError, match="bert.encoder.layer is a ModuleList.*name the modules in it"):
        decayed_modules(model, ["encoder.layer"])


class Scaled(nn.Module):
    def forward(self, scale, hidden_states):
        return scale * hidden_states


class Odd(nn.Module):
    """What enters its modules is unusual."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.relu = nn.ReLU(inplace=True)
        self.embed = nn.Embedding(5, 4)
        self.scaled = Scaled()
        self.last = nn.Bilinear(4, 4, 2)

    def forward(self, x, ids):
        h = self.first(x)
        h, _ = self.attention(h, h, h)
        h = self.relu(h + self.embed(ids))
        return self.last(input2=self.scaled(scale=torch.tensor(3.0), hidden_states=h), input1=h)


def odd_decay(names, mask=None, trained=True):
    torch.manual_seed(0)
    model = Odd().requires_grad_(trained)
    batch = {"x": torch.randn(2, 3, 4), "ids": torch.randint(0, 5, (2, 3))}
    return decay_of(model, {**batch}, names) if mask is None else _masked(model, batch, names, mask)


def _masked(model, batch, names, mask):
    with captured_inputs(model, names) as calls:
        model(**batch)
    return module_decay(model, calls, mask)


def test_inputs_by_name():
    # The first that is given, of which the second argument of `last` is 3 times the one of `scaled`.
    torch.testing.assert_close(odd_decay(["last"]), 9 * odd_decay(["scaled"]))
    assert odd_decay(["scaled"]) > 0


def test_modules_without_usable_activations_are_errors():
    with pytest.raises(RuntimeError, match="attention.out_proj not called in this forward"):
        odd_decay(["attention.out_proj", "last"])
    with pytest.raises(RuntimeError, match="no floating-point tensor enters embed, a Embedding"):
        odd_decay(["embed"])
    with pytest.raises(RuntimeError, match="what entered relu was changed in place"):
        odd_decay(["relu"])
    with pytest.raises(RuntimeError, match="changes nothing: the activations entering first have no gradient"):
        odd_decay(["first"])
    with pytest.raises(RuntimeError, match="entering first, last have no gradient; name modules after a layer"):
        odd_decay(["first", "last"], trained=False)
    assert odd_decay(["first", "last"]) > odd_decay(["last"])


def test_mask_that_does_not_fit_is_an_error():
    assert odd_decay(["attention"], torch.ones(2, 3)) == odd_decay(["attention"])
    for mask in (torch.ones(2, 4), torch.ones(2, 1, 3, 3)):
        with pytest.raises(RuntimeError, match="does not say which tokens count in what enters attention"):
            odd_decay(["attention"], mask)


def test_tokens_of_a_decoder_are_not_those_of_the_mask():
    model = t5().eval()
    batch = batch_for(model)
    assert decay_of(model, batch, ["encoder.block.1"]) > 0
    with pytest.raises(RuntimeError, match="does not say which tokens count in what enters decoder.block.1"):
        decay_of(model, batch, ["decoder.block.1"])
    assert decay_of(model, batch, ["decoder.block.1"], mask=None) > 0


def test_checkpoint_of_torch_runs_hooks_again_only_while_they_are_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4, requires_grad=True)
    with captured_inputs(model, ["1"]) as calls:
        y = checkpoint(model, x, use_reentrant=False)
    penalty = module_decay(model, calls)
    (y.sum() + penalty).backward()
    assert len(calls["1"]) == 1
    h = model[0](x)
    expected = torch.autograd.grad(h.pow(2).sum() / 3 + model[1](h).sum(), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, expected)
