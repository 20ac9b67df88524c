"""The norms and the statistics of scripts/real_checkpoints/batch_norm.py."""

import batch_norm
import pytest
import torch
from anneal import interval
from efficientnet_lite0 import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from scipy.stats import binomtest
from torch import nn

from hf_lipschitz import lipschitzify


@pytest.fixture
def model() -> EfficientNetLiteForImageClassification:
    torch.manual_seed(0)
    stages = [[1, 8, 3, 1, 1], [1, 12, 3, 2, 3]]
    config = EfficientNetLiteConfig(stages=stages, stem_channels=8, head_channels=16, num_labels=3)
    model = EfficientNetLiteForImageClassification(config)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(-2, 2)
            norm.bias.data.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3)
    return model.eval()


def test_largest_norm_is_that_of_convolution_and_batch_norm(model: EfficientNetLiteForImageClassification) -> None:
    lipschitzify(model, layer_lipschitz=0.5)
    project = model.blocks[1].project
    project.norm.weight.data *= 40
    gain = project.norm.weight / (project.norm.running_var + project.norm.eps).sqrt()
    matrix = (gain[:, None] * project.conv.weight.flatten(1)).double()
    exact = torch.linalg.matrix_norm(matrix, 2).item()
    assert batch_norm.largest_norm(model) == pytest.approx(exact, rel=2e-3)
    assert batch_norm.has_batch_norm(model)


def test_statistics_are_those_of_the_batches(model: EfficientNetLiteForImageClassification) -> None:
    batches = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    batch_norm.take_statistics_anew(model, batches)
    with torch.no_grad():
        outputs = [model.stem.conv(batch).transpose(0, 1).flatten(1) for batch in batches]
    expected = torch.stack([output.var(dim=1) for output in outputs]).mean(0)
    torch.testing.assert_close(model.stem.norm.running_var, expected)
    assert model.stem.norm.momentum == model.config.batch_norm_momentum
    assert not model.training


def test_interval_takes_the_seeds_as_one_model() -> None:
    one = binomtest(180, 200).proportion_ci(0.95, method="exact")
    assert interval([0.89, 0.91], 200) == (one.low, one.high)
    low, high = interval([0.895, 0.9], 200)
    assert low == binomtest(179, 200).proportion_ci(0.95, method="exact").low
    assert high == one.high
