"""How a classifier is smoothed and certified: plain data, validated, with an exact JSON round trip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_lipschitz.bounds.result import LipschitzBound
from hf_lipschitz.certification.looks import check_looks
from hf_lipschitz.certification.noise import NOISE_BLOCK, NOISES
from hf_lipschitz.fields import check_fields, check_int, check_name, real
from hf_lipschitz.functional.simplex import SIMPLEX_MAPS


# Filled further by `register_certificate`, which imports this module.
CERTIFICATES: list[str] = ["two_class", "one_class", "class_partition", "lvm", "lipschitz", "deterministic"]
MEAN_BOUNDS = ("betting", "bernstein", "hoeffding", "subgaussian")

# Between these, sigma and every sample of the noise are normal float32 numbers.
SIGMA_MIN, SIGMA_MAX = 2.0**-100, 2.0**120


@dataclass(frozen=True)
class SmoothingConfig:
    r"""
    How a classifier is smoothed and certified. Everything in it is fixed before the input is seen: choosing any of it
    per input certifies two classes on overlapping balls.

    Args:
        sigma (`float`):
            Standard deviation of the noise, in the unit of the input that is certified. The default, 0, is for
            `"deterministic"` alone.
        n0 (`int`, *optional*, defaults to `100`):
            Samples that choose the class. They are used for nothing else.
        n (`int`, *optional*, defaults to `10_000`):
            Samples that bound its probability; with `radii` or `gain` the most of them.
        alpha (`float`, *optional*, defaults to `1e-3`):
            One-sided probability, at most 0.5, that a certificate is wrong.
        batch_size (`int`, *optional*, defaults to `100`):
            Rows of every forward pass, rounded up to whole blocks of 100. It does not change the noise.
        seed (`int`, *optional*, defaults to `0`):
            Any integer; the noise is a function of (seed, example index, stage, block).
        certificate (`str`, *optional*, defaults to `"two_class"`):
            `"two_class"`, `"one_class"` (Cohen et al. 2019), `"class_partition"`, `"lvm"` (Delattre et al. 2024),
            `"lipschitz"` for scores with a known Lipschitz constant, or a registered name. `"deterministic"` certifies
            the classifier itself by its Lipschitz constant, without noise: `sigma` is 0, and the samples are not read.
        simplex_map (`str`, *optional*, defaults to `"softmax"`):
            Map from logits to scores, used by certificates on scores: `"softmax"`, `"sparsemax"` or a registered name.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits before the simplex map.
        mean_bound (`str`, *optional*, defaults to `"betting"`):
            Of certificates on scores: `"betting"`, `"bernstein"` (Maurer and Pontil 2009, as in LVM-RS),
            `"hoeffding"`, or `"subgaussian"` for `"lipschitz"`.
        noise (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"`; `"exact"`, the same without rounding errors, for images of 8 bits; `"laplace"` or
            `"uniform"`, whose radii are of ℓ1 balls; or a registered name.
        radii (`Sequence[float]`, *optional*):
            Samples an input only until it is decided which of these radii it is certified for.
        gain (`float`, *optional*):
            Samples an input only until the radius can hardly grow by this much any more.
        looks (`Sequence[int]`, *optional*):
            Where the counts are looked at with `radii` or `gain`: multiples of 100, and `n` as the last one. Defaults
            to 100, 200, 400, 800, 1600, 3000, 6000, 10 000, 20 000, 40 000, 100 000 up to `n`.
        num_splits (`int`, *optional*, defaults to `1`):
            Parts in which each batch goes through the base classifier, where it does not fit into memory; a divisor of
            the batch size.
        score_lipschitz (`LipschitzBound`, *optional*):
            For `"lipschitz"`: of `lipschitz_bound`, for the map from the noised input to the logits, everywhere. The
            pipeline computes it if it is missing.

    Raises:
        `TypeError`, `ValueError`: a field has a wrong type or value; the message names the field and the fix.
    """

    sigma: float = 0.0
    n0: int = 100
    n: int = 10_000
    alpha: float = 1e-3
    batch_size: int = NOISE_BLOCK
    seed: int = 0
    certificate: str = "two_class"
    simplex_map: str = "softmax"
    temperature: float = 1.0
    mean_bound: str = "betting"
    noise: str = "gaussian"
    radii: tuple[float, ...] | None = None
    gain: float | None = None
    looks: tuple[int, ...] | None = None
    num_splits: int = 1
    score_lipschitz: LipschitzBound | None = None

    def __post_init__(self) -> None:
        for name in ("sigma", "alpha", "temperature"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        for name in ("n0", "n", "batch_size", "seed", "num_splits"):
            check_int(name, getattr(self, name))
        for name in ("n0", "n", "batch_size", "num_splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_name("certificate", self.certificate, CERTIFICATES)
        check_name("simplex_map", self.simplex_map, SIMPLEX_MAPS)
        check_name("mean_bound", self.mean_bound, MEAN_BOUNDS)
        check_name("noise", self.noise, NOISES)
        self._check_numbers()
        self._check_stopping()
        self._check_lipschitz()

    @property
    def rows(self) -> int:
        """Rows of every forward pass: `batch_size` in whole noise blocks."""
        return math.ceil(self.batch_size / NOISE_BLOCK) * NOISE_BLOCK

    @property
    def is_sequential(self) -> bool:
        """Whether an input is sampled only until something is decided."""
        return self.radii is not None or self.gain is not None

    def _check_numbers(self) -> None:
        if self.certificate == "deterministic" and self.sigma != 0:
            raise ValueError(f"certificate='deterministic' has no noise: leave sigma out, got {self.sigma}.")
        if self.certificate != "deterministic" and not (SIGMA_MIN <= self.sigma <= SIGMA_MAX):
            raise ValueError(
                f"sigma must be positive and representable in float32 ({SIGMA_MIN} to {SIGMA_MAX}), got {self.sigma}."
            )
        if not (0 < self.alpha <= 0.5):
            raise ValueError(
                f"alpha must be in (0, 0.5], got {self.alpha}: it is the probability of a wrong certificate, and "
                "alpha > 0.5 is refused."
            )
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}.")
        if self.rows % self.num_splits:
            raise ValueError(f"num_splits must divide the {self.rows} rows of a batch, got {self.num_splits}.")

    def _check_stopping(self) -> None:
        if self.radii is not None:
            radii = tuple(real("radii", radius) for radius in _sequence("radii", self.radii))
            if not radii or any(not 0 <= radius < math.inf for radius in radii) or sorted(set(radii)) != list(radii):
                raise ValueError(f"radii must increase, finite and at least 0, got {radii}.")
            object.__setattr__(self, "radii", radii)
        if self.gain is not None:
            object.__setattr__(self, "gain", real("gain", self.gain))
            if not 0 < self.gain < math.inf:
                raise ValueError(f"gain must be positive and finite, got {self.gain}.")
        if self.looks is not None:
            looks = tuple(_sequence("looks", self.looks))
            for look in looks:
                check_int("looks", look)
            if not self.is_sequential:
                raise ValueError("looks need a reason to stop: give radii or gain as well, or leave looks out.")
            check_looks(looks, self.n)
            object.__setattr__(self, "looks", looks)

    def _check_lipschitz(self) -> None:
        bound = self.score_lipschitz
        is_lipschitz = self.certificate == "lipschitz"
        if self.mean_bound == "subgaussian" and not is_lipschitz:
            raise ValueError("mean_bound='subgaussian' needs certificate='lipschitz', for a constant of the scores.")
        if is_lipschitz and self.noise != "gaussian":
            raise ValueError(f"certificate='lipschitz' is for noise='gaussian', got {self.noise!r}.")
        if bound is None:
            return
        if not is_lipschitz:
            raise ValueError("score_lipschitz is read by certificate='lipschitz' alone; leave it out.")
        if not isinstance(bound, LipschitzBound):
            raise TypeError(
                f"score_lipschitz must be what lipschitz_bound returns, a proved bound, got {type(bound).__name__}: "
                "an estimate, as of verify_lipschitz, certifies nothing."
            )
        if not bound.is_sound or bound.radius is not None or bound.log_value == math.inf:
            raise ValueError(
                "score_lipschitz must be sound, finite and global, for noise reaches everywhere: call lipschitz_bound "
                "without radius."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        bound = self.score_lipschitz
        known = None if bound is None else {"log_value": bound.log_value, "wrt": bound.wrt, "shape": bound.shape}
        return {**values, **lists, "score_lipschitz": known}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SmoothingConfig:
        """
        Inverse of `to_dict`.

        Raises:
            `ValueError`: a key is not a field, or `sigma` is missing.
        """
        check_fields(cls, values)
        if "sigma" not in values:
            raise ValueError("SmoothingConfig needs sigma, the standard deviation of the noise.")
        bound = values.get("score_lipschitz")
        if isinstance(bound, dict):
            shape = None if bound["shape"] is None else tuple(bound["shape"])
            values = {**values, "score_lipschitz": LipschitzBound(bound["log_value"], wrt=bound["wrt"], shape=shape)}
        return cls(**values)


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers, got {value!r}.")
    return value
