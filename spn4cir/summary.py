"""All metrics of an evaluation as rows: by tag, by mode, with intervals."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spn4cir.evaluate import COMPOSED
from spn4cir.intervals import Array, bootstrap_interval, bootstrap_means
from spn4cir.measures import Ranks
from spn4cir.query_values import Sample, collect_samples, select_joint, tag_rows
from spn4cir.results import Result
from spn4cir.types import Benchmark

ENDS = (2.5, 97.5)  # percentiles
MACRO = "macro "  # what the name of a mean over tags begins with
HEAD = ("model", "tag", "mode", "metric", "value", "low", "high", "queries")


class MetricRow(NamedTuple):
    """One metric of one tag, or of all queries where the tag is empty, by one mode; in percent.

    ``queries`` counts the queries, or the needs of a metric over needs.
    """

    tag: str
    mode: str
    metric: str
    value: float
    low: float
    high: float
    queries: int


def metric_rows(result: Result) -> list[MetricRow]:
    """Metrics with 95 % intervals: of all queries, of each tag, and by each mode if there was an ablation.

    Modes other than ``composed`` are over queries that have both parts; so is ``composed, queries of both``, which is
    there if other queries have one part alone.
    """
    benchmark = result.benchmark
    samples = {COMPOSED: result.samples()}
    assert benchmark is not None
    rows = list(_rows(benchmark, samples))
    numbers, joint = select_joint(benchmark)
    ranks = {mode: found for mode, found in result.by_mode.items() if mode != COMPOSED}
    if ranks and len(numbers):
        if len(numbers) < len(benchmark.queries):
            ranks[f"{COMPOSED}, queries of both"] = result.by_mode[COMPOSED]
        rows += _rows(joint, {mode: _samples_of(joint, found, numbers) for mode, found in ranks.items()})
    return rows


def _samples_of(joint: Benchmark, ranks: Mapping[str, Ranks], numbers: Array | Ranks) -> list[Sample]:
    return collect_samples(joint, {over: values[numbers] for over, values in ranks.items()})


def _rows(benchmark: Benchmark, samples: Mapping[str, Sequence[Sample]]) -> Iterator[MetricRow]:
    """Rows of all modes, whose samples have the same metrics.

    All queries are resampled once, and the queries of each tag once, for all modes. Tags of ``benchmark.macro`` are
    drawn first, as ``Sample.intervals`` draws them, so both give the same ends.
    """
    plain, tags = [of_mode[0] for of_mode in samples.values()], tag_rows(benchmark)
    columns = {name: place for place, name in enumerate(plain[0].names)}
    shown = tags if len(tags) > 1 or benchmark.macro else {}
    order = dict.fromkeys([*benchmark.macro, *shown])
    places, averaged = {tag: place for place, tag in enumerate(order)}, len(benchmark.macro or shown)
    stacked = np.concatenate([sample.values for sample in plain])
    whole = _split(bootstrap_means(stacked, [plain[0].rows]), len(plain))[:, 0]  # (R, modes, M)
    by_tag = _split(bootstrap_means(stacked, [tags[tag] for tag in order]), len(plain))  # (R, T, modes, M)
    for parts in zip(*samples.values(), strict=True):
        first = parts[0]
        own = [columns.get(name.removeprefix(MACRO), -1) for name in first.names]
        if -1 in own:  # over wrong answers, or needs
            ends = bootstrap_interval(np.concatenate([sample.values for sample in parts]), first.groups)
        else:
            ends = _ends((whole if first.groups is None else by_tag[:, :averaged].mean(1))[..., own])
        yield from _named("", samples, first, [sample.means() for sample in parts], ends)
    for tag, rows in shown.items():
        of_modes = [sample.values[:, rows].mean(1) for sample in plain]
        yield from _named(tag, samples, plain[0]._replace(rows=rows), of_modes, _ends(by_tag[:, places[tag]]))


def _split(means: Array, modes: int) -> Array:
    """Means (R, T, modes · M) as (R, T, modes, M)."""
    return means.reshape(*means.shape[:2], modes, means.shape[2] // modes)


def _ends(means: Array) -> Array:
    """Percentiles (modes · M, 2) of resampled means (R, modes, M)."""
    return np.asarray(np.percentile(means, ENDS, axis=0).reshape(2, -1).T)


def _named(
    tag: str, modes: Mapping[str, object], sample: Sample, means: Sequence[Array], ends: Array
) -> Iterator[MetricRow]:
    """Rows of one tag; ``ends`` (modes · M, 2)."""
    for mode, values, own in zip(modes, means, np.split(100 * ends, len(modes)), strict=True):
        for name, value, (low, high) in zip(sample.names, values, own, strict=True):
            yield MetricRow(tag, mode, name, 100 * float(value), float(low), float(high), len(sample.rows))


def format_csv(rows: Mapping[str, Sequence[MetricRow]]) -> str:
    """The rows of each model as CSV, with a head line.

    A name that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    for model, found in rows.items():
        for row in found:
            names = (f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t") else name for name in (model, row.tag))
            numbers = (f"{number:.6f}" for number in (row.value, row.low, row.high))
            writer.writerow([*names, row.mode, row.metric, *numbers, row.queries])
    return text.getvalue()
