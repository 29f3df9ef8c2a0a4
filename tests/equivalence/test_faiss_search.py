"""What an index of faiss finds against what torch finds: exact ones the same, approximate ones most of it."""

import importlib
import random
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir import faiss_search, search
from spn4cir.errors import InputError
from spn4cir.faiss_search import Kind, Neighbours
from spn4cir.search import top_k

G, Q = 300, 41
KINDS = get_args(Kind)


def l2_normalize(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: dot products are exact in any order, and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def table(width: int, count: int = Q) -> Tensor:
    """(count, width) rows, each line padded with -1 to another length, one row named twice."""
    draw, lines = random.Random(width), []
    for n in range(count):
        real = draw.sample(range(G), 1 + n % (width - 1))
        lines.append(([real[0], *real] + [-1] * width)[:width])
    return torch.tensor(lines)


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """Equal scores, and equal rows where images were found."""
    held = ~wanted[0].isneginf()
    close = found[0].shape == wanted[0].shape and torch.allclose(found[0], wanted[0], rtol=0, atol=1e-6)
    padded = bool((found[1][~held] == -1).all())
    return close and padded and torch.equal(found[1][held], wanted[1][held])


@pytest.mark.parametrize("which", ["nothing", "excluded", "members", "both"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("vectors", [1, 3])
def test_exact_finds_what_torch_finds(
    vectors: int, stored: torch.dtype, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties everywhere, duplicates, several vectors an image, half precision; queries and gallery in ragged parts."""
    monkeypatch.setattr(faiss_search, "CHUNK", 8)
    monkeypatch.setattr(search, "BLOCK", 70 * vectors)
    monkeypatch.setattr(faiss_search, "BLOCK", 100 * vectors)
    query, gallery = integers(Q, 4), integers(G, vectors, 4, seed=1).to(stored)
    excluded = table(4) if which in ("excluded", "both") else None
    members = table(9) if which in ("members", "both") else None
    ours = Neighbours(gallery)
    for k in (1, 10, 100, G + 5):
        assert same(ours.top_k(query, k, excluded, members), top_k(query, gallery, k, excluded, members))
    if which != "nothing":  # negative control
        assert not same(ours.top_k(query, 10), top_k(query, gallery, 10, excluded, members))


@pytest.mark.parametrize("vectors", [1, 3])
def test_exact_finds_what_torch_finds_among_features(vectors: int) -> None:
    """Vectors as a backbone makes them, some images twice."""
    query, gallery = l2_normalize(Q, 32), l2_normalize(G, vectors, 32, seed=1)
    gallery[200:] = gallery[:100]
    excluded = table(3)
    ours = Neighbours(gallery)
    assert len(ours) == G and same(top_k(query, ours, 20, excluded), top_k(query, gallery, 20, excluded))
    assert not torch.equal(ours.top_k(query, 20, excluded)[1], top_k(query, gallery.roll(1, 0), 20, excluded)[1])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries torch is asked each time."""
    counts: list[int] = []

    def noted(part: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        counts.append(len(part))
        return top_k(part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(faiss_search, "top_k", noted)
    return counts


def test_exact_asks_torch_where_equal_scores_end_the_list(asked: list[int]) -> None:
    """A query whose k-th score is shared by more images than were fetched; the others are left to the index."""
    gallery = l2_normalize(G, 1, 8)
    gallery[50:250] = gallery[50]
    query = torch.stack([gallery[50, 0], -gallery[50, 0]])
    scores, rows = Neighbours(gallery).top_k(query, 5)
    assert rows[0].tolist() == [50, 51, 52, 53, 54] and asked == [1]
    assert same((scores, rows), top_k(query, gallery, 5))


def test_exact_knows_enough_without_torch(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All vectors of an image are near each other, so k images are found by no fewer than k · K of them."""
    query, gallery = (
        l2_normalize(Q, 32),
        F.normalize(l2_normalize(G, 1, 32, seed=1) + 0.01 * l2_normalize(G, 3, 32, seed=2), dim=-1),
    )
    excluded = table(4)
    wanted = top_k(query, gallery, 20, excluded)
    assert same(Neighbours(gallery).top_k(query, 20, excluded), wanted) and not asked
    monkeypatch.setattr(faiss_search, "SLACK", 1.0)  # negative control: were scores that coarse, none could be trusted
    assert same(Neighbours(gallery).top_k(query, 20, excluded), wanted) and asked == [Q]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_approximate_indexes_find_most(kind: Kind, vectors: int) -> None:
    """Most of the first ten, each with its exact score, in order, nothing that is left out; and all with all effort."""
    query, gallery = l2_normalize(Q, 16), l2_normalize(G, vectors, 16, seed=1)
    excluded = table(4)
    wanted, rows = top_k(query, gallery, 10, excluded)
    every = search.scores_of(query, gallery)

    def hits(effort: int) -> float:
        scores, found = Neighbours(gallery, kind, effort).top_k(query, 10, excluded)
        held = found >= 0
        torch.testing.assert_close(scores[held], every.gather(1, found.clamp(min=0))[held], rtol=0, atol=1e-6)
        assert bool((scores[:, :-1] >= scores[:, 1:]).all()) and bool(scores[~held].isneginf().all())
        for row, ours, skip in zip(rows.tolist(), found.tolist(), excluded.tolist(), strict=True):
            real = [n for n in ours if n >= 0]
            assert len(set(real)) == len(real) and not {*real} & {*skip} and len(row) == len(ours)
        return sum(len({*a} & {*b}) for a, b in zip(rows.tolist(), found.tolist(), strict=True)) / (10 * Q)

    assert hits(4 * G) > 0.99 and wanted.isfinite().all()
    if kind == "ivf":
        assert 0.05 < hits(1) < 0.9  # negative control: one cluster does not hold all


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indexes_are_the_same_each_time(kind: Kind) -> None:
    """One thread, one seed, two builds."""
    query, gallery = l2_normalize(Q, 16), l2_normalize(G, 1, 16, seed=1)
    faiss = importlib.import_module("faiss")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        one, other = (Neighbours(gallery, kind, 2).top_k(query, 10) for _ in range(2))
    finally:
        faiss.omp_set_num_threads(threads)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_list_that_is_too_short_is_padded() -> None:
    """One cluster of few images cannot fill the first hundred."""
    scores, rows = Neighbours(l2_normalize(G, 1, 16), "ivf", 1).top_k(l2_normalize(Q, 16, seed=1), 100)
    assert rows.shape == (Q, 100) and bool((rows == -1).any()) and bool((rows[:, 0] >= 0).all())
    assert torch.equal(rows == -1, scores.isneginf())
    assert all(line == sorted(line) for line in (rows == -1).int().tolist())  # padding comes last


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_come_by_row(kind: Kind) -> None:
    """Copies of an image have bitwise the same score, wherever they stand."""
    gallery = l2_normalize(60, 1, 37).repeat(3, 1, 1)
    scores, rows = Neighbours(gallery, kind, 200).top_k(l2_normalize(Q, 37, seed=1), 9)
    assert torch.equal(rows.view(Q, 3, 3), rows.view(Q, 3, 3)[:, :, :1] + torch.tensor([0, 60, 120]))
    assert torch.equal(scores.view(Q, 3, 3), scores.view(Q, 3, 3)[:, :, :1].expand(Q, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_searches(kind: Kind) -> None:
    """No query, no image, one image, and a k of none."""
    assert [tuple(one.shape) for one in Neighbours(l2_normalize(3, 1, 4), kind).top_k(l2_normalize(0, 4), 2)] == [
        (0, 2)
    ] * 2
    assert Neighbours(torch.zeros(0, 1, 4), kind).top_k(l2_normalize(2, 4), 3)[1].shape == (2, 0)
    assert Neighbours(l2_normalize(1, 1, 4), kind).top_k(l2_normalize(2, 4), 3)[1].tolist() == [[0], [0]]
    assert Neighbours(l2_normalize(3, 1, 4), kind).top_k(l2_normalize(2, 4), 0)[1].shape == (2, 0)
    everything = torch.tensor([[0, 1, 2]])
    assert Neighbours(l2_normalize(3, 1, 4), kind).top_k(l2_normalize(1, 4), 2, everything)[1].tolist() == [[-1, -1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float, kind: Kind) -> None:
    """By a broken gallery when the index is built, by a broken query when it is searched."""
    query, gallery = l2_normalize(2, 4), l2_normalize(3, 1, 4)
    ours = Neighbours(gallery.clone(), kind)
    gallery[1, 0, 2] = query[1, 2] = value
    with pytest.raises(ValueError, match="gallery is not finite"):
        Neighbours(gallery, kind)
    with pytest.raises(ValueError, match="finite"):
        ours.top_k(query, 2)


def test_unknown_indexes_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name names the right ones; without faiss one line says what to install."""
    with pytest.raises(ValueError, match="exact, ivf, hnsw"):
        Neighbours(l2_normalize(3, 1, 4), "flat")  # type: ignore[arg-type]
    monkeypatch.setitem(importlib.sys.modules, "faiss", None)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"pip install 'spn4cir\[faiss-cpu\]'"):
        Neighbours(l2_normalize(3, 1, 4))
