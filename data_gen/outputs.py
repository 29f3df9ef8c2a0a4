"""The files that hold triplets: JSONL with everything, the published JSON shape, and Parquet."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from spn4cir.data_gen.files import Row
from spn4cir.data_gen.settings import GenerateConfig
from spn4cir.errors import InputError
from spn4cir.types import Dataset, Triplet

GROUP = 1 << 15  # rows of Parquet held in memory
KINDS = ("jsonl", "json", "parquet")


@contextmanager
def triplet_files(config: GenerateConfig, dataset: Dataset, made_by: str) -> Iterator["TripletWriter"]:
    """Three files that are written beside their places, and take them when all is well; else they are removed.

    Raises:
        InputError: where one cannot be written.
    """
    places = [config.file(f"triplets.{kind}") for kind in KINDS]
    beside = [path.with_name(path.name + ".tmp") for path in places]
    try:
        writer = TripletWriter(beside, dataset, made_by)
        try:
            yield writer
        finally:
            with suppress(OSError):  # of a full disk there is news already
                writer.close()
        for path, place in zip(beside, places, strict=True):
            os.replace(path, place)
    except OSError as error:
        raise InputError(f"triplets in {config.folder} cannot be written: {error.strerror or error}") from None
    finally:
        for path in beside:
            path.unlink(missing_ok=True)


class TripletWriter:
    """Writes triplets as they come, and counts what they are like.

    Args:
        paths: of JSONL, JSON and Parquet.
        dataset: whose published shape, and whose paths of images.
        made_by: digest of what made the triplets.

    Attributes:
        count: triplets so far.
        words: of their texts together.
        tokens: likewise.
        distinct: hashes of their texts.
        templates: how many of them each template made.
        rewritten: how many hold a text that a model wrote anew.
    """

    def __init__(self, paths: list[Path], dataset: Dataset, made_by: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        from spn4cir.datasets.generated import entry_writer

        self._dataset, self._made_by = dataset, made_by
        self._path_of = lru_cache(1 << 18)(lambda image_id: str(dataset.path(image_id)))
        self._published = entry_writer(dataset, paths[1].parent)
        self.count, self.words, self.tokens, self.rewritten = 0, 0, 0, 0
        self.distinct, self.templates = set[int](), Counter[str]()
        self._group: list[Row] = []
        text, schema = pa.string(), _columns(pa)
        self._schema = pa.schema([(name, kind or text) for name, kind in schema.items()])
        self._rows = paths[0].open("w", encoding="utf-8")
        self._entries = paths[1].open("w", encoding="utf-8")
        self._parquet: Any = pq.ParquetWriter(paths[2], self._schema, compression="zstd")

    def add(self, row: Row) -> None:
        """Write one triplet."""
        self._rows.write(json.dumps({**row, "made_by": self._made_by}, ensure_ascii=False) + "\n")
        entry = json.dumps(self._entry(row), ensure_ascii=False, indent=0)
        self._entries.write(("," if self.count else "[") + "\n" + entry)
        self._group.append(self._record(row))
        if len(self._group) == GROUP:
            self._flush()
        self.count += 1
        self.words += len(row["modification"].split())
        self.tokens += row["tokens"]
        self.rewritten += "llm_caption" in row
        self.distinct.add(hash(row["modification"]))
        self.templates[row["template"]] += 1

    def _entry(self, row: Row) -> Row:
        triplet = Triplet(row["reference"], row["target"], (row["modification"],))
        entry = self._published(triplet, tuple(row["captions"]))
        return {**entry, "llm_caption": row["llm_caption"]} if "llm_caption" in row else entry

    def _record(self, row: Row) -> Row:
        paths = {f"{role}_path": self._path_of(row[role]) for role in ("reference", "target")}
        captions = dict(zip(("reference_caption", "target_caption"), row["captions"], strict=True))
        made = {"modifications": [row["modification"]], "made_by": self._made_by}
        known = {**row, **paths, **captions, **made}
        return {name: known.get(name) for name in self._schema.names}

    def _flush(self) -> None:
        import pyarrow as pa

        self._parquet.write_table(pa.Table.from_pylist(self._group, schema=self._schema))
        self._group.clear()

    def finish(self) -> None:
        """Write what is still held, once all triplets are there."""
        self._flush()
        self._entries.write("\n]\n" if self.count else "[]\n")
        self.close()

    def close(self) -> None:
        """Close the files, whatever became of them."""
        self._rows.close()
        self._entries.close()
        self._parquet.close()


def _columns(pa: Any) -> dict[str, Any]:
    """Columns of the Parquet file by name; a text where there is None."""
    return {
        "reference": None,
        "target": None,
        "reference_path": None,
        "target_path": None,
        "modifications": pa.list_(pa.string()),
        "reference_caption": None,
        "target_caption": None,
        "rank": pa.int64(),
        "similarity": pa.float64(),
        "template": None,
        "model": None,
        "rewriter": None,
        "made_by": None,
    }
