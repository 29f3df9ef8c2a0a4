"""Values of each query, or of each need, whose means are an evaluation's metrics."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from spn4cir.errors import InputError
from spn4cir.intervals import Array, Rows, bootstrap_interval, paired_test
from spn4cir.measures import MEASURES, Ranks, measure_name, precision
from spn4cir.types import Benchmark, Measure

WRONG_FIRST, WRONG_ABOVE = "wrong@1", "wrong above"
SPREAD, WORST, BEST = "spread", "worst phrasing", "best phrasing"


class NegativeRanks(NamedTuple):
    """Ranks of each query's named wrong answers, (Q, N, 2) as those of targets; 0 where there is none.

    The query's other wrong answers are left out of the count.
    """

    whole: Ranks  # among all items that are ranked
    among_targets: Ranks  # among the query's targets alone


class Sample(NamedTuple):
    """Metrics that are means over the same queries, or over the same needs.

    Args:
        names: of the metrics, (M,).
        values: (M, n), from 0 to 1.
        rows: (n,) numbers of the queries; numbers of the first query of each need.
        groups: columns of ``values`` of each tag, where metrics are unweighted means over tags; None for plain means.
    """

    names: tuple[str, ...]
    values: Array
    rows: Rows
    groups: list[Rows] | None = None

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each metric, in percent; each of the groups is resampled by itself."""
        ends = 100 * bootstrap_interval(self.values, self.groups)
        return {name: (float(low), float(high)) for name, (low, high) in zip(self.names, ends, strict=True)}

    def means(self) -> Array:
        """The metrics (M,), from 0 to 1."""
        if self.groups is None:
            return np.asarray(self.values.mean(1))
        return np.asarray(np.mean([self.values[:, rows].mean(1) for rows in self.groups], axis=0))

    def p_values(self) -> Array:
        """Of values that are differences between two models: the paired test of each metric (M,)."""
        weights = np.ones(self.values.shape[1])
        if self.groups is not None:  # the mean over tags is a weighted sum over queries
            weights[:] = 0
            for rows in self.groups:
                weights[rows] += 1 / len(rows)
        return paired_test(self.values * weights)


def measures_by_name(benchmark: Benchmark) -> dict[str, Measure]:
    """The measures of a benchmark. Raises ``InputError`` if two have one name."""
    names = [measure_name(measure) for measure in benchmark.measures]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{benchmark.name}: two measures are called {twice[0]}: over gallery and over candidates")
    return dict(zip(names, benchmark.measures, strict=True))


def query_values(benchmark: Benchmark, rankings: Mapping[str, Ranks]) -> dict[str, Array]:
    """Value (Q,) of each query in each measure, from 0 to 1; ranks (Q, P, 2) are given by what is ranked."""
    return {
        name: MEASURES[measure.kind].values(rankings[measure.over], measure.k)
        for name, measure in measures_by_name(benchmark).items()
    }


def tag_rows(benchmark: Benchmark) -> dict[str, Rows]:
    """Numbers of the queries of each tag, sorted by tag."""
    found: dict[str, list[int]] = {}
    for number, query in enumerate(benchmark.queries):
        for tag in dict.fromkeys(query.tags):
            found.setdefault(tag, []).append(number)
    return {tag: np.array(found[tag]) for tag in sorted(found)}


def select_joint(benchmark: Benchmark) -> tuple[Rows, Benchmark]:
    """Numbers of the queries that have both a reference and a text, and a benchmark of these queries."""
    rows = [n for n, query in enumerate(benchmark.queries) if query.reference is not None and query.text is not None]
    if len(rows) == len(benchmark.queries):
        return np.array(rows), benchmark
    queries = tuple(benchmark.queries[n] for n in rows)
    used = {tag for query in queries for tag in query.tags}
    macro = tuple(tag for tag in benchmark.macro if tag in used)
    return np.array(rows, dtype=np.int64), replace(benchmark, queries=queries, macro=macro)


def collect_samples(
    benchmark: Benchmark, rankings: Mapping[str, Ranks], negatives: NegativeRanks | None = None
) -> list[Sample]:
    """All metrics of an evaluation as samples: of queries, of tags, of wrong answers, of needs."""
    values = query_values(benchmark, rankings)
    every, tags = np.arange(len(benchmark.queries)), tag_rows(benchmark)
    if len(primary := [name for name, m in measures_by_name(benchmark).items() if m.primary]) > 1:
        values["Rmean"] = np.mean([values[name] for name in primary], axis=0)
    macro = [tags[tag] for tag in benchmark.macro] if benchmark.macro else None
    found = [Sample(tuple(values), np.stack(list(values.values())), every, macro)]
    if not benchmark.macro and len(tags) > 1:
        names = [name for name, measure in measures_by_name(benchmark).items() if measure.over != "subset"]
        stacked = np.stack([values[name] for name in names])
        found.append(Sample(tuple(f"macro {name}" for name in names), stacked, every, list(tags.values())))
    further = (need_sample(benchmark, values), None if negatives is None else negative_sample(benchmark, negatives))
    return found + [sample for sample in further if sample is not None]


def negative_sample(benchmark: Benchmark, negatives: NegativeRanks) -> Sample | None:
    """Of each query with named wrong answers: whether one is the first item, and whether one is above every target.

    Ties are shared evenly: with one wrong answer among four items that tie for the first rank, the value is 1/4.
    Lower is better. None if no query names a wrong answer.

    Source of the idea: PinPoint, CVPR 2026 (rate of explicit negatives).
    """
    rows = np.array([number for number, query in enumerate(benchmark.queries) if query.negatives], dtype=np.int64)
    if not len(rows):
        return None
    values = np.stack([precision(ranks[rows], 1) for ranks in negatives])  # share of wrong answers at rank 1
    return Sample((WRONG_FIRST, WRONG_ABOVE), values, rows)


def need_rows(benchmark: Benchmark) -> dict[str, Rows]:
    """Numbers of the queries of each need that several queries phrase."""
    found: dict[str, list[int]] = {}
    for number, query in enumerate(benchmark.queries):
        if query.need:
            found.setdefault(query.need, []).append(number)
    return {need: np.array(numbers) for need, numbers in found.items() if len(numbers) > 1}


def need_sample(benchmark: Benchmark, values: Mapping[str, Array]) -> Sample | None:
    """Of each need with several phrasings and each primary measure: spread, worst and best value over the phrasings.

    The spread is the standard deviation over the phrasings that there are. Of recall, the mean of the worst values is
    the share of needs that all phrasings solve. None if no need has several phrasings.

    Source of the idea: PinPoint, CVPR 2026 (spread over paraphrases).
    """
    needs = list(need_rows(benchmark).values())
    if not needs:
        return None
    measures = measures_by_name(benchmark)
    primary = [name for name, measure in measures.items() if measure.primary] or [next(iter(measures))]
    found = {
        f"{name} {label}": np.array([reduce(values[name][rows]) for rows in needs])
        for name in primary
        for label, reduce in ((WORST, np.min), (BEST, np.max), (SPREAD, np.std))
    }
    return Sample(tuple(found), np.stack(list(found.values())), np.array([rows[0] for rows in needs]))


def is_lower_better(name: str) -> bool:
    """Whether a metric counts what goes wrong."""
    return name in (WRONG_FIRST, WRONG_ABOVE) or name.endswith(f" {SPREAD}")
