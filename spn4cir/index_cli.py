"""``spn4cir-index``: make, change, describe and export an index of pictures."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.cli import Parser, check_output, report_stream, write_json
from spn4cir.config import TrainConfig
from spn4cir.errors import InputError, run_command

if TYPE_CHECKING:
    from spn4cir.index.local import Index
    from spn4cir.model import Model

DEFAULT_SOURCE = TrainConfig.dataset
SHOWN = 10
"""Broken pictures, or indexes, that are listed in the terminal."""


def _index() -> None:
    parser = Parser(
        "spn4cir-index",
        "Embed pictures once, for spn4cir-search to search.",
        "examples:\n"
        "  spn4cir-index build                                   # the embedded pictures\n"
        "  spn4cir-index build FOLDER --index pictures.index\n"
        "  spn4cir-index build products.csv --model RUN --dtype float16 --kind hnsw\n"
        "  spn4cir-index build FOLDER --dataset fashioniq\n"
        "  spn4cir-index add NEW_FOLDER --index pictures.index\n"
        "  spn4cir-index update --index pictures.index           # encodes what is new or changed\n"
        "  spn4cir-index remove shoes/7.jpg shoes/8.jpg --index pictures.index\n"
        "  spn4cir-index info --json -\n"
        "  spn4cir-index export --to npy FOLDER",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    build = commands.add_parser("build", help="embed all pictures of a source, and write the index")
    add = commands.add_parser("add", help="add the pictures of another source")
    remove = commands.add_parser("remove", help="remove pictures by id")
    update = commands.add_parser("update", help="read the sources again; encode new and changed pictures")
    compact = commands.add_parser("compact", help="write all images into one segment")
    info = commands.add_parser("info", help="describe an index")
    export = commands.add_parser("export", help="copy vectors and columns into another engine, or to plain files")
    for command, run in (
        (build, _build), (add, _add), (remove, _remove), (update, _update), (compact, _compact), (info, _info),
        (export, _export),
    ):  # fmt: skip
        where = "new or empty folder (default: runs/index/SOURCE)" if command is build else "its folder"
        rest = "" if command is build else " (default: the only index in runs/index)"
        command.add_argument("--index", metavar="PATH", help=where + rest)
        command.set_defaults(run=run)
    what = "folder of pictures, table of pictures, hf:NAME, or dataset"
    build.add_argument("source", nargs="?", metavar="SOURCE", help=f"{what} (default: {DEFAULT_SOURCE})")
    build.add_argument("--kind", default="exact", help="exact (default); hnsw or ivf: faiss, faster, may miss hits")
    build.add_argument("--dtype", default="float32", help="type of the stored vectors: float32 (default) or float16")
    add.add_argument("source", metavar="SOURCE", help=what)
    for command in (build, add):
        command.add_argument("--dataset", metavar="NAME", help="dataset whose files are in SOURCE, such as fashioniq")
    remove.add_argument("ids", nargs="*", metavar="ID", help="ids of pictures")
    remove.add_argument("--from", dest="list", type=Path, metavar="FILE", help="text file of ids, one a line")
    remove.add_argument("--source", metavar="PLACE", help="a source, with all its pictures; see spn4cir-index info")
    update.add_argument("--restore", action="store_true", help="bring back what was removed by hand")
    info.add_argument("--json", metavar="FILE", help="write the description as JSON; - for standard output")
    export.add_argument("target", metavar="TARGET", help="folder (npy); URL or folder (qdrant)")
    export.add_argument("--to", required=True, choices=("npy", "qdrant"), help="what is written")
    for command in (build, add, update):
        default = "embedded" if command is build else "the model of the index"
        add_model_options(command, default)
        command.add_argument("--batch-size", type=int, metavar="N", help="pictures encoded at once (default: 64)")
    args = parser.parse_args()
    args.run(args)


index_command = partial(run_command, _index)


def add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--model`` and ``--device``."""
    parser.add_argument("--model", help=f"run folder, hub id OWNER/NAME, or embedded (default: {default})")
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")


def find_index(given: str | None) -> str:
    """The index that ``--index`` names; without it, the only one in ``runs/index``.

    Raises:
        InputError: if none is given and there is none, or more than one.
    """
    from spn4cir.checkpoints import runs_root

    if given:
        return given
    folder = runs_root() / "index"
    indexes = sorted(str(file.parent) for file in folder.glob("*/index.json"))
    if not indexes:
        raise InputError(f"{folder} holds no index: make one by spn4cir-index build FOLDER, or give --index PATH")
    if len(indexes) > 1:
        more = f" and {len(indexes) - SHOWN} more" if len(indexes) > SHOWN else ""
        raise InputError(
            f"{folder} holds {len(indexes)} indexes: give --index, one of {', '.join(indexes[:SHOWN])}{more}"
        )
    return indexes[0]


def is_engine(index: str) -> bool:
    """Whether ``--index`` is the address of an engine, such as ``qdrant://HOST:PORT/NAME``, and no folder."""
    return re.match(r"[a-z][a-z+]+:", index) is not None


def chosen_model(args: argparse.Namespace, built_with: str | None = None) -> Model | None:
    """The model that ``--model``, ``--device`` and ``--batch-size`` name; None if none of them is given."""
    from spn4cir.model import load

    size = getattr(args, "batch_size", None)
    if args.model is None and args.device is None and size is None:
        return None
    options = {"batch_size": size} if size is not None else {}
    return load(args.model or built_with or "embedded", device=args.device, **options)


def _build(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    from spn4cir.checkpoints import runs_root
    from spn4cir.index.local import Index
    from spn4cir.model import load

    source = args.source if args.source is not None else "" if args.dataset else DEFAULT_SOURCE
    path = _folder(args.index or str(runs_root() / "index" / _source_name(source, args.dataset)))
    model = chosen_model(args) or load()
    index = Index.build(model, source, path, kind=args.kind, dtype=args.dtype, dataset=args.dataset)
    print(f"read {source or args.dataset}: {len(index.snapshot.alive):,} pictures")
    _report(index, started)
    example = ["spn4cir-search", "--index", str(path), f"--image={index.ids[0]}", "--text", "but in red"]
    print(f"next: {shlex.join(example)}")


def _source_name(source: str, dataset: str | None) -> str:
    """The name of an index that is called after its source."""
    if dataset:
        return dataset
    from spn4cir.datasets.table_settings import split_place

    place = Path(split_place(source)[0].removeprefix("hf:").rstrip("/"))
    return (place.stem if place.is_file() else place.absolute().resolve().name) or "pictures"


def _folder(index: str) -> Path:
    if is_engine(index):
        raise InputError(f"--index {index} is an engine: this command needs the folder of an index")
    return Path(index)


def _open(args: argparse.Namespace) -> Index:
    from spn4cir.index.local import Index
    from spn4cir.index.snapshot import read_head

    path = _folder(find_index(args.index))
    model = chosen_model(args, read_head(path).model) if hasattr(args, "model") else None
    return Index(path, model)


def _add(args: argparse.Namespace) -> None:
    started, index = time.perf_counter(), _open(args)
    index.add(args.source, args.dataset)
    _report(index, started)


def _remove(args: argparse.Namespace) -> None:
    if [bool(args.ids), bool(args.list), bool(args.source)].count(True) != 1:
        raise InputError("give the ids of pictures, or --from FILE with one id a line, or --source PLACE")
    started, ids = time.perf_counter(), _read_ids(args.list) if args.list else args.ids
    index = _open(args)
    if args.source:
        index.remove_source(args.source)
    else:
        index.remove(ids)
    _report(index, started)


def _read_ids(path: Path) -> list[str]:
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--from {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not ids:
        raise InputError(f"--from {path} holds no id")
    return ids


def _update(args: argparse.Namespace) -> None:
    started, index = time.perf_counter(), _open(args)
    index.update(args.restore)
    _report(index, started)


def _compact(args: argparse.Namespace) -> None:
    started, index = time.perf_counter(), _open(args)
    before = len(index.snapshot.head.segments)
    index.compact()
    print(f"{before} segments before, {len(index.snapshot.head.segments)} now")
    _print_size(index, started)


def _report(index: Index, started: float) -> None:
    """Print what a change did, and what the index holds now."""
    print(index.changes)
    if index.changes and len(index.changes.broken) > 1:
        print(f"all of them: {shlex.join(['spn4cir-index', 'info', '--index', str(index.path)])}")
    _print_size(index, started)


def _print_size(index: Index, started: float) -> None:
    size, seconds = file_size(_disk_size(index.path)), time.perf_counter() - started
    print(f"{index.path}: {len(index):,} images, {size}, {seconds:.1f} s")


def _export(args: argparse.Namespace) -> None:
    from spn4cir.index.vector_engines import export_index

    path = _folder(find_index(args.index))
    print(export_index(path, args.to, args.target))


def _info(args: argparse.Namespace) -> None:
    check_output("--json", args.json)
    description = describe_index(_open(args))
    broken = description["broken"]
    sources = [f"{source['dataset']} {source['place']}".rstrip() for source in description["sources"]]
    lines = {
        "index": description["path"],
        "images": f"{description['images']:,}",
        "left out": f"{len(broken):,} broken" if broken else "",
        "segments": str(description["segments"]),
        "on disk": file_size(description["bytes"]),
        "model": f"{description['model']}, fingerprint {description['fingerprint']}",
        "vectors": f"{description['vectors']} × {description['width']}, {description['dtype']}",
        "kind": description["kind"],
        "sources": ", ".join(sources),
        "columns": ", ".join(f"{name} ({kind})" for name, kind in description["columns"].items()),
    }
    rows = [f"{name:<10}{text}" for name, text in lines.items() if text]
    rows += [f"  {problem}" for problem in list(broken.values())[:SHOWN]]
    rows += [f"  and {len(broken) - SHOWN} more: see --json"] if len(broken) > SHOWN else []
    print("\n".join(rows), file=report_stream(args.json))
    write_json(args.json, description)


def describe_index(index: Index) -> dict[str, Any]:
    """What ``spn4cir-index info --json`` writes; ``vectors`` are those of an image, ``bytes`` the size on disk."""
    head = index.snapshot.head
    return {
        "path": str(index.path),
        "images": len(index),
        "broken": head.broken,
        "removed": list(head.removed),
        "segments": len(head.segments),
        "bytes": _disk_size(index.path),
        "model": head.model,
        "fingerprint": head.fingerprint,
        "vectors": head.shape[0],
        "width": head.shape[1],
        "dtype": head.dtype,
        "kind": head.kind,
        "sources": [
            {"place": note.place, "dataset": note.dataset, "root": note.root}
            for note in head.sources
            if not note.is_gone
        ],
        "columns": dict(index.kinds),
    }


def _disk_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def file_size(count: int) -> str:
    """A number of bytes as people read it."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
