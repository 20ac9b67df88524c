"""lipschitz_bound and verify_lipschitz as a user calls them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import ViTImageProcessor

from hf_lipschitz import lipschitz_bound, lipschitzify, verify_lipschitz
from hf_lipschitz.integrations.preprocessing import PixelInput
from tests.bounds.functions import exact
from tests.families import bert, gpt2, resnet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        return y if mask is None else y * mask


def spectral(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double(), ord=2).item()


def test_inputs_by_name_and_by_position() -> None:
    model, x, mask = Net().eval(), torch.randn(2, 4), torch.tensor([1.0, 0.0, 2.0])
    assert lipschitz_bound(model, (x,)).value == pytest.approx(spectral(model.layer.weight), rel=1e-3)
    by_name = lipschitz_bound(model, {"x": x, "mask": mask}, wrt="x").value
    assert by_name == lipschitz_bound(model, (x, mask), wrt="x").value
    masked = spectral(model.layer.weight * mask[:, None])
    assert by_name == pytest.approx(masked, rel=1e-3)
    assert verify_lipschitz(model, (x, mask), wrt="x", starts=1, steps=1) == pytest.approx(masked, rel=1e-6)


def test_constrained_layers_are_materialised_and_stay_constrained() -> None:
    model, x = Net().eval(), torch.randn(2, 4)
    lipschitzify(model, layer_lipschitz=0.5, mode="exact")
    assert lipschitz_bound(model, (x,)).value == pytest.approx(0.5, rel=2e-3)
    assert 0.49 <= verify_lipschitz(model, (x,), starts=1, steps=1) <= lipschitz_bound(model, (x,)).value
    assert hasattr(model.layer, "parametrizations")


def test_texts_are_bounded_by_their_embeddings() -> None:
    model = bert().eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    bound = lipschitz_bound(model, ids)
    assert bound.wrt == "inputs_embeds"
    embeddings = model.get_input_embeddings()(ids["input_ids"]).detach()
    by_hand = lipschitz_bound(model, {"inputs_embeds": embeddings, "attention_mask": ids["attention_mask"]})
    assert bound.log_value == by_hand.log_value


def test_a_decoder_comes_without_its_cache() -> None:
    assert lipschitz_bound(gpt2().eval(), {"input_ids": torch.tensor([[5, 6, 7]])}).log_value < math.inf


def test_outputs_by_name() -> None:
    model, ids = bert().eval(), {"input_ids": torch.tensor([[5, 6, 7]])}
    logits = lipschitz_bound(model, ids)
    assert lipschitz_bound(model, ids, output="logits").log_value == logits.log_value
    both, hidden = (lipschitz_bound(model.bert, ids, output=name) for name in (None, "last_hidden_state"))
    assert hidden.log_value < both.log_value
    with pytest.raises(ValueError, match="output='pooled' is not returned"):
        lipschitz_bound(model, ids, output="pooled")


@pytest.mark.parametrize(
    "size", [{"height": 20, "width": 24}, {"shortest_edge": 20}, {"height": 33, "width": 29}], ids=str
)
@pytest.mark.parametrize("resample", [2, 3, 0])
def test_pixels_go_through_the_processor(size: dict[str, int], resample: int) -> None:
    processor = ViTImageProcessor(size=size, resample=resample, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.4])
    image = np.random.default_rng(0).integers(0, 256, (33, 29, 3), dtype=np.uint8)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255
    found = PixelInput(processor)(pixels.double())
    assert found.shape == expected.shape
    # The processor rounds to whole grey levels after each axis: half of one each, over the least deviation.
    assert (found - expected).abs().max() <= 2 / 255 / 0.2


@pytest.mark.parametrize(
    ("kind", "size", "is_known"),
    [
        ("ViT", (300, 200), True),
        ("CLIP", (300, 200), True),
        ("ConvNext", (224, 224), True),
        ("ConvNext", (300, 200), False),  # resizes to more than it cuts out
        ("EfficientNet", (64, 64), False),  # divides by the deviation twice
        ("MobileViT", (256, 256), False),  # turns the channels around
        ("PoolFormer", (64, 64), False),
        ("Donut", (64, 64), False),  # pads
    ],
)
def test_processors_that_do_more_are_refused(kind: str, size: tuple[int, int], is_known: bool) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    pixels = torch.rand(1, 3, *size)

    class Mean(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.mean((-1, -2))

    def bound() -> float:
        return lipschitz_bound(Mean().eval(), {"pixels": pixels}, wrt="pixels", image_processor=processor).value

    if is_known:
        assert 0 < bound() < math.inf
    else:
        with pytest.raises(ValueError, match=f"{kind}.*process the images yourself"):
            bound()


def test_the_constant_of_the_processor_is_exact() -> None:
    processor = ViTImageProcessor(size={"height": 6, "width": 4}, image_mean=[0.5] * 3, image_std=[0.5, 0.2, 0.4])

    class Identity(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

    pixels = torch.rand(1, 3, 9, 5)
    bound = lipschitz_bound(Identity().eval(), {"pixels": pixels}, wrt="pixels", image_processor=processor)
    assert bound.value == pytest.approx(exact(PixelInput(processor).double(), pixels), rel=1e-6)
    assert bound.wrt == "pixels"
    lower = verify_lipschitz(
        Identity().eval(), {"pixels": pixels}, wrt="pixels", image_processor=processor, starts=1, steps=1
    )
    assert lower == pytest.approx(bound.value, rel=1e-3)


def test_local_bounds_shrink_with_the_ball() -> None:
    model, x = resnet().eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    values = [lipschitz_bound(model, x, radius=radius).log_value for radius in (1e-6, 1.0)]
    assert values[0] <= values[1] <= lipschitz_bound(model, x).log_value
    elsewhere = lipschitz_bound(model, x, radius=1e-6, center=torch.zeros(1, 3, 32, 32)).log_value
    assert elsewhere != values[0]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_control_flow_on_data_is_refused_with_the_reason() -> None:
    bound = lipschitz_bound(Branches().eval(), (torch.randn(3),))
    assert bound.value == math.inf
    assert bound.blame[0].node == "torch.export"
    assert "data" in bound.blame[0].advice
    assert "Branches" in str(bound)


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no module": (lambda: lipschitz_bound(torch.relu, (torch.ones(2),)), TypeError, "torch.nn.Module"),
    "training mode": (lambda: lipschitz_bound(Net(), (torch.ones(1, 4),)), ValueError, "training mode"),
    "dropout": (
        lambda: lipschitz_bound(nn.Sequential(nn.Linear(4, 4).eval(), nn.Dropout()), (torch.ones(1, 4),)),
        ValueError,
        "training mode",
    ),
    "integers": (
        lambda: lipschitz_bound(nn.Embedding(3, 4).eval(), {"input": torch.tensor([1])}, wrt="input"),
        TypeError,
        "floating-point",
    ),
    "texts without embeddings": (
        lambda: lipschitz_bound(nn.Embedding(3, 4).eval(), {"input_ids": torch.tensor([1])}, wrt="inputs_embeds"),
        TypeError,
        "takes no inputs_embeds",
    ),
    "unknown wrt": (lambda: lipschitz_bound(Net().eval(), (torch.ones(1, 4),), wrt="y"), ValueError, "not an input"),
    "two inputs": (
        lambda: lipschitz_bound(Net().eval(), (torch.ones(1, 4), torch.ones(3))),
        ValueError,
        "wrt must name",
    ),
    "too many": (lambda: lipschitz_bound(Net().eval(), (1, 2, 3)), ValueError, "3 inputs for forward"),
    "a tensor": (lambda: lipschitz_bound(Net().eval(), torch.ones(1, 4)), TypeError, "example_inputs must be"),
    "negative radius": (
        lambda: lipschitz_bound(Net().eval(), (torch.ones(1, 4),), radius=-1.0),
        ValueError,
        "radius must be positive",
    ),
    "a center alone": (
        lambda: lipschitz_bound(Net().eval(), (torch.ones(1, 4),), center=torch.ones(1, 4)),
        ValueError,
        "center needs a radius",
    ),
    "another shape": (
        lambda: lipschitz_bound(Net().eval(), (torch.ones(1, 4),), radius=1.0, center=torch.ones(2, 4)),
        ValueError,
        "center has shape",
    ),
    "NaN": (
        lambda: lipschitz_bound(Net().eval(), (torch.full((1, 4), math.nan),), radius=1.0),
        ValueError,
        "center holds NaN",
    ),
    "wrong shape": (lambda: lipschitz_bound(Net().eval(), (torch.ones(1, 5),)), RuntimeError, "mat1 and mat2"),
    "pixels without a processor": (
        lambda: lipschitz_bound(Net().eval(), {"pixels": torch.ones(1, 4)}, wrt="pixels"),
        ValueError,
        "needs image_processor",
    ),
    "verify in training mode": (lambda: verify_lipschitz(Net(), (torch.ones(1, 4),)), ValueError, "training mode"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_broken_weights_are_named() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.layer.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="layer.weight holds NaN or inf"):
        lipschitz_bound(model, (torch.ones(1, 4),))
