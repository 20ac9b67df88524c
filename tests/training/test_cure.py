import pytest
import torch
from curvature_cases import LABELS, PIXELS, double_batch, draws, run, small_net, task_of
from tiny_models import Examples, bert, gpt2, resnet, vit
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForSequenceClassification, ViTImageProcessor

from hf_lipschitz import lipschitzify
from hf_lipschitz.training.augmentation import moved_inputs, pixel_scale
from hf_lipschitz.training.cure import cure, sign_direction
from hf_lipschitz.training.curvature import task_curvature
from hf_lipschitz.training.curvature_problem import CurvatureProblem


def problem_of(model, task_loss=None, radius=0.3, **values):
    batch = {"pixel_values": PIXELS, "labels": LABELS}
    return CurvatureProblem(model, [], task_loss or task_of(model), batch, draws(), radius, **values)


def example_by_example(loss_of, inputs, h):
    """The mean of ‖(∇ℓ(x + hz) - ∇ℓ(x))/h‖² from first derivatives of the loss of one example at a time."""
    values = []
    for index, x in enumerate(inputs):
        points = []
        z = torch.zeros_like(x)
        for _ in range(2):
            point = (x + h * z).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(point, index), point)
            z = gradient.sign() / gradient.sign().norm()
            points.append(gradient)
        values.append(((points[1] - points[0]) / h).pow(2).sum())
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("h", [0.01, 0.3, 2.0])
def test_penalty_is_the_mean_over_examples(h):
    model = small_net(hidden=4)

    def loss_of(x, index):
        return cross_entropy(model(x.unsqueeze(0)), LABELS[index : index + 1])

    expected = example_by_example(loss_of, PIXELS, h)
    assert cure(problem_of(model, radius=h)).item() == pytest.approx(expected, rel=1e-9)
    whole = {"pixel_values": PIXELS, "labels": LABELS}
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 2), slice(2, 5))]
    parts = [task_curvature(model, None, task_of(model), half, draws(), "cure", h).item() for half in halves]
    assert (2 * parts[0] + 3 * parts[1]) / 5 == pytest.approx(expected)


def test_small_steps_give_the_hessian_vector_product():
    model = small_net(hidden=4)
    values = []
    for x, label in zip(PIXELS, LABELS, strict=True):

        def loss_of(x, label=label):
            return cross_entropy(model(x.view(1, 1, 1, 2)), label.view(1))

        hessian = torch.func.hessian(loss_of)(x.flatten())
        z = torch.func.grad(loss_of)(x.flatten()).sign() / 2**0.5
        values.append((hessian @ z).pow(2).sum())
    expected = torch.stack(values).mean().item()
    assert cure(problem_of(model, radius=1e-5)).item() == pytest.approx(expected, rel=1e-4)
    assert abs(cure(problem_of(model, radius=1.0)).item() / expected - 1) > 1e-2


def test_gradient_is_the_derivative():
    model = small_net(hidden=3)
    names = ["1.weight", "1.bias", "3.weight"]

    def penalty(*weights):
        def task_loss(inputs):
            logits = functional_call(model, dict(zip(names, weights, strict=True)), inputs["pixel_values"])
            return cross_entropy(logits, LABELS), None

        return cure(problem_of(model, task_loss))

    assert torch.autograd.gradcheck(penalty, [model.get_parameter(n).detach().requires_grad_() for n in names])


def test_directions_have_norm_one_for_each_example():
    gradients = torch.randn(4, 3, 5, 5, generator=draws())
    gradients[1, 0] = 0.0
    gradients[3] = 0.0
    z = sign_direction(gradients)
    torch.testing.assert_close(z.flatten(1).norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert torch.equal(z.sign(), gradients.sign())
    assert sign_direction(torch.randn(2, 200_000).to(torch.bfloat16)).float().norm(dim=1).sub(1).abs().max() < 0.01


@pytest.mark.parametrize("build", [bert, gpt2])
def test_embeddings_are_moved_as_inputs_embeds_would_be(build):
    model = build(initializer_range=0.4, attn_implementation="sdpa").double().eval()
    batch = double_batch(model, 5)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.unique().numel() > 1
    values = []
    for i, length in enumerate(lengths):
        # Alone and without padding.
        embeddings = model.get_input_embeddings()(batch["input_ids"][i : i + 1, :length]).detach()

        def loss_of(x, index, i=i):
            # Not inputs_embeds, for which this classifier has another last token.
            return loss_at(model, x.unsqueeze(0), batch["labels"][i : i + 1])

        values.append(example_by_example(loss_of, embeddings, 0.5))
    penalty = run(model.train(), batch, "cure", radius=0.5)
    assert penalty.item() == pytest.approx(sum(values) / 5, rel=1e-9)


def loss_at(model, embeddings, label):
    hidden = model.base_model(inputs_embeds=embeddings)
    logits = model.score(hidden[0][:, -1]) if hasattr(model, "score") else model.classifier(hidden.pooler_output)
    return cross_entropy(logits, label)


def test_gradient_reaches_the_embeddings():
    model = bert(initializer_range=0.4).double()
    batch = double_batch(model)
    table = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(run(model, batch, "cure", radius=0.5), table)
    row = batch["input_ids"][0, 0].item()
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            table[row, 2] += sign * 1e-6
        moved.append(run(model, batch, "cure", radius=0.5).item())
        with torch.no_grad():
            table[row, 2] -= sign * 1e-6
    assert abs(gradient[row, 2].item()) > 1e-4
    assert gradient[row, 2].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4)
    table.requires_grad_(False)
    assert run(model, batch, "cure", radius=0.5).requires_grad


@pytest.mark.parametrize("build", [vit, resnet])
def test_images_are_moved_in_the_asked_unit(build):
    model = build(**({} if build is resnet else {"initializer_range": 0.4})).double().eval()
    batch = double_batch(model, 3)
    scale = pixel_scale(ViTImageProcessor(image_std=[0.5, 0.2, 0.1]))
    pixels = batch["pixel_values"] / scale

    def loss_of(x, index):
        return model(pixel_values=(x * scale).unsqueeze(0), labels=batch["labels"][index : index + 1]).loss

    expected = example_by_example(loss_of, pixels, 0.1)
    assert run(model, batch, "cure", radius=0.1, input_scale=scale).item() == pytest.approx(expected, rel=1e-9)
    assert run(model, batch, "cure", radius=0.1).item() != pytest.approx(expected, rel=1e-2)


def test_noise_of_the_embeddings_stays():
    model = bert(initializer_range=0.4).double()
    batch = double_batch(model)
    clean = run(model, batch, "cure", layers=None).item()
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    noise = 0.5 * torch.randn(embeddings.shape, generator=draws(1)).double()
    with moved_inputs(model, batch, noise) as inputs:
        noisy, again = (run(model, inputs, "cure", layers=None).item() for _ in range(2))
    assert noisy == again
    assert noisy != pytest.approx(clean, rel=1e-3)
    values = []
    for i in range(4):
        model.eval()

        def loss_of(x, index, i=i):
            hidden = model.base_model(inputs_embeds=x.unsqueeze(0), attention_mask=batch["attention_mask"][i : i + 1])
            return cross_entropy(model.classifier(hidden.pooler_output), batch["labels"][i : i + 1])

        values.append(example_by_example(loss_of, (embeddings + noise)[i : i + 1].detach(), 1.5))
    assert noisy == pytest.approx(sum(values) / 4, rel=1e-9)


def test_chosen_layers_do_not_matter():
    model = vit()
    model.classifier.requires_grad_(False)
    batch = Examples(model).batch()
    expected = run(model, batch, "cure", layers=None).item()
    assert run(model, batch, "cure", layers=[model.classifier]).item() == expected


def test_training_on_it_flattens_the_loss():
    model = lipschitzify(vit(initializer_range=0.4), layer_lipschitz=2.0)
    batch = Examples(model).batch()
    before = run(model, batch, "cure").item()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        run(model, batch, "cure").backward()
        optimizer.step()
    assert run(model, batch, "cure").item() < 0.3 * before


def test_inputs_that_cannot_be_moved_are_errors():
    tiny = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    encoder_decoder = T5ForSequenceClassification(T5Config(**tiny, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="takes tokens twice: use a curvature of weights"):
        run(encoder_decoder, {}, "cure", layers=None)
    with pytest.raises(ValueError, match="Linear takes None: use a curvature of weights"):
        run(torch.nn.Linear(2, 2), {}, "cure", layers=None)
    model = vit()
    with pytest.raises(ValueError, match="needs pixel_values in the batch, which has labels"):
        run(model, {"labels": LABELS}, "cure")
    with pytest.raises(ValueError, match=r"got \(4, 12\) of torch.float32"):
        run(model, {"pixel_values": torch.zeros(4, 12)}, "cure")
    with pytest.raises(ValueError, match="of torch.uint8"):
        run(model, {"pixel_values": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "cure")
    model = bert()
    batch = Examples(model).batch()
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="BertForSequenceClassification makes 0: give input_ids"):
        run(model, {**batch, "inputs_embeds": embeddings}, "cure")
