import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from probe_trainer import CASES, RADII, evaluate, processor, trainer_for
from scipy import stats
from tiny_models import LABELS, Examples, bert, gpt2, roberta, vit
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    default_data_collator,
    pipeline,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_lipschitz import SmoothingConfig, lipschitzify
from hf_lipschitz.dataset_certification import certify_dataset
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.probe import (
    certified_accuracy_metrics,
    check_probe,
    probe_batches,
    probe_certificates,
)
from tests.processes import on_two_processes


SCRIPT = Path(__file__).with_name("probe_trainer.py")
CONFIG = SmoothingConfig(sigma=0.25, n0=50, n=300, alpha=0.01, batch_size=200)
TEXTS = ["a good film", "the bad one", "one", "good good a bad film the one", "a bad film"]


def without_names(certificates):
    return [{**certificate.to_dict(), "label": None} for certificate in certificates]


def words(text_model):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    return bert(initializer_range=0.5, vocab_size=len(tokenizer)).eval(), tokenizer


def text_batches(tokenizer, labels, size=2):
    rows = [{**tokenizer(text), "labels": label} for text, label in zip(TEXTS, labels, strict=True)]
    collator = DataCollatorWithPadding(tokenizer)
    return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("certificate", ["two_class", "lvm"])
def test_texts_have_the_certificates_of_the_dataset_certification(certificate, text_model, tmp_path):
    model, tokenizer = words(text_model)
    labels = [0, 1, 1, 0, 1]
    config = SmoothingConfig(sigma=0.25, n0=50, n=300, alpha=0.01, seed=3, certificate=certificate, temperature=0.02)
    certifier = pipeline("certified-classification", model=model, tokenizer=tokenizer, device="cpu", smoothing=config)
    expected = certify_dataset(certifier, TEXTS, labels, tmp_path / "results.jsonl", progress_bar=False)
    found, found_labels = probe_certificates(model, text_batches(tokenizer, labels), tokenizer, config)
    assert found_labels == labels
    assert without_names(found) == without_names(expected)
    assert len({c.radius for c in found}) > 2


@pytest.mark.parametrize("noise", ["gaussian", "exact"])
def test_images_have_the_certificates_of_the_pipeline(noise):
    model = vit(initializer_range=0.5).eval()
    of_images = processor()
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(5)]
    options = {"sigma": 0.25, "n0": 50, "n": 300, "alpha": 0.01, "noise": noise}
    certifier = pipeline("certified-classification", model=model, image_processor=of_images, device="cpu", **options)
    expected = certifier(images, progress_bar=False)
    pixels = of_images(images, return_tensors="pt")["pixel_values"]
    batches = [{"pixel_values": pixels[i : i + 2], "labels": torch.zeros(len(pixels[i : i + 2]), dtype=torch.long)}
               for i in range(0, 5, 2)]  # fmt: skip
    found, _ = probe_certificates(model, batches, of_images, SmoothingConfig(**options))
    assert without_names(found) == without_names(expected)
    assert {c.unit for c in found} == {"pixels in [0, 1]"}
    assert len({c.radius for c in found}) > 2


class HalfSpace(PreTrainedModel):
    """Class 1 where the mean of the pixel values is above the bias."""

    config_class = PreTrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(12, 2)
        self.post_init()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight.data[1] = 1.0

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.linear(pixel_values.flatten(1)))


def test_half_spaces_have_the_radii_of_the_closed_form():
    # With pixel values 2p - 1 the border is at mean pixel 1/2; in ℓ2 over 12 pixels, p = 1/2 + t is |t|·√12 away.
    model = HalfSpace(PreTrainedConfig(num_labels=2)).eval()
    of_images = ViTImageProcessor(size={"height": 2, "width": 2}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    steps = torch.tensor([-0.1, -0.02, 0.0, 0.03, 0.08, 0.12])
    pixels = (0.5 + steps)[:, None, None, None].expand(-1, 3, 2, 2)
    labels = torch.tensor([0, 0, 1, 1, 0, 1])
    batch = {"pixel_values": 2 * pixels - 1, "labels": labels}
    config = SmoothingConfig(sigma=0.25, n=5000, alpha=0.001)
    certificates, _ = probe_certificates(model, [batch], of_images, config)
    distances = (steps.abs() * 12**0.5).tolist()
    for certificate, distance, step in zip(certificates, distances, steps.tolist(), strict=True):
        votes = stats.binom(5000, stats.norm.cdf(distance / 0.25)).ppf([1e-9, 1 - 1e-9])
        low, high = (0.25 * stats.norm.ppf(stats.beta.ppf(0.001, k, 5000 - k + 1)) for k in votes)
        assert max(low, 0) - 1e-9 <= certificate.radius <= max(high, 0) + 1e-9
        assert certificate.radius <= distance
        assert certificate.prediction == (-1 if certificate.radius == 0 else int(step > 0))
    assert certificates[2].prediction == -1
    # Right and above 0: 1, 2, 4 and 6; the third abstains, and the fifth is of the other class.
    metrics = certified_accuracy_metrics(certificates, labels.tolist(), [0, 0.05, 0.25, 1.0])
    assert metrics == {
        "certified_accuracy@0": 4 / 6,
        "certified_accuracy@0.05": 4 / 6 - (certificates[1].radius <= 0.05) / 6,
        "certified_accuracy@0.25": 2 / 6,
        "certified_accuracy@1": 0.0,
    }


def test_certified_accuracy_is_above_the_radius():
    model = HalfSpace(PreTrainedConfig(num_labels=2)).eval()
    batch = {"pixel_values": torch.full((1, 3, 2, 2), 0.2), "labels": torch.ones(1, dtype=torch.long)}
    (certificate,), labels = probe_certificates(model, [batch], processor(), CONFIG)
    radius = certificate.radius
    (at,) = certified_accuracy_metrics([certificate], labels, [radius]).values()
    (below,) = certified_accuracy_metrics([certificate], labels, [np.nextafter(radius, 0)]).values()
    assert (at, below) == (0.0, 1.0)
    with pytest.raises(ValueError, match="different names"):
        certified_accuracy_metrics([certificate], labels, [0.1234567, 0.12345671])


def padded(batch, left, right, model):
    def pad(x, value):
        return torch.nn.functional.pad(x, (left, right), value=value)

    return {
        "input_ids": pad(batch["input_ids"], model.config.pad_token_id),
        "attention_mask": pad(batch["attention_mask"], 0),
        "labels": batch["labels"],
    }


@pytest.mark.parametrize("build", [bert, gpt2, roberta])
@pytest.mark.parametrize(("left", "right"), [(0, 4), (3, 0)])
def test_padding_changes_nothing(build, left, right):
    model = build(initializer_range=0.5).eval()
    batch = Examples(model, count=6).batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    assert min(lengths) < max(lengths)
    alone = [
        {"input_ids": batch["input_ids"][i : i + 1, :length], "labels": batch["labels"][i : i + 1]}
        for i, length in enumerate(lengths)
    ]
    expected, _ = probe_certificates(model, alone, None, CONFIG)
    found, _ = probe_certificates(model, [padded(batch, left, right, model)], None, CONFIG)
    assert found == expected
    assert len({c.radius for c in found}) > 2


def test_token_types_are_those_of_the_text():
    model = bert(initializer_range=0.5).eval()
    batch = Examples(model, count=5).batch()
    types = (torch.arange(batch["input_ids"].shape[1]) >= 1).long().expand_as(batch["input_ids"])
    found, _ = probe_certificates(model, [{**batch, "token_type_ids": types}], None, CONFIG)
    zeros = torch.zeros_like(types)
    assert (
        probe_certificates(model, [{**batch, "token_type_ids": zeros}], None, CONFIG)[0]
        == (probe_certificates(model, [batch], None, CONFIG)[0])
    )
    # A model whose tokens all are of the second type, but the first one, by its weights.
    table = model.bert.embeddings.token_type_embeddings.weight.data
    first = table[0].clone()
    table[0] = table[1]
    positions = model.bert.embeddings.position_embeddings.weight.data
    positions[0] += first - table[1]
    assert [c.radius for c in probe_certificates(model, [batch], None, CONFIG)[0]] == [c.radius for c in found]


def test_the_constrained_model_is_certified_and_stays_as_it_was():
    model = lipschitzify(bert(initializer_range=0.5), layer_lipschitz=1.0)
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Examples(model, count=5).batch()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    found, _ = probe_certificates(model, [batch], None, CONFIG)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    plain = bert(initializer_range=0.5)
    plain.load_state_dict({name: after[name] for name in plain.state_dict()})
    assert found == probe_certificates(plain.eval(), [batch], None, CONFIG)[0]
    unconstrained = probe_certificates(bert(initializer_range=0.5).eval(), [batch], None, CONFIG)[0]
    assert [c.p_lower for c in unconstrained] != [c.p_lower for c in found]


def test_models_with_adapters_are_certified():
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(bert(initializer_range=0.5), config)
    batch = Examples(model, count=4).batch()
    found, _ = probe_certificates(model, [batch], None, CONFIG)
    merged, _ = probe_certificates(model.merge_and_unload(), [batch], None, CONFIG)
    assert [(c.prediction, c.radius) for c in found] == [(c.prediction, c.radius) for c in merged]
    without, _ = probe_certificates(bert(initializer_range=0.5), [batch], None, CONFIG)
    assert [c.p_lower for c in found] != [c.p_lower for c in without]


@pytest.mark.parametrize("case", CASES)
def test_probing_leaves_training_as_it_was(case, tmp_path):
    def weights(**values):
        trainer = trainer_for(
            case, tmp_path, dropout=True, noise_sigma=0.1, max_steps=4, eval_strategy="steps", eval_steps=1,
            per_device_train_batch_size=4, learning_rate=0.05, **values,
        )  # fmt: skip
        trainer.train()
        return trainer, trainer.model.state_dict()

    trainer, probed = weights()
    _, plain = weights(certified_radii=None, certified_sigma=None)
    assert all(torch.equal(probed[name], plain[name]) for name in plain)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 4
    assert all(f"eval_certified_accuracy@{radius:g}" in entry for entry in logged for radius in RADII)


def test_the_best_checkpoint_is_the_one_with_the_best_certified_accuracy(tmp_path):
    trainer = trainer_for(
        "text", tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        learning_rate=0.05, load_best_model_at_end=True, metric_for_best_model="eval_certified_accuracy@0.05",
    )  # fmt: skip
    trainer.train()
    name = "eval_certified_accuracy@0.05"
    logged = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
    assert trainer.state.best_metric == max(logged.values())
    assert trainer.state.best_global_step == min(
        step for step, value in logged.items() if value == max(logged.values())
    )
    assert not [key for key in trainer.predict(trainer.eval_dataset).metrics if "certified" in key]


def test_a_model_that_cannot_be_certified_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        LipschitzTrainer(
            vit(), LipschitzTrainingArguments(str(tmp_path), certified_radii=[0.5], certified_sigma=0.2, use_cpu=True)
        )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(SCRIPT, tmp_path_factory.mktemp("probing"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_certificates_of_one(case, two_processes, tmp_path):
    metrics, certificates = evaluate(case, str(tmp_path))
    assert len(metrics) == len(RADII)
    assert len(certificates) == 6
    assert two_processes[0][case] == two_processes[1][case] == (metrics, certificates)


def test_processes_with_different_examples_are_stopped(two_processes):
    for result in two_processes:
        assert "different probe sets" in result["different"]


def test_probe_batches_are_spread_over_the_dataset():
    examples = [{"input_ids": [i], "labels": 0} for i in range(10)]

    def ids(dataset, size):
        return [int(b["input_ids"]) for b in probe_batches(dataset, default_data_collator, size)]

    assert ids(examples, 5) == [0, 2, 4, 6, 8]
    assert ids(examples, 3) == [0, 3, 6]
    assert ids(examples, 99) == list(range(10))
    assert ids(iter(examples), 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one"):
        ids(examples, 0)


def bart():
    return BartForSequenceClassification(BartConfig(vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=1, decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
        max_position_embeddings=8, bos_token_id=0, pad_token_id=1, eos_token_id=2))  # fmt: skip


def wav2vec2():
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, conv_dim=(8,), conv_stride=(2,), conv_kernel=(2,), num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=1))  # fmt: skip


@pytest.mark.parametrize(
    ("build", "config", "of_images", "match"),
    [
        (bart, CONFIG, None, "tokens twice"),
        (wav2vec2, CONFIG, None, "input_values"),
        (vit, CONFIG, None, "processing_class"),
        (vit, CONFIG, ViTImageProcessor(rescale_factor=1 / 127), "pixels in"),
        (lambda: bert(num_labels=1), CONFIG, None, "num_labels=1"),
        (lambda: bert(problem_type="multi_label_classification"), CONFIG, None, "multi_label"),
        (bert, SmoothingConfig(certificate="deterministic"), None, "sigma above 0"),
        (bert, SmoothingConfig(sigma=0.1, certificate="lipschitz"), None, "changes with every step"),
        (bert, SmoothingConfig(sigma=0.1, n=5), None, "n"),
    ],
)
def test_what_cannot_be_certified_is_refused_before_a_batch(build, config, of_images, match):
    with pytest.raises(ValueError, match=match):
        check_probe(build(), of_images, config)


def test_smoothing_without_noise_is_refused():
    with pytest.raises(ValueError, match="sigma"):
        SmoothingConfig(sigma=0.0)


def changed(**columns):
    batch = Examples(bert(), count=4).batch() | columns
    return {name: value for name, value in batch.items() if value is not None}


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (changed(labels=None), "needs labels"),
        (changed(labels=torch.rand(4)), "one class index"),
        (changed(labels=torch.zeros(4, LABELS, dtype=torch.long)), "one class index"),
        (changed(labels=torch.tensor([0, 1, -100, 1])), "from 0 to 2"),
        (changed(labels=torch.tensor([0, 1, 3, 1])), "from 0 to 2"),
        (changed(attention_mask=None), "no attention_mask"),
        (changed(attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 4)), "one run of tokens"),
        (changed(attention_mask=torch.zeros(4, 7, dtype=torch.long)), "one run of tokens"),
        (changed(pixel_values=torch.zeros(4, 3, 8, 8)), "pixel_values"),
        (changed(input_ids=None), "needs input_ids"),
    ],
)
def test_batches_that_cannot_be_certified_are_refused(batch, match):
    model = bert().train()
    with pytest.raises(ValueError, match=match):
        probe_certificates(model, [batch], None, CONFIG)
    assert all(module.training for module in model.modules())


def test_no_example_and_pixels_of_another_normalisation_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        probe_certificates(bert(), [], None, CONFIG)
    batch = {"pixel_values": torch.full((1, 3, 8, 8), 2.0), "labels": torch.zeros(1, dtype=torch.long)}
    with pytest.raises(ValueError, match="outside"):
        probe_certificates(vit(), [batch], processor(), CONFIG)


def test_models_that_treat_embeddings_differently_are_refused():
    model = bert(initializer_range=0.5)
    forward = model.forward
    model.forward = lambda inputs_embeds=None, **inputs: forward(
        inputs_embeds=None if inputs_embeds is None else 2 * inputs_embeds, **inputs
    )
    with pytest.raises(ValueError, match="other logits"):
        probe_certificates(model, [Examples(model, count=2).batch()], None, CONFIG)
