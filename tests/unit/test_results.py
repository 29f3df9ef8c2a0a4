"""What an evaluation found, as data, and the files that the command line writes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from spn4cir import eval_cli
from spn4cir.datasets import load_dataset
from spn4cir.errors import InputError
from spn4cir.measures import best_ranks
from spn4cir.results import Ranking, Result, combine, compute_metrics, metrics_table
from spn4cir.types import Benchmark, Measure, Query, recall_measures

QUERIES = (
    Query("a", "in blue ä", ("b", "c"), ("colour",), name="7"),
    Query(None, "a cat", ("a",), ("animal", "colour")),
    Query("c", None, ("d",)),
)
RANKING = Ranking(
    np.array([[[2, 2], [5, 6]], [[1, 1], [0, 0]], [[9, 9], [0, 0]]]),
    (("b", "d"), ("a", "b"), ("b", "a")), ((0.5, 0.25), (1.0, -0.5), (0.75, 0.5)),
)  # fmt: skip
SUBSET = Ranking(np.array([[[1, 1], [2, 2]], [[1, 1], [0, 0]], [[3, 3], [0, 0]]]))


def found(**changes: Any) -> Result:
    about: dict[str, Any] = {
        "protocol": "x/val", "metrics": {"R@1": 100 / 3}, "tags": {"colour": {"R@1": 50.0, "queries": 2}},
        "ablation": {"image only": {"R@1": 0.1}}, "count": 3, "data": "0123", "is_holdout": True, "skipped": 4,
        "queries": QUERIES, "rankings": {"gallery": RANKING},
    }  # fmt: skip
    return Result(**{**about, **changes})


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, by its suffix."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a result


def test_as_json_and_back() -> None:
    """Every digit and every fact but those of single queries, also among other entries; what is missing is seen."""
    values = json.loads(json.dumps({"run": "runs/x", **found().as_json(), "git": "abc"}))
    assert Result.from_json(values) == found(queries=(), rankings={})
    assert Result.from_json(values).as_json() == found().as_json() == {
        name: values[name] for name in values if name not in ("run", "git")
    }  # fmt: skip
    del values["data"]
    with pytest.raises(KeyError, match="data"):
        Result.from_json(values)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_of_queries(tmp_path: Path, suffix: str) -> None:
    """What was asked, and of each ranking what is asked for; of each query as many ranks as it has targets."""
    result, path = found(rankings={"gallery": RANKING, "subset": SUBSET}), tmp_path / f"rows{suffix}"
    result.write_rows(path, "ranks")
    rows = read(path)
    assert [row["query"] for row in rows] == [0, 1, 2] and rows[0]["name"] == "7"
    assert [(row["reference"], row["text"]) for row in rows] == [("a", "in blue ä"), (None, "a cat"), ("c", None)]
    assert [(row["targets"], row["tags"]) for row in rows] == [(list(q.targets), list(q.tags)) for q in QUERIES]
    assert [row["ranks"] for row in rows] == [[[2, 2], [5, 6]], [[1, 1]], [[9, 9]]]
    assert [row["ranks_subset"] for row in rows] == [[[1, 1], [2, 2]], [[1, 1]], [[3, 3]]]
    assert not {"top", "scores"} & rows[0].keys()
    found().write_rows(path, "top")
    rows = read(path)
    assert [(row["top"], row["scores"]) for row in rows] == [
        (list(top), list(scores)) for top, scores in zip(RANKING.top, RANKING.scores, strict=True)
    ]
    assert "ranks" not in rows[0] and list(tmp_path.iterdir()) == [path]


def test_rows_of_another_kind(tmp_path: Path) -> None:
    """A suffix that says nothing is refused, and nothing is written."""
    with pytest.raises(InputError, match=r"rows\.csv: one row per query is written as \.parquet or \.jsonl"):
        found().write_rows(tmp_path / "rows.csv", "ranks")
    assert not list(tmp_path.iterdir())


def test_metrics_and_tags() -> None:
    """A query counts for each of its tags; means are over queries, over tags, or over the tags of a protocol."""
    benchmark = Benchmark("x/val", tuple("abcd"), QUERIES, False, recall_measures(1, 5, primary=(1, 5)))
    metrics, tags = compute_metrics(benchmark, {"gallery": RANKING.ranks})  # type: ignore[dict-item]
    assert metrics["R@1"] == pytest.approx(100 / 3) and metrics["R@5"] == pytest.approx(200 / 3)
    assert metrics["Rmean"] == pytest.approx(50) and metrics["macro R@1"] == pytest.approx((50 + 100) / 2)
    assert {tag: (values["R@1"], values["queries"]) for tag, values in tags.items()} == {
        "animal": (100.0, 1), "colour": (50.0, 2),
    }  # fmt: skip
    of_tags = Benchmark("x/val", tuple("abcd"), QUERIES, False, benchmark.measures, macro=("colour",))
    assert compute_metrics(of_tags, {"gallery": RANKING.ranks})[0]["R@1"] == 50.0  # type: ignore[dict-item]


def test_two_measures_of_one_name() -> None:
    """Recall over the gallery and over candidates of their own would be one column."""
    measures = (Measure("recall", 1), Measure("recall", 1, over="candidates"))
    queries = tuple(replace(query, candidates=tuple("abcd")) for query in QUERIES)
    benchmark = Benchmark("x/val", tuple("abcd"), queries, False, measures)
    with pytest.raises(InputError, match="x/val: two measures are called R@1"):
        compute_metrics(benchmark, {})


def test_the_table_says_how_many() -> None:
    """Of a mean over queries their number, of tags theirs; the protocol comes first."""
    lines = metrics_table(found(tags={})).splitlines()
    assert lines[0] == "protocol x/val" and lines[2].startswith("all (3 queries)") and "33.33" in lines[2]
    tags = {"colour": {"R@1": 50.0, "queries": 2}, "animal": {"R@1": 0.0, "queries": 1}}
    lines = metrics_table(found(tags=tags)).splitlines()
    assert lines[2].startswith("mean over tags") and [line.split()[:2] for line in lines[3:5]] == [
        ["colour", "(2)"], ["animal", "(1)"],
    ]  # fmt: skip


def test_results_that_are_never_combined() -> None:
    """Of other data, other protocols, other metrics, or none."""
    one = found().as_json()
    assert combine([one, {**one, "metrics": {"R@1": 100 / 3 + 2}}]) == {
        "R@1": (pytest.approx(100 / 3 + 1), pytest.approx(2**0.5))
    }
    for change in ({"data": "4"}, {"protocol": "y/val"}, {"metrics": {"R@2": 1.0}}):
        with pytest.raises(InputError, match="never combined"):
            combine([one, {**one, **change}])
    with pytest.raises(InputError, match="no results"):
        combine([])


# --- the files of spn4cir-eval

Eval = Callable[..., int]


@pytest.fixture
def spn4cir_eval(monkeypatch: pytest.MonkeyPatch) -> Eval:
    """The command, in this process; its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["spn4cir-eval", *map(str, arguments)])
        try:
            eval_cli.evaluate_command()
        except SystemExit as stopped:
            return int(str(stopped.code))
        return 0

    return run


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_ranks_and_first_items_of_an_evaluation(cirr: Path, tmp_path: Path, spn4cir_eval: Eval, suffix: str) -> None:
    """The metrics follow from them, over the gallery and over the subset; no reference is ranked."""
    ranks, top, result = tmp_path / f"ranks{suffix}", tmp_path / f"top{suffix}", tmp_path / "result.json"
    assert spn4cir_eval(
        "--dataset", "cirr", "--data-root", cirr, "--ranks", ranks, "--top-k", top, "--k", 7, "--json", result
    ) == 0  # fmt: skip
    benchmark, metrics = load_dataset("cirr", str(cirr)).benchmark("val"), json.loads(result.read_text())["metrics"]
    named, listed = read(ranks), read(top)
    assert [row["targets"] for row in named] == [row["targets"] for row in listed]
    assert [row["name"] for row in named] == [q.name for q in benchmark.queries]
    rankings = {
        "gallery": np.array([r["ranks"] for r in named]),
        "subset": np.array([r["ranks_subset"] for r in named]),
    }
    assert compute_metrics(benchmark, rankings)[0] == pytest.approx(metrics)
    for row, query, (first, last) in zip(
        listed, benchmark.queries, best_ranks(rankings["gallery"]).tolist(), strict=True
    ):
        assert len(row["top"]) == len(row["scores"]) == len({*row["top"]} - {query.reference}) == 7
        assert row["scores"] == sorted(row["scores"], reverse=True) and {*row["top"]} <= {*benchmark.gallery}
        assert {*row["top_subset"]} == {*query.candidates} - {query.reference}
        within = [score for item, score in zip(row["top"], row["scores"], strict=True) if item in query.targets]
        assert bool(within) == (first <= 7) or first <= 7 < last  # a tie over the end
        if within:
            assert first <= row["top"].index(query.targets[0]) + 1 <= last


@pytest.mark.parametrize("option", ["--ranks", "--top-k"])
def test_an_unknown_suffix_is_refused_before_any_work(
    option: str, spn4cir_eval: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with option and file, before a dataset is opened; a folder that is not there likewise."""
    monkeypatch.setattr("spn4cir.datasets.load_dataset", lambda *_: pytest.fail("a dataset is opened"))
    for path, told in (
        (tmp_path / "out.csv", "one row per query is written as .parquet or .jsonl"),
        (tmp_path / "no" / "out.jsonl", "is missing"),
    ):
        assert spn4cir_eval(option, path) == 2
        assert (said := capsys.readouterr().err).startswith(f"error: {option} {path}") and told in said
        assert said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("arguments", "told"), [(["--k", "5"], "needs --top-k"), (["--k", "0"], "at least 1")])
def test_a_number_of_items_that_cannot_be_meant(
    arguments: list[str], told: str, spn4cir_eval: Eval, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--k`` belongs to ``--top-k``."""
    assert spn4cir_eval(*arguments) == 2 and told in capsys.readouterr().err
