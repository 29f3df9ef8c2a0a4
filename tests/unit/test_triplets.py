"""A table of triplets says of itself what a list of the same triplets says, and holds no object for each."""

import gc
import pickle
import random
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spn4cir import triplets as module
from spn4cir.batches import KnownTargets, TripletSampler
from spn4cir.triplets import TripletTable, join_triplets, named_images, shuffle
from spn4cir.types import Triplet

IDS = [f"i{n}" for n in range(60)]
IDENTITY = {image_id: n // 2 for n, image_id in enumerate(IDS)}
WORDS = ["a", "b", "é c", ""]
ORDER = [4, 8, 7, 9, 1, 2, 3, 0, 6, 5]


def rows(count: int, whole: bool = False) -> list[dict[str, Any]]:
    """Rows as a table has them: with nulls, empty texts and lists of several, unless they are whole."""
    chance = random.Random(count)
    return [
        {
            "reference": chance.choice(IDS if whole else [*IDS, None]),
            "targets": chance.sample(IDS, 1 if whole else chance.choice([1, 1, 2])),
            "texts": [chance.choice(WORDS[:3])] if whole else chance.choices(WORDS, k=chance.choice([0, 1, 2])),
            "negatives": None if whole else chance.choices(IDS, k=chance.choice([0, 1, 3])) or None,
        }
        for _ in range(count)
    ]


def as_list(given: list[dict[str, Any]]) -> list[Triplet]:
    parts = [[tuple(v for v in row[name] or () if v) for name in ("targets", "texts", "negatives")] for row in given]
    return [Triplet(r["reference"], t, m, negatives=n) for r, (t, m, n) in zip(given, parts, strict=True)]


def as_table(given: list[dict[str, Any]], chunk: int = 7, kind: Any = None) -> TripletTable:
    """In chunks, as files have them."""
    kind = kind or pa.string()
    lists = pa.list_(kind)
    schema = pa.schema({"reference": kind, "targets": lists, "texts": lists, "negatives": lists})
    table = pa.Table.from_batches(pa.Table.from_pylist(given, schema).to_batches(max_chunksize=chunk), schema)
    return TripletTable.from_columns({name: table[name] for name in schema.names})


@pytest.fixture(params=[16, 64, 1000])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several sizes, the last one ragged or all in one."""
    monkeypatch.setattr(module, "BLOCK", request.param)


def agree(table: Any, other: list[Triplet]) -> None:
    """Everything that training asks."""
    assert len(table) == len(other) and list(table) == other
    assert list(named_images(table)) == list(named_images(other))
    known, expected = KnownTargets(table, IDENTITY), KnownTargets(other, IDENTITY)
    assert vars(known) == vars(expected) and list(known._targets) == list(expected._targets)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_table_and_a_list_agree(whole: bool, kind: Any) -> None:
    """As a whole, in slices, without some images, and with others behind."""
    given = rows(500, whole)
    table, other = as_table(given, kind=kind), as_list(given)
    agree(table, other)
    agree(table[100:400:3], other[100:400:3])
    assert table[-1] == other[-1] and table[3:9][2] == other[5]
    skipped = {"i3", "i7"}
    few, rest = table.without_images(skipped), [t for t in other if not skipped & set(t.image_ids)]
    assert 0 < len(rest) < len(other)
    agree(few, rest)
    agree(few[5:50], rest[5:50])
    assert join_triplets(few, []) is few  # no object for each row
    more = [Triplet("i1", ("i2",), ("x", "y"), generated=True), Triplet("i1", ("i4",), ("x",), generated=True)]
    agree(join_triplets(few, more), rest + more)
    annotated, generated = join_triplets(few, more).split_rows()  # type: ignore[attr-defined]
    assert annotated.tolist() == list(range(len(rest))) and generated.tolist() == [len(rest), len(rest) + 1]
    agree(pickle.loads(pickle.dumps(few)), rest)
    with pytest.raises(IndexError):
        table[len(table)]
    with pytest.raises(ValueError, match="forwards"):
        table[::-1]


def test_texts_alone_are_lists_of_one() -> None:
    """Columns of texts, without one of negatives."""
    column = pa.chunked_array([["a", "b"], ["c"]])
    table = TripletTable.from_columns({"reference": column, "targets": column, "texts": column})
    assert list(table) == [Triplet(i, (i,), (i,)) for i in "abc"] and table[1:].image_ids == ["b", "c"]


def test_hashes_that_collide_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """They only let more rows be looked at."""
    monkeypatch.setattr(module, "_hash", lambda values: np.ones(len(values), np.uint64))
    given = rows(300)
    assert vars(KnownTargets(as_table(given), IDENTITY)) == vars(KnownTargets(as_list(given), IDENTITY))


@pytest.mark.parametrize(("row", "found"), [
    ({"targets": []}, (4, "targets")), ({"targets": [""]}, (4, "targets")),
    ({"reference": None, "texts": [""]}, (4, "texts")), ({"reference": None}, None), ({"texts": None}, None),
])  # fmt: skip
def test_incomplete_rows(row: dict[str, Any], found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, and what it lacks."""
    monkeypatch.setattr(module, "BLOCK", 3)
    given = rows(9, whole=True)
    given[4].update(row)
    assert as_table(given).find_incomplete() == found


def test_draws() -> None:
    """Uniform, decided by the words of a row or by its targets alone; inf where the reference is the target."""
    given = rows(1000, whole=True)
    table = as_table(given)
    drawn, by_target = table.draws(by_target=False), table.draws(by_target=True)
    same = np.array([[row["reference"]] == row["targets"] for row in given])
    assert same.any() and (np.isinf(drawn) == same).all() and (np.isinf(by_target) == same).all()
    assert len(set(by_target[~same])) == 60 and len(set(drawn[~same])) > 900
    assert abs((drawn < 0.1).mean() - 0.1) < 0.03 and drawn.min() >= 0
    assert (as_table(given[::-1], chunk=50).draws(by_target=False)[::-1] == drawn).all()


def test_batches_of_a_table() -> None:
    """Each row once an epoch, another order in each, the share of generated ones; the same for all processes."""
    annotated, generated = np.arange(70, dtype=np.uint32), np.arange(70, 100, dtype=np.uint32)
    mixed = TripletSampler(annotated, generated, 8, 0.25, seed=1)
    batches = np.array(mixed.batches(0))
    assert batches.shape == (11, 8) and ((batches >= 70).sum(axis=1) == 2).all()
    assert len({*batches[:, :6].ravel().tolist()}) == 66 and (np.array(mixed.batches(1)) != batches).any()
    whole = TripletSampler(annotated, generated, 10, None, seed=1)
    assert sorted(np.array(whole.batches(3)).ravel().tolist()) == list(range(100))
    shares = [TripletSampler(annotated, generated, 8, 0.25, 1, (rank, 2)) for rank in (0, 1)]
    for one, other, batch in zip(*shares, batches, strict=True):
        assert [item for _, item in (*one, *other)] == batch.tolist() and type(one[0][1]) is int


def test_an_order_is_for_ever() -> None:
    """Neither a new version of NumPy nor the size of a number moves it."""
    items = np.arange(10, dtype=np.uint32)
    assert shuffle(items, "1/0/order").tolist() == shuffle(items.astype(np.int64), "1/0/order").tolist() == ORDER


def test_no_object_for_each_row() -> None:
    """200,000 rows: what training asks leaves no 200,000 Python objects, nor their memory."""
    count = 200_000
    numbers = pa.array(np.random.default_rng(0).integers(0, 1000, 2 * count)).cast(pa.string())
    texts = pa.array(np.arange(count)).cast(pa.string())
    identity = {str(n): n for n in range(1000)}
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    columns = {"reference": numbers[:count], "targets": numbers[count:], "texts": texts}
    table = TripletTable.from_columns({name: pa.chunked_array([values]) for name, values in columns.items()})
    known, images = KnownTargets(table, identity), table.image_ids
    sampler = TripletSampler(*table.split_rows(), 100, None, seed=0)
    batch = next(iter(sampler))
    few = table.take(np.flatnonzero(table.draws(by_target=False) > 0.1))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    gc.collect()
    assert len(gc.get_objects()) - before < 5000 and len(images) == 1000 and len(batch) == 100
    assert known.width == 0 and 0.8 * count < len(few) < count
    # rows' numbers and the order of an epoch; an object takes 16 bytes at the least, a list 56; and the names of images
    assert kept < 20 * count + 100 * len(images)
    assert len(list(table[:10])) == 10
