from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertTokenizer,
    EfficientNetImageProcessor,
    PreTrainedModel,
    ViTImageProcessor,
    pipeline,
)

import hf_lipschitz
from hf_lipschitz.certification import ABSTAIN, Certificate, SmoothedClassifier, SmoothingConfig
from hf_lipschitz.conversion import lipschitzify
from hf_lipschitz.nn import references
from tests.families import TEXT, VISION, bert, resnet, vit


SMOOTHING = {"sigma": 0.25, "n0": 50, "n": 200, "alpha": 0.01}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "and", "long", "one"]
    path.write_text("\n".join(words + [f"w{i}" for i in range(48)]))
    return BertTokenizer(str(path), model_max_length=40)


def processor(**options: object) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 16, "width": 16}, **options)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 18, 3), dtype=np.uint8)


def certifier(model: PreTrainedModel, **options: object) -> hf_lipschitz.CertifiedClassificationPipeline:
    options = {**SMOOTHING, "device": "cpu", "progress_bar": False, **options}
    return pipeline("certified-classification", model=model, **options)


@pytest.mark.parametrize("family", TEXT)
def test_every_text_family_is_certified_on_its_embeddings(family: str, tokenizer: BertTokenizer) -> None:
    certificate = certifier(TEXT[family]().eval(), tokenizer=tokenizer)("a good film")
    assert isinstance(certificate, Certificate)
    assert certificate.unit == "input embeddings"
    assert (certificate.prediction == ABSTAIN) == (certificate.radius == 0)


@pytest.mark.parametrize("family", VISION)
def test_every_vision_family_is_certified_on_its_pixels(family: str) -> None:
    size = 32 if family == "mobilenet_v2" else 16
    preprocess = ViTImageProcessor(size={"height": size, "width": size})
    certificate = certifier(VISION[family]().eval(), image_processor=preprocess)(image())
    assert certificate.unit == "pixels in [0, 1]"
    assert certificate.label in {"LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "ABSTAIN"}


def test_pixels_before_normalisation_by_hand() -> None:
    model, preprocess = vit().eval(), processor(image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.25, 0.125])
    pipe = certifier(model, image_processor=preprocess)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (preprocess.image_mean, preprocess.image_std))
    pixels = preprocess(image(), do_normalize=False, return_tensors="pt")["pixel_values"][0]
    by_hand = SmoothedClassifier(
        lambda x: model(pixel_values=(x - mean) / std).logits, 4, SmoothingConfig(**SMOOTHING), unit="pixels in [0, 1]"
    )
    ours = pipe(image(), index=3)
    assert dataclasses.replace(ours, label=None, dtype=None) == by_hand.certify(pixels, index=3)
    normalised = preprocess(image(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pipe.base_classifier(pixels[None]), model(pixel_values=normalised).logits)


def test_embeddings_by_hand(tokenizer: BertTokenizer) -> None:
    model = bert().eval()
    pipe = certifier(model, tokenizer=tokenizer)
    ids = tokenizer("a good film", return_tensors="pt")["input_ids"]
    embeddings = model.get_input_embeddings()(ids)[0].detach()
    by_hand = SmoothedClassifier(
        lambda x: model(inputs_embeds=x).logits, 3, SmoothingConfig(**SMOOTHING), unit="input embeddings"
    )
    assert dataclasses.replace(pipe("a good film"), label=None, dtype=None) == by_hand.certify(embeddings)


def test_kinds_of_inputs_agree(tmp_path: Path) -> None:
    pipe = certifier(resnet().eval(), image_processor=processor())
    picture = Image.fromarray(image())
    picture.save(tmp_path / "image.png")
    expected = pipe(image())
    assert pipe(picture) == expected
    assert pipe(str(tmp_path / "image.png")) == expected
    assert pipe([picture, image(1)])[0] == expected
    lazy = pipe(im for im in [picture, image(1)])
    assert next(lazy) == expected
    assert next(lazy) == pipe(image(1), index=1)


@pytest.mark.parametrize("scale", [1 / 255, 2.0, -1.0])
def test_images_outside_their_range_are_refused(scale: float) -> None:
    pipe, floating = certifier(resnet().eval(), image_processor=processor()), image().astype(np.float32)
    assert pipe.base_classifier.encode(floating).shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"pass values in 0 \.\. 255|outside the range \[0, 255\]"):
        pipe(scale * floating)
    black = np.zeros((16, 16, 3), np.float32)
    assert float(pipe.base_classifier.encode(black).abs().max()) == 0


def test_compiled_and_channels_last_models_get_the_same_certificates() -> None:
    model = resnet().eval()
    plain = certifier(model, image_processor=processor(), n=1000)([image(0), image(1)])
    compiled, last = copy.deepcopy(model), copy.deepcopy(model).to(memory_format=torch.channels_last)
    compiled.compile(backend="aot_eager")
    for model in (compiled, last):
        found = certifier(model, image_processor=processor(), n=1000)([image(0), image(1)])
        for ours, theirs in zip(found, plain, strict=True):
            assert (ours.prediction, ours.n) == (theirs.prediction, theirs.n)
            # Another order of sums may turn a vote at a tie.
            assert ours.p_lower == pytest.approx(theirs.p_lower, abs=5e-3)


def test_grey_images_for_a_model_of_one_channel() -> None:
    model = vit()
    config = type(model.config)(**{**model.config.to_dict(), "num_channels": 1})
    pipe = certifier(type(model)(config).eval(), image_processor=processor(image_mean=[0.5], image_std=[0.5]))
    grey = image()[:, :, 0]
    assert pipe(grey) == pipe(Image.fromarray(grey))
    assert pipe.base_classifier.encode(grey).shape == (1, 16, 16)


def test_counts_depend_on_the_index_and_the_seed_and_on_nothing_else(tokenizer: BertTokenizer) -> None:
    pipe = certifier(bert().eval(), tokenizer=tokenizer, n=400)
    texts = ["a good film", "a bad one", "a long and good one"]
    together = pipe(texts)
    assert [pipe(text, index=index) for index, text in enumerate(texts)] == together
    assert pipe(texts, batch_size=100) == together
    torch.manual_seed(99)
    assert pipe(texts) == together
    assert pipe(texts[0], seed=1).p_lower != together[0].p_lower


def test_calls_override_construction(tokenizer: BertTokenizer) -> None:
    pipe = certifier(bert().eval(), tokenizer=tokenizer)
    certificate = pipe("a good film", certificate="lvm", n=100, sigma=0.5, temperature=2.0)
    assert (certificate.method, certificate.n, certificate.sigma) == ("lvm", 100, 0.5)
    assert pipe("a good film").n == 200
    config = SmoothingConfig(**SMOOTHING, certificate="one_class")
    assert certifier(bert().eval(), tokenizer=tokenizer, smoothing=config)("a good film").method == "one_class"


def test_runs_on_plain_weights_and_leaves_the_model_constrained(
    tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lipschitzify(bert().eval(), layer_lipschitz=0.1)
    pipe = certifier(model, tokenizer=tokenizer)
    keys = list(model.state_dict())

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a norm was computed")

    monkeypatch.setattr(references, "norms_and_directions", never)
    first = pipe("a good film")
    assert list(model.state_dict()) == keys
    assert pipe("a good film") == first


def test_saved_directory_loads_by_task(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    pipe = certifier(lipschitzify(bert().eval(), layer_lipschitz=0.1), tokenizer=tokenizer)
    expected = pipe("a good film")
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline("certified-classification", model=str(tmp_path), device="cpu", **SMOOTHING)
    assert again("a good film") == expected


def test_bfloat16_models_take_float32_noise() -> None:
    model = vit().eval().to(torch.bfloat16)
    assert certifier(model, image_processor=processor())(image()).n == 200


def test_bad_input_is_named(tokenizer: BertTokenizer) -> None:
    pipe = certifier(bert().eval(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="text is empty"):
        pipe("  ")
    with pytest.raises(TypeError, match="certifies strings, got int"):
        pipe(3)
    with pytest.raises(ValueError, match="alpha must be in"):
        pipe("a", alpha=1.5)
    with pytest.raises(ValueError, match="n must be at least 1"):
        pipe("a", n=0)
    with pytest.raises(ValueError, match="sigma must be positive"):
        pipe("a", sigma=-1.0)
    with pytest.raises(TypeError, match="unknown argument sigmma"):
        pipe("a", sigmma=1.0)
    with pytest.raises(ValueError, match="sigma is missing"):
        pipeline("certified-classification", model=bert().eval(), tokenizer=tokenizer, device="cpu")("a")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        certifier(bert().eval())
    with pytest.raises(ValueError, match="needs its image_processor"):
        certifier(vit().eval())


def test_train_mode_is_refused(tokenizer: BertTokenizer) -> None:
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        certifier(bert().train(), tokenizer=tokenizer)("a good film")


def test_nan_logits_name_the_input(tokenizer: BertTokenizer) -> None:
    model = bert().eval()
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="7"):
        certifier(model, tokenizer=tokenizer)("a good film", index=7)


def test_regression_heads_are_refused(tokenizer: BertTokenizer) -> None:
    model = bert()
    config = type(model.config)(**{**model.config.to_dict(), "id2label": {0: "score"}, "label2id": {"score": 0}})
    with pytest.raises(ValueError, match="num_labels=1"):
        certifier(type(model)(config).eval(), tokenizer=tokenizer)


def test_processors_without_a_pixel_unit_are_refused_by_name() -> None:
    efficient = EfficientNetImageProcessor(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match=r"EfficientNetImageProcessor.*\[0, 1\]"):
        certifier(vit().eval(), image_processor=efficient)
    with pytest.raises(ValueError, match="instead of pixels in"):
        certifier(vit().eval(), image_processor=processor(do_rescale=False))


def test_models_that_ignore_embeddings_are_refused_by_name(tokenizer: BertTokenizer) -> None:
    config = BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        eos_token_id=3,
    )
    with pytest.raises(ValueError, match="BartForSequenceClassification does not classify from inputs_embeds"):
        certifier(BartForSequenceClassification(config).eval(), tokenizer=tokenizer)
