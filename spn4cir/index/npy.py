"""Export of an index to plain files, in the layout of clip-retrieval: the neutral way into any engine.

``img_emb/img_emb_N.npy`` holds the vectors of shard N and ``metadata/metadata_N.parquet`` what is known of its images,
in the same order. With K > 1 vectors per image, each image has K consecutive rows in both; the column ``vector`` counts
them. ``meta.json`` says of which model they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spn4cir.errors import InputError
from spn4cir.files import read_json, replaced, write_text
from spn4cir.index.exporting import Exported, image_paths, live_rows
from spn4cir.index.snapshot import Snapshot

META = "meta.json"
FORMAT = "spn4cir-npy-1"
SHARD = 100_000
"""Most images of a shard. A shard never spans two segments of the index, so that what is added makes new shards."""
ROWS = 4096  # images held in memory at once


class _Shard(NamedTuple):
    rows: np.ndarray[Any, Any]
    digest: str


def export_npy(path: Path, folder: Path) -> Exported:
    """Write the images of an index as shards; shards that are there already, and unchanged, stay as they are.

    Raises:
        InputError: if there is no index, the folder holds other files or another model's vectors, or the disk refuses.
    """
    snapshot = Snapshot(path)
    before = _digests(snapshot, folder)
    shards = _shards(snapshot)
    kept = [shard.digest if before[n : n + 1] == [shard.digest] else "" for n, shard in enumerate(shards)]
    kept = [digest if all(file.is_file() for file in _files(folder, n)) else "" for n, digest in enumerate(kept)]
    missing = [n for n, digest in enumerate(kept) if not digest]
    expected_files = {file for n in range(len(shards)) for file in _files(folder, n)}
    surplus = [
        file for kind in _files(folder, 0) for file in kind.parent.glob(f"*{kind.suffix}") if file not in expected_files
    ]
    if not missing and not surplus:
        return Exported("shards", 0, 0, len(shards))
    for file in _files(folder, 0):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    _write_meta(snapshot, folder, kept)  # whoever is killed from here on has no digest of a shard that is half new
    for n in missing:
        _write_shard(snapshot, shards[n].rows, *_files(folder, n))
    for file in surplus:
        file.unlink()
    _write_meta(snapshot, folder, [shard.digest for shard in shards])
    return Exported("shards", len(missing), len(surplus) // 2, len(shards) - len(missing))


def _files(folder: Path, n: int) -> tuple[Path, Path]:
    """The vectors and the metadata of a shard."""
    return folder / "img_emb" / f"img_emb_{n}.npy", folder / "metadata" / f"metadata_{n}.parquet"


def _digests(snapshot: Snapshot, folder: Path) -> list[str]:
    """The digests of the shards that are there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder")
    if not (folder / META).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds other files: give a new or an empty folder")
        return []
    meta = read_json(folder / META)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{folder / META} is not of an export: give a new or an empty folder")
    if meta.get("fingerprint") != snapshot.head.fingerprint:
        raise InputError(f"{folder} holds vectors of another model, {meta.get('model')}: give another folder")
    if meta.get("source") != _source(snapshot):
        raise InputError(f"{folder} holds another index, of {meta.get('source')}: give another folder")
    return [str(digest) for digest in meta.get("shards", [])]


def _source(snapshot: Snapshot) -> str:
    """Where the index began, by which an export tells it from others."""
    first = snapshot.head.sources[0]
    return first.place or first.dataset


def _write_meta(snapshot: Snapshot, folder: Path, digests: list[str]) -> None:
    head, (count, width) = snapshot.head, snapshot.head.shape
    meta = {
        "format": FORMAT,
        "model": head.model,
        "fingerprint": head.fingerprint,
        "source": _source(snapshot),
        "images": len(snapshot),
        "vectors_per_image": count,
        "width": width,
        "metric": "dot product of unit vectors; an image's score is the maximum over its vectors",
        "dtype": head.dtype,
        "shards": digests,
    }
    write_text(folder / META, json.dumps(meta, indent=1, ensure_ascii=False) + "\n")


def _shards(snapshot: Snapshot) -> list[_Shard]:
    """Shards of live rows, each with a digest of what its files depend on; a segment's key stands for its content."""
    live, shards = live_rows(snapshot), []
    sources = snapshot.files["source"].to_numpy()
    for part, start in zip(snapshot.head.segments, snapshot.starts, strict=True):
        rows = live[(live >= start) & (live < start + part.rows)]
        for first in range(0, len(rows), SHARD):
            chosen = rows[first : first + SHARD]
            roots = [snapshot.head.sources[n].root for n in np.unique(sources[chosen])]
            content = repr([part.key, roots, str(snapshot.columns.schema)])
            digest = hashlib.sha256(content.encode() + (chosen - start).tobytes())
            shards.append(_Shard(chosen, digest.hexdigest()[:24]))
    return shards


def _write_shard(snapshot: Snapshot, rows: np.ndarray[Any, Any], vectors: Path, metadata: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    count, width = snapshot.head.shape
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(snapshot.head.dtype)), "fortran_order": False}
    with replaced(vectors) as beside, beside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(rows) * count, width)})
        for start in range(0, len(rows), ROWS):
            file.write(snapshot.gather(rows[start : start + ROWS].tolist()).numpy().tobytes())
    repeated = np.repeat(rows, count)
    fixed_columns: dict[str, Any] = {
        "image_path": pa.array(image_paths(snapshot, repeated.tolist()), pa.string()),
        "id": snapshot.files["id"].take(repeated),
    }
    if count > 1:
        fixed_columns["vector"] = pa.array(np.tile(np.arange(count), len(rows)), pa.int64())
    columns = snapshot.columns.take(repeated)
    table = dict(fixed_columns)
    for name in columns.column_names:
        free = name
        while free in fixed_columns or (free != name and free in columns.column_names):
            free += "_"
        table[free] = columns[name]
    with replaced(metadata) as beside:
        parquet.write_table(pa.table(table), beside)
