"""What a certification returns, and the curve that a set of them gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


ABSTAIN = -1


@dataclass(frozen=True)
class Certificate:
    r"""
    With probability at least 1 - `alpha` over the noise drawn, the smoothed classifier returns `prediction` on the
    OPEN ball of `radius` around the input. The statement is about the smoothed classifier in exact arithmetic, not
    about the base classifier. With `method="deterministic"` it is about the classifier itself, and certain.

    Args:
        prediction (`int`):
            The class, or `ABSTAIN` (-1). Abstention and radius 0 go together.
        radius (`float`):
            Certified radius: a sound lower bound on the distance to another prediction.
        norm (`str`):
            Norm of the ball, `"l2"` or `"l1"`.
        unit (`str`):
            Unit of the radius and of `sigma`: what the noise was added to.
        p_lower (`float`, *optional*):
            Lower confidence bound on the smoothed score of the candidate class, also on abstention; `None` if the
            method has none.
        p_upper (`float`, *optional*):
            Upper confidence bound on the smoothed score of every other class; `None` if the method has none.
        alpha (`float`):
            One-sided probability that the certificate is wrong.
        n (`int`):
            Samples behind the bounds, without those that chose the class.
        method (`str`):
            Name of the certificate.
        stop_reason (`str`):
            Why sampling stopped.
        sigma (`float`):
            Standard deviation of the noise.
        seed (`int`), index (`int`):
            With the configuration, what it takes to draw the same noise again.
        label (`str`, *optional*):
            Name of the predicted class.
        score_lipschitz (`float`, *optional*):
            Lipschitz constant of the scores, where the radius uses one.
        noise (`str`, *optional*):
            Name of the noise; with `"exact"` alone the statement covers float32 rounding of the noisy inputs.
        dtype (`str`, *optional*):
            Of the base classifier's weights, to which noisy float32 inputs are cast; `None` where it has none.

    Raises:
        `ValueError`: the radius is negative or not finite, or contradicts `prediction`.
    """

    prediction: int
    radius: float
    norm: str
    unit: str
    p_lower: float | None
    p_upper: float | None
    alpha: float
    n: int
    method: str
    stop_reason: str
    sigma: float
    seed: int
    index: int
    label: str | None = None
    score_lipschitz: float | None = None
    noise: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.radius < math.inf):
            raise ValueError(f"A certified radius is finite and at least 0, got {self.radius}.")
        if self.prediction < ABSTAIN:
            raise ValueError(f"prediction must be a class or ABSTAIN = {ABSTAIN}, got {self.prediction}.")
        if (self.prediction == ABSTAIN) != (self.radius == 0):
            raise ValueError(
                f"Abstention and radius 0 go together, got prediction {self.prediction} and radius {self.radius}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields by name; `json.dumps` of them and `from_dict` give back an equal certificate, bit for bit."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """
        Inverse of `to_dict`.

        Raises:
            `ValueError`: a key is unknown or missing.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(name for name in set(fields) - set(values) if fields[name].default is dataclasses.MISSING)
        if unknown or missing:
            raise ValueError(f"Not a certificate: unknown keys {unknown}, missing keys {missing}.")
        return cls(**values)


def certified_accuracy(
    certificates: Sequence[Certificate], labels: Sequence[int], radii: Iterable[float]
) -> list[float]:
    r"""
    Share of the inputs whose certificate has the right class and a radius above r, for each r. Strictly above,
    because balls are open; an abstention, whose radius is 0, counts as wrong.

    Args:
        certificates (`Sequence[Certificate]`):
            One an input, all with the same norm and unit.
        labels (`Sequence[int]`):
            True classes, in the same order.
        radii (`Iterable[float]`):
            Radii, at least 0, in the certificates' unit.

    Returns:
        `list[float]`: one share in [0, 1] for each radius.

    Raises:
        `ValueError`: no certificates, as many labels as certificates are not given, a radius is negative or NaN, or
            norms or units differ.
    """
    radii = [float(radius) for radius in radii]
    if len(certificates) == 0:
        raise ValueError("certified_accuracy needs at least one certificate.")
    if len(certificates) != len(labels):
        raise ValueError(f"Got {len(certificates)} certificates and {len(labels)} labels; give one label each.")
    if not all(radius >= 0 for radius in radii):
        raise ValueError(f"Radii must be at least 0, got {radii}.")
    if len({(certificate.norm, certificate.unit) for certificate in certificates}) > 1:
        raise ValueError("The certificates differ in norm or unit; draw one curve for each.")
    correct = [
        certificate.radius
        for certificate, label in zip(certificates, labels, strict=True)
        if certificate.prediction == int(label)
    ]
    return [sum(certified > radius for certified in correct) / len(certificates) for radius in radii]
