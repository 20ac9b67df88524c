"""scripts/reproduce: the Hessian of the last layer against automatic differentiation, and the wrong labels."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "reproduce"))
hessian = importlib.import_module("last_layer_hessian")
label_noise = importlib.import_module("label_noise")

ROWS, WIDTH = 7, 4


def differentiated(weight: Tensor, bias: Tensor, inputs: Tensor) -> np.ndarray:
    """The matrix of second derivatives of the mean cross-entropy, with labels that should not matter."""
    labels = torch.randint(0, len(weight), (len(inputs),))

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(inputs @ weight.T + bias, labels)

    return torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), weight.numel()).numpy()


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_hessian_is_the_second_derivative(num_classes: int, scale: float) -> None:
    weight = scale * torch.randn(num_classes, WIDTH, dtype=torch.float64)
    bias = torch.randn(num_classes, dtype=torch.float64)
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.float64) + 0.5
    exact = differentiated(weight, bias, inputs)
    rows = inputs.numpy(), (inputs @ weight.T + bias).numpy()
    operator = hessian.hessian_operator(*rows)
    np.testing.assert_allclose(operator @ np.eye(len(exact)), exact, rtol=1e-10, atol=1e-14)
    assert hessian.hessian_trace(*rows) == pytest.approx(np.trace(exact), rel=1e-10)
    assert hessian.largest_eigenvalue(*rows) == pytest.approx(np.linalg.eigvalsh(exact)[-1], rel=1e-10)


def test_bounds_by_the_square_norm_are_reached() -> None:
    inputs, logits = np.array([[3.0, 4.0]]), np.zeros((1, 2))
    assert hessian.mean_square_norm(inputs) == pytest.approx(25)
    assert hessian.largest_eigenvalue(inputs, logits) == pytest.approx(25 / 2)
    assert hessian.hessian_trace(inputs, logits) == pytest.approx(25 * (1 - 1 / 2))


def test_no_curvature_without_activations() -> None:
    rows = np.zeros((3, WIDTH)), np.ones((3, 2))
    assert hessian.largest_eigenvalue(*rows) == hessian.hessian_trace(*rows) == 0


def test_rows_of_a_model_are_those_of_evaluation() -> None:
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config).train()
    model.classifier.insert(1, nn.Dropout(0.5))
    pixels, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    batches = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(0, 3), slice(3, 5))]
    inputs, logits = hessian.last_layer_rows(model, batches)
    assert model.training
    model.eval()
    with torch.no_grad():
        pooled = model.resnet(pixels).pooler_output.flatten(1).double().numpy()
        expected = model(pixels).logits.double().numpy()
    np.testing.assert_allclose(inputs, pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def labelled(count: int, num_classes: int) -> Dataset:
    data = Dataset.from_dict({"labels": [i % num_classes for i in range(count)], "index": list(range(count))})
    return data.cast_column("labels", ClassLabel(num_classes=num_classes))


def test_wrong_labels_are_any_of_the_others() -> None:
    data = labelled(3000, num_classes=3)
    noisy = label_noise.with_label_noise(data, 0.3, seed=0)
    shifts = (np.array(noisy["labels"]) - np.array(data["labels"])) % 3
    counts = np.bincount(shifts, minlength=3)
    assert counts[0] == 2100
    assert abs(counts[1] - counts[2]) < 5 * np.sqrt(900)
    assert noisy["index"] == data["index"]
    assert noisy.features["labels"] == data.features["labels"]


def test_wrong_labels_belong_to_the_seed() -> None:
    labels = [0, 1] * 50
    assert label_noise.noisy_labels(labels, 2, 0.2, seed=3) == label_noise.noisy_labels(labels, 2, 0.2, seed=3)
    assert label_noise.noisy_labels(labels, 2, 0.2, seed=3) != label_noise.noisy_labels(labels, 2, 0.2, seed=4)
    assert label_noise.noisy_labels(labels, 2, 0.0, seed=3) == labels
    with pytest.raises(ValueError, match="share"):
        label_noise.noisy_labels(labels, 2, 1.5, seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_of_the_same_seed_holds_its_share_of_wrong_labels(seed: int) -> None:
    data = labelled(2000, num_classes=10)
    part = label_noise.with_label_noise(data, 0.2, seed).train_test_split(test_size=0.2, seed=seed)["test"]
    wrong = sum(label != index % 10 for label, index in zip(part["labels"], part["index"], strict=True))
    assert abs(wrong - 80) < 5 * np.sqrt(400 * 0.2 * 0.8)
