import pytest
import torch
from tiny_models import LABELS, Examples, bert, gpt2, resnet, roberta, vit
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lipschitz import lipschitzify
from hf_lipschitz.training.activation_decay import HeadCall, activation_decay, captured, example_activations
from hf_lipschitz.training.head import find_head


def last_tokens(model, batch):
    hidden = model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(1) - 1]


def by_hand(model, batch):
    """The activations entering the last layer, written out for each architecture."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    kind = type(model).__name__
    if kind.startswith("Bert"):
        return model.bert(**inputs).pooler_output
    if kind.startswith("Roberta"):
        return torch.tanh(model.classifier.dense(model.roberta(**inputs)[0][:, 0]))
    if kind.startswith("GPT2"):
        return last_tokens(model, batch)
    if kind.startswith("ViT"):
        return model.vit(**inputs)[0][:, 0]
    return model.resnet(**inputs).pooler_output.flatten(1)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("build", [bert, roberta, gpt2, vit, resnet])
def test_activations_are_those_computed_by_hand(build, constrained):
    model = build().eval()
    if constrained:
        lipschitzify(model, layer_lipschitz=0.5)
    batch = Examples(model, 5).batch()
    head = find_head(model)[1]
    with captured(head) as calls:
        logits = model(**batch).logits
    h = example_activations(calls[0], logits)
    torch.testing.assert_close(h, by_hand(model, batch), rtol=1e-5, atol=1e-6)
    # The row times the head gives the logits: it is what enters the last layer for that example.
    torch.testing.assert_close(nn.functional.linear(h, head.weight, head.bias), logits, rtol=1e-5, atol=1e-6)


def test_hook_is_gone_afterwards():
    model = bert()
    with captured(find_head(model)[1]) as calls:
        pass
    model(**Examples(model).batch())
    assert calls == []


@pytest.mark.parametrize(("build", "name"), [
    (bert, "classifier"), (roberta, "classifier.out_proj"), (gpt2, "score"), (vit, "classifier"),
    (resnet, "classifier.1"),
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


def test_model_without_a_head_says_how_to_name_one():
    with pytest.raises(ValueError, match="head_module="):
        find_head(bert().bert.encoder)
    with pytest.raises(ValueError, match="no Linear or convolution.*classifier"):
        find_head(bert(), "bert.embeddings")
    assert find_head(bert(), "bert.pooler.dense")[0] == "bert.pooler.dense"
