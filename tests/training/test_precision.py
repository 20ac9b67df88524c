"""Training in bfloat16, and on a GPU where there is one."""

import pytest
import torch
from test_terms import MEANS
from tiny_models import Examples, bert, gpt2, resnet, vit
from transformers import ViTImageProcessor

from hf_lipschitz import lipschitzify
from hf_lipschitz.nn.attachment import constrained_layers
from hf_lipschitz.training import LipschitzTrainer, LipschitzTrainingArguments
from hf_lipschitz.training.curvature import CURVATURES


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ["cpu", CUDA]
CURVATURE = [{"curvature": name, "curvature_weight": 0.01} for name in CURVATURES]


def trained(model, tmp_path, device, **values):
    defaults = {
        "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    args = LipschitzTrainingArguments(str(tmp_path), use_cpu=device == "cpu", **{**defaults, **values})
    images = ViTImageProcessor() if model.main_input_name == "pixel_values" else None
    trainer = LipschitzTrainer(model, args, train_dataset=Examples(model, 32), processing_class=images)
    trainer.train()
    return trainer


@pytest.mark.parametrize("terms", [MEANS, *CURVATURE], ids=["means", *CURVATURES])
@pytest.mark.parametrize("build", [bert, vit])
@pytest.mark.parametrize("device", DEVICES)
def test_every_term_trains_in_bfloat16_and_layers_stay_under_their_constants(device, build, terms, tmp_path):
    model = lipschitzify(build(), layer_lipschitz=0.5)
    trainer = trained(model, tmp_path, device, bf16=True, **terms)
    assert model.device.type == device
    logged = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(logged) == 3
    assert all(
        torch.isfinite(torch.tensor([v for v in entry.values() if isinstance(v, float)])).all() for entry in logged
    )
    for layer in constrained_layers(model):
        if layer.effective_weight.ndim == 2:
            assert torch.linalg.matrix_norm(layer.effective_weight.double(), 2) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("terms", [MEANS, *CURVATURE], ids=["means", *CURVATURES])
@pytest.mark.parametrize("build", [gpt2, resnet])
@pytest.mark.parametrize("device", [CUDA])
def test_every_term_trains_in_float32_on_a_gpu(device, build, terms, tmp_path):
    trainer = trained(build(), tmp_path, device, **terms)
    assert len([entry for entry in trainer.state.log_history if "task_loss" in entry]) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_bfloat16_step_is_near_the_float32_one(device, tmp_path):
    losses = []
    for is_bf16 in (False, True):
        trainer = trained(bert(), tmp_path, device, max_steps=1, bf16=is_bf16, **MEANS)
        losses.append(trainer.state.log_history[0])
    for name in ("task_loss", "consistency", "activation_decay", "norm_penalty"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.05)


@pytest.mark.parametrize("device", [CUDA])
def test_micro_batches_on_a_gpu_are_one_batch(device, tmp_path):
    def after(**values):
        model = vit(initializer_range=0.3)
        trained(
            model, tmp_path, device, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **MEANS, **values
        )
        return dict(model.named_parameters())

    whole = after(per_device_train_batch_size=32)
    parts = after(per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) <= 1e-5
