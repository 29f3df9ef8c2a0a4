"""The summary of a run: how much of everything, what was dropped and why, and with which settings."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.data_gen.files import Row, count_lines, stream_jsonl
from spn4cir.data_gen.settings import GenerateConfig
from spn4cir.files import read_json
from spn4cir.files import write_text as write_file
from spn4cir.types import Dataset

if TYPE_CHECKING:
    from spn4cir.data_gen.outputs import TripletWriter
    from spn4cir.data_gen.write_text import Texts

OF_A_MACHINE = ("output", "data_root", "requests", "requests_per_minute", "timeout", "endpoint", "rewriter_endpoint")
"""Settings that say where and how fast a run was made, not what came of it."""
MANY = 0.75  # of the pairs


def reasons(dropped: Mapping[str, int]) -> str:
    """Drop reasons with their counts, the most frequent first; empty if there are none."""
    ordered = sorted(dropped.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} since {reason}" for reason, count in ordered)


def write_summary(config: GenerateConfig, made: "TripletWriter", texts: "Texts", made_by: str) -> dict[str, Any]:
    """Write summary.json: counts, drop reasons, means and settings of one run."""
    images = count_images(config.file("images.jsonl"))
    counts = {
        **images,
        "pairs": texts.pairs,
        "captions": len(texts.captions.text),
        "captions_failed": count_lines(config.file("captions.failed.jsonl")),
        "triplets": made.count,
        "distinct_texts": len(made.distinct),
        "too_long_so_target_caption_alone": texts.shortened,
    }
    if config.rewriter:
        counts |= {"rewritten": made.rewritten, "not_rewritten": made.count - made.rewritten}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_A_MACHINE}
    summary = {
        "counts": counts,
        "dropped": dict(sorted(texts.dropped.items(), key=lambda pair: (-pair[1], pair[0]))),
        "templates": dict(sorted(made.templates.items())),
        "mean_words": round(made.words / max(made.count, 1), 2),
        "mean_tokens": round(made.tokens / max(made.count, 1), 2),
        "settings": settings,
        "made_by": made_by,
    }
    write_file(config.file("summary.json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def count_images(path: Path) -> dict[str, int | None]:
    """How many images there are, and how many with pixels of their own; None where the first step left no file."""
    if not path.is_file():
        return {"images": None, "unique_images": None}
    total, own = 0, 0
    for row in stream_jsonl(path):
        total, own = total + 1, own + (row.get("canonical") == row.get("image_id"))
    return {"images": total, "unique_images": own}


def read_summary(config: GenerateConfig) -> dict[str, Any]:
    """What ``write_summary`` wrote. Raises ``InputError`` if it is missing or damaged."""
    found: dict[str, Any] = read_json(config.file("summary.json"), "python data_gen/write_text.py")
    return found


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts and means of a summary, as names and values to show to people."""
    counted = [(name.replace("_", " "), value) for name, value in summary["counts"].items() if value is not None]
    means = [("words of a text, on average", summary["mean_words"]), ("tokens", summary["mean_tokens"])]
    return [(name, f"{value:,}") for name, value in [*counted, *means]]


def summarise(config: GenerateConfig, dataset: Dataset) -> None:
    """Print the counts, the drop reasons, eight examples, and where the pictures are."""
    summary = read_summary(config)
    print("\nsummary: " + ", ".join(f"{name} {value}" for name, value in facts(summary)))
    print(f"dropped: {reasons(summary['dropped']) or 'none'}")
    if summary["dropped"].get("difference has nothing to say", 0) > MANY * summary["counts"]["pairs"]:
        print("most pairs of captions share no word, so no change can be named: try --templates '[instead]'")
    print("\nfor example:")
    for row in some_rows(config.file("triplets.jsonl"), summary["counts"]["triplets"], 8):
        print(f"  {row['captions'][0]}  +  «{row['modification']}»  →  {row['captions'][1]}")
    files = [config.file(name) for name in ("triplets.json", "triplets.parquet", "sheet.html", "sheet.png")]
    print(f"\n{dataset.name}: " + ", ".join(str(path) for path in files if path.is_file()))


def some_rows(path: Path, total: int, count: int) -> list[Row]:
    """Rows from all over a file."""
    step = max(1, total // count)
    return [row for number, row in enumerate(stream_jsonl(path)) if number % step == 0][:count]
