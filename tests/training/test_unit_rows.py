import copy
import math

import pytest
import torch
from scipy import optimize
from tiny_models import Examples, bert, gpt2, resnet
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_lipschitz import certify_deterministic, inspect, lipschitzify, materialized, merge
from hf_lipschitz.nn import SLLLinear
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.unit_rows import layers_with_norms, normalize_head


def row_norms(weight):
    return torch.linalg.vector_norm(weight.detach().double(), dim=1)


def logits_of(model):
    batch = Examples(model).batch()
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("build", [bert, gpt2, resnet])
def test_rows_have_norm_one_and_the_direction_they_had(build):
    model = build()
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    name = normalize_head(model)
    weight = model.get_submodule(name).weight
    before = raw[f"{name}.weight"]
    torch.testing.assert_close(weight, before / before.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-7)
    assert (row_norms(weight) <= 1).all()
    assert (row_norms(weight) > 1 - 1e-6).all()
    assert normalize_head(model) == name
    assert len(list(constrained_layers(model))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_leaves_no_row_longer_than_one(dtype):
    torch.manual_seed(0)
    head = Classifier(nn.Linear(300, 40, dtype=dtype))
    head.classifier.weight.data *= torch.logspace(-2, 2, 40, dtype=torch.float64)[:, None].to(dtype)
    normalize_head(head, "classifier")
    norms = row_norms(head.classifier.weight)
    assert head.classifier.weight.dtype == dtype
    assert (norms <= 1).all()
    assert (norms >= 1 - 2 * torch.finfo(dtype).eps - 1e-12).all()


class Classifier(nn.Module):
    def __init__(self, head, body=None):
        super().__init__()
        self.body = nn.Identity() if body is None else body
        self.classifier = head

    def forward(self, x):
        return self.classifier(self.body(x))


def test_rows_of_zeros_stay_and_train():
    model = Classifier(nn.Linear(4, 3))
    model.classifier.weight.data[1] = 0
    normalize_head(model, "classifier")
    assert (model.classifier.weight[1] == 0).all()
    model(torch.ones(2, 4)).square().sum().backward()
    assert torch.isfinite(model.classifier.parametrizations.weight.original.grad).all()


def test_transposed_layers_have_their_columns_normalised():
    model = Classifier(Conv1D(5, 4))
    normalize_head(model, "classifier")
    assert model.classifier.weight.shape == (4, 5)
    torch.testing.assert_close(model.classifier.weight.norm(dim=0), torch.ones(5))


def test_gradient_is_that_of_the_quotient():
    torch.manual_seed(0)
    model = Classifier(nn.Linear(4, 3, dtype=torch.float64))
    normalize_head(model, "classifier")
    raw = model.classifier.parametrizations.weight.original
    probe = torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((model.classifier.weight * probe).sum(), raw)
    leaf = raw.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((leaf / leaf.norm(dim=1, keepdim=True) * probe).sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_autocast_does_not_round_the_rows():
    model = bert()
    normalize_head(model)
    expected = model.classifier.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.classifier.weight, expected)


@pytest.mark.parametrize("body", [False, True])
def test_saved_models_load_as_the_same_function(body, tmp_path):
    model = bert(initializer_range=0.5)
    if body:
        lipschitzify(model, layer_lipschitz=0.7, exclude_modules=["classifier"])
    normalize_head(model)
    logits = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits, rtol=1e-6, atol=1e-7)
    assert len(list(constrained_layers(loaded))) == len(list(layers_with_norms(model)))
    normalize_head(loaded)
    torch.testing.assert_close(logits_of(loaded), logits, rtol=1e-5, atol=1e-6)
    assert len(list(constrained_layers(loaded))) == len(list(constrained_layers(model)))

    again = bert(initializer_range=0.1)
    if body:
        lipschitzify(again, layer_lipschitz=0.7, exclude_modules=["classifier"])
    normalize_head(again)
    again.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_it_merges_and_materialises():
    model = bert()
    normalize_head(model)
    logits = logits_of(model)
    with materialized(model) as plain:
        assert not list(constrained_layers(plain))
        assert torch.equal(logits_of(plain), logits)
    assert torch.equal(logits_of(copy.deepcopy(model)), logits)
    assert torch.equal(logits_of(merge(model)), logits)
    assert (row_norms(model.classifier.weight) <= 1).all()


def test_the_report_bounds_the_spectral_norm_and_not_the_rows():
    model = bert(num_labels=12)
    model.classifier.weight.data[:] = model.classifier.weight.data[:1]
    normalize_head(model)
    (layer,) = constrained_layers(model)
    raw = layer.parametrization.original.detach().double()
    assert layer.parametrization.present_bound() == pytest.approx(torch.linalg.matrix_norm(raw, 2).item(), rel=1e-6)
    row = next(row for row in inspect(model).layers if row.name == "classifier")
    exact = torch.linalg.matrix_norm(model.classifier.weight.double(), 2).item()
    assert exact == pytest.approx(math.sqrt(12), rel=1e-5)
    assert exact <= row.norm_after <= row.lipschitz


def test_margin_over_root_two_is_no_radius_and_the_certificate_is():
    torch.manual_seed(0)
    model = Classifier(nn.Linear(2, 2, bias=False, dtype=torch.float64)).eval()
    model.classifier.weight.data[:] = torch.tensor([[3.0, 0.0], [-5.0, 0.0]])
    normalize_head(model, "classifier")
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    (certificate,) = certify_deterministic(model, (x,))
    margin = (model(x)[0, 0] - model(x)[0, 1]).item()
    assert margin == pytest.approx(2.0)
    distance = optimize.brentq(lambda r: (model(x - r * x)[0, 0] - model(x - r * x)[0, 1]).item(), 0, 3)
    assert certificate.radius == pytest.approx(distance, rel=1e-6)
    assert certificate.radius <= distance < margin / math.sqrt(2)


def test_certificates_of_a_lipschitz_body_are_margins_over_distances_of_rows():
    torch.manual_seed(0)
    model = Classifier(nn.Linear(6, 3), body=SLLLinear(6, 6)).eval()
    normalize_head(model, "classifier")
    x = torch.randn(4, 6)
    logits, rows = model(x).detach().double(), model.classifier.weight.detach().double()
    norm = torch.linalg.matrix_norm(model.body.weight.detach().double(), 2).item()
    assert norm <= 1
    for certificate, z in zip(certify_deterministic(model, (x,)), logits, strict=True):
        best = int(z.argmax())
        radii = [((z[best] - z[j]) / (rows[best] - rows[j]).norm()).item() for j in range(3) if j != best]
        assert min(radii) / norm * (1 - 2e-3) <= certificate.radius <= min(radii) / norm * (1 + 1e-6)
        assert certificate.prediction == best


def test_schedule_leaves_the_head_alone_and_a_resumed_run_goes_on(tmp_path):
    def run(resume=None):
        model = bert(initializer_range=0.6)
        lipschitzify(model, layer_lipschitz=None, exclude_modules=["classifier"])
        normalize_head(model)
        args = LipschitzTrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, per_device_train_batch_size=4, lipschitz_schedule="linear",
            lipschitz_target=0.5, lipschitz_schedule_ratio=0.5, weight_decay=0.1, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        LipschitzTrainer(model, args, train_dataset=Examples(model, 16)).train(resume_from_checkpoint=resume)
        return model

    model = run()
    constants = {layer.name: layer.parametrization.lipschitz.item() for layer in constrained_layers(model)}
    assert constants.pop("classifier") == math.sqrt(3)
    assert set(constants.values()) == {0.5}
    torch.testing.assert_close(model.classifier.weight.norm(dim=1), torch.ones(3), rtol=1e-6, atol=0)
    resumed = run(str(tmp_path / "checkpoint-3"))
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_heads_that_cannot_be_normalised_are_errors():
    with pytest.raises(ValueError, match=r"parametrized by something else.*exclude_modules=\['classifier'\]"):
        normalize_head(lipschitzify(bert()))
    with pytest.raises(ValueError, match="is a Conv2d"):
        normalize_head(Convolutional())
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=1)
    with pytest.raises(ValueError, match="tied weight"):
        normalize_head(GPT2LMHeadModel(config), "lm_head")
    model = bert()
    model.classifier.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer classifier: weight holds NaN"):
        normalize_head(model)
    with pytest.raises(ValueError, match="head_module='nowhere'"):
        normalize_head(bert(), "nowhere")


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 3, 1)
        self.config = type("Config", (), {"num_labels": 3})
