from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from hf_lipschitz.certification.host_numbers import CHUNK, HostNumbers


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Whatever a test sets, the next one has what this one found."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(stream: np.random.Generator, out: np.ndarray) -> None:
    stream.standard_normal(dtype=np.float32, out=out)


def drawn(threads: int, size: tuple[int, ...] = (3, CHUNK + 5), entropy: int = 7) -> torch.Tensor:
    torch.set_num_threads(threads)
    return HostNumbers(entropy).draw(size, normal)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    assert drawn(1).shape == (3, CHUNK + 5)
    assert drawn(1).dtype == torch.float32
    for threads in (2, 3, 8):
        assert torch.equal(drawn(threads), drawn(1))


def test_chunks_and_draws_are_independent() -> None:
    source = HostNumbers(7)
    first, second = (source.draw((2, CHUNK), normal) for _ in range(2))
    chunks = torch.cat([first, second, drawn(2, (2, CHUNK), entropy=8)]).numpy()
    assert np.abs(np.corrcoef(chunks) - np.eye(6)).max() < 5 / np.sqrt(CHUNK)
    assert stats.kstest(chunks[:, :2000].ravel(), "norm").pvalue > 0.01
    assert len(np.unique(chunks[:, :8].ravel())) == 48


def test_short_draws_take_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lipschitz.certification.host_numbers.ThreadPoolExecutor", None)
    assert drawn(2, (100, 784)).shape == (100, 784)
    with pytest.raises(TypeError):
        drawn(2, (CHUNK + 1,))


def test_what_fails_in_a_thread_is_raised() -> None:
    def fail(stream: np.random.Generator, out: np.ndarray) -> None:
        raise ValueError("no numbers")

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="no numbers"):
        HostNumbers(0).draw((2 * CHUNK,), fail)
