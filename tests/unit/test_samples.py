"""Metrics of wrong answers, needs and tags, with their intervals and differences: against loops."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from spn4cir.comparison import compare_results, comparison_table
from spn4cir.errors import InputError
from spn4cir.evaluate import benchmark_fingerprint
from spn4cir.intervals import holm, paired_test
from spn4cir.query_values import collect_samples, need_sample, query_values
from spn4cir.ranking import rank_negatives, rank_queries
from spn4cir.results import Ranking, Result, compute_metrics
from spn4cir.summary import format_csv, metric_rows
from spn4cir.types import Benchmark, Measure, Query, recall_measures

# --- wrong answers and needs


def make(*queries: Query, **changes: Any) -> Benchmark:
    about = {"exclude_reference": True, "measures": recall_measures(1, 2, primary=(1,)), **changes}
    return Benchmark("x/val", tuple("abcdef"), queries, **about)


def ranked(benchmark: Benchmark, scores: list[list[float]]) -> tuple[dict[str, Any], Any]:
    """Ranks of targets and of wrong answers where query q scores item g by ``scores[q][g]``."""
    query, gallery = torch.tensor(scores), torch.eye(6)[:, None]
    return rank_queries(benchmark, query, gallery), rank_negatives(benchmark, query, gallery)


WRONG = (
    Query("a", "1", ("b",), negatives=("c",)),  # the wrong answer is first
    Query("a", "2", ("b",), negatives=("c", "d")),  # one is above the target, another item is first
    Query("a", "3", ("b",), negatives=("c", "d")),  # both tie with e for the first rank, above the target
    Query("a", "4", ("b",), negatives=("c",)),  # ties with the target alone, behind e
    Query("a", "5", ("b",)),
    Query("a", "6", ("b", "e"), negatives=("c",)),  # above one target, below the other
)
SCORES = [
    [9.0, 2, 3, 1, 0, 0], [9.0, 2, 3, 1, 4, 0], [9.0, 2, 3, 3, 3, 0], [9.0, 2, 2, 1, 4, 0], [9.0, 2, 3, 1, 0, 0],
    [9.0, 1, 2, 0, 3, 0],
]  # fmt: skip


@pytest.mark.parametrize("over", ["gallery", "candidates"])
def test_wrong_answers(over: Any) -> None:
    """First, and above every target; ties shared evenly, the reference left out; other queries have no say."""
    measures = recall_measures(1, 2, primary=(1,), over=over)
    benchmark = make(*(replace(q, candidates=tuple("abcdef")) for q in WRONG), measures=measures)
    ranks, negatives = ranked(benchmark, SCORES)
    samples = {
        name: row
        for s in collect_samples(benchmark, ranks, negatives)
        for name, row in zip(s.names, s.values, strict=True)
    }
    assert samples["wrong@1"].tolist() == pytest.approx([1, 0, 2 / 3, 0, 0])
    assert samples["wrong above"].tolist() == pytest.approx([1, 1, 1, 0.5, 0])
    metrics, _ = compute_metrics(benchmark, ranks, negatives)
    assert metrics["wrong@1"] == pytest.approx(100 / 3) and metrics["wrong above"] == pytest.approx(70)
    assert negatives.whole[1, :, 0].tolist() == [2, 3]  # behind e; the target is before the second


def test_wrong_answers_equal_a_loop() -> None:
    """Random scores of few values, so that many tie: the mean over random orders of equal scores."""
    chance = np.random.default_rng(0)
    queries = tuple(Query("a", str(n), ("b", "c"), negatives=("d", "e")) for n in range(12))
    benchmark, scores = make(*queries), chance.integers(0, 3, (12, 6)).astype(float)
    ranks, negatives = ranked(benchmark, scores.tolist())
    sample = collect_samples(benchmark, ranks, negatives)[-1]
    for number, row in enumerate(scores):
        first = above = 0
        orders = list(permutations(range(1, 6)))
        for order in orders:
            best = sorted(order, key=lambda item: -row[item])  # stable: equal scores in this order
            first += best[0] in (3, 4)
            above += next(item for item in best if item in (1, 2, 3, 4)) in (3, 4)
        assert sample.values[:, number].tolist() == pytest.approx([first / len(orders), above / len(orders)])


def test_a_benchmark_without_wrong_answers_and_needs() -> None:
    """It has no such metrics, and its fingerprint is the one of before there were any."""
    benchmark = make(Query("a", "1", ("b",)), Query("a", "2", ("b",), need="alone"))
    ranks, negatives = ranked(benchmark, SCORES[:2])
    assert negatives is None and compute_metrics(benchmark, ranks)[0].keys() == {"R@1", "R@2"}
    plain = make(Query("a", "1", ("b",)))
    assert benchmark_fingerprint(plain) == "47b84b568cad435e"
    changed = [make(replace(plain.queries[0], need="n")), make(replace(plain.queries[0], negatives=("c",)))]
    assert len({benchmark_fingerprint(one) for one in (plain, *changed)}) == 3


PHRASED = tuple(Query("a", str(n), ("b",), need=need) for n, need in enumerate(("x", "x", "y", "y", "y", "z", "")))


def test_needs_equal_a_loop() -> None:
    """Spread, worst and best over the phrasings of each need that has several."""
    benchmark = make(*PHRASED)
    firsts = [1, 5, 1, 1, 1, 5, 5]
    ranks = {"gallery": np.array([[[n, n]] for n in firsts])}
    sample = need_sample(benchmark, query_values(benchmark, ranks))
    assert sample is not None and sample.rows.tolist() == [0, 2]
    found = dict(zip(sample.names, sample.values.tolist(), strict=True))
    assert found == {"R@1 worst phrasing": [0, 1], "R@1 best phrasing": [1, 1], "R@1 spread": [0.5, 0]}
    metrics, _ = compute_metrics(benchmark, ranks)
    assert (metrics["R@1 worst phrasing"], metrics["R@1 spread"]) == (50, 25)


@pytest.mark.parametrize(("query", "said"), [
    (Query("a", "1", ("b",), negatives=("z",)), "wrong answer 'z', which is not ranked"),
    (Query("a", "1", ("b",), negatives=("b",)), "wrong answer 'b', which is a target too"),
    (Query("a", "1", ("b",), negatives=("a",)), "wrong answer 'a', which is the reference"),
    (Query("a", "1", ("b",), negatives=("c", "c")), "wrong answer 'c', which is named twice"),
    (Query("a", "1", ("c",), need="n"), r"\('1'\) and '0' phrase one need, 'n', and their targets differ"),
])  # fmt: skip
def test_wrong_answers_and_needs_without_a_meaning(query: Query, said: str) -> None:
    """The query is named."""
    with pytest.raises(InputError, match=f"x/val: query 1 has the {said}|x/val: query 1 {said}"):
        make(Query("a", "0", ("b",), need="n"), query)


# --- a result: intervals, rows, comparisons


def result_of(benchmark: Benchmark, ranks: Any, data: str = "0") -> Result:
    metrics, tags = compute_metrics(benchmark, {"gallery": ranks})
    return Result(
        "x/val", metrics, tags, {}, len(ranks), data, queries=benchmark.queries, benchmark=benchmark,
        rankings={"gallery": Ranking(ranks)}, by_mode={"composed": {"gallery": ranks}},
    )  # fmt: skip


@pytest.fixture
def evaluated() -> Callable[..., Result]:
    """An evaluation of 60 drawn queries of three tags, some with several targets, under recall and mAP."""

    def build(seed: int, **changes: Any) -> Result:
        chance = np.random.default_rng(seed)
        queries = tuple(Query("a", str(n), ("b", "c"), (("t", "u", "v")[n % 3],)) for n in range(60))
        measures = (Measure("recall", 1, primary=True), Measure("recall", 2, primary=True), Measure("map", 2))
        first = chance.integers(1, 4, (60, 2))
        ranks = np.stack([first, first + (chance.random((60, 2)) < 0.2)], 2)
        return result_of(make(*queries, measures=measures, **changes), ranks)

    return build


@pytest.mark.parametrize("macro", [(), ("t", "u")])
def test_every_metric_has_an_interval_that_holds_it(evaluated: Callable[..., Result], macro: tuple[str, ...]) -> None:
    """Also Rmean and means over tags; rows of all queries and tags agree with the result."""
    result = evaluated(0, macro=macro).with_intervals()
    assert result.intervals.keys() == result.metrics.keys() > {"R@1", "Rmean"}
    assert all(low < result.metrics[name] < high for name, (low, high) in result.intervals.items())
    rows = metric_rows(result)
    for row in rows:
        expected = result.tags[row.tag][row.metric] if row.tag else result.metrics[row.metric]
        assert row.value == pytest.approx(expected) and row.low <= row.value <= row.high
        if not row.tag:
            assert (row.low, row.high) == pytest.approx(result.intervals[row.metric])
    assert {row.tag for row in rows} == {"", "t", "u", "v"}
    lines = format_csv({"=m,1": rows}).splitlines()
    assert len(lines) == 1 + len(rows) and lines[1].startswith('"\'=m,1",,composed,R@1,')


def test_comparison_of_two_results(evaluated: Callable[..., Result]) -> None:
    """The difference, an interval around it, and p-values corrected for all metrics of all models."""
    base, other = evaluated(0), evaluated(1)
    found = compare_results(base, {"other": other, "same": base})
    assert [row.metric for row in found["other"]] == list(base.metrics)
    for row in found["other"]:
        assert row.difference == pytest.approx(other.metrics[row.metric] - base.metrics[row.metric])
        assert row.low <= row.difference <= row.high and row.p <= row.adjusted
    assert {(row.difference, row.low, row.high, row.p, row.verdict) for row in found["same"]} == {(0, 0, 0, 1, "noise")}
    every = [row for rows in found.values() for row in rows]
    assert [row.adjusted for row in every] == holm([row.p for row in every])
    with pytest.raises(InputError, match="other: evaluated on other data"):
        compare_results(base, {"other": replace(other, data="1")})
    with pytest.raises(InputError, match="no values of single queries"):
        compare_results(Result.from_json(base.as_json()), {"other": other})


@pytest.mark.parametrize("macro", [(), ("v", "t")])
def test_small_tags_of_rows_and_differences(evaluated: Callable[..., Result], macro: tuple[str, ...]) -> None:
    """Ends of rows, of the result and of differences are those of each tag resampled by itself: a loop."""
    base, other = evaluated(0, macro=macro), evaluated(1, macro=macro)
    of_tag = [[n for n, q in enumerate(base.queries) if tag in q.tags] for tag in macro or ("t", "u", "v")]
    name = "R@1" if macro else "macro R@1"
    chance = np.random.default_rng(0)
    drawn = [chance.integers(len(one), size=(1_000, len(one)), dtype=np.int32).tolist() for one in of_tag]
    row_of = lambda result: result.samples()[0].values[0].tolist()  # noqa: E731
    first, second = row_of(base), row_of(other)

    def ends(values: list[float]) -> list[float]:
        means = [
            np.mean([np.mean([values[rows[n]] for n in places[r]]) for rows, places in zip(of_tag, drawn, strict=True)])
            for r in range(1_000)
        ]
        return [float(end) for end in 100 * np.percentile(means, [2.5, 97.5])]

    (row,) = (row for row in metric_rows(base) if (row.tag, row.metric) == ("", name))
    assert [row.low, row.high] == pytest.approx(ends(first))
    assert base.with_intervals().intervals[name] == pytest.approx(tuple(ends(first)))
    (change,) = (one for one in compare_results(base, {"o": other})["o"] if one.metric == name)
    assert [change.low, change.high] == pytest.approx(ends([b - a for a, b in zip(first, second, strict=True)]))


def test_a_mean_over_tags_is_tested_as_a_whole(evaluated: Callable[..., Result]) -> None:
    """Its p-value is that of the weighted sum of differences: signs by a loop."""
    base, other = evaluated(0), evaluated(3)
    tags = [q.tags[0] for q in base.queries]
    (row,) = (row for row in compare_results(base, {"o": other})["o"] if row.metric == "macro mAP@2")
    values = [
        {n: v for s in one.samples() for n, v in zip(s.names, s.values, strict=True)}["mAP@2"] for one in (base, other)
    ]
    weighted = (values[1] - values[0]) / [3 * tags.count(tag) for tag in tags]
    assert row.p == pytest.approx(paired_test(weighted[None] * 60)[0])
    assert row.difference == pytest.approx(100 * weighted.sum())


def test_what_is_better_of_wrong_answers() -> None:
    """Fewer of them; and what is clear is no noise."""
    queries = tuple(Query("a", str(n), ("b",), negatives=("c",)) for n in range(40))
    benchmark = make(*queries)
    good, bad = [9.0, 5, 1, 0, 0, 0], [9.0, 1, 5, 0, 0, 0]
    results = []
    for scores in ([bad] * 40, [good] * 30 + [bad] * 10):
        ranks, negatives = ranked(benchmark, scores)
        results.append(replace(result_of(benchmark, ranks["gallery"]), negatives=negatives))
    rows = {row.metric: row for row in compare_results(results[0], {"o": results[1]})["o"]}
    assert rows["wrong@1"].difference == -75 and rows["wrong@1"].verdict == "better" == rows["R@1"].verdict
    assert compare_results(results[1], {"o": results[0]})["o"][-1].verdict == "worse"
    assert "wrong@1" in comparison_table("o", [*rows.values()])
