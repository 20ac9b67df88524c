from types import SimpleNamespace

import pytest
import torch
from tiny_models import Examples, bert, gpt2, vit
from transformers import T5Config, T5ForSequenceClassification, ViTImageProcessor

from hf_lipschitz.training.augmentation import check_noise, gaussian_noise, pixel_scale
from hf_lipschitz.training.randomness import Draws


SIGMA = 0.25


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pixel_noise_has_the_asked_deviation_before_normalisation():
    processor = ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.1])
    pixels = torch.zeros(64, 3, 32, 32)
    with gaussian_noise(vit(), {"pixel_values": pixels}, SIGMA, processor, draws()) as inputs:
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
    with gaussian_noise(model, batch, SIGMA, None, draws(4)) as inputs:
        noisy, again = model(**inputs).logits, model(**inputs).logits
    assert torch.equal(model(**batch).logits, clean)
    assert torch.equal(noisy, again)
    assert (noisy - clean).abs().min() > 0
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    embeddings = embeddings + SIGMA * torch.randn(embeddings.shape, generator=draws(4))
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
    with pytest.raises(ValueError, match="needs input_ids"), gaussian_noise(bert(), {"labels": 1}, 1.0, None, draws()):
        pass
    patches = {"pixel_values": torch.zeros(2, 3, 8)}
    with pytest.raises(ValueError, match="shape"), gaussian_noise(vit(), patches, 1.0, ViTImageProcessor(), draws()):
        pass
