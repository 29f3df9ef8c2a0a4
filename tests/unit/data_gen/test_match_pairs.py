"""Pairs from a window of similarity ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_gen import match_pairs as step
from data_gen.files import read_jsonl, write_jsonl
from data_gen.settings import GenerateConfig
from spn4cir.errors import InputError
from spn4cir.types import Dataset, Triplet

IDS = [f"i{n}" for n in range(23)]
# Small whole numbers: products are exact in any block size, and there are ties.
VECTORS = torch.randint(-3, 4, (23, 5), generator=torch.Generator().manual_seed(0)).float()
ANNOTATED = [("i0", "i1"), ("i1", "i0"), ("i4", "i7"), *[("i9", f"i{n}") for n in range(23) if n not in (9, 3)]]


def dataset(annotated: list[tuple[str, str]] = ANNOTATED) -> Dataset:
    return cast(Dataset, SimpleNamespace(name="x", triplets=lambda: [Triplet(r, t, ("x",)) for r, t in annotated]))


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given vectors instead of a model."""

    def encode(config: GenerateConfig, data: Dataset, ids: list[str]) -> Tensor:
        return VECTORS[[IDS.index(i) for i in ids]]

    monkeypatch.setattr(step, "encode", encode)


def matched(
    folder: Path, data: Dataset | None = None, copies: dict[str, str] | None = None, **settings: Any
) -> list[dict]:
    """Rows of pairs.jsonl."""
    config = GenerateConfig(output=str(folder), **settings)
    rows = [{"image_id": i, "pixels": i, "canonical": i} for i in IDS]
    rows += [{"image_id": i, "pixels": c, "canonical": c} for i, c in (copies or {}).items()]
    write_jsonl(config.file("images.jsonl"), rows)
    step.match_pairs(config, data or dataset())
    return read_jsonl(config.file("pairs.jsonl"))


def naive(lo: int, hi: int) -> list[tuple[str, str, int, float]]:
    """All pairs of the window by the definition: others by falling score, equal ones in order."""
    found = []
    for i, reference in enumerate(IDS):
        others = [j for j in range(len(IDS)) if j != i]
        others.sort(key=lambda j: -float(VECTORS[i] @ VECTORS[j]))
        for rank, j in enumerate(others, 1):
            if lo <= rank < hi and (reference, IDS[j]) not in ANNOTATED:
                found.append((reference, IDS[j], rank, float(VECTORS[i] @ VECTORS[j])))
    return found


def as_tuples(rows: list[dict]) -> list[tuple[str, str, int, float]]:
    return [(r["reference"], r["target"], r["rank"], r["similarity"]) for r in rows]


@pytest.mark.parametrize(("lo", "hi"), [(1, 23), (1, 2), (5, 12), (22, 23)])
def test_whole_window_equals_the_naive_loop(tmp_path: Path, lo: int, hi: int) -> None:
    """With as many partners as the window holds, the pairs are those of the plain loop, ranks and similarities too."""
    expected = naive(lo, hi)
    assert as_tuples(matched(tmp_path, window=[lo, hi], pairs_per_image=hi - lo)) == expected
    assert expected


def test_draws_lie_in_the_window(tmp_path: Path) -> None:
    """A draw is a subset of the window's pairs: so many for each image, no self, no annotated pair, no pair twice."""
    rows = as_tuples(matched(tmp_path, window=[3, 12], pairs_per_image=4))
    allowed = naive(3, 12)
    assert set(rows) <= set(allowed) and len(set(rows)) == len(rows)
    for i in IDS:
        assert sum(r[0] == i for r in rows) == min(4, sum(a[0] == i for a in allowed))
    assert not [r for r in rows if r[0] == r[1] or (r[0], r[1]) in ANNOTATED]


@pytest.mark.parametrize("rows", [1, 7, 22, 23])
def test_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Any number of images compared at once gives the same pairs."""
    whole = matched(tmp_path / "whole", window=[2, 15])
    monkeypatch.setattr(step, "ROWS", rows)
    assert matched(tmp_path / "parts", window=[2, 15]) == whole


def test_deterministic_by_seed(tmp_path: Path) -> None:
    """The same seed draws the same pairs, byte for byte; another seed others."""
    first = matched(tmp_path / "a", window=[1, 20])
    assert matched(tmp_path / "b", window=[1, 20]) == first
    assert (tmp_path / "a" / "pairs.jsonl").read_bytes() == (tmp_path / "b" / "pairs.jsonl").read_bytes()
    assert matched(tmp_path / "c", window=[1, 20], seed=7) != first


def test_copies_of_annotated_images_count(tmp_path: Path) -> None:
    """An annotated pair that names a copy is the pair of the canonical images: it is not made again."""
    rows = matched(tmp_path, dataset([("copy of i2", "i5")]), {"copy of i2": "i2"}, window=[1, 23], pairs_per_image=22)
    pairs = {(r["reference"], r["target"]) for r in rows}
    assert ("i2", "i6") in pairs and ("i2", "i5") not in pairs


def test_a_window_beyond_the_images(tmp_path: Path) -> None:
    """[1, 24) would need 23 others of 23 images: an InputError with the window and how many there are."""
    with pytest.raises(InputError, match=r"\[1, 24\).* 22 other images"):
        matched(tmp_path, window=[1, 24])
    assert not (tmp_path / "pairs.jsonl").exists()


def test_done_until_something_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same settings are done; another window, or another annotated pair, is not."""
    matched(tmp_path)
    capsys.readouterr()
    for expected, keys in ((True, {}), (False, {"window": [2, 9]}), (False, {"data": dataset([])})):
        matched(tmp_path, **keys)  # type: ignore[arg-type]
        assert ("is done" in capsys.readouterr().out) == expected
