"""``spn4cir-search``: search an index by pictures and texts."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.cli import Parser, check_output, report_stream, write_json
from spn4cir.errors import InputError, run_command
from spn4cir.index_cli import add_model_options, chosen_model, find_index, is_engine

if TYPE_CHECKING:
    from spn4cir.index.searchable import Hit, SearchableIndex
    from spn4cir.index.sheet import Tile

Query = dict[str, Any]
PARTS = ("image", "text", "unlike", "without")
REPEATS = 20
"""Repetitions of ``--timing``."""
LONGEST, MOST_COLUMNS = 40, 4  # characters of a cell; columns of the table beside rank, scores, id and path


def _search() -> None:
    parser = Parser(
        "spn4cir-search",
        "Find the pictures of an index that fit a picture, a text, or a picture changed by a text.",
        "examples:\n"
        "  spn4cir-search --text 'a red heart'\n"
        "  spn4cir-search --index pictures.index --image reference.png --text 'but in red' --save result.png\n"
        "  spn4cir-search --image 1f600 --text 'with a hat' 2 --without glasses      # a text of weight 2\n"
        "  spn4cir-search --image a.png --image b.png 0.5 --unlike c.png\n"
        "  spn4cir-search --image a.png --where 'category=dress|skirt' --where 'price<=50' --group product\n"
        "  spn4cir-search --text 'a red heart' --min-z 2 --fold 0.95 --json -",
    )
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "append", "default": []}
    add("--index", metavar="I", help="folder, or qdrant://HOST:PORT/NAME (default: the only index in runs/index)")
    add("--image", **several, metavar=("PICTURE", "WEIGHT"), help="file or id of the index; may be repeated")
    add("--text", **several, metavar=("TEXT", "WEIGHT"), help="how to change the picture, or what to find")
    add("--unlike", **several, metavar=("PICTURE", "WEIGHT"), help="picture to be unlike (default weight: 0.5)")
    add("--without", **several, metavar=("TEXT", "WEIGHT"), help="what to be without (default weight: 0.5)")
    add("-k", type=int, default=10, help="number of hits (default: 10)")
    add("--where", action="append", default=[], metavar="CONDITION", help="COLUMN=A|B, COLUMN!=A, COLUMN<=NUMBER, …")
    add("--group", metavar="COLUMN", help="one hit for each value of this column")
    add("--min-score", type=_number, metavar="S", help="lowest score, from -1 to 1")
    add("--min-z", type=_number, metavar="Z", help="lowest z-score: standard deviations above the query's mean score")
    add("--fold", type=_number, metavar="S", help="fold hits that are at least this similar to a better one into it")
    add("--describe", action="store_true", help="also say what the model sees in the pictures, such as their style")
    add_model_options(parser, "the model of the index")
    add("--save", type=Path, metavar="FILE", help="draw query and hits as one picture (.png, .jpg, .webp)")
    add("--json", metavar="FILE", help="write query and hits as JSON; - for standard output")
    add("--timing", type=int, nargs="?", const=REPEATS, metavar="N", help=f"time N repetitions (default: {REPEATS})")
    args = parser.parse_args()
    query = {name: [_weighted(name, values) for values in getattr(args, name)] for name in PARTS}
    if not query["image"] and not query["text"]:
        raise InputError("a search needs something to look for: give --image PICTURE, --text TEXT or both")
    if args.timing is not None and args.timing < 1:
        raise InputError(f"--timing must be at least 1, got {args.timing}")
    for option, path in (("--json", args.json), ("--save", args.save)):
        check_output(option, path)
    _run(args, query)


search_command = partial(run_command, _search)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def _weighted(name: str, values: Sequence[str]) -> str | tuple[str, float]:
    """A picture or text of a query, with its weight if one is given."""
    if len(values) > 2:
        raise InputError(
            f"--{name} takes one value and a weight, got {len(values)} values: put a text in quotes, and repeat "
            f"--{name} for a second one"
        )
    if len(values) == 1:
        return values[0]
    try:
        return values[0], float(values[1])
    except ValueError:
        what = f"--{name} {values[0]!r:.40}: the weight {values[1]!r:.40} is no number"
        raise InputError(f"{what}: put a text in quotes, and repeat --{name} for a second one") from None


def _run(args: argparse.Namespace, query: Query) -> None:
    if args.save:
        from spn4cir.index.sheet import check_sheet

        check_sheet(args.save)
    from spn4cir.index.local import Index
    from spn4cir.index.snapshot import read_head
    from spn4cir.selection import Selection, parse_where

    address, shown = find_index(args.index), report_stream(args.json)
    if is_engine(address) and args.device and not args.model:
        raise InputError("--device needs --model for an index in an engine")
    built_with = None if is_engine(address) else read_head(Path(address)).model
    index = Index.open(address, chosen_model(args, built_with))
    parse_where(args.where, index.kinds)  # before a model is loaded
    limits: dict[str, Any] = {name: getattr(args, name) for name in ("group", "min_score", "min_z", "fold")}
    selection = Selection(args.k, **{name: value for name, value in limits.items() if value is not None})
    hits = index.search(**query, k=args.k, where=args.where, **limits)
    timing = _measure(index, query, selection, args.where, args.timing) if args.timing else {}
    if args.save:
        from spn4cir.index.sheet import MOST, save_sheet

        some = f", the first {MOST} are shown" if len(hits) > MOST else ""
        heading = f"{len(hits)} hits among {len(index):,} images{some}"
        save_sheet(args.save, heading, _query_tiles(index, query), _hit_tiles(index, hits[:MOST]))
    seen = index.describe(query["image"]) if args.describe and query["image"] else []
    if args.describe and not seen:
        print("--describe is about pictures, and the query has none", file=shown)
    print(f"index {address}: {len(index):,} images", file=shown)
    for line in describe_lines(query["image"], seen):
        print(line, file=shown)
    print(hit_table(hits, args.fold is not None) if hits else _explain_none(index, query, args), file=shown)
    for name, values in timing.items():
        figures = ", ".join(f"{key} {value:.1f} ms" for key, value in values.items())
        print(f"{name}: {figures} ({args.timing} repetitions)", file=shown)
    if args.save:
        print(f"saved {args.save}", file=shown)
    settings = {"index": address, **query, "k": args.k, "where": args.where, **limits}
    write_json(
        args.json,
        {
            "query": settings,
            "hits": [hit_json(hit) for hit in hits],
            **({"seen": seen} if seen else {}),
            **({"timing": timing} if timing else {}),
        },
    )


def describe_lines(pictures: Sequence[Any], seen: Sequence[Mapping[str, float]]) -> list[str]:
    """What the model sees in each picture, the most likely first."""
    names = [_printable(str(one[0] if isinstance(one, tuple) else one)) for one in pictures]
    lines = []
    for name, weights in zip(names, seen, strict=False):
        parts = sorted(weights.items(), key=lambda part: -part[1])
        told = ", ".join(f"{what} {weight:.2f}" for what, weight in parts)
        lines.append(f"{name}: {told or 'this model describes no picture'}")
    return lines


def hit_json(hit: Hit) -> dict[str, Any]:
    """A hit as ``--json`` writes it; cells that are no number become null."""
    columns = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in hit.columns.items()}
    path = None if hit.path is None else str(hit.path)
    folded = list(hit.folded)
    return {"id": hit.id, "score": hit.score, "z": hit.z, "path": path, "columns": columns, "folded": folded}


def hit_table(hits: Sequence[Hit], folded: bool = False) -> str:
    """Hits as a table: rank, score, z-score, id, short columns, number of folded near-duplicates, path."""
    names = _short_columns([hit.columns for hit in hits])
    rows = [["rank", "score", "z", "id", *names, *(["folded"] if folded else []), "path"]]
    for rank, hit in enumerate(hits, 1):
        cells = [_cell(hit.columns.get(name)) for name in names] + ([str(len(hit.folded))] if folded else [])
        path = "" if hit.path is None else _printable(str(hit.path))
        rows.append([str(rank), f"{hit.score:.3f}", f"{hit.z:.2f}", _printable(hit.id), *cells, path])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if n < 3 else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _short_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Title and category, then further columns whose values are short; not those that are empty in all hits."""
    filled = dict.fromkeys(name for row in rows for name, value in row.items() if _cell(value))
    first = [name for name in ("title", "category") if name in filled]
    rest = [name for name in filled if name not in first]
    short = [name for name in rest if all(len(str(row.get(name) or "")) <= LONGEST for row in rows)]
    return (first + short)[:MOST_COLUMNS]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    text = f"{value:g}" if isinstance(value, float) else _printable(str(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _printable(text: str) -> str:
    """A text in one line, without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _explain_none(index: SearchableIndex, query: Query, args: argparse.Namespace) -> str:
    """One line that says why there is no hit, and what to change."""
    best = index.search(**query, k=1, where=args.where)
    if best:
        lows = {"--min-score": (args.min_score, best[0].score), "--min-z": (args.min_z, best[0].z)}
        short = [
            f"{option} {low:g} (the best image has {value:.3f})"
            for option, (low, value) in lows.items()
            if low is not None and value < low
        ]
        return f"no hit: lower {' and '.join(short)}"
    if not args.where:
        return "no hit: the index holds no image beside the query's"
    impossible = [one for one in args.where if not index.search(**query, k=1, where=[one])]
    what = ", ".join(f"--where {one!r}" for one in impossible or args.where)
    together, which = ("", "it") if impossible else (" together", "one")
    return f"no hit: no image satisfies {what}{together}: leave {which} out"


def _measure(
    index: SearchableIndex, query: Query, selection: Any, where: Sequence[str], repeats: int
) -> dict[str, dict[str, float]]:
    """The median and the 95th percentile, in milliseconds, of encoding a query and of searching for its embedding."""
    vector = index.embed(**query)
    members, paths = index.own_pictures(query["image"], query["unlike"])
    return {
        "encode": _percentiles(lambda: index.embed(**query), repeats),
        "search": _percentiles(lambda: index.search_vector(vector, selection, where, members, paths), repeats),
    }


def _percentiles(call: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    times.sort()
    return {f"p{share}": times[math.ceil(share / 100 * repeats) - 1] for share in (50, 95)}


def _query_tiles(index: SearchableIndex, query: Query) -> list[Tile]:
    from spn4cir.index.query_parts import NEGATIVE
    from spn4cir.index.sheet import Tile

    tiles = []
    for name in PARTS:
        negative = name in ("unlike", "without")
        for one in query[name]:
            value, weight = one if isinstance(one, tuple) else (one, NEGATIVE if negative else 1.0)
            caption = [name if weight == 1 else f"{name}, weight {weight:g}"]
            frame = "#c2410c" if negative else "#1d4ed8"
            if name in ("text", "without"):
                tiles.append(Tile(None, caption, value, frame))
            else:
                tiles.append(Tile(index.find_image(value) or Path(value), [*caption, Path(value).name], "", frame))
    return tiles


def _hit_tiles(index: SearchableIndex, hits: Sequence[Hit]) -> list[Tile]:
    from spn4cir.index.sheet import Tile

    tiles = []
    for rank, hit in enumerate(hits, 1):
        title = _cell(hit.columns.get("title"))
        count = len(hit.folded)
        folded = [f"+ {count} near-duplicate{'s' if count > 1 else ''}"] if count else []
        caption = [f"{rank}  ·  {hit.score:.3f}  ·  z {hit.z:.2f}", *([title] if title else []), hit.id, *folded][:3]
        tiles.append(Tile(index.find_image(hit.id), caption))
    return tiles
