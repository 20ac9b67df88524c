import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from tiny_heads import (
    EXAMPLES,
    FOR_TOKENS,
    SHIFTING,
    ast,
    bart_same,
    batch_for,
    bert,
    bert_masked,
    bert_tokens,
    gpt2,
    gpt2_next,
    llama_next,
    llama_sequences,
    resnet,
    roberta,
    t5,
    vit,
    wav2vec2,
    wav2vec2_frames,
    whisper,
)
from tiny_models import LABELS, LENGTH, Examples
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, pad
from transformers import BertConfig, BertForQuestionAnswering

from hf_lipschitz import lipschitzify
from hf_lipschitz.training.activation_decay import HeadDecay, activation_decay, hessian_trace_weights
from hf_lipschitz.training.counting import is_cross_entropy, logits_gradient
from hf_lipschitz.training.head import find_head
from hf_lipschitz.training.head_calls import HeadCall, captured, example_activations


def last_tokens(hidden, batch):
    return hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(1) - 1]


def mean_of_frames(hidden, batch):
    """Of the frames that wav2vec2's convolutions, kernels 4 and 2 and strides 3 and 2, make of unpadded samples."""
    frames = [((int(samples) - 4) // 3 + 1 - 2) // 2 + 1 for samples in batch["attention_mask"].sum(1)]
    return torch.stack([row[:count].mean(0) for row, count in zip(hidden, frames, strict=True)])


def by_hand(model, batch):
    """The activations entering the last layer, written out for each architecture."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    kind = type(model).__name__
    if kind == "BertForSequenceClassification":
        return model.bert(**inputs).pooler_output
    if kind == "BertForMaskedLM":
        return model.cls.predictions.transform(model.bert(**inputs)[0])
    if kind.startswith("Roberta"):
        return torch.tanh(model.classifier.dense(model.roberta(**inputs)[0][:, 0]))
    if kind.startswith("ViT"):
        return model.vit(**inputs)[0][:, 0]
    if kind.startswith("ResNet"):
        return model.resnet(**inputs).pooler_output.flatten(1)
    if kind.startswith("Wav2Vec2"):
        return mean_of_frames(model.projector(model.wav2vec2(**inputs)[0]), batch)
    if kind.startswith("AST"):
        return model.classifier.layernorm(model.audio_spectrogram_transformer(**inputs).pooler_output)
    if kind.startswith("Whisper"):
        return model.projector(model.encoder(**inputs)[0]).mean(1)
    if kind.startswith("T5"):
        starts = batch["labels"].new_full((len(batch["labels"]), 1), model.config.decoder_start_token_id)
        before = torch.cat([starts, batch["labels"][:, :-1]], 1)
        return model(**inputs, decoder_input_ids=before.masked_fill(before == -100, 0), output_hidden_states=True)[
            "decoder_hidden_states"
        ][-1] * (model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0)
    if kind.startswith("BartForCausalLM"):
        return model.model.decoder(**inputs)[0]
    hidden = getattr(model, model.base_model_prefix)(**inputs)[0]
    if kind.startswith("Cohere"):
        return hidden / 16
    return last_tokens(hidden, batch) if kind.endswith("SequenceClassification") else hidden


def decay_of(model, batch, decay="squared_norm"):
    """The penalty, and the call of the head with what came out of the model."""
    head_decay = HeadDecay(decay)
    head_decay.check(model)
    with head_decay.captured(model) as calls:
        outputs = model(**batch)
    return head_decay.penalty(model, calls, outputs.loss, outputs, batch), calls[0], outputs


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("build", EXAMPLES + FOR_TOKENS)
def test_activations_are_those_computed_by_hand(build, constrained):
    model = build().eval()
    if constrained:
        lipschitzify(model, layer_lipschitz=0.5)
    batch = batch_for(model, 5)
    head = find_head(model)[1]
    with captured(head) as calls:
        logits = model(**batch).logits
    h = example_activations(calls[0], logits)
    torch.testing.assert_close(h, by_hand(model, batch), rtol=1e-4, atol=1e-6)
    # The row times the head gives the logits: it is what enters the last layer for that example.
    torch.testing.assert_close(nn.functional.linear(h, head.weight, head.bias), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", EXAMPLES)
def test_penalty_of_examples_is_the_mean_of_those_that_have_a_label(build):
    model = build().eval()
    batch = batch_for(model, 5)
    squares = by_hand(model, batch).pow(2).sum(1)
    torch.testing.assert_close(decay_of(model, batch)[0], squares.mean(), rtol=1e-4, atol=1e-6)
    batch["labels"][1] = batch["labels"][4] = -100
    expected = (squares[0] + squares[2] + squares[3]) / 3
    torch.testing.assert_close(decay_of(model, batch)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", FOR_TOKENS)
def test_penalty_of_tokens_is_the_mean_of_those_that_count(build):
    model = build().eval()
    batch = batch_for(model, 5)
    h, labels = by_hand(model, batch), batch["labels"].tolist()
    ahead = 1 if build in SHIFTING else 0
    squares = [
        (h[i, t] @ h[i, t]).item()
        for i in range(5)
        for t in range(LENGTH)
        if t + ahead < LENGTH and labels[i][t + ahead] != -100
    ]
    assert 0 < len(squares) < 5 * LENGTH
    assert max(squares) > 1.2 * min(squares)
    assert decay_of(model, batch)[0].item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)


@pytest.mark.parametrize("build", FOR_TOKENS)
def test_penalty_is_about_the_tokens_that_the_loss_is_about(build):
    model = build()
    penalty, call, outputs = decay_of(model, batch_for(model))
    (of_loss,) = torch.autograd.grad(outputs.loss, call.outputs, retain_graph=True)
    (of_penalty,) = torch.autograd.grad(penalty, call.activations)
    assert torch.equal(of_loss.ne(0).any(-1), of_penalty.ne(0).any(-1))


@pytest.mark.parametrize("build", [*EXAMPLES, *FOR_TOKENS])
def test_hessian_trace_is_that_of_the_models_loss(build):
    model = build().double().eval()
    nn.init.normal_(find_head(model)[1].weight)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_for(model).items()}
    penalty = decay_of(model, batch, "hessian_trace")[0]

    name, head = find_head(model)
    weight = head.weight.detach().clone().requires_grad_()
    loss = functional_call(model, {f"{name}.weight": weight}, (), batch, tie_weights=False).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    rows = [
        torch.autograd.grad(g, weight, retain_graph=True)[0].flatten()[i] for i, g in enumerate(gradient.flatten())
    ]
    # Losses of language models are in float32.
    torch.testing.assert_close(penalty, sum(rows), rtol=1e-6, atol=0.0)
    assert 0 < penalty < 0.999 * decay_of(model, batch)[0]


def test_probabilities_are_held_fixed():
    h = torch.randn(3, 4, requires_grad=True)
    logits = nn.Linear(4, 5)(h)
    (gradient,) = torch.autograd.grad(activation_decay(h, hessian_trace_weights(logits)), h)
    uncertain = 1 - logits.softmax(1).pow(2).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, 2 / 3 * uncertain * h)


def test_hessian_trace_weights_in_chunks_and_in_half_precision(monkeypatch):
    logits = 3 * torch.randn(7, 11, 50)
    expected = 1 - logits.double().softmax(-1).pow(2).sum(-1)
    torch.testing.assert_close(hessian_trace_weights(logits), expected.float())
    monkeypatch.setattr("hf_lipschitz.training.activation_decay.CHUNK", 120)
    torch.testing.assert_close(hessian_trace_weights(logits), expected.float())
    half = hessian_trace_weights(logits.bfloat16())
    assert half.dtype == torch.float32
    exact = 1 - logits.bfloat16().double().softmax(-1).pow(2).sum(-1)
    torch.testing.assert_close(half, exact.float())
    assert hessian_trace_weights(torch.tensor([[100.0, 0.0], [0.0, 0.0]])).tolist() == pytest.approx([0.0, 0.5])


def test_hook_is_gone_afterwards():
    model = bert()
    with captured(find_head(model)[1]) as calls:
        pass
    model(**Examples(model).batch())
    assert calls == []


@pytest.mark.parametrize(("build", "name"), [
    (bert, "classifier"), (roberta, "classifier.out_proj"), (gpt2, "score"), (vit, "classifier"),
    (resnet, "classifier.1"), (bert_tokens, "classifier"), (gpt2_next, "lm_head"), (llama_next, "lm_head"),
    (llama_sequences, "score"), (bert_masked, "cls.predictions.decoder"), (t5, "lm_head"), (wav2vec2, "classifier"),
    (ast, "classifier.dense"), (whisper, "classifier"),
])  # fmt: skip
def test_head_is_found_by_its_outputs(build, name):
    assert find_head(build())[0] == name


def test_head_is_the_last_of_the_layers_as_wide_as_the_labels():
    assert find_head(roberta(num_labels=8))[0] == "classifier.out_proj"


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_penalty_bounds_the_loss_under_noise_on_the_last_layer(scale):
    generator = torch.Generator().manual_seed(1)
    num_classes, varsigma, samples = 4, 0.3, 200_000
    h = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(num_classes, 6, generator=generator, dtype=torch.float64)
    label = torch.tensor([2])
    clean = cross_entropy(h @ weight.T, label)
    noise = varsigma * torch.randn(samples, num_classes, 6, generator=generator, dtype=torch.float64)
    losses = cross_entropy(((weight + noise) @ h[0]), label.expand(samples), reduction="none")
    mean, error = losses.mean(), 5 * losses.std() / samples**0.5
    added = varsigma**2 / 2 * (1 - 1 / num_classes) * activation_decay(h)
    assert clean <= mean + error
    assert mean - error <= clean + added
    if scale == 0.0:
        # At uniform probabilities the second-order term of the expansion is the bound itself.
        assert mean - clean >= 0.9 * added


def losses_under_noise(model, batch, varsigma, pairs):
    """The task loss, and half the sum of those at W + ςε and W - ςε, of many ε: its mean is E[CE]."""
    generator = torch.Generator().manual_seed(2)
    with captured(find_head(model)[1]) as calls:
        clean = model(**batch).loss
    head, h = calls[0].head, calls[0].activations.detach()
    ahead = int("CausalLM" in type(model).__name__)
    labels = batch["labels"][:, ahead:].flatten()
    losses = []
    for _ in range(pairs):
        noise = varsigma * torch.randn(head.weight.shape, generator=generator, dtype=h.dtype)
        both = [
            cross_entropy(nn.functional.linear(h, w, head.bias)[:, : LENGTH - ahead].flatten(0, 1), labels)
            for w in (head.weight.detach() + noise, head.weight.detach() - noise)
        ]
        losses.append(sum(both) / 2)
    return clean.detach(), torch.stack(losses).detach()


@pytest.mark.parametrize("build", [bert_tokens, llama_next])
def test_penalty_of_tokens_bounds_their_loss_under_noise(build):
    model = build().double()
    batch, varsigma = batch_for(model), 0.3
    num_classes = find_head(model)[1].out_features
    clean, losses = losses_under_noise(model, batch, varsigma, 2000)
    error = 5 * losses.std() / len(losses) ** 0.5
    added = varsigma**2 / 2 * (1 - 1 / num_classes) * decay_of(model, batch)[0]
    assert error < 0.1 * added
    assert clean <= losses.mean() + error
    assert losses.mean() - error <= clean + added
    # The probabilities of a new model are nearly uniform, where the bound is the second-order term.
    assert losses.mean() - clean >= 0.7 * added


@pytest.mark.parametrize("build", [bert_tokens, llama_next])
def test_hessian_trace_is_what_small_noise_adds_to_the_loss(build):
    model, varsigma = build().double(), 0.02
    nn.init.normal_(find_head(model)[1].weight)
    batch = batch_for(model)
    clean, losses = losses_under_noise(model, batch, varsigma, 2000)
    estimate = varsigma**2 / 2 * decay_of(model, batch, "hessian_trace")[0]
    error = 5 * losses.std() / len(losses) ** 0.5
    assert error < 0.1 * estimate
    assert abs(losses.mean() - clean - estimate) <= error + 0.01 * estimate


def test_penalty_is_a_mean_over_examples_in_float32():
    h = torch.tensor([[3.0, 4.0], [0.0, 300.0]], dtype=torch.float16)
    penalty = activation_decay(h)
    assert penalty.dtype == torch.float32
    assert penalty.item() == (25.0 + 90_000.0) / 2


def test_gradient_of_a_picked_token_reaches_that_token_only():
    head = nn.Linear(4, LABELS)
    tokens = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = head(tokens)
    h = example_activations(HeadCall(head, tokens, outputs), outputs[torch.arange(2), torch.tensor([1, 4])])
    (gradient,) = torch.autograd.grad(activation_decay(h), tokens)
    expected = torch.zeros_like(tokens)
    expected[0, 1], expected[1, 4] = tokens[0, 1].detach(), tokens[1, 4].detach()
    torch.testing.assert_close(gradient, expected)


def test_equal_tokens_are_one():
    head = nn.Linear(4, LABELS)
    tokens = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).expand(2, 3, 4)
    outputs = head(tokens)
    torch.testing.assert_close(example_activations(HeadCall(head, tokens, outputs), outputs[:, 1]), tokens[:, 0])


def test_tokens_that_the_head_cannot_tell_apart_are_an_error():
    head = nn.Linear(4, LABELS)
    nn.init.zeros_(head.weight)
    tokens = torch.randn(2, 5, 4)
    outputs = head(tokens)
    with pytest.raises(RuntimeError, match="several tokens.*non-zero weights"):
        example_activations(HeadCall(head, tokens, outputs), outputs[:, 0])


def test_a_layer_that_does_not_give_the_logits_is_an_error():
    head, activations = nn.Linear(4, LABELS), torch.randn(2, 4)
    outputs = head(activations)
    with pytest.raises(RuntimeError, match="head_module"):
        example_activations(HeadCall(head, activations, outputs), outputs + 1)
    tokens = torch.randn(2, 5, 4)
    with pytest.raises(RuntimeError, match="those of no token.*head_module"):
        example_activations(HeadCall(head, tokens, head(tokens)), outputs)


def test_convolution_over_the_whole_input_is_a_linear_layer():
    head, maps = nn.Conv2d(2, LABELS, 3), torch.randn(4, 2, 3, 3)
    outputs = head(maps)
    h = example_activations(HeadCall(head, maps, outputs), outputs.flatten(1))
    torch.testing.assert_close(h, maps.flatten(1))
    maps = torch.randn(4, 2, 5, 5)
    outputs = head(maps)
    with pytest.raises(RuntimeError, match="several places"):
        example_activations(HeadCall(head, maps, outputs), outputs.mean((2, 3)))


@pytest.mark.parametrize("build", [llama_next, bert_tokens])
def test_adapters_of_the_head_are_part_of_it(build):
    model = build()
    name = find_head(model)[0]
    model = get_peft_model(model, LoraConfig(target_modules=[name, "up_proj", "query"], r=2, init_lora_weights=False))
    found, head = find_head(model)
    assert found == f"base_model.model.{name}"
    assert find_head(model, found)[1] is head
    batch = batch_for(build())
    penalty, call, _ = decay_of(model, batch)
    assert call.activations.shape[-1] == 8
    unwrapped, *_ = decay_of(model.merge_and_unload().requires_grad_(), batch)
    torch.testing.assert_close(penalty, unwrapped, rtol=1e-5, atol=1e-6)


def test_copies_of_the_head_that_are_saved_are_the_head():
    for build, name in ((llama_next, "lm_head"), (bert, "classifier")):
        config = LoraConfig(target_modules=["up_proj", "query"], modules_to_save=[name], r=2)
        model = get_peft_model(build(), config)
        penalty, call, _ = decay_of(model, batch_for(build()))
        assert call.activations.shape[-1] == 8
        assert penalty > 0


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("build", [llama_next, bert_tokens, bart_same])
def test_only_token_with_a_label(build, shift):
    model = build().eval()
    batch = batch_for(model)
    h = by_hand(model, batch)
    label = batch["labels"][batch["labels"] >= 0][0].item()
    batch["labels"][:] = -100
    batch["labels"][2, 4] = label
    row = 3 if build is llama_next else 4
    if shift and build is llama_next:
        batch["shift_labels"], row = batch["labels"], 4
    torch.testing.assert_close(decay_of(model, batch)[0], h[2, row].pow(2).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [gpt2_next, llama_next, bert_tokens, bert_masked, t5])
def test_loss_on_every_token_counts_those_with_a_label_as_the_model_does(build):
    model = build().eval()
    batch = batch_for(model)
    head_decay = HeadDecay()
    with head_decay.captured(model) as calls:
        outputs = model(**batch)
    loss = outputs.logits.pow(2).mean()
    assert head_decay.penalty(model, calls, loss, outputs, batch) == decay_of(model, batch)[0]


@pytest.mark.parametrize("aligned", [False, True])
def test_own_loss_says_whether_labels_are_those_of_the_next_token(aligned):
    model = llama_next().eval()
    batch = batch_for(model)
    h, labels = by_hand(model, batch), batch["labels"]
    head_decay = HeadDecay()
    with head_decay.captured(model) as calls:
        outputs = model(**batch)
    target = labels if aligned else pad(labels[:, 1:], (0, 1), value=-100)
    loss = cross_entropy(outputs.logits.flatten(0, 1), target.flatten(), label_smoothing=0.1)
    penalty = head_decay.penalty(model, calls, loss, outputs, batch)
    torch.testing.assert_close(penalty, h[target != -100].pow(2).sum(1).mean(), rtol=1e-4, atol=1e-6)


def test_shift_is_decided_by_the_first_batch_with_labels():
    model, head_decay = bart_same().eval(), HeadDecay()
    for seed in range(3):
        batch = batch_for(model, seed=seed)
        if seed == 0:
            batch["labels"][:] = -100
        with head_decay.captured(model) as calls:
            outputs = model(**batch)
        penalty = head_decay.penalty(model, calls, outputs.loss, outputs, batch)
        if seed == 0:
            assert penalty == 0
        else:
            assert penalty == decay_of(model, batch)[0]


def test_every_frame_of_one_hot_labels_counts():
    model = wav2vec2_frames().eval()
    batch = batch_for(model)
    frames = model.wav2vec2(batch["input_values"], batch["attention_mask"])[0]
    batch["labels"] = nn.functional.one_hot(torch.randint(0, LABELS, frames.shape[:2]), LABELS)
    torch.testing.assert_close(decay_of(model, batch)[0], frames.pow(2).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    assert 0 < decay_of(model, batch, "hessian_trace")[0] < decay_of(model, batch)[0]


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_the_token_of_an_example(left):
    model = llama_sequences().eval()
    batch = batch_for(model)
    h = by_hand(model, batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    if left:
        for i, length in enumerate(lengths):
            for name in ("input_ids", "attention_mask"):
                batch[name][i] = batch[name][i].roll(LENGTH - length)
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert min(lengths) < LENGTH
    torch.testing.assert_close(decay_of(model, batch)[0], h.pow(2).sum(1).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["squared_norm", "hessian_trace"])
@pytest.mark.parametrize("build", [bert, llama_next, bert_tokens, resnet])
def test_mixed_precision(build, decay, dtype):
    model = build()
    batch = batch_for(model)
    expected = decay_of(model, batch, decay)[0]
    forward = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(forward))
    penalty, call, outputs = decay_of(model, batch, decay)
    assert call.outputs.dtype == dtype
    assert outputs.logits.dtype == penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected, rtol=0.03, atol=1e-6)


def test_other_losses_have_another_hessian():
    for overrides, labels in (
        ({"problem_type": "multi_label_classification"}, torch.randint(0, 2, (4, LABELS)).float()),
        ({"num_labels": 1}, torch.randn(4)),
    ):
        model = bert(**overrides)
        batch = {**batch_for(model), "labels": labels}
        assert decay_of(model, batch)[0] > 0
        with pytest.raises(RuntimeError, match="cross-entropy over classes.*'squared_norm'"):
            decay_of(model, batch, "hessian_trace")


@pytest.mark.parametrize(("dtype", "margin"), [(torch.float16, 0.0), (torch.float32, 25.0)])
def test_gradients_that_underflow_or_round_are_still_those_of_a_cross_entropy(dtype, margin):
    labels = torch.randint(0, 1000, (64,))
    outputs = (margin * nn.functional.one_hot(labels, 1000)).to(dtype).requires_grad_()
    loss = cross_entropy(outputs.float(), labels) / 1000
    scaled = logits_gradient(loss, outputs, 1000)
    assert is_cross_entropy(scaled)
    if dtype == torch.float16:
        assert (scaled.float().sum(-1).abs() < 0.05 * scaled.float().abs().sum(-1)).all()
    plain = torch.autograd.grad(loss, outputs)[0].float()
    assert (plain.sum(-1).abs() > 0.05 * plain.abs().sum(-1)).all()


def test_unknown_decay_names_those_known():
    with pytest.raises(ValueError, match="'norm'; known: squared_norm, hessian_trace"):
        HeadDecay("norm")


@pytest.mark.parametrize("build", [bert, gpt2_next])
def test_frozen_body_is_an_error_before_training(build):
    model = build()
    HeadDecay().check(model)
    model.requires_grad_(False)
    name, head = find_head(model)
    with pytest.raises(ValueError, match=f"no parameter outside the head '{name}' is trained.*unfreeze"):
        HeadDecay().check(model)
    head.requires_grad_()
    if build is gpt2_next:
        # Its weight is that of the embedding too, which is before everything.
        assert decay_of(model, batch_for(model))[0].requires_grad
        return
    with pytest.raises(ValueError, match="unfreeze"):
        HeadDecay().check(model)
    model.bert.pooler.dense.bias.requires_grad_()
    head.requires_grad_(False)
    assert decay_of(model, batch_for(model))[0].requires_grad


def test_weight_that_the_head_shares_with_an_embedding_is_before_it():
    model = nn.ModuleDict({"head": nn.Linear(4, 5, bias=False), "embedding": nn.Embedding(5, 4)})
    with pytest.raises(ValueError, match="unfreeze"):
        HeadDecay(head_module="head").check(model.requires_grad_(False))
    model["embedding"].weight = model["head"].requires_grad_().weight
    HeadDecay(head_module="head").check(model)


def test_activations_without_a_gradient_are_an_error():
    model = bert_masked(tie_word_embeddings=False).requires_grad_(False)
    model.cls.requires_grad_(False).predictions.decoder.requires_grad_()
    model.bert.embeddings.word_embeddings.requires_grad_()
    batch = batch_for(model)
    HeadDecay().check(model)
    with torch.no_grad():
        hidden = model.bert.embeddings(batch["input_ids"])
    inputs = {"inputs_embeds": hidden, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    with pytest.raises(RuntimeError, match="have no gradient.*activation_decay=0"):
        decay_of(model, inputs)


@pytest.mark.parametrize("build", [bert_tokens, llama_next])
def test_tokens_without_labels_are_an_error(build):
    model = build()
    batch = batch_for(model)
    head_decay = HeadDecay()
    with head_decay.captured(model) as calls:
        outputs = model(**batch)
    del batch["labels"]
    with pytest.raises(RuntimeError, match="no 'labels' that say which of them count.*column 'labels'"):
        head_decay.penalty(model, calls, outputs.loss, outputs, batch)


def test_labels_that_do_not_fit_are_an_error():
    model = bert_tokens()
    batch = batch_for(model)
    head_decay = HeadDecay()
    with head_decay.captured(model) as calls:
        outputs = model(**batch)
    batch["labels"] = batch["labels"][:, 1:]
    with pytest.raises(RuntimeError, match=r"\(4, 6\) are not one for each row of the logits, of shape \(4, 7, 3\)"):
        head_decay.penalty(model, calls, outputs.loss, outputs, batch)


def test_head_called_twice_or_outputs_without_logits_are_errors():
    model = bert()
    batch = batch_for(model)
    head_decay = HeadDecay()
    with head_decay.captured(model) as calls:
        model(**batch)
        outputs = model(**batch)
    with pytest.raises(RuntimeError, match="called 2 times.*head_module"):
        head_decay.penalty(model, calls, outputs.loss, outputs, batch)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    answers = BertForQuestionAnswering(BertConfig(**sizes, vocab_size=40))
    batch["start_positions"] = batch["end_positions"] = batch.pop("labels")
    with pytest.raises(RuntimeError, match="loss, start_logits, end_logits, with no 'logits'"):
        decay_of(answers, batch)


def test_logits_that_are_capped_are_an_error():
    head, tokens = nn.Linear(4, LABELS), torch.randn(2, 5, 4)
    outputs = head(tokens)
    with pytest.raises(RuntimeError, match="pools or caps.*head_module"):
        example_activations(HeadCall(head, tokens, outputs), torch.tanh(outputs))
    torch.testing.assert_close(example_activations(HeadCall(head, tokens, outputs), -3 * outputs), -3 * tokens)


def test_no_rows_have_no_penalty():
    h = torch.zeros(0, 4, requires_grad=True)
    assert activation_decay(h) == 0
    assert activation_decay(h, torch.zeros(0)) == 0


def test_model_without_a_head_says_how_to_name_one():
    with pytest.raises(ValueError, match="head_module="):
        find_head(bert().bert.encoder)
    with pytest.raises(ValueError, match="no Linear or convolution.*classifier"):
        find_head(bert(), "bert.embeddings")
    assert find_head(bert(), "bert.pooler.dense")[0] == "bert.pooler.dense"
