"""Build, add, remove, update, compact: each change of an index is one commit, and goes on after a kill."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from spn4cir.errors import InputError
from spn4cir.files import locked
from spn4cir.index.approximate import check_kind
from spn4cir.index.segments import Change, PlannedRows
from spn4cir.index.snapshot import BLOCK, HEAD, Head, Snapshot
from spn4cir.index.source import Source, image_stamps, read_source
from spn4cir.model import Model

Load = Callable[[], Model]
OWN = re.compile(r"index\.(json|lock)(\.tmp)?|[0-9a-f]{24}(\.lock)?")
"""Files and folders of an index."""
MANY_SEGMENTS, MANY_GONE = 16, 0.25
"""An index of more segments than that, or of which more than that share is gone, is compacted with the next change."""
ABOUT = ("source", "size", "mtime_ns", "columns", "path", "box")
"""What tells that a row of ``files.parquet`` is as it was."""


@dataclass
class Changes:
    """What a change of an index did, in images; ``broken`` says why pictures are left out."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    encoded: int = 0
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("added", "changed", "removed", "encoded")}
        lines = [", ".join(f"{count:,} {name}" for name, count in counts.items())]
        if len(self.broken) == 1:
            lines.append(f"1 picture is left out: {self.broken[0]}")
        elif self.broken:
            lines.append(f"{len(self.broken):,} pictures are left out, such as: {self.broken[0]}")
        return "\n".join(lines + self.notes)


def build(model: Model, source: Source, path: Path, kind: str = "exact", dtype: str = "float32") -> Changes:
    """Make an index. A build that was killed goes on where it stopped, to the same bytes.

    Raises:
        InputError: if there is an index already or the folder holds something else, no picture decodes, or the disk
            has no room.
    """
    if dtype not in ("float32", "float16"):
        raise InputError(f"vectors are stored as float32 or float16, not {dtype!r}")
    check_kind(kind)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror}: give a new or an empty folder") from None
    with _changing(path):
        if (path / HEAD).is_file():
            raise InputError(f"{path} already holds an index: use update or add, or give another folder")
        if foreign := [one.name for one in path.iterdir() if not OWN.fullmatch(one.name)]:
            raise InputError(f"{path} holds other files, such as {foreign[0]!r:.60}: give a new or an empty folder")
        head = Head(model.name, model.fingerprint, dtype, model.target_shape, kind, (source.note,))
        change = Change(path, lambda: model, head, None)
        change.write(source, 0, list(source.images))
        return _finish(change, source.notes)


def add(load: Load, source: Source, path: Path) -> Changes:
    """Add the images of another source. Raises ``InputError`` for an id that the index holds already."""
    with _changing(path):
        old = Snapshot(path)
        if source.note in old.head.sources:
            raise InputError(f"{source.note.place or source.note.dataset} is in {path} already: use update")
        if known_ids := sorted(source.images.keys() & set(old.live_ids()))[:1]:
            raise InputError(f"{path} already holds an image with the id {known_ids[0]!r:.80}: ids occur once")
        removed = [image_id for image_id in source.images if image_id in old.head.removed]
        notes = [*source.notes, *_left_out(removed, "were removed from the index: update --restore brings them back")]
        broken = _without(old.head.broken, source.images)
        head = replace(old.head, sources=(*old.head.sources, source.note), broken=broken)
        change = Change(path, load, head, old)
        change.write(source, len(old.head.sources), [i for i in source.images if i not in set(removed)])
        return _finish(change, notes)


def remove(path: Path, ids: Sequence[str]) -> Changes:
    """Remove images; an update leaves them out from now on. Raises ``InputError`` for an id that the index lacks."""
    with _changing(path):
        old = Snapshot(path)
        broken = [image_id for image_id in ids if image_id in old.head.broken]  # not searched, but listed
        rows = old.rows_of([image_id for image_id in dict.fromkeys(ids) if image_id not in broken])
        removed = tuple(sorted({*old.head.removed, *ids}))
        head = replace(old.head, removed=removed, broken=_without(old.head.broken, broken))
        return _finish(Change(path, _no_model, head, old, gone=rows))


def remove_source(path: Path, place: str) -> Changes:
    """Remove a source with all its images; updates no longer read it. Raises ``InputError`` for an unknown one."""
    with _changing(path):
        old = Snapshot(path)
        places = {place, str(Path(place).absolute())}
        numbers = [
            n
            for n, note in enumerate(old.head.sources)
            if not note.is_gone and (note.place in places if note.place else note.dataset == place)
        ]
        if not numbers:
            known = ", ".join(note.place or note.dataset for note in old.head.sources if not note.is_gone)
            raise InputError(f"{path} has no source {place}; sources: {known}")
        sources = tuple(
            replace(note, is_gone=True) if n in numbers else note for n, note in enumerate(old.head.sources)
        )
        numbers_of_rows = np.asarray(old.files["source"].to_numpy())
        rows = np.flatnonzero(np.isin(numbers_of_rows, numbers)).tolist()
        gone = {str(old.files["id"][row]) for row in rows}
        head = replace(old.head, sources=sources, broken=_without(old.head.broken, gone))
        return _finish(Change(path, _no_model, head, old, gone=rows))


def update(load: Load, path: Path, restore: bool = False) -> Changes:
    """Read all sources again, and encode what is new or has changed.

    With ``restore``, images that were removed by hand come back.

    An image is looked at again if the size or the time of its file is another one, and encoded again if its content
    is. A row of a table that says something else of the same picture keeps its vectors.

    Raises:
        InputError: if a source is missing or has moved.
    """
    with _changing(path):
        old = Snapshot(path)
        known, removed = _last_rows(old), set() if restore else set(old.head.removed)
        old_rows = old.files.select([*ABOUT, "content"]).to_pydict()
        change, notes, seen = Change(path, load, old.head, old), list[str](), set[str]()
        for number, note in enumerate(old.head.sources):
            if note.is_gone:
                continue
            source = read_source(note.place, note.dataset)
            if source.note != note:
                raise InputError(f"{note.place or note.dataset} lies in {source.note.root} now: build the index anew")
            notes += source.notes
            repeated = [image_id for image_id in source.images if image_id in seen]
            notes += _left_out(repeated, f"have ids of an earlier source ({note.place or note.dataset})")
            ids = [image_id for image_id in source.images if image_id not in removed and image_id not in seen]
            seen.update(ids)
            stamps = image_stamps(source.images[image_id] for image_id in ids)
            hashes = dict(zip(source.images, source.column_hashes, strict=True))
            boxes = [box and list(box) for box in (source.images[image_id].box for image_id in ids)]
            new_rows = [
                (number, *stamp, hashes[image_id], source.relative_path(image_id), box)
                for image_id, stamp, box in zip(ids, stamps, boxes, strict=True)
            ]
            stale = [
                image_id
                for image_id, new_row in zip(ids, new_rows, strict=True)
                if (row := known.get(image_id)) is None
                or new_row != tuple(old_rows[name][row] for name in ABOUT)
                or (new_row[1:3] != (0, 0) and not old_rows["content"][row])  # is there, and could not be read
            ]
            change.gone += [known[image_id] for image_id in stale if image_id in known]
            change.write(source, number, stale)
        change.gone += [row for image_id, row in known.items() if image_id not in seen]
        kept = set(known.values()) - set(change.gone)
        broken = {image_id: why for image_id, why in old.head.broken.items() if known.get(image_id) in kept}
        change.head = replace(old.head, broken=broken, removed=tuple(sorted(removed)))
        return _finish(change, notes)


def compact(path: Path) -> Changes:
    """Write all images into one segment, without those that are gone."""
    with _changing(path):
        return _compact(path)


def _compact(path: Path) -> Changes:
    old = Snapshot(path)
    kept = sorted(_last_rows(old).values())
    if not kept:
        return Changes()
    change = Change(path, _no_model, replace(old.head, segments=()), old)
    change.rows.append(PlannedRows([None] * len(kept), old.files.take(kept), old.columns.take(kept), kept))
    change.commit()
    return Changes()


def _last_rows(snapshot: Snapshot) -> dict[str, int]:
    """The last row of each id that is there, or is known not to decode."""
    ids = snapshot.files["id"].to_pylist()
    return {i: row for row, i in enumerate(ids) if snapshot.alive[row] or i in snapshot.head.broken}


def _finish(change: Change, notes: Sequence[str] = ()) -> Changes:
    """Commit, and count; then compact an index of many segments, or of which a large part is gone."""
    before = set(change.old.live_ids()) if change.old else set()
    encoded, broken = change.commit()
    snapshot = Snapshot(change.path)
    after = set(snapshot.live_ids())
    written = {image_id for rows in change.rows for image_id in rows.files["id"].to_pylist()}
    counts = len(after - before), len(written & before & after), len(before - after)
    gone = len(snapshot.alive) - len(snapshot)
    if len(snapshot.head.segments) > MANY_SEGMENTS or gone > MANY_GONE * len(snapshot.alive) + BLOCK:
        _compact(change.path)
    return Changes(*counts, encoded, broken, list(notes))


def _left_out(ids: Sequence[str], why: str) -> list[str]:
    return [f"{len(ids):,} images are left out since they {why}, such as {ids[0]!r:.80}"] if ids else []


def _without(problems: Mapping[str, str], ids: Collection[str]) -> dict[str, str]:
    return {image_id: why for image_id, why in problems.items() if image_id not in ids}


def _no_model() -> Model:
    raise AssertionError("nothing is encoded here")


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Keep other processes from changing an index meanwhile."""
    if not path.is_dir():
        raise InputError(f"{path} holds no index: make one by spn4cir-index build FOLDER --index {path}")
    with locked(path / "index.lock", f"{path} is being changed by another process"):
        yield
