"""Long lists of inputs, a window of them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from torch import Tensor


WINDOW = 128


class WindowOfInputs(NamedTuple):
    """Places in the list, and the inputs there."""

    places: range
    xs: list[Tensor]

    def digest(self) -> str:
        """Of the inputs' shapes and bits."""
        found = hashlib.sha256()
        for x in self.xs:
            found.update(str(tuple(x.shape)).encode())
            found.update(x.detach().cpu().float().contiguous().numpy().tobytes())
        return found.hexdigest()


def windows_of(
    encode: Callable[[int], Tensor], count: int, *, done: Container[int] = (), by_shape: bool = False
) -> Iterator[WindowOfInputs]:
    """
    Windows at fixed places, so that a run that is taken up again has those of the one before.

    Args:
        encode (`Callable[[int], Tensor]`):
            The input at a place.
        count (`int`):
            How many there are.
        done (`Container[int]`, *optional*):
            Places that need not be certified any more; windows of nothing else are left out.
        by_shape (`bool`, *optional*, defaults to `False`):
            Whether a window ends where the shape changes.
    """
    for first in range(0, count, WINDOW):
        places = range(first, min(first + WINDOW, count))
        if all(place in done for place in places):
            continue
        xs = [encode(place) for place in places]
        ends = [i for i in range(1, len(xs)) if by_shape and xs[i].shape != xs[i - 1].shape]
        for start, stop in zip([0, *ends], [*ends, len(xs)], strict=True):
            if any(place not in done for place in places[start:stop]):
                yield WindowOfInputs(places[start:stop], xs[start:stop])
