"""CIRR's submission: two JSON files of ranked image names, which only its server can score.

Keys are pair ids as text, values the first 50 images of the gallery without the reference (``recall``), or the first 3
of the subset without the reference (``recall_subset``); ``version`` and ``metric`` say what the file is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spn4cir.errors import InputError
from spn4cir.files import read_json, short, write_text
from spn4cir.types import Benchmark, Query

VERSION = "rc2"
LENGTHS = {"recall": 50, "recall_subset": 3}
LIMIT = 5_000_000  # bytes that the server takes


def write_submission(
    folder: Path, ranked: Mapping[str, Sequence[str]], within: Mapping[str, Sequence[str]], benchmark: Benchmark
) -> list[Path]:
    """Write both files into a folder, made if it is missing, whole or not at all.

    ``ranked`` are the first images of the gallery by query name, at least 50, ``within`` those of the subset, at least
    3. Raises ``InputError`` if the server would refuse a file, such as for a query of the benchmark that is missing.
    """
    contents: dict[Path, str] = {}
    for metric, lists in (("recall", ranked), ("recall_subset", within)):
        content: dict[str, Any] = {"version": VERSION, "metric": metric}
        content |= {name: list(lists[name])[: LENGTHS[metric]] for name in sorted(lists)}
        path = folder / f"{metric}_submission.json"
        contents[path] = json.dumps(content, separators=(",", ":"))
        _check(path, content, len(contents[path]), benchmark)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None
    for path, text in contents.items():
        write_text(path, text)
    return list(contents)


def check_submission(path: Path, benchmark: Benchmark) -> str:
    """One line on a sound file of either metric. Raises ``InputError`` that names the file, the entry and its fault."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file")
    return _check(path, read_json(path), path.stat().st_size, benchmark)


def _check(path: Path, content: Any, size: int, benchmark: Benchmark) -> str:
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of pair ids and ranked images")
    if size >= LIMIT:
        raise InputError(f"{path}: {size:,} bytes, but the server takes less than {LIMIT:,}")
    for key, known in (("version", (VERSION,)), ("metric", tuple(LENGTHS))):
        allowed = " or ".join(map(repr, known))
        if key not in content:
            raise InputError(f"{path}: the entry {key!r} is missing; it must be {allowed}")
        if content[key] not in known:
            raise InputError(f"{path}, entry {key!r}: must be {allowed}, got {short(content[key])}")
    metric = content["metric"]
    queries = {query.name: query for query in benchmark.queries}
    answers = {name: value for name, value in content.items() if name not in ("version", "metric")}
    faults = [f"entry {short(name)} is no pair id of {benchmark.name}" for name in answers if name not in queries]
    faults += [f"pair id {name!r} is missing" for name in queries if name not in answers]
    gallery = set(benchmark.gallery)
    for name, images in answers.items():
        if name in queries and (fault := _fault(images, queries[name], metric, gallery)):
            faults.append(f"entry {name!r}: {fault}")
    if faults:
        more = f" (and {len(faults) - 1} more entries with a fault)" if len(faults) > 1 else ""
        raise InputError(f"{path}, {faults[0]}{more}")
    return f"{path}: a sound {metric} submission, {len(answers)} queries of {LENGTHS[metric]} images, {size:,} bytes"


def _fault(images: Any, query: Query, metric: str, gallery: set[str]) -> str:
    if not isinstance(images, list):
        return f"expected a list of image names, got {short(images)}"
    if wrong := [i for i in images if not isinstance(i, str)]:
        return f"expected a list of image names, got {short(wrong[0])} in it"
    if len(images) != LENGTHS[metric]:
        return f"expected {LENGTHS[metric]} images, got {len(images)}"
    if len(set(images)) < len(images):
        return f"{short(next(i for i in images if images.count(i) > 1))} occurs twice"
    if query.reference in images:
        return f"its own reference {query.reference!r} is in the list"
    if unknown := [i for i in images if i not in gallery]:
        return f"{short(unknown[0])} is not in the gallery"
    strangers = [i for i in images if i not in query.candidates]
    return f"{strangers[0]!r} is no member of its subset" if metric == "recall_subset" and strangers else ""
