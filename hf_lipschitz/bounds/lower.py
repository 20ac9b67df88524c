"""Lower bounds of Lipschitz constants, from points and directions found adversarially."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lipschitz.bounds.jacobians import Function, Linearized, Rows, gradient, norm


Evaluate = Callable[[tuple[Tensor, ...], Tensor], "_State"]

# Units of rounding that a computed ratio may be too large by, and the most that is taken off in short formats.
_UNITS, _MOST = 2.0**10, 0.5
# Pairs that are nearer, relative to their norms, are not looked at: their differences are rounding.
_NEAREST = 1e-4
# Lengths of the differences that confirm derivatives, in the usual one for a function of the size of its argument.
_DIFFERENCES, _DIFFERENCE_UNITS = (1.0, 1e-2, 1e-4), 4
# A step grows after a success and shrinks after a failure.
_FIRST, _GROW, _SHRINK = 0.5, 1.6, 0.3
# Rounds of `steps` at most from the best of all starts, and of products that make its direction exact; and the growth
# that the next round is worth.
_MORE_ROUNDS, _MORE_RTOL = 8, 1e-3
_POLISH_ROUNDS, _POLISH_RTOL = 24, 1e-10
# What the first starts are made of: x with features drawn together, x drawn to zero, x and noise.
_STARTS = [
    *(("noise", 0.0), ("flatten", 1e-4), ("noise", 1.0), ("shrink", 1e-4)),
    *(("noise", 10.0), ("noise", 0.1), ("flatten", 1e-9), ("noise", 100.0)),
]
_DECADES = {"noise": (-2.0, 2.0), "flatten": (-9.0, -1.0), "shrink": (-6.0, -1.0)}


def lipschitz_lower_bound(
    function: Function,
    x: Tensor,
    *,
    radius: float | None = None,
    starts: int = 8,
    steps: int = 20,
    power_iterations: int = 8,
    seed: int = 0,
) -> float:
    r"""A **lower bound** of the Lipschitz constant of a function, in Frobenius norms of whole tensors.

    The largest ratio found of one of the two kinds

    $$\frac{\|f(y) - f(z)\|_F}{\|y - z\|_F} \le L, \qquad \frac{\|J_f(y)v\|_F}{\|v\|_F} \le L,$$

    each computed at the end for whole tensors y, z and v. They are searched for from several starts: pairs by gradient
    ascent on the logarithm of their ratio (projected gradient ascent, Madry et al. 2018), points by gradient ascent on
    that of ‖J(y)v‖, which takes second derivatives, and v by the power method with the best combination of its
    iterates (Lanczos 1950). Where a gradient is zero, as for piecewise linear functions, the step is random. Rows that
    do not influence each other are searched side by side, and the best of them alone is moved in what is returned.

    The starts are x, x with noise of 1e-2 to 1e2 times its norm, x drawn to zero, and x with the entries of its last
    axis drawn to their mean, where a layer norm is steepest; in a ball, their projections.

    Rounding: ratios are computed in the dtype of x. With ε = 1024 units of the coarser of the dtypes of x and f(x),
    0.5 at most, ‖J(y)v‖ is lowered by ε‖J(y)v‖, and ‖f(y) - f(z)‖ by ε(‖f(y)‖ + ‖f(z)‖) and by ε(‖y‖ + ‖z‖) times the
    ratio; pairs with ‖y - z‖ < 1e-4 (1e-8 + ‖y‖) are not used. That is generous for a well-conditioned function, and
    no analysis of its arithmetic.

    From ‖J(y)v‖ the distance of J(y)v to the nearest of three central differences of `function` is also taken, and 4
    units of rounding of that difference: at kinks, and beside a `detach`, what autograd gives may be no derivative. In
    a ball these differences reach outside, by some 1e-5 of ‖y‖ at most in float64.

    Args:
        function (`Callable[[Tensor], Tensor]`):
            Deterministic, of tensors of the shape and dtype of x; differentiable twice by autograd where it is smooth.
            Attention runs in plain tensor operations, since the fused kernels cannot be differentiated twice.
        x (`Tensor` of shape `(batch, ...)`):
            Where to start, or the centre of the ball. float64 is advised.
        radius (`float`, *optional*):
            Of the closed ball around x, in the Frobenius norm of the whole tensor, that all points lie in. Without it
            the search is for the global constant.
        starts (`int`, *optional*, defaults to 8):
            Of each row.
        steps (`int`, *optional*, defaults to 20):
            Of each of the two ascents of each start, and of each round in which the best goes on.
        power_iterations (`int`, *optional*, defaults to 8):
            Products with JᵀJ at the beginning of each start, and of each round that makes the last v exact.
        seed (`int`, *optional*, defaults to 0):
            Of the noise. The global random state is not read.

    Returns:
        `float`: a **lower bound**, 0.0 if no change was found.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no batch axis, is empty or holds NaN or inf; `radius` is not positive and finite; a count is
            below 1; `function` is not finite at any start.
    """
    _check(x, radius, {"starts": starts, "steps": steps, "power_iterations": power_iterations})
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = x.detach().clone()
        generator = torch.Generator().manual_seed(seed)
        search = _Search(function, x, radius, steps, power_iterations, generator)
        found = [search.from_start(start) for index in range(starts) if (start := search.start(index)) is not None]
        if not found:
            raise ValueError("function gives NaN or inf at x and at all other starts: pass an x where it is finite")
        return search.finished(max(found, key=lambda best: best.value))


def _check(x: Tensor, radius: float | None, counts: dict[str, int]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}; convert it first, e.g. x.double()")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x must have shape (batch, ...) and entries, got {tuple(x.shape)}; x[None] adds an axis")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or inf; pass a finite input")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}; pass None for the global constant")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


@dataclass
class _State:
    """The value of each row, -1 where it is not finite, the points that it belongs to, and the gradients of its log.

    The points are (y,) with a unit direction v, or (y, z) with v that of y - z; all have the shape of the input.
    """

    values: Tensor
    points: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    v: Tensor

    def better(self, other: _State, rows: Rows) -> _State:
        """Row by row the state of the larger value."""
        is_better = other.values > self.values

        def pick(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(rows.where(is_better, b, a) for a, b in zip(ours, theirs, strict=True))

        (v,) = pick((self.v,), (other.v,))
        values = torch.maximum(self.values, other.values)
        return _State(values, pick(self.points, other.points), pick(self.gradients, other.gradients), v)


@dataclass
class _Best:
    """A lower bound, and the steepest point and direction found with it: whole tensors, of which one row is moved."""

    value: float
    row: int
    y: Tensor
    v: Tensor


class _Search:
    def __init__(
        self,
        function: Function,
        x: Tensor,
        radius: float | None,
        steps: int,
        power_iterations: int,
        generator: torch.Generator,
    ) -> None:
        self.function, self.x, self.radius = function, x, radius
        self.steps, self.power_iterations, self.generator = steps, power_iterations, generator
        at_x = self.values(x)
        self.eps = max(torch.finfo(x.dtype).eps, torch.finfo(at_x.dtype).eps)
        self.allowance = min(_MOST, _UNITS * self.eps)
        self.rows = Rows(x.shape[0] if self._has_separate_rows(at_x) else 1)
        norms = self.rows.norms(x)
        self.size = torch.where(norms > 0, norms, math.sqrt(x.numel() / self.rows.count))
        if radius is not None:
            self.size = torch.full_like(norms, radius)

    def values(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(y.clone())

    def _has_separate_rows(self, at_x: Tensor) -> bool:
        """Whether no row of f(x) changes when other rows of x do; two rows differ in a bit of their numbers."""
        batch = self.x.shape[0]
        if at_x.dim() == 0 or at_x.shape[0] != batch or not bool(torch.isfinite(at_x).all()):
            return False
        rows, number = Rows(batch), torch.arange(batch, device=self.x.device)
        noise = self._normal() * (self.radius or self.x.abs().max().item() or 1.0) / math.sqrt(4 * self.x.numel())
        for bit in range((batch - 1).bit_length()):
            for side in (0, 1):
                is_moved = (number >> bit) & 1 == side
                y = rows.where(is_moved, self.x + noise, self.x)
                if norm((self.values(y) - at_x)[~is_moved]) > self.allowance * norm(at_x):
                    return False
        return True

    def _normal(self) -> Tensor:
        noise = torch.randn(self.x.shape, generator=self.generator, dtype=torch.float64)
        return noise.to(self.x.device, self.x.dtype)

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def start(self, index: int) -> Tensor | None:
        """The start of a number, or None where the function is not finite; such rows go back to x if they can."""
        y = self._project(self._raw_start(index))
        rows, values = self.rows, self.values(y)
        is_finite = torch.isfinite(values.reshape(rows.count, -1)).all(-1)
        y = rows.where(is_finite, y, self.x)
        return y if bool(torch.isfinite(self.values(y)).all()) else None

    def _raw_start(self, index: int) -> Tensor:
        noise = self.rows.unit(self._normal()) * self.rows.column(self.size, self.x)
        if index < len(_STARTS):
            y, (kind, scale) = self.x, _STARTS[index]
        else:
            kind = ("noise", "flatten", "noise", "shrink")[index % 4]
            y, scale = self.x + noise, 10.0 ** self._uniform(*_DECADES[kind])
        if kind == "noise":
            return self.x + scale * noise
        return (y.mean(-1, keepdim=True) if kind == "flatten" else 0.0) * (1 - scale) + scale * y

    def _project(self, y: Tensor) -> Tensor:
        if self.radius is None:
            return y
        norms = self.rows.norms(y - self.x)
        # So far inside that the sum, rounded, is still in the ball.
        inner = max(0.0, self.radius - 8 * torch.finfo(y.dtype).eps * (norm(self.x) + self.radius))
        is_out = norms > inner
        back = self.x + self.rows.column(inner / torch.where(is_out, norms, 1), y) * (y - self.x)
        return self.rows.where(is_out, back, y)

    def from_start(self, start: Tensor) -> _Best:
        """Both ascents from one start: the second begins at the start, the pair or its middle, what is steepest."""
        at = Linearized(self.function, start)
        v = self.rows.direction(at, self._normal(), self.power_iterations)
        apart = self.rows.column(self.size, v) * 10.0 ** self._uniform(-2.0, 0.0)
        pair = self._ratio((start, self._project(start + apart * self._or_noise(v))), v)
        pair = self._ascended(self._ratio, pair)
        state = self._stretch((start,), v)
        for y in (*pair.points, self._project(sum(pair.points) / 2)):
            state = state.better(self._stretch((y,), pair.v), self.rows)
        state = self._ascended(self._stretch, state)
        best, row = self._best(state), int(pair.values.argmax())
        y, z = (self._alone(point, row, self.x) for point in pair.points)
        best.value = max(best.value, self._true_ratio(y, z))
        return best

    def _best(self, state: _State) -> _Best:
        row = int(state.values.argmax())
        y = self._alone(state.points[0], row, self.x)
        v = self._alone(state.v, row, torch.zeros_like(self.x))
        return _Best(self._true_stretch(y, v), row, y, v)

    def finished(self, best: _Best) -> float:
        """The ascent goes on from the best, in all rows at once, while that brings much; then v is made exact."""
        for _ in range(_MORE_ROUNDS):
            y, v = self._project(self._everywhere(best.y, best.row)), self._everywhere(best.v, best.row)
            after = self._best(self._ascended(self._stretch, self._stretch((y,), v)))
            if not after.value > best.value:
                break
            before, best = best, after
            if best.value < before.value * (1 + _MORE_RTOL):
                break
        return max(best.value, self._true_stretch(best.y, self._exact_direction(best)))

    def _exact_direction(self, best: _Best) -> Tensor:
        at, v, value = Linearized(self.function, best.y), best.v, 0.0
        for _ in range(_POLISH_ROUNDS):
            v = Rows(1).direction(at, v, max(2, self.power_iterations))
            before, value = value, norm(at.forwards(v))
            if not value > before * (1 + _POLISH_RTOL):
                break
        return v

    def _everywhere(self, t: Tensor, row: int) -> Tensor:
        return t if self.rows.count == 1 else t[row : row + 1].expand_as(t).clone()

    def _ascended(self, evaluate: Evaluate, state: _State) -> _State:
        factor = torch.full_like(state.values, _FIRST)
        for _ in range(self.steps):
            trial = evaluate(self._moved(state, factor), state.v)
            factor = torch.where(trial.values > state.values, _GROW * factor, _SHRINK * factor)
            state = state.better(trial, self.rows)
        return state

    def _moved(self, state: _State, factor: Tensor) -> tuple[Tensor, ...]:
        """A step along the gradients, over the length that changes the logarithm by `factor` at first order.

        It is at most `factor` times the size of x or of the ball. Without a gradient it is noise of any length.
        """
        rows = self.rows
        slopes = torch.stack([rows.norms(gradient) for gradient in state.gradients]).norm(dim=0)
        has_slope = slopes > 0
        slopes = torch.where(has_slope, slopes, 1)
        along = factor * torch.minimum(self.size, 1 / slopes) / slopes
        reach = self.size * 10.0 ** self._uniform(-2.0, 0.0)
        flat = torch.where(has_slope, 0, reach)
        ways = self._noisy_ways(state, reach) if bool(flat.any()) else state.gradients
        return tuple(
            self._project(p + rows.column(along, p) * gradient + rows.column(flat, p) * way)
            for p, gradient, way in zip(state.points, state.gradients, ways, strict=True)
        )

    def _noisy_ways(self, state: _State, reach: Tensor) -> tuple[Tensor, ...]:
        """Noise; for a point with that to where the ratio of the pair grows that is `reach` away along v and -v."""
        noise = tuple(self.rows.unit(self._normal()) for _ in state.points)
        if len(state.points) == 2:
            return noise
        (point,), beside = state.points, self.rows.column(reach, state.v) * state.v
        pair = self._ratio((self._project(point + beside), self._project(point - beside)), state.v)
        return (self.rows.unit(noise[0] + self.rows.unit(sum(pair.gradients))),)

    def _or_noise(self, v: Tensor) -> Tensor:
        return self.rows.where(self.rows.norms(v) > 0, v, self.rows.unit(self._normal()))

    def _stretch(self, points: tuple[Tensor, ...], v: Tensor) -> _State:
        """‖J(y)v‖ of each row after one more step of the power method."""
        at = Linearized(self.function, points[0])
        v = self.rows.unit(at.backwards(at.forwards(self._or_noise(v))))
        image = at.forwards(v)
        values = self.rows.norms(image)
        gradient = at.slope(v, self.rows.unit(image)) / self.rows.column(values, v)
        return self._state(values, (at.x,), (gradient,), v)

    def _ratio(self, points: tuple[Tensor, ...], v: Tensor) -> _State:
        """‖f(y) - f(z)‖/‖y - z‖ of each row."""
        y, z = (point.detach().requires_grad_() for point in points)
        distances = self.rows.norms(y - z)
        ratios = self.rows.norms(self.function(y.clone()) - self.function(z.clone())) / distances
        gradients = tuple(gradient(ratios.log().sum(), point) for point in (y, z))
        is_far = distances >= _NEAREST * (1e-8 + norm(self.x) + self.rows.norms(y))
        return self._state(torch.where(is_far, ratios, -1), (y, z), gradients, self.rows.unit((y - z).detach()))

    def _state(self, values: Tensor, points: tuple[Tensor, ...], gradients: tuple[Tensor, ...], v: Tensor) -> _State:
        values = torch.where(torch.isfinite(values), values, -1).detach()
        gradients = tuple(torch.nan_to_num(gradient, 0.0, 0.0, 0.0) for gradient in gradients)
        return _State(values, tuple(point.detach() for point in points), gradients, v)

    def _alone(self, t: Tensor, row: int, others: Tensor) -> Tensor:
        if self.rows.count == 1:
            return t
        alone = others.clone()
        alone[row] = t[row]
        return alone

    def _true_ratio(self, y: Tensor, z: Tensor) -> float:
        """A lower bound of the constant from whole tensors, 0 if they are too near or a value is not finite."""
        distance = norm(y - z)
        if not distance >= _NEAREST * (1e-8 + norm(y)):
            return 0.0
        at_y, at_z = self.values(y), self.values(z)
        rise = norm(at_y - at_z)
        loss = self.allowance * (norm(at_y) + norm(at_z) + rise / distance * (norm(y) + norm(z)))
        return max(0.0, (rise - loss) / distance) if math.isfinite(rise) else 0.0

    def _true_stretch(self, y: Tensor, v: Tensor) -> float:
        """A lower bound of the constant from whole tensors, 0 where differences do not confirm the derivative."""
        length = norm(v)
        if length == 0.0:
            return 0.0
        image = Linearized(self.function, y).forwards(v)
        rise, value = (1 - self.allowance) * norm(image), 0.0
        for scale in _DIFFERENCES:
            h = scale * self.eps ** (1 / 3) * (self.size.max().item() + norm(y)) / length
            high, low = self.values(y + h * v), self.values(y - h * v)
            rounding = _DIFFERENCE_UNITS * self.eps * (norm(high) + norm(low) + 2 * rise / length * norm(y)) / (2 * h)
            value = max(value, (rise - norm((high - low) / (2 * h) - image) - rounding) / length)
        return value
