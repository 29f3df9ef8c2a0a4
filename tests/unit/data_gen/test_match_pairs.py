"""Pairs from a window of similarity ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from spn4cir.data_gen import match_pairs as step
from spn4cir.data_gen.match_pairs import ranks_of
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl
from spn4cir.types import Triplet

IDS = [f"i{n}" for n in range(23)]
VECTORS = np.random.default_rng(0).integers(-3, 4, (23, 5)).astype("float32")
VECTORS[5] = VECTORS[6] = VECTORS[19]  # ties
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
ANNOTATED = [("i0", "i1"), ("i1", "i0"), ("i4", "i7"), *[("i9", f"i{n}") for n in range(23) if n not in (9, 3)]]
CATEGORY = {i: "odd" if n % 2 else "even" for n, i in enumerate(IDS)}


def dataset(annotated: list[tuple[str, str]] = ANNOTATED) -> Dataset:
    triplets = [Triplet(r, (t,), ("x",)) for r, t in annotated]
    return cast(Dataset, SimpleNamespace(name="x", triplets=lambda: triplets, category=lambda i: CATEGORY.get(i, "")))


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given vectors instead of a model."""

    def vectors(config: GenerateConfig, data: Dataset, ids: list[str], processes: object) -> Any:
        return (
            VECTORS[[IDS.index(i) for i in ids]] if config.window or config.max_image_similarity is not None else None
        )

    monkeypatch.setattr(step, "_vectors", vectors)


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


def naive(lo: int, hi: int, pools: list[list[str]] | None = None) -> list[tuple[str, str, int, float]]:
    """All pairs of the window by the definition: others by falling score, equal ones in order."""
    found = []
    for pool in pools or [IDS]:
        for reference in pool:
            others = [j for j in pool if j != reference]
            others.sort(key=lambda j: -score(reference, j))
            for rank, j in enumerate(others, 1):
                if lo <= rank < hi and (reference, j) not in ANNOTATED:
                    found.append((reference, j, rank, round(score(reference, j), 4)))
    return found


def score(one: str, other: str) -> float:
    a, b = (VECTORS[IDS.index(i)].astype("float64").tolist() for i in (one, other))
    return sum(x * y for x, y in zip(a, b, strict=True))


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
def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Any number of images compared at once gives the same pairs."""
    whole = matched(tmp_path / "whole", window=[2, 15])
    monkeypatch.setattr(step, "ROWS", rows)
    assert matched(tmp_path / "parts", window=[2, 15]) == whole
    assert (tmp_path / "parts" / "pairs.jsonl").read_bytes() == (tmp_path / "whole" / "pairs.jsonl").read_bytes()


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


def test_by_category(tmp_path: Path) -> None:
    """Ranks count within the category, and no pair leaves it."""
    pools = [[i for i in IDS if CATEGORY[i] == c] for c in ("even", "odd")]
    rows = as_tuples(matched(tmp_path, window=[2, 6], pairs_per_image=4, pool="category"))
    assert sorted(rows) == sorted(naive(2, 6, pools))
    assert rows != naive(2, 6)


def test_small_categories_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There are 12 even images and 11 odd ones; ranks up to 11 are of the even ones alone, and beyond, of none."""
    rows = matched(tmp_path, window=[1, 12], pool="category", pairs_per_image=11)
    even = [i for i in IDS if CATEGORY[i] == "even"]
    assert as_tuples(rows) == naive(1, 12, [even]) and rows
    assert "11 images are left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="no category has images enough"):
        matched(tmp_path, window=[1, 13], pool="category")


def test_categories_that_are_not_there(tmp_path: Path) -> None:
    data = cast(Dataset, SimpleNamespace(triplets=list, category=lambda i: ""))
    with pytest.raises(InputError, match="no categories"):
        matched(tmp_path, data, pool="category", window=[1, 3])


@pytest.mark.parametrize(("window", "others", "expected"), [
    ([1, 20], 100, (1, 20)), ([0.4, 0.8], 100, (41, 81)), ([0, 0.5], 10, (1, 6)), ([0.5, 1.0], 10, (6, 11)),
    ([0.001, 0.002], 10, (1, 2)), ([0.999, 1.0], 10, (10, 11)), ([0.5, 0.9], 1, (1, 2)), (None, 5, None),
])  # fmt: skip
def test_fractions(window: list[float] | None, others: int, expected: tuple[int, int] | None) -> None:
    """Ranks as they are given, or as parts of the others: never empty, never beyond."""
    assert ranks_of(GenerateConfig(window=window), others) == expected


def test_only_annotated_references(tmp_path: Path) -> None:
    """Each image may be a target, but only references of annotated triplets are paired."""
    rows = matched(tmp_path, window=[1, 6], references="annotated")
    assert {row["reference"] for row in rows} <= {"i0", "i1", "i4", "i9"}
    assert {row["target"] for row in rows} - {t for _, t in ANNOTATED[:3]}


def test_uniform_draws_need_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank, no similarity; every other image but annotated targets can be drawn, each once."""
    rows = matched(tmp_path, window=None, pairs_per_image=22)
    pairs = [(row["reference"], row["target"]) for row in rows]
    assert sorted(pairs) == sorted((i, j) for i in IDS for j in IDS if i != j and (i, j) not in ANNOTATED)
    assert {(row["rank"], row["similarity"]) for row in rows} == {(None, None)}
    few = matched(tmp_path, window=None, pairs_per_image=2)
    assert len(few) == 2 * 22 + 1 and len({row["target"] for row in few}) > 15


def test_filter_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too similar pairs go, with the count; then so many are kept of the rest, drawn by seed."""
    every = matched(tmp_path / "a", window=[1, 23], pairs_per_image=22)
    bound = sorted(row["similarity"] for row in every)[len(every) // 2]
    rows = matched(tmp_path / "b", window=[1, 23], pairs_per_image=22, max_image_similarity=bound)
    plain = [{k: v for k, v in row.items() if k != "made_by"} for row in every if row["similarity"] <= bound]
    assert [{k: v for k, v in row.items() if k != "made_by"} for row in rows] == plain and len(rows) < len(every)
    assert f"{len(every) - len(rows)} since image similarity above {bound}" in capsys.readouterr().out
    few = matched(tmp_path / "c", window=[1, 23], pairs_per_image=22, pairs=10)
    other = matched(tmp_path / "d", window=[1, 23], pairs_per_image=22, pairs=10, seed=1)
    assert len(few) == len(other) == 10 and few != other
    with pytest.raises(InputError, match="no pair is left"):
        matched(tmp_path / "e", window=[1, 23], max_image_similarity=-1.0)


def test_the_filter_knows_uniform_draws_too(tmp_path: Path) -> None:
    """A bound on similarity asks for vectors even where the draws do not."""
    rows = matched(tmp_path, window=None, pairs_per_image=22, max_image_similarity=0.0)
    assert rows and all(row["similarity"] <= 0 and row["rank"] is None for row in rows)
    assert all(row["similarity"] == round(score(row["reference"], row["target"]), 4) for row in rows)


def test_the_report_counts_pairs(tmp_path: Path) -> None:
    """window.json: all ordered pairs of the images, and those that were drawn."""
    import json

    rows = matched(tmp_path, window=[2, 9])
    report = json.loads((tmp_path / "window.json").read_text())
    assert sum(report["histogram"]["all"]) == 23 * 22 and sum(report["histogram"]["window"]) == len(rows)
    assert report["quantiles"][0][1] == min(row["similarity"] for row in rows)
