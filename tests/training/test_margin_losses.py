import math

import pytest
import torch
from tiny_models import Examples, bert

from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.margin_losses import (
    LOSSES,
    OFFSET,
    cross_entropy,
    loss_function,
    loss_parameters,
    multi_margin,
    offset_cross_entropy,
)


def random_logits(rows=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def by_hand(logits, labels, offset, temperature):
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        terms = [math.exp((offset - (row[label] - z)) / temperature) for j, z in enumerate(row) if j != label]
        total += temperature * math.log(1 + sum(terms))
    return total / len(labels)


@pytest.mark.parametrize(("offset", "temperature"), [(OFFSET, 0.25), (math.sqrt(2), 0.25), (0.0, 1.0), (0.3, 2.0)])
def test_offset_cross_entropy_is_the_formula(offset, temperature):
    logits, labels = random_logits()
    value = offset_cross_entropy(logits, labels, offset=offset, temperature=temperature)
    assert value.item() == pytest.approx(by_hand(logits, labels, offset, temperature), rel=1e-12)


def test_defaults_are_those_of_the_sll_code():
    logits, labels = random_logits()
    outputs = (logits - 2.12132 * torch.nn.functional.one_hot(labels, 4)) / 0.25
    published = torch.nn.CrossEntropyLoss()(outputs, labels) * 0.25
    assert offset_cross_entropy(logits, labels).item() == pytest.approx(published.item(), rel=1e-6)
    assert 3 * math.sqrt(2) / 2 == pytest.approx(OFFSET, rel=1e-15)
    assert loss_parameters("offset_cross_entropy") == {"offset": OFFSET, "temperature": 0.25}
    assert loss_parameters("multi_margin") == {"margin": 0.7}
    assert loss_parameters("cross_entropy") == {}


def test_small_temperatures_give_the_hinge():
    logits, labels = random_logits(classes=5)
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    hinge = (1.5 - (logits.gather(1, labels[:, None])[:, 0] - others)).clamp_min(0).mean()
    for temperature in (0.5, 0.05, 1e-3):
        excess = offset_cross_entropy(logits, labels, offset=1.5, temperature=temperature) - hinge
        assert 0 <= excess <= temperature * math.log(5)


def test_gradient_is_between_minus_one_and_zero_on_the_true_class():
    logits, labels = random_logits(rows=1)
    for temperature in (0.01, 0.25, 4.0):
        leaf = logits.clone().requires_grad_()
        offset_cross_entropy(leaf, labels, temperature=temperature).backward()
        assert -1 <= leaf.grad[0, labels[0]] < 0
        assert leaf.grad.sum().item() == pytest.approx(0, abs=1e-12)
        assert torch.autograd.gradcheck(lambda z, t=temperature: offset_cross_entropy(z, labels, temperature=t), leaf)


def test_multi_margin_is_the_formula():
    logits, labels = random_logits()
    for margin in (0.7, 3.0):
        total = sum(
            max(0.0, margin - (row[label] - z))
            for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
            for j, z in enumerate(row)
            if j != label
        )
        assert multi_margin(logits, labels, margin=margin).item() == pytest.approx(total / 24, rel=1e-12)
    assert multi_margin(logits, labels) == multi_margin(logits, labels, margin=0.7)
    wide_margins = 0.7 * torch.nn.functional.one_hot(labels, 4).double()
    assert multi_margin(wide_margins, labels) == 0
    assert multi_margin(0.9 * wide_margins, labels) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(name):
    logits, labels = random_logits()
    half = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name](half, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(LOSSES[name](half.double(), labels).item(), rel=1e-5)


def test_int32_labels_are_labels():
    logits, labels = random_logits()
    for loss in LOSSES.values():
        assert loss(logits, labels.int()) == loss(logits, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_give_finite_gradients(name):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    value = LOSSES[name](logits, torch.tensor([0, 0]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1].abs().max() > 0.1


@pytest.mark.parametrize(("logits", "labels", "error", "message"), [
    (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"\[0, 3\).*got 3.*num_labels"),
    (torch.zeros(2, 3), torch.tensor([-100, 0]), ValueError, "got -100.*without a label"),
    (torch.zeros(2, 3), torch.zeros(2), TypeError, "class indices"),
    (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), ValueError, r"shape \(2,\)"),
    (torch.zeros(2, 3), None, TypeError, "NoneType"),
    (torch.zeros(2, 1), torch.tensor([0, 0]), ValueError, "K >= 2"),
    (torch.zeros(2, 5, 3), torch.tensor([0, 0]), ValueError, r"shape \(B, K\)"),
    (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 0]), TypeError, "floating-point"),
    (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), ValueError, "NaN or inf"),
    (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), ValueError, "NaN or inf"),
])  # fmt: skip
@pytest.mark.parametrize("name", LOSSES)
def test_what_no_loss_can_take_is_an_error(name, logits, labels, error, message):
    with pytest.raises(error, match=message):
        LOSSES[name](logits, labels)


@pytest.mark.parametrize(("name", "parameters", "message"), [
    ("hinge", {}, "known: cross_entropy, offset_cross_entropy, multi_margin"),
    ("offset_cross_entropy", {"margin": 1.0}, "it has offset, temperature"),
    ("cross_entropy", {"offset": 1.0}, "it has no parameter"),
    ("offset_cross_entropy", {"temperature": 0.0}, "temperature must be finite and > 0"),
    ("offset_cross_entropy", {"offset": -1.0}, "offset must be finite and >= 0"),
    ("multi_margin", {"margin": math.nan}, "margin must be finite and > 0"),
])  # fmt: skip
def test_unknown_losses_and_parameters_are_errors_before_there_is_a_batch(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        loss_function(name, **parameters)


def test_loss_function_is_one_of_the_trainer(tmp_path):
    model = bert()
    batch = Examples(model).batch()
    args = LipschitzTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8)
    loss = loss_function("multi_margin", margin=2.0)
    trainer = LipschitzTrainer(model, args, train_dataset=Examples(model), compute_loss_func=loss)
    model.train()
    value = trainer.compute_loss(model, dict(batch))
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    assert value == multi_margin(logits, batch["labels"], margin=2.0)
    assert loss((logits,), batch["labels"]) == value
    assert value != cross_entropy(logits, batch["labels"])
