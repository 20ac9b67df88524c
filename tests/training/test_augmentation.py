from types import SimpleNamespace

import pytest
import torch
from tiny_models import Examples, bert, gpt2, vit
from transformers import T5Config, T5ForSequenceClassification, ViTImageProcessor

from hf_lipschitz.training.augmentation import check_noise, moved_inputs, pixel_scale, repeated
from hf_lipschitz.training.example_draws import ExampleDraws
from hf_lipschitz.training.noisy_inputs import noisy_inputs
from hf_lipschitz.training.randomness import Draws
from hf_lipschitz.training.smoothing_losses import smoothed_cross_entropy


SIGMA = 0.25


def draws(rows, seed=0):
    source = ExampleDraws(seed)
    source.advance(0, rows)
    return source


def test_pixel_noise_has_the_asked_deviation_before_normalisation():
    processor = ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.1])
    pixels = torch.zeros(64, 3, 32, 32)
    with noisy_inputs(vit(), {"pixel_values": pixels}, draws(64), processor, sigma=SIGMA) as inputs:
        noise = inputs["pixel_values"] - pixels
    back = noise * torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1)
    # 65536 samples a channel: five standard errors are 1.4 per cent.
    torch.testing.assert_close(back.std((0, 2, 3)), torch.full((3,), SIGMA), rtol=0.015, atol=0)
    assert back.mean((0, 2, 3)).abs().max() < 5 * SIGMA / 65536**0.5
    assert torch.equal(pixels, torch.zeros_like(pixels))


def test_scale_is_what_the_processor_does_to_a_pixel():
    processor = ViTImageProcessor(image_std=[0.5, 0.2, 0.1], size={"height": 4, "width": 4})
    dark, light = (processor(torch.full((3, 4, 4), v, dtype=torch.uint8), return_tensors="pt") for v in (51, 102))
    moved = (light["pixel_values"] - dark["pixel_values"])[0, :, :1, :1] / 0.2
    torch.testing.assert_close(pixel_scale(processor).float(), moved, rtol=1e-4, atol=1e-5)
    without = ViTImageProcessor(do_normalize=False)
    torch.testing.assert_close(pixel_scale(without).flatten(), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("build", [bert, gpt2])
def test_embedding_noise_is_that_of_noisy_inputs_embeds(build):
    model = build().eval()
    batch = Examples(model).batch()
    batch.pop("labels")
    clean = model(**batch).logits
    with noisy_inputs(model, batch, draws(8, seed=4), sigma=SIGMA) as inputs:
        noisy, again = model(**inputs).logits, model(**inputs).logits
    assert torch.equal(model(**batch).logits, clean)
    assert torch.equal(noisy, again)
    assert (noisy - clean).abs().min() > 0
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    (noise,) = draws(8, seed=4).standard_normal(embeddings, mask=batch["attention_mask"])
    assert noise[batch["attention_mask"] == 1].abs().min() > 0
    embeddings = embeddings + SIGMA * noise
    hidden = model.base_model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
    if build is bert:
        expected = model.classifier(hidden.pooler_output)
    else:
        expected = model.score(hidden[0])[torch.arange(8), batch["attention_mask"].sum(1) - 1]
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)


def test_draws_are_functions_of_their_key():
    def numbers(step, seed=0, process=0, calls=1, purpose="noise"):
        source = Draws(seed, process)
        for _ in range(calls):
            source.advance(step)
        return torch.randn(4, generator=source.generator(purpose, torch.device("cpu"))).tolist()

    state = torch.get_rng_state()
    different = [numbers(3), numbers(4), numbers(3, seed=1), numbers(3, process=1), numbers(3, calls=2)]
    different.append(numbers(3, purpose="curvature"))
    assert len({tuple(n) for n in different}) == len(different)
    assert numbers(3) == different[0]
    source = Draws(0, 0)
    for step in (2, 2, 3):
        source.advance(step)
    assert torch.randn(4, generator=source.generator("noise", torch.device("cpu"))).tolist() == different[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("processor", "message"), [
    (None, "processing_class=image_processor"),
    (SimpleNamespace(model_input_names=["input_ids"]), "processing_class=image_processor"),
    (SimpleNamespace(model_input_names=["pixel_values"], do_rescale=True, rescale_factor=1 / 127.5), "1/255"),
    (SimpleNamespace(model_input_names=["pixel_values"], include_top=True), "include_top"),
])  # fmt: skip
def test_unknown_units_are_errors(processor, message):
    with pytest.raises(ValueError, match=message):
        check_noise(vit(), processor)


def test_inputs_without_a_unit_are_errors():
    small = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "num_labels": 2}
    with pytest.raises(ValueError, match="tokens twice"):
        check_noise(T5ForSequenceClassification(T5Config(**small)), None)
    speech = SimpleNamespace(main_input_name="input_values", config=SimpleNamespace())
    with pytest.raises(ValueError, match="input_values: set noise_sigma=0"):
        check_noise(speech, None)
    with pytest.raises(ValueError, match="needs input_ids"), noisy_inputs(bert(), {"labels": 1}, draws(2), sigma=1.0):
        pass
    patches = {"pixel_values": torch.zeros(2, 3, 8)}
    with (
        pytest.raises(ValueError, match="shape"),
        noisy_inputs(vit(), patches, draws(2), ViTImageProcessor(), sigma=1.0),
    ):
        pass
    model, batch = bert(), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    with (
        moved_inputs(model, batch, torch.zeros(2, 4, 8)) as inputs,
        pytest.raises(RuntimeError, match="called on .2, 3. tokens"),
    ):
        model(**inputs)


@pytest.mark.parametrize("build", [bert, gpt2, vit])
def test_copies_are_the_batch_again_with_noise_of_their_own(build):
    model = build().eval()
    batch = Examples(model).batch()
    values = {"sigma": SIGMA, "copies": 3}
    with noisy_inputs(model, batch, draws(8), ViTImageProcessor(), **values) as inputs:
        together = model(**inputs).logits.unflatten(0, (3, 8))
        assert torch.equal(inputs["labels"], batch["labels"].repeat(3))
    with noisy_inputs(model, batch, draws(8), ViTImageProcessor(), sigma=SIGMA) as inputs:
        torch.testing.assert_close(together[0], model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert (together[1] - together[0]).abs().min() > 0


def test_what_has_no_row_for_each_example_is_not_repeated():
    batch = {"x": torch.arange(6).view(3, 2), "scale": torch.tensor(2.0), "table": torch.ones(4, 3), "flag": True}
    again = repeated(batch, 3, 2)
    assert again["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5]]
    assert all(again[name] is batch[name] for name in ("scale", "table", "flag"))


@pytest.mark.parametrize("build", [bert, vit])
def test_attacks_raise_the_smoothed_loss_and_stay_in_the_ball(build):
    model = build(initializer_range=0.6).train()
    batch = Examples(model).batch()
    processor = ViTImageProcessor(image_std=[0.5, 0.2, 0.1])
    common = {"sigma": 0.1, "copies": 4}
    losses, seen = [], []
    for radius in (0.0, 0.2):
        with noisy_inputs(model, batch, draws(8), processor, **common, attack_radius=radius, attack_steps=5) as inputs:
            assert model.training
            losses.append(smoothed_cross_entropy(model(**inputs).logits.unflatten(0, (4, 8)), batch["labels"]))
            if build is vit:
                seen.append(inputs["pixel_values"] * torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1))
    assert losses[1] > losses[0] * 1.01
    assert all(p.grad is None for p in model.parameters())
    if build is vit:
        moved = (seen[1] - seen[0]).unflatten(0, (4, 8))
        torch.testing.assert_close(moved[0], moved[3], rtol=0, atol=1e-5)
        lengths = moved[0].flatten(1).norm(dim=1)
        assert lengths.max() <= 0.2 * (1 + 1e-4)
        assert lengths.min() > 0.1


def test_attacks_need_one_class_each():
    batch = Examples(bert()).batch()
    batch.pop("labels")
    attacked = noisy_inputs(bert(), batch, draws(8), sigma=0.1, attack_radius=0.1)
    with pytest.raises(ValueError, match="attack_radius needs labels"), attacked:
        pass
