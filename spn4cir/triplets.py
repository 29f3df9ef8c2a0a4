"""A table of triplets that stays on disk: a sequence that makes a ``Triplet`` when it is asked for one.

What training must know of all triplets is computed over blocks of rows, without a Python object for each.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from spn4cir.types import Triplet

if TYPE_CHECKING:
    import pyarrow

Numbers: TypeAlias = npt.NDArray[Any]
BLOCK = 1 << 18  # rows that are in memory at once
MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # odd constants of the splitmix64 generator


LISTS = ("targets", "texts", "negatives")


class TripletTable(Sequence[Triplet]):
    """Triplets in the rows of an Arrow table, which may be memory-mapped and hold many millions.

    Args:
        table: columns ``reference`` (texts) and ``targets``, ``texts``, ``negatives`` (lists of texts), ``generated``
            (booleans); nulls and empty texts count as absent.
        rows: rows of the table that belong to the sequence, ascending; None for all.
    """

    def __init__(self, table: pyarrow.Table, rows: Numbers | None = None):
        self.table = table
        self.rows = np.arange(table.num_rows, dtype=np.uint32) if rows is None else rows
        # kept since table.column() takes time for each of its thousands of chunks
        self._columns = {name: table.column(name) for name in ("reference", *LISTS, "generated")}

    def __reduce__(self) -> tuple[Any, ...]:
        return TripletTable, (self.table, self.rows)

    @classmethod
    def from_columns(cls, columns: Mapping[str, pyarrow.ChunkedArray]) -> TripletTable:
        """Annotated triplets, whose columns hold texts, or lists of texts; nothing is copied."""
        import pyarrow as pa

        count = len(columns["reference"])
        lists = {name: _as_lists(columns.get(name, pa.chunked_array([pa.nulls(count)]))) for name in LISTS}
        generated = pa.repeat(pa.scalar(False), count)
        return cls(pa.table({"reference": columns["reference"], **lists, "generated": generated}))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The triplet at a position; of a slice a table."""
        if isinstance(index, slice):
            if index.step is not None and index.step < 1:
                raise ValueError("a table of triplets is read forwards")
            return TripletTable(self.table, self.rows[index])
        row = int(self.rows[index])
        found = {name: column[row].as_py() for name, column in self._columns.items()}
        lists: Any = {name: tuple(filter(None, found[name] or ())) for name in LISTS}
        return Triplet(found["reference"] or None, generated=found["generated"], **lists)

    def take(self, positions: Numbers) -> TripletTable:
        """The triplets at some positions, ascending."""
        return TripletTable(self.table, self.rows[positions])

    def _blocks(self) -> Iterator[pyarrow.Table]:
        """The rows in order, a bounded number of them at a time, each column in one piece."""
        for start in range(0, self.table.num_rows, BLOCK):
            first, last = (bisect_left(self.rows, at) for at in (start, start + BLOCK))
            part = self.table.slice(start, BLOCK)
            if last - first < len(part):
                part = part.combine_chunks().take(self.rows[first:last].astype(np.int64) - start)
            if len(part):
                yield part.combine_chunks()

    def split_rows(self) -> tuple[Numbers, Numbers]:
        """Positions of annotated and of generated triplets; the generated ones come last."""
        generated = self.table.column("generated").combine_chunks()
        first = bisect_left(self.rows, len(generated) - generated.true_count)
        return np.arange(first, dtype=np.uint32), np.arange(first, len(self), dtype=np.uint32)

    @cached_property
    def image_ids(self) -> list[str]:
        """All images that triplets name, in the order of triplets and of ``Triplet.image_ids``."""
        import pyarrow as pa

        found: dict[str, None] = {}
        for block in self._blocks():
            parts = [_flat(block, name) for name in ("reference", "targets", "negatives")]
            order = np.argsort(np.concatenate([3 * rows + n for n, (_, rows) in enumerate(parts)]), kind="stable")
            encoded = pa.concat_arrays([values for values, _ in parts]).dictionary_encode()
            codes = encoded.indices.to_numpy()[order]
            first = np.sort(np.unique(codes, return_index=True)[1])
            found.update(dict.fromkeys(encoded.dictionary.take(codes[first]).to_pylist()))
        return list(found)

    def without_images(self, skipped: Collection[str]) -> TripletTable:
        """The triplets that name none of some images."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted, kept = pa.array(list(skipped), pa.string()), []
        for block in self._blocks():
            keep = np.ones(len(block), bool)
            for name in ("reference", "targets", "negatives"):
                values, rows = _flat(block, name)
                keep[rows[pc.is_in(values, wanted).to_numpy(zero_copy_only=False)]] = False
            kept.append(keep)
        return self.take(np.flatnonzero(np.concatenate(kept))) if kept else self

    def find_incomplete(self) -> tuple[int, str] | None:
        """Position of the first triplet that lacks a target, or both reference and text, and the column."""
        before = 0
        for block in self._blocks():
            for column, names in (("targets", ("targets",)), ("texts", ("texts", "reference"))):
                lacking = np.flatnonzero(sum(_counts(block, name) for name in names) == 0)
                if len(lacking):
                    return before + int(lacking[0]), column
            before += len(block)
        return None

    def widths(self) -> tuple[int, int, bool]:
        """The largest counts of targets and of hard negatives, and whether some triplets lack reference or text."""
        positives, negatives, is_partial = 1, 0, False
        for block in self._blocks():
            counts = {name: _counts(block, name) for name in ("reference", *LISTS)}
            positives = max(positives, int(counts["targets"].max()))
            negatives = max(negatives, int(counts["negatives"].max()))
            is_partial |= not (counts["reference"].all() and counts["texts"].all())
        return positives, negatives, is_partial

    def ambiguous(self, identity: Mapping[str, int]) -> TripletTable:
        """The triplets of queries that may have several targets: of equal reference pixels, and text by its hash."""
        parts: tuple[list[Numbers], ...] = ([], [], [], [])  # of each query: hash, triplet, least and greatest target
        before = 0
        for block in self._blocks():
            reference = np.zeros(len(block), np.uint64)  # 0 where there is none
            values, rows = _flat(block, "reference")
            reference[rows] = _numbers(values, identity) + 1
            values, rows = _flat(block, "targets")
            starts, numbers = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]), _numbers(values, identity)
            low, high = np.minimum.reduceat(numbers, starts), np.maximum.reduceat(numbers, starts)
            values, rows = _flat(block, "texts")
            lacking = np.flatnonzero(_counts(block, "texts") == 0)
            hashed = np.r_[_hash(values), np.zeros(len(lacking), np.uint64)]
            row = np.r_[rows, lacking]
            found = (hashed + reference[row] * np.uint64(MIX[0]), row + before, low[row], high[row])
            for part, values, kind in zip(parts, found, (np.uint64, np.int32, np.int32, np.int32), strict=True):
                part.append(values.astype(kind))
            before += len(block)
        if not before:
            return self
        keys, row, low, high = (np.concatenate([part.pop(0) for _ in range(len(part))]) for part in parts)
        order = np.argsort(keys)
        keys = keys[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        several = np.minimum.reduceat(low[order], starts) != np.maximum.reduceat(high[order], starts)
        return self.take(np.unique(row[order[np.repeat(several, np.diff(np.r_[starts, len(keys)]))]]))

    def draws(self, by_target: bool) -> Numbers:
        """A number in [0, 1) of each triplet, decided by its targets or all its words; inf if reference is target."""
        import pyarrow.compute as pc

        drawn: list[Numbers] = [np.zeros(0)]
        for block in self._blocks():
            sums = np.zeros(len(block), np.uint64)
            for mix, name in zip(MIX, ("targets",) if by_target else ("targets", "reference", "texts"), strict=False):
                values, rows = _flat(block, name)
                np.add.at(sums, rows, _hash(values) * np.uint64(mix))
            values, rows = _flat(block, "targets")
            first = values.take(np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]))
            same = pc.equal(block.column("reference").combine_chunks(), first).fill_null(False)
            is_reference = same.to_numpy(zero_copy_only=False) & (_counts(block, "targets") == 1)
            drawn.append(np.where(is_reference, np.inf, (sums >> np.uint64(11)) * 2.0**-53))
        return np.concatenate(drawn)


def named_images(triplets: Sequence[Triplet]) -> Iterable[str]:
    """All images that triplets name, each once, in their order."""
    if isinstance(triplets, TripletTable):
        return triplets.image_ids
    return dict.fromkeys(i for triplet in triplets for i in triplet.image_ids)


def join_triplets(triplets: Sequence[Triplet], others: Sequence[Triplet]) -> Sequence[Triplet]:
    """Triplets and then others, which are few enough for a list; a table where the first are one."""
    if not isinstance(triplets, TripletTable):
        return [*triplets, *others]
    if not others:
        return triplets
    import pyarrow as pa

    table = triplets.table
    rows = [{name: getattr(t, name) for name in table.column_names} for t in others]
    whole = pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)])
    added = np.arange(table.num_rows, whole.num_rows, dtype=np.uint32)
    return TripletTable(whole, np.concatenate([triplets.rows, added]))


Items: TypeAlias = list[int] | Numbers  # item numbers: an array for the rows of a table, whose order NumPy draws


def item_numbers(*parts: Sequence[int] | Numbers) -> Items:
    """The numbers of all parts, one after the other: an array of them where the parts are arrays."""
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [item for part in parts for item in part]


def shuffle(items: Items, key: str) -> Items:
    """The same numbers in an order that the key decides."""
    if isinstance(items, list):
        return random.Random(key).sample(items, len(items))
    shuffled = items.copy()
    chance = np.random.RandomState(np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), np.uint32))
    chance.shuffle(shuffled)  # this generator's stream is the same in all versions of NumPy
    return shuffled


def _as_lists(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    """A column of texts as one of lists of one text each, by offsets alone; lists stay."""
    import pyarrow as pa

    if pa.types.is_null(column.type):
        return column.cast(pa.list_(pa.string()))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column
    offsets = [pa.array(np.arange(len(chunk) + 1, dtype=np.int32)) for chunk in column.chunks]
    lists = [pa.ListArray.from_arrays(at, chunk) for at, chunk in zip(offsets, column.chunks, strict=True)]
    return pa.chunked_array(lists, pa.list_(column.type))


def _flat(block: pyarrow.Table, name: str) -> tuple[pyarrow.Array, Numbers]:
    """The texts of a column that are not empty, in one array, and the row of each."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = block.column(name).combine_chunks()
    rows = np.arange(len(values))
    if name != "reference":
        values, rows = values.flatten(), pc.list_parent_indices(values).to_numpy()
    given = pc.greater(pc.binary_length(values), 0).fill_null(False)
    return values.filter(given).cast(pa.string()), rows[given.to_numpy(zero_copy_only=False)]


def _counts(block: pyarrow.Table, name: str) -> Numbers:
    """How many texts each row has in a column."""
    return np.bincount(_flat(block, name)[1], minlength=len(block))


def _numbers(values: pyarrow.Array, number: Mapping[str, int]) -> Numbers:
    encoded = values.dictionary_encode()
    known = [number[value] for value in encoded.dictionary.to_pylist()]
    return np.asarray(known, np.int64)[encoded.indices.to_numpy()]  # type: ignore[no-any-return]


def _hash(values: pyarrow.Array) -> Numbers:
    """64 bits of each text, the same on every machine."""
    from pandas.util import hash_array

    return np.asarray(hash_array(values.to_numpy(zero_copy_only=False)))
