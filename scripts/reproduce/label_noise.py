"""Wrong labels at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset


# `train_test_split` takes the first entries of the permutation of default_rng(seed): a stream of its own keeps the
# wrong labels from being those very examples.
STREAM = (1,)


def noisy_labels(labels: Sequence[int], num_classes: int, share: float, seed: int) -> list[int]:
    """`labels` with that share of them, rounded to a count, replaced by one of the other classes, all equally likely.

    Raises:
        ValueError: `share` is no share.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of wrong labels must be in [0, 1], got {share}")
    draws = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=STREAM))
    chosen = draws.permutation(len(labels))[: round(share * len(labels))]
    shifts = np.zeros(len(labels), dtype=int)
    shifts[chosen] = draws.integers(1, num_classes, len(chosen))
    return ((np.asarray(labels) + shifts) % num_classes).tolist()


def with_label_noise(part: Dataset, share: float, seed: int) -> Dataset:
    """`part` with such `labels`."""
    feature = part.features["labels"]
    labels = noisy_labels([int(label) for label in part["labels"]], feature.num_classes, share, seed)
    return part.remove_columns("labels").add_column("labels", labels).cast_column("labels", feature)
