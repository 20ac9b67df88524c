"""Checks of the fields of configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


def check_fields(cls: type, values: dict[str, Any]) -> None:
    """Raises a ValueError where a key of `values` is no field of the dataclass."""
    fields = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}.")


def names(field: str, value: Any) -> tuple[str, ...]:
    """A tuple of strings, or a ValueError."""
    found = tuple(value)
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{field} must be a string or a non-empty list of strings, got {value!r}.")
    return found


def real(name: str, value: Any) -> float:
    """A number as a float, or a TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}.")
    return float(value)


def check_int(name: str, value: Any) -> None:
    """Raises a TypeError where `value` is no int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")


def check_name(field: str, value: Any, known: Iterable[str]) -> None:
    """Raises a ValueError, with the known names, where `value` is none of them."""
    if value not in list(known):
        raise ValueError(f"Unknown {field} {value!r}; known: {', '.join(known)}.")
