"""Mutated tables of the shapes that people have: nothing but ``InputError`` is raised, and strict mode loses no row.

    python -m benchmarks.table_fuzz                      # 10,000 tables, seed 0
    python -m benchmarks.table_fuzz --tables 300 --seed 1

Prints one JSON line. A table that fails is kept below --keep, if that is given.
"""

import argparse
import json
import random
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.table_shapes import SHAPES, Shape
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.errors import InputError

TEXT = ("kaggle_fashion", "hm", "shopify", "woocommerce", "flickr30k", "imagefolder_csv")
JSON = ("amazon_berkeley", "coco", "imagefolder_jsonl")
BINARY = {"laion": 0.05, "webdataset": 0.01}  # share of the tables, as each takes long to open
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252")
ODD = [
    '"',
    '""',
    ",",
    ";",
    "\t",
    "|",
    "\n",
    "\r\n",
    "\r",
    "\0",
    "\x1a",
    "é",
    "日本",
    "\ufeff",
    "'",
    "\\",
    "<b>",
    "&amp;",
    " ",
]
# what names an image in a row of each shape; texts hold none
TOKENS = {
    "kaggle_fashion": re.compile(r"(?<![\d.])11[6-8]\d(?!\d)"),
    "hm": re.compile(r"(?<!\d)10[89]\d{6}(?!\d)"),
    "shopify": re.compile(r"https://cdn[^\s,;|\"]*?\.jpg"),
    "woocommerce": re.compile(r"https://shop[^\s,;|\"]*?(?<!-2)\.jpg"),
    "flickr30k": re.compile(r"10000928\d\d\.jpg|10000927\d\d\.jpg"),
    "imagefolder_csv": re.compile(r"00\d\d\.png"),
}


def mutate_text(shape: Shape, name: str, rng: random.Random) -> tuple[bytes, int]:
    """Return the bytes of a mutated table, and the number of its lines that hold an image."""
    text = shape.table().decode("utf-8-sig")
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        head, _, body = text.partition("\n")
        body = rng.choice(MUTATIONS)(body, TOKENS[name], rng)
        text = f"{_mutate_head(head, rng)}\n{body}"
    lines = re.split(r"\r\n|\n|\r", text)
    held = sum(bool(TOKENS[name].search(line)) for line in lines[1:])
    if rng.random() < 0.3:
        text = text.replace("\r\n", "\n").replace("\n", rng.choice(("\r\n", "\r")))
    return text.encode(rng.choice(ENCODINGS), "replace"), held


def _mutate_head(head: str, rng: random.Random) -> str:
    change = rng.random()
    if change < 0.05:
        return head.upper()
    return head + rng.choice((",,", " ", "\t")) if change < 0.08 else head


def _place(text: str, tokens: re.Pattern[str], rng: random.Random) -> int:
    """A place in a text outside what names an image."""
    spans = [found.span() for found in tokens.finditer(text)]
    while True:
        place = rng.randrange(len(text) + 1)
        if not any(first < place < last for first, last in spans):
            return place


def insert(text: str, tokens: re.Pattern[str], rng: random.Random) -> str:
    """Put a letter somewhere."""
    place = _place(text, tokens, rng)
    return text[:place] + rng.choice(ODD) + text[place:]


def insert_quote(text: str, tokens: re.Pattern[str], rng: random.Random) -> str:
    """Open a quote at the beginning of a cell, or somewhere."""
    places = [found.end() for found in re.finditer(r"[,|\n]", text)]
    place = rng.choice(places) if places and rng.random() < 0.7 else _place(text, tokens, rng)
    return text[:place] + '"' + text[place:]


def delete(text: str, tokens: re.Pattern[str], rng: random.Random) -> str:
    """Take a quote, a separator or a line break out."""
    places = [found.start() for found in re.finditer(r'["|,\n]', text)]
    if not places:
        return text
    place = rng.choice(places)
    return text[:place] + text[place + 1 :]


def cut(text: str, tokens: re.Pattern[str], rng: random.Random) -> str:
    """End the file early."""
    return text[: _place(text, tokens, rng)]


def repeat(text: str, tokens: re.Pattern[str], rng: random.Random) -> str:
    """Write a line twice, put an empty line in, or one of separators."""
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    lines.insert(place, rng.choice((lines[place], "", ",,,", "   ")))
    return "\n".join(lines)


MUTATIONS: tuple[Callable[[str, re.Pattern[str], random.Random], str], ...] = (
    insert, insert_quote, insert_quote, delete, delete, cut, repeat
)  # fmt: skip


def mutate_json(shape: Shape, rng: random.Random) -> bytes:
    """Return the bytes of a mutated JSON file: values replaced, letters changed, or cut."""
    import gzip

    packed = shape.file.endswith(".gz")
    data = gzip.decompress(shape.table()) if packed else shape.table()
    text = data.decode()
    for _ in range(rng.choice((0, 1, 2, 4))):
        values = list(re.finditer(r'(?<=: )("[^"]*"|\d+|\[|\{)', text))
        if rng.random() < 0.6 and values:
            found = rng.choice(values)
            other = rng.choice(
                ("null", "1.5", "true", "[]", "{}", '[" a", null, 3]', '"\\u0000"', '""', "NaN", '"../x.png"')
            )
            text = text[: found.start()] + other + text[found.end() :]
        else:
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice((*ODD, "{", "]")) + text[place + rng.randrange(3) :]
    data = (
        text[: rng.randrange(len(text))].encode()
        if rng.random() < 0.1
        else text.encode(rng.choice(ENCODINGS), "replace")
    )
    data = gzip.compress(data, mtime=0) if packed else data
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.05 else data


def mutate_bytes(shape: Shape, rng: random.Random) -> bytes:
    """Return the bytes of a damaged file."""
    data = bytearray(shape.table())
    for _ in range(rng.choice((0, 1, 3, 30))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def read(place: str) -> Any:
    """Read everything that training, evaluation, the check and the index ask for; return the contents."""
    dataset = Catalogue(place)
    ids = dataset.training_images()
    dataset.checks()
    dataset.notes()
    dataset.image_roles()
    dataset.other_columns()
    for image_id in ids:
        dataset.image(image_id)
        assert all(text and "\n" not in text for text in dataset.captions(image_id))
        assert isinstance(dataset.label(image_id) + dataset.category(image_id), str)
    assert all(dataset.image(name) == dataset.image(own) for name, own in dataset.further_names.items())
    return dataset._contents


def run(tables: int, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Read mutated tables, in strict mode where rows can be counted; return counts and failures."""
    counts, refusals, failures, started = Counter[str](), Counter[str](), list[str](), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="table_fuzz") as base:
        shapes = {name: make() for name, make in SHAPES.items()}
        places = {name: shape.write(Path(base) / name, is_empty=True) for name, shape in shapes.items()}
        for number in range(tables):
            rng = random.Random(f"{seed}/{number}")
            name = rng.choices([*TEXT, *JSON, *BINARY], [1] * len(TEXT + JSON) + [9 * x for x in BINARY.values()])[0]
            shape, held, file = shapes[name], None, Path(base) / name / shapes[name].file
            if name in TEXT:
                data, held = mutate_text(shape, name, rng)
            else:
                data = mutate_json(shape, rng) if name in JSON else mutate_bytes(shape, rng)
            file.write_bytes(data)
            is_strict = rng.random() < 0.7
            place = places[name] + (("," if "?" in places[name] else "?") + "strict=true") * is_strict
            problem = ""
            try:
                found = read(place)
                counts["read"] += 1
                if held is not None and is_strict:
                    counts["rows counted"] += 1
                    if found.image_rows != held:
                        problem = f"{found.image_rows} rows, and {held} lines hold an image"
            except InputError as error:
                counts["refused"] += 1
                refusals[_kind_of(str(error))] += 1
                counts["refused, strict" if is_strict else "refused, not strict"] += 1
                problem = (
                    "the message has several lines" if "\n" in str(error) or str(file.name) not in str(error) else ""
                )
                if problem:
                    problem += f": {error}"
            except Exception:
                problem = traceback.format_exc(limit=-3)
            counts[name] += 1
            if problem:
                failures.append(f"{number} ({name}): {problem}")
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, keep / f"{seed}_{number}_{file.name}")
            if file.suffix == ".tar":
                for cache in Path(base).glob("cache/*"):
                    with suppress(OSError):
                        shutil.rmtree(cache)
    seconds = round(time.perf_counter() - started, 1)
    return {
        "tables": tables,
        "seed": seed,
        "seconds": seconds,
        "counts": dict(counts),
        "refusals": dict(refusals.most_common()),
        "failures": failures,
    }


def _kind_of(message: str) -> str:
    """A message without what it names."""
    message = re.sub(r"^\S+?(, row \d+|, line \d+)?(, column '[^']*')?[:,] ", "", message)
    return re.sub(r'"[^"]*"|\d+|/\S+|\'[^\']*\'', "…", message)[:70]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for tables that fail")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(cache)
        datasets.disable_progress_bars()
        with redirect_stderr(StringIO()):
            result = run(args.tables, args.seed, args.keep)
    print(json.dumps(result))
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
