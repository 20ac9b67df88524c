"""What `certification.py` compares and measures with: Cohen's CERTIFY, ART, ours, bare passes; time and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from hf_lipschitz.certification import ABSTAIN, Certificate, SmoothedClassifier, SmoothingConfig


try:
    import statsmodels  # noqa: F401  ART's bound needs it
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
except ImportError:
    PyTorchRandomizedSmoothing = None

COHEN = "Cohen's CERTIFY"
ART = "ART"
BARE = "bare forward passes"
# ART holds all noisy copies of an input at once, in float64 and several times in float32.
ART_BYTES_AN_ENTRY = 24
PASSES_A_SHAPE = 3


class Outcome(NamedTuple):
    """A certificate; `n` is without the samples that chose the class."""

    prediction: int
    radius: float
    n: int


def outcome_of(certificate: Certificate) -> Outcome:
    return Outcome(certificate.prediction, certificate.radius, certificate.n)


@dataclass(frozen=True)
class Smoothing:
    """What all loops have in common."""

    classifier: nn.Module
    num_classes: int
    sigma: float
    alpha: float
    n0: int
    batch_size: int
    seed: int

    def smoothed(self, n: int, classifier: Callable[[Tensor], Any] | None = None, **fields: Any) -> SmoothedClassifier:
        """Ours, with further fields of its configuration; `classifier` takes the place of the base classifier."""
        same = {name: getattr(self, name) for name in ("sigma", "alpha", "n0", "batch_size", "seed")}
        return SmoothedClassifier(
            classifier or self.classifier, self.num_classes, SmoothingConfig(n=n, **same, **fields)
        )


def logits_of(classifier: Callable[[Tensor], Any], batch: Tensor) -> Tensor:
    output = classifier(batch)
    return getattr(output, "logits", output)


class Cohen:
    """
    CERTIFY of Cohen et al. 2019 (arXiv:1902.02918) as its authors' code has it: one input at a time, fixed n0 and n,
    noise of `torch.randn` for each batch, one-class Clopper-Pearson. `bincount` stands for a loop in Python there.
    """

    def __init__(self, smoothing: Smoothing) -> None:
        self.smoothing = smoothing

    def certify(self, x: Tensor, n: int) -> Outcome:
        return self.outcome(self.counts(x, self.smoothing.n0), self.counts(x, n))

    def outcome(self, selection: NDArray, estimation: NDArray) -> Outcome:
        """From the votes that choose the class, and the others."""
        candidate, n = int(selection.argmax()), int(estimation.sum())
        votes = int(estimation[candidate])
        p_lower = float(stats.beta.ppf(self.smoothing.alpha, votes, n - votes + 1)) if votes else 0.0
        if p_lower < 0.5:
            return Outcome(ABSTAIN, 0.0, n)
        return Outcome(candidate, self.smoothing.sigma * float(stats.norm.ppf(p_lower)), n)

    @torch.no_grad()
    def counts(self, x: Tensor, n: int) -> NDArray:
        counts = np.zeros(self.smoothing.num_classes, dtype=np.int64)
        while n > 0:
            batch = x.repeat(min(self.smoothing.batch_size, n), *[1] * x.dim())
            noise = torch.randn_like(batch) * self.smoothing.sigma
            predictions = logits_of(self.smoothing.classifier, batch + noise).argmax(1)
            counts += np.bincount(predictions.cpu().numpy(), minlength=len(counts))
            n -= len(batch)
        return counts


class Art:
    """`PyTorchRandomizedSmoothing` of ART on the same base classifier, its logits as float32."""

    def __init__(self, smoothing: Smoothing, x: Tensor) -> None:
        self.batch_size = smoothing.batch_size
        self.smoother = PyTorchRandomizedSmoothing(
            model=_FloatLogits(smoothing.classifier).eval(),
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape),
            nb_classes=smoothing.num_classes,
            device_type="cpu" if x.device.type == "cpu" else "gpu",
            sample_size=smoothing.n0,
            scale=smoothing.sigma,
            alpha=smoothing.alpha,
        )

    def certify(self, x: Tensor, n: int) -> Outcome:
        (prediction,), (radius,) = self.smoother.certify(x.cpu().numpy()[None], n=n, batch_size=self.batch_size)
        return Outcome(int(prediction), float(radius), n)

    def outcome(self, selection: NDArray, estimation: NDArray) -> Outcome:
        """What its `certify` makes of given votes."""
        with patch.object(self.smoother, "_prediction_counts", side_effect=[selection, estimation]):
            return self.certify(torch.zeros(1), int(estimation.sum()))


class _FloatLogits(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: Tensor) -> Tensor:
        return logits_of(self.classifier, batch).float()


def synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def bare_passes(classifier: nn.Module, batch: Tensor, passes: int) -> float:
    """Seconds of forward passes whose logits nobody reads."""
    start = synchronized_time(batch.device)
    for _ in range(passes):
        classifier(batch)
    return synchronized_time(batch.device) - start


def batch_of(x: Tensor, smoothing: Smoothing) -> Tensor:
    """A batch of one input's noisy copies."""
    batch = x.repeat(smoothing.batch_size, *[1] * x.dim())
    return batch.add_(torch.randn_like(batch), alpha=smoothing.sigma)


class BarePasses:
    """Times of bare passes for each shape of some inputs, taken in between other work."""

    def __init__(self, smoothing: Smoothing, xs: Iterable[Tensor]) -> None:
        self.smoothing = smoothing
        self.examples = {tuple(x.shape): x for x in xs}
        self.seconds: dict[tuple[int, ...], list[float]] = {shape: [] for shape in self.examples}

    def run_for(self, seconds: float) -> None:
        """At least one pass, and more until `seconds` are over; of the shapes in turn."""
        end = time.perf_counter() + seconds
        while True:
            shape = min(self.seconds, key=lambda shape: len(self.seconds[shape]))
            self._run(shape)
            if time.perf_counter() >= end:
                return

    def total(self, samples: Iterable[tuple[Tensor, int]]) -> float:
        """Seconds of bare passes for so many samples of each input: medians, times samples over batch size."""
        for shape, times in self.seconds.items():
            while len(times) < PASSES_A_SHAPE:
                self._run(shape)
        medians = {shape: statistics.median(times) for shape, times in self.seconds.items()}
        return sum(medians[tuple(x.shape)] * count / self.smoothing.batch_size for x, count in samples)

    def _run(self, shape: tuple[int, ...]) -> None:
        batch = batch_of(self.examples[shape], self.smoothing)
        self.seconds[shape].append(bare_passes(self.smoothing.classifier, batch, 1))


class MemoryPeak:
    """
    How far memory rises inside the block above what it was at the start: `host`, the resident set, which a thread
    reads every `interval` seconds, and on a GPU `device`, what torch allocates there. In bytes.
    """

    def __init__(self, device: torch.device, interval: float = 0.002) -> None:
        self.is_cuda, self.interval = device.type == "cuda", interval
        self.host, self.device = 0, None

    def __enter__(self) -> MemoryPeak:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._start = _resident_bytes()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopped.set()
        self._thread.join()
        if self.is_cuda:
            self.device = torch.cuda.max_memory_allocated() - self._allocated

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            self.host = max(self.host, _resident_bytes() - self._start)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Loop:
    """
    Args:
        run (`Callable[[int], object]`):
            Certifies one input with so many samples, and one batch more that chooses the class.
        samples (`int`):
            How many.
        extra_batches (`int`):
            Batches that a call has in addition: ours checks once that rows are independent.
    """

    run: Callable[[int], object]
    samples: int
    extra_batches: int = 0


@dataclass(frozen=True)
class Speed:
    """
    Of a loop: `ratio` is its time over that of bare passes of as many rows in the same round, median, without its
    extra batch, `ratio_as_timed` with it. Memory is the peak less that of bare passes.
    """

    loop: str
    samples: int
    batch_size: int
    seconds: float
    samples_per_second: float
    ratio: float
    ratio_least: float
    ratio_most: float
    ratio_as_timed: float
    host_bytes: int
    device_bytes: int | None


def loops_of(
    smoothing: Smoothing, x: Tensor, ours: dict[str, dict[str, Any]], samples: int, art_bytes: float
) -> dict[str, Loop]:
    """Cohen's, ART's where it is installed, and ours with the fields of a configuration each."""
    cohen = Cohen(smoothing)
    found = {COHEN: Loop(lambda n: cohen.certify(x, n), samples)}
    fitting = int(art_bytes / (ART_BYTES_AN_ENTRY * x.numel())) // smoothing.batch_size * smoothing.batch_size
    if PyTorchRandomizedSmoothing is not None and fitting:
        art = Art(smoothing, x)
        found[ART] = Loop(lambda n: art.certify(x, n), min(samples, fitting))
    for name, fields in ours.items():
        found[name] = Loop(
            lambda n, fields=fields: smoothing.smoothed(n, **fields).certify(x), samples, extra_batches=1
        )
    return found


def alternate(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, round after round; each round begins with another one."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = synchronized_time(device)
            runs[name]()
            seconds[name].append(synchronized_time(device) - start)
    return seconds


def speeds_of(
    smoothing: Smoothing,
    x: Tensor,
    ours: dict[str, dict[str, Any]],
    *,
    batches: int,
    least_seconds: float,
    rounds: int,
    art_bytes: float,
) -> list[Speed]:
    """
    Times the loops on one input, interleaved with bare passes, and then their peak memory. All rows count: the class
    is chosen on one whole batch. There are `batches` batches, or as many as take bare passes `least_seconds`.
    """
    smoothing = replace(smoothing, n0=smoothing.batch_size)
    batch = batch_of(x, smoothing)
    bare_passes(smoothing.classifier, batch, 1)
    batches = max(batches, round(least_seconds / bare_passes(smoothing.classifier, batch, 1)))
    loops = loops_of(smoothing, x, ours, batches * smoothing.batch_size, art_bytes)
    for loop in loops.values():  # warms up
        loop.run(smoothing.batch_size)
    runs = {name: (lambda loop=loop: loop.run(loop.samples)) for name, loop in loops.items()}
    runs[BARE] = lambda: bare_passes(smoothing.classifier, batch, batches + 1)
    seconds = alternate(runs, rounds, x.device)
    peaks = {}
    for name, run in runs.items():
        with MemoryPeak(x.device) as peaks[name]:
            run()
    bare = [total / (batches + 1) for total in seconds[BARE]]
    return [_speed(name, loop, seconds[name], bare, peaks, smoothing) for name, loop in loops.items()]


def _speed(
    name: str,
    loop: Loop,
    seconds: Sequence[float],
    bare: Sequence[float],
    peaks: dict[str, MemoryPeak],
    smoothing: Smoothing,
) -> Speed:
    """`bare` are the seconds of a bare pass, round by round."""
    num_batches = loop.samples / smoothing.batch_size + 1
    as_timed = [s / (b * num_batches) for s, b in zip(seconds, bare, strict=True)]
    ratios = [ratio - loop.extra_batches / num_batches for ratio in as_timed]
    peak, of_bare = peaks[name], peaks[BARE]
    median = statistics.median(seconds)
    return Speed(
        loop=name,
        samples=loop.samples,
        batch_size=smoothing.batch_size,
        seconds=median,
        samples_per_second=(loop.samples + smoothing.n0) / median,
        ratio=statistics.median(ratios),
        ratio_least=min(ratios),
        ratio_most=max(ratios),
        ratio_as_timed=statistics.median(as_timed),
        host_bytes=peak.host - of_bare.host,
        device_bytes=None if peak.device is None else peak.device - of_bare.device,
    )
