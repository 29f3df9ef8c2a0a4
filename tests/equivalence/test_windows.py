"""Exact windows of ranks: selection, and counting as on a GPU, against a full sort of float64 products."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from spn4cir.data_gen import windows
from spn4cir.data_gen.match_pairs import draw_uniformly
from spn4cir.data_gen.windows import Partner, Window, bracket

N, E = 300, 64


def clustered(seed: int = 0) -> np.ndarray[Any, Any]:
    """Unit vectors: clusters, exact copies, and near copies whose float32 products cannot be told apart."""
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((8, E))[draw.integers(0, 8, N)] + 0.3 * draw.standard_normal((N, E))
    vectors[40:45] = vectors[3]  # equal: order is by position
    vectors[100:160] = vectors[99] + 2e-7 * draw.standard_normal((60, E))
    return np.ascontiguousarray((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float32"))


def by_the_definition(
    vectors: np.ndarray[Any, Any], lo: int, hi: int, k: int, seed: int, never: list[list[int]]
) -> Any:
    """Full float64 matrix, full stable sort, and the draws."""
    wide = vectors.astype("float64")
    scores = (wide[:, None] * wide[None]).sum(-1)
    found = []
    for n in range(len(vectors)):
        order = sorted((j for j in range(len(vectors)) if j != n), key=lambda j, n=n: (-scores[n, j], j))  # type: ignore[misc]
        ranks = [rank for rank in range(lo, hi) if order[rank - 1] not in never[n]]
        drawn = sorted(random.Random(f"{seed}/{n}").sample(ranks, min(k, len(ranks))))
        found.append([(order[rank - 1], rank, scores[n, order[rank - 1]]) for rank in drawn])
    return found


def drawn(window: Window, never: list[list[int]], rows: int) -> list[list[Partner]]:
    """All images, so many at once."""
    count = len(window.vectors)
    blocks = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
    return [
        partners
        for block in blocks
        for partners in window.draw(block, [str(n) for n in block], [never[n] for n in block])
    ]


def on_gpu(window: Window, never: list[list[int]], rows: int) -> list[list[Partner]]:
    """As it is done where scores are not on a CPU."""
    scores = window._all @ window._all.T
    scores.fill_diagonal_(-torch.inf)
    count = len(scores)
    out = []
    for start in range(0, count, rows):
        block = range(start, min(start + rows, count))
        some = scores[start : start + rows], block, [str(n) for n in block], [never[n] for n in block]
        out += window._partners(*some, by_counting=True)
    return out


@pytest.mark.parametrize("way", [drawn, on_gpu])
@pytest.mark.parametrize(("lo", "hi", "k"), [(1, 300, 299), (1, 20, 4), (100, 200, 3), (299, 300, 1)])
def test_partners_are_those_of_the_definition(way: Callable[..., Any], lo: int, hi: int, k: int) -> None:
    vectors, draw = clustered(), random.Random(0)
    never = [draw.sample(range(N), draw.choice([0, 0, 1, 5])) for _ in range(N)]
    expected = by_the_definition(vectors, lo, hi, k, 42, never)
    found = way(Window(vectors, lo, hi, k, 42), never, 77)
    assert [[p[:2] for p in row] for row in found] == [[p[:2] for p in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert np.allclose([p[2] for p in row], [p[2] for p in other], rtol=0, atol=1e-14)


def test_float32_alone_is_not_enough() -> None:
    """A sort of float32 products orders near copies otherwise: what is compared above can fail."""
    vectors = clustered()
    scores = torch.from_numpy(vectors @ vectors.T).fill_diagonal_(-torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    exact = by_the_definition(vectors, 1, N, N - 1, 42, [[]] * N)
    assert any(order[n, rank - 1] != other for n, row in enumerate(exact) for other, rank, _ in row)
    blind = Window(vectors, 1, N, N - 1, 42)
    blind.slack = 0.0
    with pytest.raises((AssertionError, IndexError)):
        assert [[p[:2] for p in row] for row in drawn(blind, [[]] * N, 77)] == [[p[:2] for p in row] for row in exact]


@pytest.mark.parametrize("rows", [1, 13, 299, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_neither_blocks_nor_threads_matter(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, before = clustered(1), torch.get_num_threads()
    monkeypatch.setattr(windows, "cpu_count", lambda: threads)
    try:
        torch.set_num_threads(threads)
        found = drawn(Window(vectors, 50, 250, 5, 7), [[]] * N, rows)
    finally:
        torch.set_num_threads(before)
    assert found == drawn(Window(vectors, 50, 250, 5, 7), [[]] * N, N)
    assert found != drawn(Window(vectors, 50, 250, 5, 8), [[]] * N, N)


def test_the_error_is_within_the_slack() -> None:
    """Products in float32 of a real width err less than is allowed for, and more than nothing."""
    draw = np.random.default_rng(3)
    vectors = draw.standard_normal((500, 768)) + 1.0  # of one sign mostly, so that rounding adds up
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float32")
    wide = vectors.astype("float64")
    error = np.abs(torch.from_numpy(vectors) @ torch.from_numpy(vectors).T - wide @ wide.T).max()
    assert 0 < error < Window(vectors, 1, 2, 1, 0).slack / 2


def test_a_bracket_holds_its_rank() -> None:
    scores = torch.from_numpy(clustered() @ clustered().T).fill_diagonal_(-torch.inf)
    for rank in (1, 2, 150, 299):
        low, high = bracket(scores, torch.full((N,), rank))
        at = scores.sort(dim=1, descending=True).values[:, rank - 1]
        assert (low < at).all() and (at <= high).all() and (high - low).max() < 1e-4


def test_uniform_draws() -> None:
    """Each free position once if all are wanted; by seed; and all equally often."""
    never = [[n % 7] for n in range(40)]
    every = draw_uniformly(range(40), [str(n) for n in range(40)], never, 40, 99, 1)
    assert every == [[j for j in range(40) if j not in (n, n % 7)] for n in range(40)]
    counts = np.zeros(40, int)
    for seed in range(200):
        for row in draw_uniformly(range(40), [str(n) for n in range(40)], [[]] * 40, 40, 2, seed):
            counts[row] += 1
    expected = 200 * 2
    assert ((counts - expected) ** 2 / expected).sum() < 80  # chi-square of 39 degrees: beyond that once in 10⁴
