"""The protocol of modules whose constants are set from data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Calibrated(Protocol):
    """A module that watches what passes through it and sets its constant from that.

    Between the two calls the module computes the function it computes with no constant set, so that what it sees is
    what the original model does. The constants live in buffers of the module itself.
    """

    def begin_calibration(self) -> None:
        """Starts to watch, and forgets what an earlier calibration saw."""
        ...

    def end_calibration(self, margin: float) -> None:
        """Sets the constants so that what was seen would pass unchanged, with a relative `margin`, and stops watching.

        Raises:
            RuntimeError: nothing passed since; the constants are then what they were.
            ValueError: `margin` is negative or not finite, or what passed was not finite.
        """
        ...


def calibrated_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of `model` that follows the protocol, each once, with its dotted name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Calibrated))
