"""Projection onto balls, and the radii of attention layers with their calibration."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from hf_lipschitz.nn.attention import SMALLEST_RADIUS, BallRadii, clip_to_ball


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def exact_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double(), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [1e-3, 0.3, 7.0, 1e3])
@pytest.mark.parametrize("length", [1, 3, 64, 257])
def test_result_is_in_the_ball_as_stored_and_close_to_the_projection(
    dtype: torch.dtype, radius: float, length: int
) -> None:
    scales = torch.logspace(-3, 1, 200, dtype=torch.float64)[:, None] * radius / math.sqrt(length)
    x = (torch.randn(200, length, dtype=torch.float64) * scales).to(dtype)
    clipped = clip_to_ball(x, radius)
    assert clipped.dtype == dtype
    assert (exact_norms(clipped) <= radius).all()
    wide = torch.promote_types(dtype, torch.float32)
    expected = x.double() / torch.clamp(exact_norms(x)[:, None] / radius, min=1)
    tolerance = 4 * torch.finfo(dtype).eps + (length + 20) * torch.finfo(wide).eps
    subnormal = 2 * math.sqrt(length) * 2.0**-24 if dtype == torch.float16 else 0.0
    assert ((clipped.double() - expected).norm(dim=-1) <= tolerance * radius + subnormal).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_inside_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(50, 16).to(dtype)
    largest = exact_norms(x).max().item()
    assert torch.equal(clip_to_ball(x, largest * 1.02), x)
    assert torch.equal(clip_to_ball(x, math.inf), x)


def test_projection_is_the_nearest_point_and_does_not_expand() -> None:
    x, y = torch.randn(2, 500, 4, dtype=torch.float64) * 3
    px, py = clip_to_ball(x, 1.7), clip_to_ball(y, 1.7)
    assert ((px - py).norm(dim=-1) <= (x - y).norm(dim=-1) * (1 + 1e-12)).all()
    # The projection onto a convex set makes an obtuse angle with every point of it.
    assert (((x - px) * (py - px)).sum(-1) <= 1e-9).all()


def test_jacobian_is_that_of_the_projection() -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    unit = x / 5
    expected = 0.4 * (torch.eye(2, dtype=torch.float64) - torch.outer(unit, unit))
    jacobian = torch.func.jacrev(lambda x: clip_to_ball(x, 2.0))(x)
    torch.testing.assert_close(jacobian, expected)
    inside = torch.func.jacrev(lambda x: clip_to_ball(x, 6.0))(x)
    assert torch.equal(inside, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("radius", [1.0, math.inf, SMALLEST_RADIUS])
def test_zero_and_tiny_vectors_have_first_and_second_derivatives(radius: float) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1e-12, 1e-12], [1e20, 1e20]], requires_grad=True)
    clipped = clip_to_ball(x, radius)
    (first,) = torch.autograd.grad(clipped.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum() + 0 * x.sum(), x)
    assert clipped.isfinite().all()
    assert (exact_norms(clipped)[:3] <= radius).all()
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert torch.equal(first[0], torch.ones(2))


def test_vector_whose_square_overflows_is_inside_afterwards() -> None:
    clipped = clip_to_ball(torch.tensor([1e30, 1e30]), 2.0)
    assert exact_norms(clipped) <= 2


def test_autocast_does_not_change_the_norm() -> None:
    x = torch.randn(20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        clipped = clip_to_ball(x, 3.0)
    assert torch.equal(clipped, clip_to_ball(x, 3.0))


def kinds() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(scale * torch.randn(2, 3, 5, 8) for scale in (1.0, 2.0, 3.0))


def test_radii_are_infinite_at_first_and_set_one_by_one() -> None:
    balls = BallRadii()
    given = kinds()
    assert all(torch.equal(a, b) for a, b in zip(balls(*given), given, strict=True))
    balls.set_radii(key=0.1)
    query, key, value = balls(*given)
    assert torch.equal(query, given[0])
    assert torch.equal(value, given[2])
    assert exact_norms(key).max() <= 0.1
    assert balls.key <= 0.1
    assert (balls.query, balls.value) == (math.inf, math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_calibration_takes_the_largest_norm_and_clips_nothing_seen(dtype: torch.dtype, margin: float) -> None:
    balls = BallRadii()
    balls.set_radii(query=1e-3)
    batches = [tuple(x.to(dtype) for x in kinds()) for _ in range(4)]
    balls.begin_calibration()
    for batch in batches:
        assert all(torch.equal(a, b) for a, b in zip(balls(*batch), batch, strict=True))
    balls.end_calibration(margin)
    for index, radius in enumerate((balls.query, balls.key, balls.value)):
        largest = max(exact_norms(batch[index]).max().item() for batch in batches)
        slack = 3 * torch.finfo(dtype).eps + 1e-5 * (dtype != torch.float64) + 1e-6
        assert largest * (1 + margin) <= radius * (1 + 1e-7)
        assert radius <= largest * (1 + margin) * (1 + slack)
    for batch in batches:
        assert all(torch.equal(a, b) for a, b in zip(balls(*batch), batch, strict=True))


def test_calibration_on_zeros_gives_the_smallest_radius() -> None:
    balls = BallRadii()
    balls.begin_calibration()
    balls(*[torch.zeros(1, 2, 4)] * 3)
    balls.end_calibration(0.0)
    assert balls.query == pytest.approx(SMALLEST_RADIUS, rel=1e-6)
    balls.check()


def test_calibration_is_refused_without_data_or_with_wrong_data() -> None:
    balls = BallRadii()
    with pytest.raises(RuntimeError, match="without begin_calibration"):
        balls.end_calibration(0.1)
    balls.begin_calibration()
    with pytest.raises(RuntimeError, match="nothing passed"):
        balls.end_calibration(0.1)
    for wrong in (math.nan, math.inf):
        balls.begin_calibration()
        balls(*kinds())
        balls(torch.full((1, 4), wrong), torch.ones(1, 4), torch.ones(1, 4))
        balls(*kinds())
        with pytest.raises(ValueError, match="not finite"):
            balls.end_calibration(0.1)
    balls.begin_calibration()
    balls(*kinds())
    with pytest.raises(ValueError, match="margin"):
        balls.end_calibration(-0.1)
    assert balls.query == math.inf


@pytest.mark.parametrize("radius", [math.nan, -1.0, 0.0, 1e-13])
def test_what_is_no_radius_is_refused(radius: float) -> None:
    balls = BallRadii()
    with pytest.raises(ValueError, match="radius of the value"):
        balls.set_radii(value=radius)
    balls.radii[1] = radius
    with pytest.raises(ValueError, match="radius of the key"):
        balls.check()


def test_radii_keep_their_precision_when_the_model_is_cast_and_survive_copies() -> None:
    balls = BallRadii()
    balls.set_radii(query=1.001, key=2.003, value=3.007)
    radii = balls.radii.clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), balls)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        assert torch.equal(balls.radii, radii)
        assert balls.radii.dtype == torch.float32
    for other in (copy.deepcopy(balls), pickle.loads(pickle.dumps(balls))):
        assert torch.equal(other.radii, radii)
    loaded = BallRadii(device="meta")
    assert "meta" in repr(loaded)
    loaded.check()
    loaded.load_state_dict(balls.state_dict(), assign=True)
    assert torch.equal(loaded.radii, radii)
    assert "key=2.003" in repr(loaded)


def test_clipping_exports_and_compiles_whole() -> None:
    balls = BallRadii()
    balls.set_radii(query=0.5, value=2.0)
    given = kinds()
    expected = balls(*given)
    exported = torch.export.export(balls, given).module()
    assert all(torch.equal(a, b) for a, b in zip(exported(*given), expected, strict=True))
    compiled = torch.compile(balls, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), expected, strict=True))
