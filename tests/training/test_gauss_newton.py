import itertools
import re

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from curvature_cases import BATCH, LABELS, PIXELS, double_batch, draws, run, small_net, task_of
from tiny_heads import FOR_TOKENS, SHIFTING, bart_same, batch_for, bert_tokens, gpt2_next
from tiny_models import Examples, bert, gpt2, resnet
from torch.func import functional_call
from torch.nn.functional import cross_entropy, pad

from hf_lipschitz.training import gauss_newton
from hf_lipschitz.training.curvature import task_curvature
from hf_lipschitz.training.curvature_problem import CurvatureProblem
from hf_lipschitz.training.gauss_newton import gauss_newton_square
from hf_lipschitz.training.selection import curvature_layers


def exact_trace(logits_of, weights):
    """(1/N) Σ tr JᵀSJ with whole matrices; `logits_of` takes the weights and returns (N, K)."""
    rows = logits_of(*weights)
    jacobians = torch.autograd.functional.jacobian(logits_of, tuple(weights), create_graph=True)
    jacobian = torch.cat([j.flatten(2) for j in jacobians], -1)
    p = rows.softmax(-1)
    inner = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("nkw,nkl,nlw->", jacobian, inner, jacobian) / len(rows)


def test_mean_over_all_signs_is_the_trace_and_so_for_the_gradient():
    model = small_net()
    names = ["1.weight", "3.weight", "3.bias"]
    weights = [model.get_parameter(name).detach().requires_grad_() for name in names]

    def logits_of(*weights):
        # Of three rows, one of them confident.
        return functional_call(model, dict(zip(names, weights, strict=True)), PIXELS[:3]) * torch.tensor([[1, 9]])

    expected = exact_trace(logits_of, weights)
    expected_gradients = torch.autograd.grad(expected, weights)
    values, gradients = [], []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        signs = torch.tensor(signs, dtype=torch.float64).view(3, 2)
        values.append(gauss_newton_square(logits_of(*weights), weights, signs))
        gradients.append(torch.autograd.grad(values[-1], weights, retain_graph=True))
    assert min(values) >= 0
    torch.testing.assert_close(torch.stack(values).mean(), expected)
    means = tuple(torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True))
    torch.testing.assert_close(means, expected_gradients)


def test_gradient_of_the_estimate_is_its_derivative():
    model = small_net(hidden=3)
    names = ["1.weight", "3.weight"]
    signs = torch.randint(0, 2, (5, 2), generator=draws()).double() * 2 - 1

    def estimate(*weights):
        logits = functional_call(model, dict(zip(names, weights, strict=True)), PIXELS)
        return gauss_newton_square(logits, weights, signs)

    assert torch.autograd.gradcheck(estimate, [model.get_parameter(n).detach().requires_grad_() for n in names])


def test_it_is_the_hessian_where_the_logits_are_linear():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 3)).double()
    weight = model[1].weight
    hessian = torch.func.hessian(lambda w: cross_entropy(functional_call(model, {"1.weight": w}, PIXELS), LABELS))
    expected = hessian(weight.detach()).view(6, 6).trace().item()
    generator = draws()
    values = torch.stack(
        [task_curvature(model, [model[1]], task_of(model), BATCH, generator, "gauss_newton") for _ in range(2000)]
    ).detach()
    error = values.std().item() / 2000**0.5
    assert error < 0.03 * expected
    assert values.mean().item() == pytest.approx(expected, abs=5 * error)


def test_underflowing_probabilities_have_a_gradient():
    logits = torch.tensor([[0.0, -1.0, 0.0005]], requires_grad=True)
    estimate = gauss_newton_square(logits.sin() * 2000, [logits], torch.ones(1, 3))
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_signs_vary_less_than_drawn_labels_on_a_confident_row():
    weight = torch.tensor([[0.0, -7.0]], dtype=torch.float64, requires_grad=True)
    p = weight.softmax(-1)
    expected = (p * (1 - p)).sum().item()
    values = [
        gauss_newton_square(weight * 1, [weight], torch.tensor([signs], dtype=torch.float64)).item()
        for signs in itertools.product((-1.0, 1.0), repeat=2)
    ]
    variance = sum((value - expected) ** 2 for value in values) / 4
    assert sum(values) / 4 == pytest.approx(expected)
    squares = torch.stack([(torch.eye(2)[y] - p[0]).pow(2).sum() for y in range(2)])
    assert (p[0] * squares).sum().item() == pytest.approx(expected)
    assert variance < 0.01 * (p[0] * (squares - expected).pow(2)).sum().item()


def test_estimate_on_a_transformer_is_unbiased():
    model = bert(initializer_range=0.4, attn_implementation="sdpa").double().eval()
    batch = double_batch(model, 6)
    batch["labels"][2] = -100
    layer = model.bert.pooler.dense
    kept = [i for i in range(6) if i != 2]

    def logits_of(weight):
        return functional_call(model, {"bert.pooler.dense.weight": weight}, kwargs=batch).logits[kept]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = exact_trace(logits_of, [layer.weight.detach().requires_grad_()]).item()
    values = torch.tensor([run(model, batch, "gauss_newton", seed=s, layers=[layer]).item() for s in range(400)])
    error = values.std().item() / 20
    assert values.min() >= 0
    assert error < 0.1 * expected
    assert values.mean().item() == pytest.approx(expected, abs=5 * error)


@pytest.fixture
def seen(monkeypatch):
    """The rows that `gauss_newton` took."""
    rows = []
    original = gauss_newton.gauss_newton_square

    def watch(logits, *others):
        rows.append(logits.detach())
        return original(logits, *others)

    monkeypatch.setattr(gauss_newton, "gauss_newton_square", watch)
    return rows


@pytest.mark.parametrize("under_accelerate", [False, True])
@pytest.mark.parametrize("build", [*FOR_TOKENS, bert, gpt2, resnet])
def test_rows_that_count_are_those_of_the_loss(build, under_accelerate, seen):
    model = build().eval()
    batch = batch_for(model)
    batch["labels"].view(-1)[1] = -100
    loss = model(**batch).loss
    labels = pad(batch["labels"], (0, 1), value=-100)[:, 1:] if build in SHIFTING else batch["labels"]
    if under_accelerate:
        # Its logits are copies that are not in the graph of the loss.
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    penalty = run(model, batch, "gauss_newton", layers=None)
    assert penalty > 0
    assert penalty.requires_grad
    mean = cross_entropy(seen[0], labels[labels != -100])
    torch.testing.assert_close(mean, loss.detach(), rtol=0.02 if under_accelerate else 1e-5, atol=0)
    if build not in SHIFTING and build is not bart_same:
        return
    again = {"shift_labels": labels, **{name: value for name, value in batch.items() if name != "labels"}}
    rows = gauss_newton.counted_logits(model, model(**batch).logits, torch.zeros(1), again)
    torch.testing.assert_close(rows, seen[0], rtol=0.02, atol=0.02)


def test_tokens_without_a_known_head_go_by_the_loss_function(seen):
    for build, is_shifted in ((gpt2_next, True), (bert_tokens, False)):
        model = build().eval()
        batch = batch_for(model)
        model.get_output_embeddings = lambda: None
        model.config.num_labels = 999

        def task_loss(inputs, model=model):
            outputs = model(**inputs)
            return outputs.loss, {"logits": outputs.logits.clone()}

        task_curvature(model, None, task_loss, batch, draws(), "gauss_newton")
        labels = batch["labels"][:, 1:] if is_shifted else batch["labels"]
        assert len(seen.pop()) == (labels != -100).sum()
    with pytest.raises(ValueError, match="head_module='nowhere'"):
        run(model, batch, "gauss_newton", layers=None, head_module="nowhere")


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_other_losses_are_an_error(kind):
    model = bert(problem_type=kind)
    batch = Examples(model).batch()
    batch["labels"] = torch.rand(8, 3, generator=draws()).round()
    with pytest.raises(ValueError, match="several labels an example.*use curvature='trace'"):
        run(model, batch, "gauss_newton")


def test_labels_do_not_matter():
    model = bert(initializer_range=0.4)
    batch = Examples(model).batch()
    first = run(model, batch, "gauss_newton").item()
    assert run(model, {**batch, "labels": (batch["labels"] + 1) % 3}, "gauss_newton").item() == first
    assert run(model, {**batch, "labels": batch["labels"].view(-1, 1)}, "gauss_newton").item() == first


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((4, 7, 3), None),
        ((4, 1), (4,)),
        ((4, 3, 8, 8), (4, 8, 8)),
        ((4, 3), (5,)),
        ((4, 7, 3), (4, 5)),
        (None, (4,)),
    ],
)
def test_batches_without_a_row_for_each_label_are_errors(logits, labels):
    inputs = {} if labels is None else {"labels": torch.zeros(labels, dtype=torch.long)}
    weight = torch.ones((), requires_grad=True)
    outputs = {} if logits is None else {"logits": weight * torch.zeros(logits)}
    problem = CurvatureProblem(torch.nn.Linear(1, 1), [weight], lambda inputs: (weight, outputs), inputs, draws())
    message = f"got logits of shape {logits} and labels of shape {labels}: use curvature='trace'"
    with pytest.raises(ValueError, match=re.escape(message)):
        gauss_newton.gauss_newton(problem)


def test_rows_without_labels_count_in_a_batch_of_examples():
    model = bert(initializer_range=0.4)
    batch = Examples(model).batch()
    expected = run(model, batch, "gauss_newton").item()
    named = {**batch, "target": batch.pop("labels")}

    def task_loss(inputs):
        outputs = model(**{name: value for name, value in inputs.items() if name != "target"})
        return cross_entropy(outputs.logits, inputs["target"]), outputs

    layers = list(curvature_layers(model).values())
    named.pop("labels")
    assert task_curvature(model, layers, task_loss, named, draws(5), "gauss_newton").item() == pytest.approx(expected)
