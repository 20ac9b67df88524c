from pathlib import Path

import pytest
import torch
from distributed_step import CASES, step

from tests.processes import on_two_processes


# Rounded, or of the clock, or of the gradient before it is averaged.
UNEQUAL = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
SCRIPT = Path(__file__).with_name("distributed_step.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two real processes has after the step."""
    return on_two_processes(SCRIPT, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("case", CASES)
def test_step_on_two_processes_is_the_step_on_one(case, two_processes, tmp_path):
    weights, logs = step(str(tmp_path), **CASES[case])
    for rank in range(2):
        theirs, their_logs = two_processes[rank][case]
        assert theirs.keys() == weights.keys()
        assert max((theirs[name] - value).abs().max().item() for name, value in weights.items()) <= 1e-6
        terms = {name: value for name, value in logs.items() if name not in UNEQUAL}
        assert {"task_loss", "activation_decay", "max_layer_norm", "lipschitz_constant"} <= terms.keys()
        assert {name: their_logs[name] for name in terms} == pytest.approx(terms, rel=1e-5)
    assert logs["activation_decay"] > 0.01


def test_processes_agree_after_a_step_with_curvature(two_processes):
    (first, logs), (second, _) = (results["curvature"] for results in two_processes)
    assert logs["curvature"] > 0
    assert all(torch.equal(second[name], value) for name, value in first.items())
    without = two_processes[0]["text"][0]
    assert any(not torch.equal(without[name], value) for name, value in first.items())
