"""What an evaluation found, as data: command line, JSON and reports read only this."""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spn4cir.errors import InputError
from spn4cir.files import replaced, write_text
from spn4cir.intervals import Rows
from spn4cir.measures import Ranks, macro_mean, measure_name
from spn4cir.query_values import (
    WRONG_FIRST,
    NegativeRanks,
    Sample,
    collect_samples,
    measures_by_name,
    need_sample,
    negative_sample,
    query_values,
    select_joint,
    tag_rows,
)
from spn4cir.types import Benchmark, Query

SAVED = (
    "protocol", "metrics", "intervals", "tags", "ablation", "ablation_tags", "count", "data", "is_holdout", "skipped",
)  # fmt: skip
ADDED = ("ablation_tags", "intervals")  # files of older versions lack them


@dataclass(frozen=True)
class Ranking:
    """One ranking of every query: the whole gallery's, that of its own candidates, or that of its subset.

    Args:
        ranks: (Q, P, 2) first and last rank of each target, 0 where there is none; None where targets are not public.
        top: ids of the first k items of each query, best first; empty unless they were asked for.
        scores: their scores.
    """

    ranks: Ranks | None = None
    top: Sequence[Sequence[str]] = ()
    scores: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Result:
    """An evaluation.

    Args:
        protocol: id of the benchmark.
        metrics: name to percentage, from 0 to 100; empty where targets are not public.
        tags: the same by tag, each with its number of ``queries``.
        ablation: the same for the image alone, the text alone and late fusion of both, if they were asked for, over
            queries that have both.
        ablation_tags: that by tag, where other queries have one of both alone.
        count: number of queries.
        data: fingerprint of the benchmark; results of different data are never combined.
        is_holdout: whether the queries are training triplets that were held out.
        skipped: number of images that the skip list left out.
        intervals: name to the lower and upper end of the metric's 95 % interval, once ``with_intervals`` computed them.
        queries: the queries, in the order of the rankings.
        rankings: by what is ranked: ``gallery``, ``candidates``, ``subset``.
        benchmark: the protocol as data; None for a result that was read from a file.
        by_mode: ranks by how queries were made, such as ``text only``, then by what is ranked.
        negatives: ranks of named wrong answers, if any query names one.
    """

    protocol: str
    metrics: Mapping[str, float]
    tags: Mapping[str, Mapping[str, float]]
    ablation: Mapping[str, Mapping[str, float]]
    count: int
    data: str
    is_holdout: bool = False
    skipped: int = 0
    ablation_tags: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    queries: Sequence[Query] = field(default=(), repr=False)
    rankings: Mapping[str, Ranking] = field(default_factory=dict, repr=False)
    benchmark: Benchmark | None = field(default=None, repr=False)
    by_mode: Mapping[str, Mapping[str, Ranks]] = field(default_factory=dict, repr=False)
    negatives: NegativeRanks | None = field(default=None, repr=False)

    def samples(self) -> list[Sample]:
        """The values whose means are the metrics. Raises ``InputError`` for a result that was read from a file."""
        if self.benchmark is None:
            raise InputError(f"{self.protocol}: a file holds no values of single queries: evaluate again")
        ranks = {over: ranking.ranks for over, ranking in self.rankings.items() if ranking.ranks is not None}
        return collect_samples(self.benchmark, ranks, self.negatives)

    def with_intervals(self) -> "Result":
        """The same with 95 % intervals, by resampling queries 1,000 times (``spn4cir.intervals``)."""
        found = [sample.intervals() for sample in self.samples()] if self.metrics else []
        return replace(self, intervals={name: ends for one in found for name, ends in one.items()})

    def as_json(self) -> dict[str, Any]:
        """Everything but what concerns single queries."""
        return {name: getattr(self, name) for name in SAVED}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Result":
        """What ``as_json`` returned, among other entries."""
        return cls(**{name: values[name] for name in SAVED if name in values or name not in ADDED})

    def rows(self, *columns: str) -> Iterator[dict[str, Any]]:
        """One dictionary per query: what was asked, and of each ranking ``ranks``, or ``top`` with its scores."""
        if "top" in columns and not all(ranking.top for ranking in self.rankings.values()):
            raise InputError(f"{self.protocol}: no first items were kept: evaluate with top above 0")
        for number, query in enumerate(self.queries):
            row: dict[str, Any] = {"query": number, "name": query.name, "reference": query.reference}
            row |= {"text": query.text, "targets": list(query.targets), "tags": list(query.tags)}
            if self.negatives is not None:
                row["negatives"] = list(query.negatives)
                if "ranks" in columns:
                    row["ranks_negatives"] = self.negatives.whole[number, : len(query.negatives)].tolist()
            for over, ranking in self.rankings.items():
                suffix = "" if over == "gallery" else f"_{over}"
                if "ranks" in columns and ranking.ranks is not None:
                    row[f"ranks{suffix}"] = ranking.ranks[number, : len(query.targets)].tolist()
                if "top" in columns:
                    row[f"top{suffix}"] = list(ranking.top[number])
                    row[f"scores{suffix}"] = list(ranking.scores[number])
            yield row

    def write_rows(self, path: Path, *columns: str) -> None:
        """Write ``rows`` as Parquet or JSONL, whole or not at all. Raises ``InputError`` for another suffix."""
        if path.suffix == ".jsonl":
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows(*columns)))
        elif path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            table = pyarrow.Table.from_pylist(list(self.rows(*columns)))
            with replaced(path) as beside:
                parquet.write_table(table, beside)
        else:
            raise InputError(f"{path}: one row per query is written as .parquet or .jsonl")


def compute_metrics(
    benchmark: Benchmark, rankings: Mapping[str, Ranks], negatives: NegativeRanks | None = None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Metrics of a benchmark in percent, and the same by tag; ranks (Q, P, 2) are given by what is ranked."""
    measures, values = measures_by_name(benchmark), query_values(benchmark, rankings)
    primary = [name for name, measure in measures.items() if measure.primary]

    def mean(rows: Rows | slice) -> dict[str, float]:
        found = {name: float(100.0 * np.mean(value[rows])) for name, value in values.items()}
        if len(primary) > 1:
            found["Rmean"] = float(np.mean([found[name] for name in primary]))
        return found

    tags = {tag: {**mean(rows), "queries": len(rows)} for tag, rows in tag_rows(benchmark).items()}
    metrics = mean(slice(None))
    if benchmark.macro:
        metrics = macro_mean({tag: tags[tag] for tag in benchmark.macro}, list(metrics))
    elif len(tags) > 1:
        over_gallery = [name for name, measure in measures.items() if measure.over != "subset"]
        metrics |= {f"macro {name}": value for name, value in macro_mean(tags, over_gallery).items()}
    for sample in (need_sample(benchmark, values), negatives and negative_sample(benchmark, negatives)):
        if sample:
            metrics |= dict(zip(sample.names, (100 * sample.means()).tolist(), strict=True))
    return metrics, tags


def compute_ablation(
    benchmark: Benchmark, ranks: Mapping[str, Mapping[str, Ranks]]
) -> dict[str, tuple[dict[str, float], dict[str, dict[str, float]]]]:
    """Metrics by how queries were made, over those that have both parts; by tag too, where others have one alone."""
    rows, joint = select_joint(benchmark)
    if not len(rows) or len(rows) == len(benchmark.queries):
        return {mode: (compute_metrics(benchmark, found)[0], {}) for mode, found in ranks.items()}
    return {
        mode: compute_metrics(joint, {over: values[rows] for over, values in found.items()})
        for mode, found in ranks.items()
    }


def metric_names(benchmark: Benchmark) -> list[str]:
    """Names of the metrics that a checkpoint can be selected by."""
    known = [measure_name(measure) for measure in benchmark.measures]
    if len({tag for query in benchmark.queries for tag in query.tags}) > 1 and not benchmark.macro:
        known += [f"macro {measure_name(measure)}" for measure in benchmark.measures if measure.over != "subset"]
    return known


def primary_names(benchmark: Benchmark) -> list[str]:
    """Names of the metrics whose mean selects the best checkpoint: the primary ones, or the first one."""
    return [measure_name(m) for m in benchmark.measures if m.primary] or [measure_name(benchmark.measures[0])]


def selection_score(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """The number that selects the best checkpoint: the mean of the named metrics."""
    return float(np.mean([metrics[name] for name in names]))


def combine(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each metric over results (as JSON), such as those of several seeds.

    Raises ``InputError`` if there are none, or two of them differ in protocol, data or metrics.
    """
    if not results:
        raise InputError("there are no results to combine")
    for key in ("protocol", "data"):
        found = list(dict.fromkeys(str(result[key]) for result in results))
        if len(found) > 1:
            raise InputError(f"results of different {key} are never combined: {', '.join(found)}")
    if any(result["metrics"].keys() != results[0]["metrics"].keys() for result in results):
        raise InputError("results of different metrics are never combined")
    values = {name: [result["metrics"][name] for result in results] for name in results[0]["metrics"]}
    spread = 1 if len(results) > 1 else 0
    return {name: (float(np.mean(v)), float(np.std(v, ddof=spread))) for name, v in values.items()}


def git_commit() -> str | None:
    """The commit of the source that runs, marked if there are changes on top, or None outside a checkout."""
    where = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=where, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def metrics_table(result: Result) -> str:
    """A result as text for the terminal, protocol id first."""
    names = [name for name in result.metrics if " " not in name and name != WRONG_FIRST]
    macro = {name: result.metrics[f"macro {name}"] for name in names if f"macro {name}" in result.metrics}
    several = len(result.tags) > 1
    rows: dict[str, Mapping[str, float]] = {}
    if macro or not several:
        rows[f"all ({result.count} queries)"] = result.metrics
        rows |= _interval_rows(result, names, "", "")
    if macro or several:
        rows["mean over tags"] = macro or result.metrics
        rows |= _interval_rows(result, names, "macro " if macro else "", " ")  # another label than of the rows above
    rows |= {f"  {name} ({values['queries']})": values for name, values in result.tags.items() if several}
    rows |= {mode + ", queries of both" * bool(result.ablation_tags): found for mode, found in result.ablation.items()}
    for tag in next(iter(result.ablation_tags.values()), {}):
        rows |= {f"  {tag}: {mode}": found[tag] for mode, found in result.ablation_tags.items()}
    width = max(map(len, rows))
    lines = [f"protocol {result.protocol}", " " * width + "".join(f"{name:>8}" for name in names)]
    for label, values in rows.items():
        cells = "".join(f"{values[name]:8.2f}" if name in values else " " * 8 for name in names)
        lines.append(f"{label:<{width}}{cells}")
    for name, value in result.metrics.items():
        if name not in names and not name.startswith("macro"):
            ends = result.intervals.get(name)
            lines.append(f"{name:<{width}}{value:8.2f}" + (f"  [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""))
    return "\n".join(lines)


def _interval_rows(result: Result, names: Sequence[str], prefix: str, suffix: str) -> dict[str, Mapping[str, float]]:
    """Both ends of the intervals as rows of the table, if there are intervals."""
    found = {name: result.intervals[prefix + name] for name in names if prefix + name in result.intervals}
    labels = ("  95 % interval from", "  to")
    return {f"{label}{suffix}": {n: ends[at] for n, ends in found.items()} for at, label in enumerate(labels) if found}
