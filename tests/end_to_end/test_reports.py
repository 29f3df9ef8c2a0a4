"""``spn4cir-eval --report --compare --csv`` over a catalogue with wrong answers and phrasings, and its errors."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import draw_picture

from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.eval_cli import evaluate_command

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command, in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spn4cir-eval", *map(str, arguments)])
        capfd.readouterr()
        try:
            evaluate_command()
        except SystemExit as stopped:
            return int(str(stopped.code)), *capfd.readouterr()
        return 0, *capfd.readouterr()

    return run


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures in a folder of a hostile name; two phrasings of each of 12 needs, a third with a wrong answer."""
    monkeypatch.chdir(tmp_path)
    names = [f"<b>&'s/{n}.png" for n in range(12)]
    for n, name in enumerate(names):
        draw_picture(tmp_path / "shop" / name, n)
    rows = [("reference", "modification", "target", "group", "negative", "need")]
    for n, name in enumerate(names):
        for text in ("<script>in blue</script>", "blue, please"):
            wrong = names[(n + 2) % 12] if n % 3 == 0 else ""
            rows.append((name, text, names[(n + 1) % 12], f"g{n % 2}", wrong, f"need {n}"))
    with (tmp_path / "shop" / "queries.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "shop"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model folder: the embedded weights, moved."""
    backbone = build_backbone("clip4cir")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.05 * parameter.std(unbiased=False) * torch.randn_like(parameter)
    save_model(tmp_path / "moved", backbone, {})
    return tmp_path / "moved"


def test_a_report_of_two_models(call: Call, shop: Path, other: Path, tmp_path: Path) -> None:
    """Page, JSON and CSV agree; the terminal shows intervals, the comparison and the shares of modalities."""
    data = ("--dataset", "catalogue", "--data-root", shop, "--run", "embedded")
    written = ("--report", "out/report", "--csv", "all.csv", "--json", "r.json", "--ranks", "r.jsonl")
    code, out, err = call(*data, "--compare", other, *written)
    assert code == 0, err
    assert "95 % interval from" in out and "\ncompared with " in out and "queries of both parts: " in out
    found, page = json.loads(Path("r.json").read_text()), Path("out/report/index.html").read_text(encoding="utf-8")
    assert json.loads(Path("out/report/result.json").read_text()) == found
    assert found["intervals"].keys() == found["metrics"].keys()
    assert {"wrong@1", "wrong above", "R@10 spread", "R@50 worst phrasing"} <= found["metrics"].keys()
    (compared,) = found["compare"]
    assert compared["run"].endswith("moved") and compared["differences"].keys() == found["metrics"].keys()
    for name, row in compared["differences"].items():
        assert row["base"] == pytest.approx(found["metrics"][name])
        assert row["value"] == pytest.approx(compared["metrics"][name])
    assert sum(found["modalities"].values()) == pytest.approx(100)
    rows = list(csv.DictReader(Path("all.csv").read_text().splitlines()))
    assert Path("out/report/metrics.csv").read_text() == Path("all.csv").read_text()
    assert {row["model"] for row in rows} == {"embedded weights", compared["run"]}
    assert {row["mode"] for row in rows} == {"composed", "image only", "text only", "late fusion"}
    wanted = ("embedded weights", "", "composed", "R@5")
    (one,) = (row for row in rows if (row["model"], row["tag"], row["mode"], row["metric"]) == wanted)
    assert float(one["value"]) == pytest.approx(found["metrics"]["R@5"], abs=1e-6) and one["queries"] == "24"
    assert "<script>in blue" not in page and "\\u003cscript\\u003ein blue" in page and page.count("<script") == 2
    ranked = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [len(row["ranks_negatives"]) for row in ranked[:4]] == [1, 1, 0, 0]
    assert str(tmp_path) not in page


def test_both_names_of_the_embedded_weights(call: Call, shop: Path, other: Path) -> None:
    """``--compare embedded`` is what ``--run embedded`` is: the same figures, with the sign turned."""
    data = ("--dataset", "catalogue", "--data-root", shop, "--json", "-")
    there, back = (
        json.loads(call(*data, "--run", one, "--compare", two)[1])
        for one, two in (("embedded", other), (other, "embedded"))
    )
    assert there["metrics"] == back["compare"][0]["metrics"] != back["metrics"]
    assert back["compare"][0]["run"] == "embedded weights"
    for name, row in there["compare"][0]["differences"].items():
        assert row["difference"] == pytest.approx(-back["compare"][0]["differences"][name]["difference"])


def test_csv_on_standard_output(call: Call, shop: Path) -> None:
    """It is all of standard output; what a person reads goes to standard error. A report is renewed in its folder."""
    data = ("--dataset", "catalogue", "--data-root", shop, "--run", "embedded", "--report", "r")
    Path("r").mkdir()
    code, out, err = call(*data, "--csv", "-")
    assert code == 0 and out == Path("r/metrics.csv").read_text() and not Path("-").exists()
    assert "95 % interval from" in err and "\nreport r/index.html" in err
    Path("r/metrics.csv").write_text("old")
    assert call(*data)[0] == 0 and Path("r/metrics.csv").read_text() == out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--report", "file"], "--report file is a file: give a folder"),
    (["--report", "file/below"], "--report file/below cannot be made"),
    (["--report", ""], "--report is empty: say where to write"),
    (["--csv", ""], "--csv is empty: say where to write"),
    (["--report", "site"], "--report site holds files but no report: give a new or empty folder"),
    (["--report", "site/data"], "--report site/data holds files but no report"),
    (["--report", "/dev/null/r"], "--report /dev/null/r cannot be made"),
    (["--report", "/proc/nope"], "--report /proc/nope cannot be made"),
    (["--csv", "-", "--json", "-"], "--csv - and --json - both write to standard output"),
    (["--csv", "gone/x.csv"], "--csv gone/x.csv: the folder gone is missing"),
    (["--report-queries", "5"], "--report-queries must be at least 0 and needs --report DIR, got 5"),
    (["--report", "r", "--report-queries", "-1"], "--report-queries must be at least 0"),
    (["--compare", "embedded"], "--compare embedded is evaluated already: name each run once"),
    (["--compare", "gone"], "gone"),
    (["--compare", "embedded", "--submission", "s"], "leave out --compare"),
    (["--combine", "a.json", "--report", "r"], "leave out --report"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], said: str, call: Call, shop: Path) -> None:
    """Before a model is loaded, and nothing is written."""
    Path("file").touch()
    Path("site/data").mkdir(parents=True)
    Path("site/index.html").write_text("<!doctype html><title>home</title>")
    Path("site/data/metrics.csv").write_text("mine")
    before = sorted(Path().rglob("*"))
    code, out, err = call("--dataset", "catalogue", "--data-root", shop, "--run", "embedded", *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err and not out
    assert sorted(Path().rglob("*")) == before


def test_a_model_of_another_kind_is_one_line(call: Call, shop: Path, other: Path) -> None:
    """A folder that is no run, or whose weights are damaged."""
    shutil.copytree(other, "damaged")
    Path("damaged/model.json").write_text("{")
    code, _, err = call("--dataset", "catalogue", "--data-root", shop, "--run", "embedded", "--compare", "damaged")
    assert code == 2 and err.count("\n") == 1 and "damaged" in err
