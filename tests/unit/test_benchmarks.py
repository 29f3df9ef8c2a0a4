"""The suite of benchmarks: what it runs, what it prints, and that nothing that is missed or fails is hidden."""

import json
import operator
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_options

from benchmarks import __main__ as suite
from benchmarks import device, gradients, loss, measure, processes, step
from benchmarks.measure import bound, distance, in_child, in_turns, peaks, report, row, share

HERE = Path(suite.__file__).parent


def made(time: float = 0.5) -> dict[str, Any]:
    """A report with one bound, 0.8 of the baseline's time."""
    line = row("a thing", "another", (time, 1.0), (1234.5, None), (bound("time", share(time, 1.0), most=0.8),))
    return report("loss", "made up", [line])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command with made-up reports, or what a benchmark raises; gives the exit code."""

    def run(found: dict[str, Any], *options: str) -> int:
        def one(task: Any, name: str) -> Any:
            if isinstance(found[name], Exception):
                raise found[name]
            return found[name]

        monkeypatch.setattr(suite, "in_child", one)
        monkeypatch.setattr(suite, "HERE", tmp_path)
        monkeypatch.setattr(suite, "summary", str)
        (tmp_path / "results").mkdir(exist_ok=True)
        try:
            suite.main(["--only", *found, *options])
        except SystemExit as end:
            return int(str(end.code))
        return 0

    return run


def test_every_benchmark_is_known() -> None:
    """Each module is in the suite or named apart from it, once."""
    helpers = {"__init__", "__main__", "measure", "made_index", "styles_plot", "table_shapes"}
    modules = {path.stem for path in HERE.glob("*.py")} - helpers
    assert sorted(modules) == sorted([*suite.SUITE, *suite.SLOW])
    assert set(suite.QUICK) <= set(suite.SUITE)
    assert all(hasattr(module, "suite") for module in (loss, step, gradients, processes, device))


def test_list_runs_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All names with what they are; nothing is run."""
    monkeypatch.setattr(suite, "run_all", None)
    suite.main(["--list"])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and suite.summary(name) in told for name in (*suite.SUITE, *suite.SLOW))


@pytest.mark.parametrize(("name", "said"), [("claims", "four hours"), ("lost", "known: loss, step")])
def test_names_that_are_not_of_the_suite(name: str, said: str) -> None:
    with pytest.raises(suite.InputError, match=said):
        suite.choose([name])


def test_the_device_has_its_rows_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert suite.choose([]) == [name for name in suite.SUITE if there or name != "device"]
    with pytest.raises(suite.InputError, match="no GPU"):
        device.suite()


def test_table(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns stand below each other; what is not known is a dash; a bound is said to hold."""
    assert run({"loss": made()}) == 0
    told = capsys.readouterr().out.splitlines()
    assert json.loads(told[0])["rows"][0]["bounds"][0]["holds"]
    head, line = told[2:4]
    assert line.split() == [
        "loss",
        "a",
        "thing",
        "another",
        "0.5",
        "1",
        "0.5",
        "1,234",
        "–",
        "time",
        "0.5",
        "≤",
        "0.8",
        "holds",
    ]
    assert head.index("bounds") == line.index("time 0.5") and head.index("against") == line.index("another")


@pytest.mark.parametrize(("time", "code"), [(0.8, 0), (0.81, 1)])
def test_a_missed_bound_is_seen(run: Any, capsys: pytest.CaptureFixture[str], time: float, code: int) -> None:
    """Marked in the table, told below it, and the exit code is 1; the other benchmarks run all the same."""
    assert run({"loss": made(time), "step": made()}) == code
    told = capsys.readouterr().out
    assert ("MISSED" in told) == bool(code) and "2 benchmarks in" in told
    assert ("loss: a thing: time 0.81, which should be ≤ 0.8" in told) == bool(code)


def test_what_was_not_measured_misses_its_bound() -> None:
    assert not bound("memory", None, most=1)["holds"] and not bound("faster", 9.9, least=10)["holds"]
    assert bound("faster", 10, least=10) == {"of": "faster", "value": 10, "bound": "≥ 10", "holds": True}


def test_a_benchmark_that_fails_is_told(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run({"loss": AssertionError("ours differs\nfrom dense"), "step": made()}) == 1
    told = capsys.readouterr()
    assert "loss failed: AssertionError: ours differs from dense" in told.out and "FAILED" in told.err
    assert "1 benchmarks in" in told.out


def test_results_are_kept_only_if_asked_for(run: Any, tmp_path: Path) -> None:
    """Under names of their own where a benchmark's own command measures more."""
    run({"loss": made()})
    assert not list((tmp_path / "results").iterdir())
    run({"loss": made(), "matching": made()}, "--save")
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"loss.json", "matching_quick.json"}
    assert json.loads((tmp_path / "results" / "loss.json").read_text()) == made()


@pytest.mark.skipif(not measure.anonymous(os.getpid()), reason="the system does not tell anonymous memory")
def test_a_peak_is_exact() -> None:
    """What is there for a moment is seen, though it was there and gone before."""
    found = peaks(partial(dict, ten=partial(operator.mul, b"ab", 5 * 2**20), one=partial(operator.mul, b"a", 2**20)))
    assert 9.5 < (found["ten"] or 0) < 11 and 0.5 < (found["one"] or 0) < 2


def test_a_child_raises_here() -> None:
    with pytest.raises(ValueError, match="they differ"):
        in_child(int, "they differ")


def test_rounds_go_in_turns() -> None:
    """Each way once in each round, and the first round does not count."""
    seen: list[str] = []
    seconds = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b"] * 3 and seconds.keys() == {"a", "b"}


def test_losses_agree_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """At small sizes; negative control: a way that forgets a candidate is refused."""
    for size, ways in (
        (loss.Size(501, 1, 16, 5), ("ours", "plain", "dense")),
        (loss.Size(99, 3, 16, 5), tuple(loss.WAYS)),
    ):
        assert compare_errors(loss.compare(size, torch.float32, ways, 1)) < 1e-4
    monkeypatch.setitem(loss.WAYS, "ours", lambda one: loss.dense(one) * 1.01)
    with pytest.raises(AssertionError, match="ours differs from dense"):
        loss.compare(size, torch.float32, ("ours", "dense"), 1)


def compare_errors(found: dict[str, Any]) -> float:
    return max(value for parts in found["error"].values() for value in parts.values())


def test_plain_chunks_leave_nothing_behind() -> None:
    before = dict(loss.streaming.FUSED)
    with loss.without_attention():
        assert not loss.streaming.FUSED and not loss.streaming.fused("cpu", torch.float32, 16)
    assert before == loss.streaming.FUSED


def test_step_of_a_small_model() -> None:
    found = step.suite("embedded", 50, 4, 1)
    assert found["rows"][0]["bounds"][0]["of"] == "time" and found["distance from dense"] < 1e-4


def test_gradients_of_two_steps() -> None:
    """Chunks give the same; negative control: another temperature does not."""
    plain, chunked = gradients.Step(gradients.PLAIN, 8), gradients.Step((True, False), 8)
    other = gradients.Step(gradients.PLAIN, 8)
    other.objective.temperature.data.mul_(1.1)
    for one in (plain, chunked, other):
        one()
    assert chunked.distance(plain) < 1e-5 < 1e-2 < other.distance(plain)


def test_parts_of_processes_are_joined() -> None:
    """Two halves of what one process finds, with the factor that their mean takes away again; and a wrong half."""
    case = ((41, 2, 8, 4), torch.float64)
    whole = processes._case(0, 1, case, 1)
    halves = [
        {**whole, "query": [[2 * x for x in line] for line in part]}
        for part in (whole["query"][:2], whole["query"][2:])
    ]
    line = processes.compare(case, whole, halves)
    assert all(held["holds"] for held in line["bounds"])
    with pytest.raises(AssertionError, match="float64: 2 processes differ"):
        processes.compare(case, whole, [halves[0], halves[0]])


def test_device_rows_at_tiny_sizes(tmp_path: Path) -> None:
    """All of the code that a GPU runs; one vector and several for each candidate, and a bank that does not fit."""
    options = tiny_options("sprc", tmp_path)
    options["config"]["qformer_config"]["vocab_size"] = 101
    several = device.Model("tiny", "sprc", {**options, "load_weights": False}, (17, 32), (4, 24), 100)
    single = device.Model("small", "clip4cir", {}, (1, 128), (1, 128))
    found = device.suite((single, several), (40, 10**9), 4, "cpu", 1)
    assert [line["what"].partition(",")[0] for line in found["rows"]] == [
        "stage-2 step", "loss alone", "small", "stage-2 step", "loss alone", "tiny",
    ]  # fmt: skip
    assert found["rows"][2]["what"].endswith("does not fit") and found["rows"][1]["seconds"]["baseline"]


def test_distance() -> None:
    assert distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
