"""Step 4: turn the captions of a pair into a modification text.

examples:
  python data_gen/write_text.py --dataset emoji --templates '[difference]'
  python data_gen/write_text.py --dataset emoji --templates '[instead, unlike]'
"""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spn4cir.data_gen.steps import GenerateConfig, digest, mark_done, run_step, skip_step
from spn4cir.data_gen.texts import Rewriter, TokenCounter, WordWeights, caption_similarity, compose_text
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import Row, count_lines, replaced, stream_jsonl, write_text
from spn4cir.types import Triplet

GROUP = 1 << 15  # rows of Parquet held in memory
KINDS = ("jsonl", "json", "parquet")
# settings that say where and how fast a run was made
OF_A_MACHINE = ("output", "data_root", "requests", "requests_per_minute", "timeout", "endpoint", "rewriter_endpoint")
# settings that decide the text of a pair whose captions are given, rewriting aside
DECIDING = (
    "templates", "all_templates", "min_shared", "seed", "tokenizer", "max_tokens", "max_caption_similarity",
    "max_caption_count",
)  # fmt: skip
COLUMNS = (  # of the Parquet file
    "reference", "target", "reference_path", "target_path", "modifications", "reference_caption", "target_caption",
    "rank", "similarity", "template", "model", "rewriter", "made_by",
)  # fmt: skip
CHUNK = 4096  # texts counted at once


class Captions:
    """Captions of all images, and which occur too often. Raises ``InputError`` for a missing or damaged file."""

    def __init__(self, config: GenerateConfig):
        path = config.file("captions.jsonl")
        self.text: dict[str, str] = {}  # the first of each image
        self._all: dict[str, list[str]] = {}  # of images that have several
        self._model: str | None = None  # of the first caption
        self._others: dict[str, str | None] = {}  # images whose caption came from another model
        for number, row in enumerate(stream_jsonl(path), 1):
            if lost := {"image_id", "caption"} - row.keys():
                raise InputError(f"{path}, line {number}: there is no {min(lost)!r}")
            image_id, model = row["image_id"], row.get("model")
            self._model = model if number == 1 else self._model
            self.text[image_id] = row["caption"]
            if more := row.get("captions"):
                self._all[image_id] = more
            if model != self._model:
                self._others[image_id] = model
        self.weigh = WordWeights(self._each() if "difference" in config.templates else ())
        limit = config.max_caption_count
        counted = Counter(_normal(text) for text in self._each()) if limit else Counter[str]()
        self._frequent = {text for text, count in counted.items() if limit and count > limit}

    def _each(self) -> Iterator[str]:
        return (text for image_id, first in self.text.items() for text in self._all.get(image_id, (first,)))

    def draw(self, image_id: str, chance: random.Random) -> str | None:
        """A caption of the image; None without any."""
        more = self._all.get(image_id)
        return chance.choice(more) if more else self.text.get(image_id)

    def model(self, image_id: str) -> str | None:
        """What wrote the caption of an image."""
        return self._others.get(image_id, self._model)

    def too_often(self, text: str) -> bool:
        """Whether more images than ``max_caption_count`` have this caption."""
        return bool(self._frequent) and _normal(text) in self._frequent


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


class Texts:
    """Rows with a text for each pair that has one to say, and the count of everything that was left out.

    With ``all_templates`` a pair has a row for each of its texts, one after the other, which ``join_texts`` joins.
    """

    def __init__(self, config: GenerateConfig, captions: Captions, count: TokenCounter):
        self.config, self.captions, self.count = config, captions, count
        self.pairs, self.dropped = 0, Counter[str]()  # pairs seen so far; how many of them were dropped, by reason
        self.shortened = 0  # texts that were too long, so that the target's caption stands in their place

    def of(self, pairs: Iterable[Row]) -> Iterator[Row]:
        """Rows of pairs, in their order; each holds ``tokens``, how long its text is."""
        stream = iter(pairs)
        while chunk := list(islice(stream, CHUNK)):
            self.pairs += len(chunk)
            yield from self._guarded([row for pair in chunk for row in self._rows(pair)])

    def _rows(self, pair: Row) -> list[Row]:
        names = pair["reference"], pair["target"]
        draw = random.Random(f"{self.config.seed}/{names[0]}/{names[1]}")
        one, other = (self.captions.draw(name, draw) for name in names)
        if one is None or other is None:
            self.dropped["an image has no caption"] += 1
            return []
        templates = self.config.templates if self.config.all_templates else [draw.choice(self.config.templates)]
        weigh, least = self.captions.weigh, self.config.min_shared
        texts = {name: compose_text(name, one, other, draw, weigh, least).strip() for name in templates}
        if reason := self._reason(one, other):
            self.dropped[reason] += 1
            return []
        if not any(texts.values()):
            self.dropped[f"{templates[0]} has nothing to say"] += 1
        kept = {key: pair.get(key) for key in ("reference", "target", "rank", "similarity")}
        rest = {"captions": [one, other], "model": self.captions.model(names[1])}
        return [{**kept, "modification": text, "template": name, **rest} for name, text in texts.items() if text]

    def _reason(self, one: str, other: str) -> str | None:
        if one.lower() == other.lower():
            return "the two captions are equal"
        limit = self.config.max_caption_similarity
        if limit is not None and caption_similarity(one, other) > limit:
            return f"the captions share more than {limit} of their words"
        if self.captions.too_often(one) or self.captions.too_often(other):
            return f"a caption occurs more than {self.config.max_caption_count} times"
        return None

    def _guarded(self, rows: list[Row]) -> Iterator[Row]:
        """The paper's guard: the target's caption alone instead of a text that is too long, or else nothing."""
        limit = self.config.max_tokens
        for row, tokens in zip(rows, self.count([row["modification"] for row in rows]), strict=True):
            row["tokens"] = tokens
            if tokens > limit:
                row["modification"] = row["captions"][1].strip()
                row["shortened"], row["template"] = row["template"], "target"
                [row["tokens"]] = self.count([row["modification"]])
        for of_pair in self._by_pair(rows):
            kept = [row for row in of_pair if row["tokens"] <= limit and row["modification"]]
            if not kept:
                self.dropped[f"too long: more than {limit} tokens"] += 1
            self.shortened += sum("shortened" in row for row in kept)
            yield from kept

    def _by_pair(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """The rows of each pair, of which there are several with ``all_templates`` alone."""
        if self.config.all_templates:
            return (list(group) for _, group in groupby(rows, itemgetter("reference", "target")))
        return ([row] for row in rows)

    def join_texts(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row for each pair: that of its first text, and under ``other_texts`` what is said of any further one."""
        of_pair = ("reference", "target", "rank", "similarity", "captions", "model")
        for group in self._by_pair(rows):
            distinct: dict[str, Row] = {}
            for row in group:
                distinct.setdefault(row["modification"], row)
            first, *others = distinct.values()
            told = [{key: row[key] for key in row if key not in of_pair} for row in others]
            yield {**first, "other_texts": told} if told else first


def list_texts(row: Row) -> list[Row]:
    """What a row says of each text of its pair: the text as ``modification``, its ``template`` and its ``tokens``."""
    return [row, *row.get("other_texts", ())]


@contextmanager
def open_triplet_files(config: GenerateConfig, dataset: Dataset, made_by: str) -> Iterator["TripletWriter"]:
    """Open the three files, which are whole or not there at all. Raises ``InputError`` where one cannot be written."""
    with ExitStack() as stack:
        paths = [stack.enter_context(replaced(config.file(f"triplets.{kind}"))) for kind in KINDS]
        writer = TripletWriter(paths, dataset, made_by, stack)
        yield writer
        writer.finish()


class TripletWriter:
    """Writes triplets as they come, to JSONL, JSON in the dataset's published shape and Parquet, and counts them."""

    def __init__(self, paths: list[Path], dataset: Dataset, made_by: str, stack: ExitStack):
        import pyarrow as pa
        import pyarrow.parquet as pq

        from spn4cir.datasets.generated import entry_writer

        self._dataset, self._made_by = dataset, made_by
        self._path_of = lru_cache(1 << 18)(lambda image_id: str(dataset.image(image_id)))
        self._published = entry_writer(dataset, paths[1].parent)
        self.count, self.texts, self.words, self.tokens, self.rewritten = 0, 0, 0, 0, 0
        self.distinct, self.templates = set[int](), Counter[str]()  # hashes of texts; texts of each template
        self._group: list[Row] = []
        kinds = {"modifications": pa.list_(pa.string()), "rank": pa.int64(), "similarity": pa.float64()}
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        self._rows, self._entries = (stack.enter_context(path.open("w", encoding="utf-8")) for path in paths[:2])
        self._parquet: Any = stack.enter_context(pq.ParquetWriter(paths[2], self._schema, compression="zstd"))

    def add(self, row: Row) -> None:
        """Write one triplet."""
        self._rows.write(json.dumps({**row, "made_by": self._made_by}, ensure_ascii=False) + "\n")
        parts = list_texts(row)
        texts = tuple(part["modification"] for part in parts)
        entry = self._published(Triplet(row["reference"], (row["target"],), texts), tuple(row["captions"]))
        if any("llm_caption" in part for part in parts):  # which takes the place of all texts where it is read
            entry["llm_caption"] = list(texts) if texts[1:] else texts[0]
        self._entries.write(("," if self.count else "[") + "\n" + json.dumps(entry, ensure_ascii=False, indent=0))
        self._group.append(self._record(row))
        if len(self._group) == GROUP:
            self._flush()
        self.count += 1
        self.texts += len(parts)
        for part in parts:
            self.words += len(part["modification"].split())
            self.tokens += part["tokens"]
            self.rewritten += "llm_caption" in part
            self.distinct.add(hash(part["modification"]))
            self.templates[part["template"]] += 1

    def _record(self, row: Row) -> Row:
        parts = list_texts(row)
        rewriter = next((part["rewriter"] for part in parts if "rewriter" in part), None)
        known = {**row, "modifications": [part["modification"] for part in parts], "rewriter": rewriter}
        known["made_by"] = self._made_by
        for role, caption in zip(("reference", "target"), row["captions"], strict=True):
            known |= {f"{role}_path": self._path_of(row[role]), f"{role}_caption": caption}
        return {name: known.get(name) for name in COLUMNS}

    def _flush(self) -> None:
        import pyarrow as pa

        self._parquet.write_table(pa.Table.from_pylist(self._group, schema=self._schema))
        self._group.clear()

    def finish(self) -> None:
        """Write what is still in memory, after the last triplet."""
        self._flush()
        self._entries.write("\n]\n" if self.count else "[]\n")


def write_triplets(config: GenerateConfig, dataset: Dataset) -> None:
    """Write triplets.jsonl with what each came from, triplets.json as published, triplets.parquet, and summary.json.

    Raises ``InputError`` if a file is missing or damaged, or no pair gives a triplet; what was there before stays.
    """
    processes, rewriter = Processes(), Rewriter.of(config)
    out, pairs, captions = (config.file(name) for name in ("triplets.json", "pairs.jsonl", "captions.jsonl"))
    settings = {name: getattr(config, name) for name in DECIDING} | ({"rewriter": rewriter.about} if rewriter else {})
    made_by = digest({"step": "write", "dataset": dataset.name, **settings}, pairs, captions)
    if skip_step("write", out, made_by):
        return
    known, count = Captions(config), TokenCounter(config.tokenizer)
    if rewriter:
        rewriter.rewrite(lambda: Texts(config, known, count).of(stream_jsonl(pairs)), count, made_by)
    if processes.first:
        texts = Texts(config, known, count)
        rows = texts.of(tqdm(stream_jsonl(pairs), desc="write", unit="pair", leave=False))
        with open_triplet_files(config, dataset, made_by) as files:
            for row in texts.join_texts(rewriter.apply(rows, count) if rewriter else rows):
                files.add(row)
            if not files.count:
                raise InputError(f"{pairs} gives no triplet: {describe_drops(texts.dropped) or 'there is no pair'}")
        summary = write_summary(config, files, texts, made_by)
        others = [config.file(name) for name in ("triplets.jsonl", "triplets.parquet", "summary.json")]
        mark_done(out, made_by, *others, **settings, triplets=files.count, dropped=summary["dropped"])
        print(f"write: {files.count} triplets, dropped: {describe_drops(texts.dropped) or 'none'} → {out}")
    processes.wait()


def describe_drops(dropped: Mapping[str, int]) -> str:
    """List drop reasons with their counts, the most frequent first; empty if there are none."""
    return ", ".join(f"{count:,} since {reason}" for reason, count in _by_count(dropped))


def _by_count(dropped: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(dropped.items(), key=lambda pair: (-pair[1], pair[0]))


def write_summary(config: GenerateConfig, made: TripletWriter, texts: Texts, made_by: str) -> dict[str, Any]:
    """Write summary.json: counts, drop reasons, means and settings of one run."""
    counts = {
        **count_images(config.file("images.jsonl")),
        "pairs": texts.pairs,
        "captions": len(texts.captions.text),
        "captions_failed": count_lines(config.file("captions.failed.jsonl")),
        "triplets": made.count,
        **({"texts": made.texts} if config.all_templates else {}),
        "distinct_texts": len(made.distinct),
        "too_long_so_target_caption_alone": texts.shortened,
    }
    if config.rewriter:
        counts |= {"rewritten": made.rewritten, "not_rewritten": made.texts - made.rewritten}
    summary = {
        "counts": counts,
        "dropped": dict(_by_count(texts.dropped)),
        "templates": dict(sorted(made.templates.items())),
        "mean_words": round(made.words / max(made.texts, 1), 2),
        "mean_tokens": round(made.tokens / max(made.texts, 1), 2),
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_A_MACHINE},
        "made_by": made_by,
    }
    write_text(config.file("summary.json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def count_images(path: Path) -> dict[str, int | None]:
    """Count images, and those with pixels of their own; None where the first step left no file."""
    if not path.is_file():
        return {"images": None, "unique_images": None}
    unique = sum(row.get("canonical") == row.get("image_id") for row in stream_jsonl(path))
    return {"images": count_lines(path), "unique_images": unique}


if __name__ == "__main__":
    run_step(write_triplets, __doc__)
