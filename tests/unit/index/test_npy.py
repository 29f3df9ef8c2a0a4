"""An index as plain files, in the layout of clip-retrieval."""

import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from benchmarks.made_index import draw_columns, draw_vectors, make_index
from spn4cir.errors import InputError
from spn4cir.index import npy
from spn4cir.index.npy import META
from spn4cir.index.snapshot import Head, Snapshot, read_head, write_head, write_removed
from spn4cir.index.vector_engines import export_index

COUNT, SIZES, GONE = 100, (50, 40, 10), (3, 4, 55)


def read_shards(folder: Path) -> tuple[np.ndarray, list[dict]]:
    """Vectors and metadata of all shards."""
    count = len(list((folder / "img_emb").iterdir()))
    assert count == len(list((folder / "metadata").iterdir()))
    vectors = [np.load(folder / "img_emb" / f"img_emb_{n}.npy") for n in range(count)]
    rows = [parquet.read_table(folder / "metadata" / f"metadata_{n}.parquet").to_pylist() for n in range(count)]
    assert [len(part) for part in vectors] == [len(part) for part in rows]
    return np.concatenate(vectors), [row for part in rows for row in part]


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_files_hold_the_index(k: int, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "SHARD", 30)
    monkeypatch.setattr(npy, "ROWS", 7)
    vectors, columns = draw_vectors(COUNT, k), {**draw_columns(COUNT), "id": list(range(COUNT))}
    path = make_index(tmp_path / "index", vectors.half() if half else vectors, columns, SIZES, GONE)
    assert str(export_index(path, "npy", str(tmp_path / "out"))) == "shards: 5 written, 0 deleted, 0 unchanged"
    found, rows = read_shards(tmp_path / "out")
    live = [n for n in range(COUNT) if n not in GONE]
    assert found.dtype == (np.float16 if half else np.float32)
    assert np.array_equal(found, vectors[live].flatten(0, 1).numpy().astype(found.dtype))
    expected = [
        {
            "image_path": str(path / f"i{n:03d}.png"),
            "id": f"i{n:03d}",
            **({"vector": place} if k > 1 else {}),
            **{f"{name}_" if name == "id" else name: values[n] for name, values in columns.items()},
        }
        for n in live
        for place in range(k)
    ]
    assert rows == expected
    meta = json.loads((tmp_path / "out" / META).read_text())
    assert (meta["fingerprint"], meta["vectors_per_image"], meta["width"], meta["images"]) == (
        "made-up",
        k,
        16,
        len(live),
    )


def test_only_changed_shards_are_written(tmp_path: Path) -> None:
    path, out = make_index(tmp_path / "index", draw_vectors(COUNT), draw_columns(COUNT), SIZES, GONE), tmp_path / "out"
    export_index(path, "npy", str(out))
    before = stamps(out)
    assert str(export_index(path, "npy", str(out))) == "shards: 0 written, 0 deleted, 3 unchanged"
    assert stamps(out) == before

    write_head(path, Snapshot(path).remove(np.array([60])))  # an image of the second segment
    assert str(export_index(path, "npy", str(out))) == "shards: 1 written, 0 deleted, 2 unchanged"
    assert {name for name, time in stamps(out).items() if before[name] != time} == {
        "img_emb_1.npy", "metadata_1.parquet", META,
    }  # fmt: skip
    write_head(path, Snapshot(path).remove(np.arange(90, 100)))  # the whole third segment
    assert str(export_index(path, "npy", str(out))) == "shards: 0 written, 1 deleted, 2 unchanged"
    assert len(read_shards(out)[0]) == 86

    (out / "img_emb" / "img_emb_0.npy").unlink()
    assert export_index(path, "npy", str(out)).written == 1
    assert [row["id"] for row in read_shards(out)[1]] == Snapshot(path).live_ids()


def test_an_export_that_was_killed_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the index is meanwhile as it was before: the half new shard is written again."""
    path, out = make_index(tmp_path / "index", draw_vectors(COUNT), draw_columns(COUNT), SIZES), tmp_path / "out"
    export_index(path, "npy", str(out))
    head = read_head(path)
    write_head(path, Snapshot(path).remove(np.array([60])))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parquet, "write_table", fail)
        export_index(path, "npy", str(out))
    write_head(path, head)
    assert export_index(path, "npy", str(out)).written == 1
    assert len(read_shards(out)[0]) == COUNT
    assert not list(out.rglob("*.tmp"))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    path = make_index(tmp_path / "index", draw_vectors(COUNT), draw_columns(COUNT), SIZES)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    export_index(path, "npy", str(tmp_path / "out"))
    write_head(path, Head(**{**vars(read_head(path)), "fingerprint": "another"}))
    for name, message in {
        "file": "is a file: give a folder",
        "full": "holds other files: give a new or an empty folder",
        "out": "holds vectors of another model, embedded: give another folder",
    }.items():
        with pytest.raises(InputError, match=message):
            export_index(path, "npy", str(tmp_path / name))
    (tmp_path / "out" / META).write_text("[]")
    with pytest.raises(InputError, match="is not of an export"):
        export_index(path, "npy", str(tmp_path / "out"))
    (tmp_path / "out" / META).write_text('{"format"')
    with pytest.raises(InputError, match="not valid JSON"):
        export_index(path, "npy", str(tmp_path / "out"))


def test_an_index_without_images(tmp_path: Path) -> None:
    path, out = make_index(tmp_path / "index", draw_vectors(20), draw_columns(20)), tmp_path / "out"
    folder = next(path.glob("0*"))
    head = read_head(path)
    removed = write_removed(folder, np.arange(20))
    write_head(path, Head(**{**vars(head), "segments": (head.segments[0].__class__(folder.name, 20, removed),)}))
    assert str(export_index(path, "npy", str(out))) == "shards: 0 written, 0 deleted, 0 unchanged"
