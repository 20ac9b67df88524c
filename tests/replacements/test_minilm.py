"""On the real MiniLM and real tweets: calibration leaves every logit as it was, and gives finite constants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

import hf_lipschitz
from hf_lipschitz import calibrate, lipschitzify, materialized
from hf_lipschitz.demo.acts import prepared
from hf_lipschitz.demo.data import tweets
from hf_lipschitz.demo.models import text_model
from hf_lipschitz.nn.attention import BallRadii


@torch.no_grad()
def logits(model: PreTrainedModel, batches: DataLoader) -> Tensor:
    with materialized(model) as plain:
        return torch.cat([plain(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, DataLoader, Tensor]:
    torch.manual_seed(0)
    data = tweets()
    model, tokenizer = text_model(data, None)
    model.eval()
    rows = prepared(data.train.select(range(128)), tokenizer, model)
    batches = DataLoader(rows, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))
    before = logits(model, batches)
    lipschitzify(model, layer_lipschitz=None, replace=("weights", "norms", "attention"))
    torch.testing.assert_close(logits(model, batches), before, rtol=1e-6, atol=1e-6)
    calibrate(model, batches)
    return model, batches, before


def test_logits_are_unchanged(calibrated: tuple[PreTrainedModel, DataLoader, Tensor], tmp_path: Path) -> None:
    model, batches, before = calibrated
    after = logits(model, batches)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batches), after)


def test_constants_are_finite_and_far_below_those_of_eps(
    calibrated: tuple[PreTrainedModel, DataLoader, Tensor],
) -> None:
    model, _, _ = calibrated
    parts = hf_lipschitz.inspect(model).replacements
    norms = [part for part in parts if part.kind == "FloorStdLayerNorm"]
    assert len(norms) == 13
    # BERT's eps = 1e-12 alone would allow 10^6.
    assert max(part.lipschitz for part in norms) < 100
    balls = [module for module in model.modules() if isinstance(module, BallRadii)]
    assert len(balls) == 6
    assert all(ball.is_finite for ball in balls)


def test_radii_below_what_was_seen_do_change_the_logits(
    calibrated: tuple[PreTrainedModel, DataLoader, Tensor],
) -> None:
    model, batches, before = calibrated
    ball = next(module for module in model.modules() if isinstance(module, BallRadii))
    radii = ball.query, ball.key, ball.value
    ball.set_radii(*(radius / 2 for radius in radii))
    try:
        assert not torch.allclose(logits(model, batches), before, rtol=1e-4, atol=1e-4)
    finally:
        ball.set_radii(*radii)
