"""Certifies many inputs at once: rounds of noisy copies over all that are still open, and a look after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lipschitz.certification.certificate import ABSTAIN
from hf_lipschitz.certification.looks import Look, default_looks, spend
from hf_lipschitz.certification.methods import METHODS, Bounds, Choice, Floats, Integers, Setting, radii_of
from hf_lipschitz.certification.noise import NOISES, Stage
from hf_lipschitz.certification.processes import ONE_PROCESS, Checkpoints, Processes
from hf_lipschitz.certification.row_independence import check_row_independence
from hf_lipschitz.certification.sampling import (
    Counted,
    Item,
    NoisyInputs,
    ScoreHistograms,
    ScoreSums,
    Votes,
    in_batches,
    items_of,
    logits_of,
)
from hf_lipschitz.certification.stopping import OPEN, STOP_REASONS, hoped_for, stop_codes
from hf_lipschitz.functional.simplex import SIMPLEX_MAPS


# Seconds between two meetings of the processes, and between two states on disk.
SLICE_SECONDS = 20.0


class Counter(Protocol):
    """Adds up what the logits that count say of their inputs."""

    counts: Tensor

    def add(self, counted: Counted, logits: Tensor) -> None: ...

    def check(self) -> None: ...


@dataclass
class State:
    """
    All that the certificates of a window depend on. In round 0 the selection samples are drawn, in round r those up to
    look r; `batches_done` batches of the round that is under way are in the counts.
    """

    selection: Integers
    estimation: Integers | None
    p_lower: Floats
    p_upper: Floats
    radius: Floats
    n: Integers
    stop: Integers
    round: int = 0
    batches_done: int = 0

    @classmethod
    def new(cls, num_inputs: int, selection: tuple[int, ...]) -> State:
        zeros, none = np.zeros(num_inputs), np.zeros(num_inputs, dtype=np.int64)
        counts = np.zeros((num_inputs, *selection), dtype=np.int64)
        return cls(counts, None, zeros, np.full(num_inputs, np.nan), zeros.copy(), none, none.copy())

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """By name, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: np.asarray(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> State:
        """Inverse of `to_arrays`."""
        values = {"estimation": None, **arrays}
        return cls(
            **{name: int(value) if name in ("round", "batches_done") else value for name, value in values.items()}
        )


@dataclass(frozen=True)
class Decision:
    """
    Outcome for one input. `radius` is 0 exactly when `prediction` is `ABSTAIN`; `p_lower` and `p_upper` bound the
    scores of the candidate class and of every other one, also on abstention.
    """

    prediction: int
    radius: float
    p_lower: float
    p_upper: float | None
    n: int
    stop_reason: str


class Window:
    """
    Inputs that go through the rounds together.

    Args:
        base_classifier (`Callable`):
            From a batch to logits, or to an object that has them as `.logits`.
        inputs (`NoisyInputs`):
            The inputs and their noise.
        setting (`Setting`):
            What is certified.
        processes (`Processes`):
            Those among which the batches are dealt out. All get the same outcomes.
        checkpoints (`Checkpoints`, *optional*):
            Where the state is kept. A window that starts from a state goes on as if it had never stopped, bit by bit.
        on_samples (`Callable[[int], None]`, *optional*):
            Is told of the samples drawn, by all processes together.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Any],
        inputs: NoisyInputs,
        setting: Setting,
        processes: Processes = ONE_PROCESS,
        checkpoints: Checkpoints | None = None,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.inputs, self.setting, self.processes = inputs, setting, processes
        self.checkpoints, self.on_samples = checkpoints, on_samples
        self.method = METHODS[setting.config.certificate]
        self.looks = looks_of(setting)
        self.device = inputs.xs[0].device
        self.choice: Choice | None = None
        self._logits_of = partial(
            logits_of, base_classifier, num_classes=setting.num_classes, splits=setting.config.num_splits
        )
        self._batches_a_slice = processes.size
        self._has_checked_rows = False

    def run(self) -> Iterator[dict[int, Decision]]:
        """The outcomes of the inputs that are finished after each look, by their row."""
        state = self._start()
        while state.round <= len(self.looks) and (state.stop == OPEN).any():
            self._draw(state)
            if state.round == 0:
                self.choice = self.method.choose(state.selection, self.setting)
                finished = {}
            else:
                finished = self._look(state)
            state.round, state.batches_done = state.round + 1, 0
            if finished:
                yield finished
            if self.checkpoints is not None:
                self.checkpoints.save(state.to_arrays())

    def _start(self) -> State:
        saved = None if self.checkpoints is None else self.checkpoints.load()
        if saved is not None:
            state = State.from_arrays(saved)
            if state.round > 0:
                self.choice = self.method.choose(state.selection, self.setting)
            return state
        shape = (self.setting.num_classes,) if self.method.statistic == "votes" else (2, self.setting.num_classes)
        return State.new(len(self.inputs.xs), shape)

    def counts_of(self, stage: Stage, n: int) -> Integers:
        """Votes among `n` samples of a stage, shape `(inputs, num_classes)`."""
        rows = range(len(self.inputs.xs))
        return self._meet(stage, in_batches(items_of(rows, 0, n), self.inputs.shapes, self.inputs.batch_size))

    def _draw(self, state: State) -> None:
        """The samples of a round, in slices that end with a meeting of the processes."""
        stage, start, stop = self._samples_of(state.round)
        rows = np.flatnonzero(state.stop == OPEN).tolist()
        parts = in_batches(items_of(rows, start, stop), self.inputs.shapes, self.inputs.batch_size)
        while state.batches_done < len(parts):
            upcoming = range(state.batches_done, min(state.batches_done + self._batches_a_slice, len(parts)))
            mine = [parts[i] for i in upcoming if i % self.processes.size == self.processes.rank]
            counts = self._meet(stage, mine)
            if stage is Stage.SELECTION:
                state.selection += counts
            else:
                state.estimation = counts if state.estimation is None else state.estimation + counts
            state.batches_done = upcoming.stop
            self.on_samples(sum(item.size for i in upcoming for item in parts[i]))
            if self.checkpoints is not None and state.batches_done < len(parts):
                self.checkpoints.save(state.to_arrays())

    def _samples_of(self, round_: int) -> tuple[Stage, int, int]:
        if round_ == 0:
            return Stage.SELECTION, 0, self.setting.config.n0
        start = 0 if round_ == 1 else self.looks[round_ - 2].n
        return Stage.ESTIMATION, start, self.looks[round_ - 1].n

    def _meet(self, stage: Stage, parts: list[tuple[Item, ...]]) -> Integers:
        """Counts of all processes' batches. What fails in one of them is raised in all."""
        failure, counts, start = None, None, time.perf_counter()
        counter = self._counter(stage)
        try:
            self._count(counter, stage, parts)
        except Exception as error:  # noqa: BLE001  it has to reach the other processes
            failure = error
        counts = counter.counts.cpu().numpy()
        microseconds = int(1e6 * (time.perf_counter() - start))
        together = self.processes.add(np.append(counts, [failure is not None, microseconds, len(parts)]))
        if together[-3]:
            self.processes.raise_together(failure)
        seconds_a_batch = max(together[-2] / max(together[-1], 1), 1) / 1e6
        self._batches_a_slice = max(int(SLICE_SECONDS / seconds_a_batch), 1) * self.processes.size
        return together[:-3].reshape(counts.shape)

    def _count(self, counter: Counter, stage: Stage, parts: list[tuple[Item, ...]]) -> None:
        broken = torch.zeros(len(self.inputs.xs), dtype=torch.int64, device=self.device)
        for batch in self.inputs.batches(stage, parts):
            logits = self._logits_of(batch.noisy)
            if not self._has_checked_rows:
                check_row_independence(self._logits_of, batch.noisy, logits)
                self._has_checked_rows = True
            counter.add(batch.counted, logits.nan_to_num())
            rows, counted = batch.counted.of(logits)
            is_broken = ~torch.isfinite(counted).all(dim=-1)
            broken.index_add_(0, rows.to(broken.device), is_broken.to(broken))
        if broken.any():
            index = self.inputs.indices[int(broken.nonzero()[0])]
            raise RuntimeError(
                f"The base classifier returned NaN or infinite logits on input {index}; check that input."
            )
        counter.check()

    def _counter(self, stage: Stage) -> Counter:
        num_inputs, num_classes = len(self.inputs.xs), self.setting.num_classes
        if self.method.statistic == "votes":
            return Votes(num_inputs, num_classes, self.device)
        config = self.setting.config
        to_scores = partial(SIMPLEX_MAPS[config.simplex_map].function, temperature=config.temperature)
        if stage is Stage.SELECTION:
            return ScoreSums(num_inputs, num_classes, self.device, to_scores)
        groups = torch.from_numpy(self.choice.groups).to(self.device)
        return ScoreHistograms(groups, self.choice.num_groups, to_scores)

    def _look(self, state: State) -> dict[int, Decision]:
        """Bounds and radii of the open inputs, and the outcomes of those that stop here."""
        look = self.looks[state.round - 1]
        rows = np.flatnonzero(state.stop == OPEN)
        counts, choice = state.estimation[rows], self.choice.take(rows)
        bounds = self.method.bounds(counts, look.n, choice, look.alpha, self.setting)
        # All looks' bounds hold together, so the best of each does.
        state.p_lower[rows] = np.maximum(state.p_lower[rows], bounds.p_lower)
        if bounds.p_upper is not None:
            state.p_upper[rows] = np.fmin(state.p_upper[rows], bounds.p_upper)
        best = Bounds(state.p_lower[rows], None if bounds.p_upper is None else state.p_upper[rows])
        radius, hopes = np.empty(len(rows)), np.empty(len(rows))
        for entries in {self.inputs.xs[row].numel() for row in rows}:
            alike = np.array([self.inputs.xs[row].numel() == entries for row in rows])
            radius[alike] = radii_of(best.take(alike), self.setting, entries)
            if len(self.looks) > 1:
                hopes[alike] = hoped_for(
                    counts[alike], look.n, choice.take(alike), self.looks, self.method, self.setting, entries
                )
        state.radius[rows], state.n[rows] = radius, look.n
        state.stop[rows] = stop_codes(radius, hopes, look, self.looks, self.setting)
        return {int(row): self._decision(state, row) for row in rows[state.stop[rows] != OPEN]}

    def _decision(self, state: State, row: int) -> Decision:
        candidate, radius, p_upper = self.choice.candidates[row], state.radius[row], state.p_upper[row]
        config = self.setting.config
        slack = NOISES[config.noise].slack(self.inputs.xs[row].numel(), config.sigma)
        return Decision(
            prediction=int(candidate) if radius > 0 else ABSTAIN,
            radius=float(radius),
            p_lower=max(float(state.p_lower[row]) - slack, 0.0),
            p_upper=None if np.isnan(p_upper) else min(float(p_upper) + slack, 1.0),
            n=int(state.n[row]),
            stop_reason=STOP_REASONS[state.stop[row]],
        )


def looks_of(setting: Setting) -> tuple[Look, ...]:
    """Those of the configuration: one at `n`, or many up to there where it stops early."""
    config = setting.config
    if not config.is_sequential:
        return (Look(config.n, config.alpha),)
    method = METHODS[config.certificate]
    return spend(config.looks or default_looks(config.n), config.alpha, is_anytime=method.is_anytime(setting))
