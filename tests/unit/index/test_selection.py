"""Search against brute force: every score, every filter and every hit by the plainest code there is."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.made_index import draw_columns, draw_vectors, make_index
from spn4cir.errors import InputError
from spn4cir.index.local import Index
from spn4cir.index.searchable import Hit
from spn4cir.selection import Part, Selection, combine_vectors, pair_parts, parse_where

COUNT, SIZES, GONE = 300, (125, 150, 25), (3, 4, 130, 299)
WHERES: tuple[list[str], ...] = (
    [],
    ["category=dress"],
    ["category!=dress", "price<=20"],
    ["price>40"],
    ["sold=true", "category=dress|shirt"],
    ["price=7|8|9"],
    ["product!=p3"],
    ["category=nothing of that name"],
)


class Made(NamedTuple):
    index: Index
    vectors: Tensor
    columns: dict[str, list[Any]]


@pytest.fixture(scope="module", params=[1, 4])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    vectors, columns = draw_vectors(COUNT, request.param), draw_columns(COUNT)
    path = make_index(tmp_path_factory.mktemp("made") / "index", vectors, columns, SIZES, GONE)
    return Made(Index(path), vectors, columns)


def passes(condition: str, value: Any) -> bool:
    """One condition on one cell, written out."""
    column, operator, wanted = next(condition.partition(o) for o in ("!=", "<=", ">", "=") if o in condition)
    if operator in ("=", "!="):
        texts = {"true": True, "false": False}
        options = [texts.get(one, one) for one in wanted.split("|")]
        equal = value is not None and any(value == (float(o) if column == "price" else o) for o in options)
        return equal if operator == "=" else not equal
    return value is not None and (value <= float(wanted) if operator == "<=" else value > float(wanted))


def brute_force(
    made: Made, query: Tensor, s: Selection, where: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[tuple[str, float, tuple[str, ...]]]:
    """All scores, all rows, one loop."""
    ids = [f"i{n:03d}" for n in range(COUNT)]
    scores = torch.einsum("nke,e->nk", made.vectors.double(), query.double()).amax(1)
    live = [n for n in range(COUNT) if n not in GONE]
    draws = {n: int.from_bytes(__import__("hashlib").sha256(ids[n].encode()).digest()[:8], "big") for n in live}
    sample = scores[sorted(live, key=draws.__getitem__)[:1024]]
    allowed = [
        n
        for n in live
        if ids[n] not in exclude
        and all(passes(c, made.columns[c.split("=")[0].split("!")[0].split("<")[0].split(">")[0]][n]) for c in where)
    ]
    means = F.normalize(made.vectors.mean(1), dim=1)
    hits: list[tuple[int, list[int]]] = []
    groups = set()
    # scores of equal vectors are equal only to rounding: compare at nine digits, where made-up ones do not collide
    for n in sorted(allowed, key=lambda n: (-round(float(scores[n]), 7), ids[n])):
        score = float(scores[n])
        if len(hits) == s.k or (s.min_score is not None and score < s.min_score):
            break
        if s.min_z is not None and (score - sample.mean()) / sample.std(correction=0) < s.min_z:
            break
        if s.fold is not None:
            twins = [folded for m, folded in hits if float(means[m] @ means[n]) >= s.fold]
            if twins:
                twins[0].append(n)
                continue
        group = made.columns[s.group][n] if s.group else None
        if group is not None and group in groups:
            continue
        groups.add(group)
        hits.append((n, []))
    return [(ids[n], float(scores[n]), tuple(ids[m] for m in folded)) for n, folded in hits]


OPTIONS = list(
    itertools.product(
        (1, 10, 700), (None, 0.3), (None, 1.0), (None, 0.99), (None, "product", "category"), range(len(WHERES))
    )
)


@pytest.mark.parametrize("k", [1, 10, 700])
def test_search_equals_brute_force(made: Made, k: int) -> None:
    """Cut-offs, folding, groups, filters and left-out ids, in every combination."""
    for number, (own, min_score, min_z, fold, group, where) in enumerate(OPTIONS):
        if own != k:
            continue
        query = F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(number)), dim=0)
        exclude = ["i007", "i200"] if number % 3 == 0 else []
        selection = Selection(k, min_score, min_z, fold, group)
        found = made.index.search_vector(query, selection, WHERES[where], exclude)
        wanted = brute_force(made, query, selection, WHERES[where], exclude)
        assert [(hit.id, hit.folded) for hit in found] == [(i, folded) for i, _, folded in wanted], selection
        assert np.allclose([hit.score for hit in found], [score for _, score, _ in wanted], atol=1e-6)


def test_brute_force_can_tell_a_wrong_search(made: Made) -> None:
    """The control: another query, another cut-off or another filter gives other hits."""
    query = F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    found = [hit.id for hit in made.index.search_vector(query, Selection(10))]
    assert found != [i for i, *_ in brute_force(made, query.roll(1), Selection(10))]
    assert found != [i for i, *_ in brute_force(made, query, Selection(10, group="product", fold=0.5))]
    assert found != [i for i, *_ in brute_force(made, query, Selection(10), ["price<=20"])]


def test_groups_of_few_values_fetch_few_candidates(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a group has its hit, no other image of it is fetched."""
    counts, nearest = [], made.index.nearest
    monkeypatch.setattr(made.index, "nearest", lambda *given: counts.append(given[1]) or nearest(*given))
    query = made.vectors[42, 0]
    for k in (2, 30):
        found = made.index.search_vector(query, Selection(k, group="sold"))
        assert [hit.id for hit in found] == [i for i, *_ in brute_force(made, query, Selection(k, group="sold"))]
    assert max(counts) < COUNT / 2


def test_columns_of_hits(made: Made) -> None:
    """A hit says what the index knows about its image."""
    hit: Hit = made.index.search_vector(made.vectors[42, 0], Selection(1))[0]
    assert hit.id == "i042" and hit.columns == {name: values[42] for name, values in made.columns.items()}
    assert hit.path == made.index.path / "i042.png" and hit.score == pytest.approx(1)


def test_pairs_of_parts() -> None:
    """Weights of one are the composed query; what one side weighs more is added alone."""
    assert pair_parts([1.0], [1.0]) == [Part(0, 0, 1.0)]
    assert pair_parts([3.0], []) == [Part(0, None, 3.0)]
    assert pair_parts([1.0], [3.0]) == [Part(0, 0, 1.0), Part(None, 0, 2.0)]
    assert pair_parts([1.0, 1.0], [1.0]) == [Part(0, 0, 0.5), Part(1, 0, 0.5)]
    assert pair_parts([1.0, 3.0], [1.0]) == [
        Part(0, 0, 0.25),
        Part(1, 0, 0.75),
        Part(0, None, 0.5),
        Part(1, None, 1.5),
    ]
    assert sum(part.weight for part in pair_parts([0.5, 2.0], [1.0, 1.5])) == pytest.approx(2)


def test_combining_vectors() -> None:
    """Sums are normalised; a query of nothing is refused."""
    one, other = torch.eye(3)[0], torch.eye(3)[1]
    assert torch.allclose(combine_vectors(torch.stack([one, other]), [3, -4]), torch.tensor([0.6, -0.8, 0]))
    with pytest.raises(InputError, match="cancel each other out"):
        combine_vectors(torch.stack([one, one]), [1, -1])
    with pytest.raises(InputError, match="not finite"):
        combine_vectors(torch.tensor([[float("nan")] * 3]), [1])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("colour=red", "the index has no column 'colour'; columns: category, price"),
        ("category<5", "the column holds texts, < compares numbers"),
        ("price<cheap", "expected a number, got 'cheap'"),
        ("sold=maybe", "expected a boolean, got 'maybe'"),
        ("price", "expected COLUMN=VALUE"),
        ("=red", "expected COLUMN=VALUE"),
    ],
)
def test_filters_that_mean_nothing(where: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        parse_where([where], {"category": "text", "price": "number", "sold": "boolean"})


def test_filters_as_a_mapping() -> None:
    """The same as texts of equality."""
    kinds: Any = {"category": "text", "price": "number", "sold": "boolean"}
    given = {"category": ["dress", "shirt"], "price": 5, "sold": True}
    assert parse_where(given, kinds) == parse_where(["category=dress|shirt", "price=5", "sold=true"], kinds)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"fold": 1.5}, {"fold": -1.0}])
def test_selections_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Selection(**wrong)


def test_a_group_needs_its_column(made: Made) -> None:
    with pytest.raises(InputError, match="no column 'brand'"):
        made.index.search_vector(made.vectors[0, 0], Selection(group="brand"))
    with pytest.raises(InputError, match="a query has 16 numbers"):
        made.index.search_vector(torch.ones(7), Selection())


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    """The files of a foreign index name no picture elsewhere."""
    import pyarrow as pa
    from pyarrow import parquet

    vectors = draw_vectors(20)
    path = make_index(tmp_path / "index", vectors, draw_columns(20))
    file = next(path.glob("*/files.parquet"))
    table = parquet.read_table(file)
    place = table.column_names.index("path")
    parquet.write_table(table.set_column(place, "path", pa.array(["../../etc/passwd"] * 20)), file)
    with pytest.raises(InputError, match="no path below"):
        Index(path).search_vector(vectors[0, 0], Selection())
