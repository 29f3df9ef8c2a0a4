"""Benchmarks of the claims, negatives, zero-shot and curves, with a training that only writes what a run leaves."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import spn4cir.train as loop
from benchmarks import claims, dynamics, negatives, zeroshot
from benchmarks.claims import Setting
from spn4cir.config import TrainConfig, write_yaml
from spn4cir.errors import InputError

Trained = list[tuple[Path, int, TrainConfig]]
GENERATED = "made.json"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """What is trained, in order. A run's hits are drawn by its name; ``killed`` in a folder's name interrupts it."""
    runs: Trained = []

    def train(config: TrainConfig, stage: int) -> None:
        assert config.output is not None and (not config.init or Path(config.init, "result.json").is_file())
        folder = Path(config.output)
        runs.append((folder, stage, config))
        folder.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            write_yaml(config, folder / "config.yaml", f"stage {stage}")
        if (folder.parent / "killed").is_file() and (folder.parent / "killed").read_text() == folder.name:
            raise KeyboardInterrupt
        speed = 500 if stage == 2 else 100
        both = {"loss": 1.0, "temperature": 0.1, "grad_norm": 2.0, "items_per_second": speed}
        lines = [{"step": 1, **both}, {"step": 2, "R@1": 40, "R@5": 60, **both}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ended = {"steps": 2, "best_step": 2, "stopped_by": "patience", "seconds": 1.0, "git": "abc"}
        (folder / "result.json").write_text(json.dumps(ended))
        hits = [float(query % (2 + stage) == 0) for query in range(24)]  # the more, the earlier the stage
        percent = 100 * sum(hits) / len(hits)
        found = {"metrics": dict.fromkeys(claims.METRICS, percent), "hits": {"R@1": hits, "R@10": hits}}
        (folder / "measured.json").write_text(json.dumps({"test": found}))

    monkeypatch.setattr(loop, "train", train)
    return runs


def start(module: Any, monkeypatch: pytest.MonkeyPatch, *argv: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, argv)])
    module.main()


def test_rows_go_on_from_one_model(trained: Trained, tmp_path: Path) -> None:
    """All rows but stage 1 start from it, with equal steps and a rate that falls to zero, but the control of time."""
    setting = Setting(1800, 3, GENERATED, tmp_path)
    for row in list(claims.ROWS)[1:]:
        setting.train(row)
    configs = {folder.name: (stage, config) for folder, stage, config in trained}
    assert len(trained) == len(configs) == 8
    for name, (stage, config) in configs.items():
        assert config.seed == 3 and config.batch_size == 128 and config.select_by == ["R@1", "R@5"]
        assert config.generated == (GENERATED if name in ("positives", "both", "stage1+p", "both+p") else None)
        assert stage == (2 if name in ("negatives", "both", "both+p") else 1)
        begun = None if name.startswith("stage1") else str(setting.folder / ("stage1+p" if "+p" in name else "stage1"))
        assert config.init == begun
        if begun:
            assert (config.schedule, config.patience) == ("cosine", None)
            assert config.max_steps == (claims.STEPS / 5 if name == "time" else claims.STEPS)  # as slow as it is
        else:
            assert (config.schedule, config.max_steps, config.patience) == ("constant", None, claims.PATIENCE)
    assert configs["stage1"][1].eval_every == 2  # 14 steps each
    assert configs["stage1+p"][1].eval_every == 1  # 18 steps


@pytest.mark.parametrize(("annotated", "batch", "with_positives"), [(1800, 128, 128), (300, 128, 256), (100, 64, 128)])
def test_held_out_triplets_are_as_many_for_each_number(annotated: int, batch: int, with_positives: int) -> None:
    """Two hundred, more or less, since a triplet's own words decide; a batch holds as many annotated ones."""
    from spn4cir.data import load_data

    setting = Setting(annotated, 0, GENERATED, Path("runs"))
    config = setting.first("stage1", False)
    data = load_data(config, lambda _: None)
    assert abs(len(data.selection.queries) - claims.HELD) < 30 and abs(len(data.triplets) - annotated) < 30
    both = setting.second(2, "both", True, "stage1")
    assert (config.batch_size, both.batch_size) == (batch, with_positives)


def test_a_report(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means, paired differences, and how each run ended; what is complete is not trained again."""
    rows = ["stage1", "steps", "negatives"]
    where = ["--generated", GENERATED, "--runs", tmp_path / "runs", "--output", tmp_path / "new" / "a.json"]
    argv = [*where, "--seeds", 0, 1, "--max-annotated", 300, "--rows", *rows]
    start(claims, monkeypatch, *argv)
    found = json.loads((tmp_path / "new" / "a.json").read_text())["results"]["300"]
    assert found["test"]["stage1"]["R@1"] == {"mean": 33.33, "sd": 0.0, "seeds": [33.3333, 33.3333]}
    difference, low, high = found["differences"]["steps"]["negatives"]["R@1"]
    assert low < difference == -8.33 < high and found["differences"]["stage1"]["steps"]["R@1"] == [0, 0, 0]
    assert found["runs"]["1"]["stage1"]["stopped_by"] == "patience"
    assert "-8.3 [" in capsys.readouterr().out
    trained.clear()
    start(claims, monkeypatch, *argv)
    assert not trained


def test_tuning_reads_no_test_split(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A score on held-out triplets for each setting of each row."""
    monkeypatch.setattr(claims, "measure", None)
    where = ["--generated", GENERATED, "--runs", tmp_path, "--seeds", 0, "--max-annotated", 1800]
    start(claims, monkeypatch, *where, "--tune", "--rows", "steps", "both")
    assert len(trained) == 1 + 2 + 2 * 2
    assert capsys.readouterr().out.count("50.0") == 6


def test_negatives(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages of each seed, differences from the targets' run and from the whole bank, and a picture."""
    sizes = dict(zip(negatives.BANKS, (32, 128, 512, 1024, 1305, 2866), strict=True))
    monkeypatch.setattr(negatives, "bank_sizes", lambda: sizes)
    places = ["--runs", tmp_path / "runs", "--json", tmp_path / "new" / "a.json", "--picture", tmp_path / "a.png"]
    start(negatives, monkeypatch, *places, "--seeds", 0, 2)
    assert len(trained) == 2 * 11
    found = json.loads((tmp_path / "new" / "a.json").read_text())
    assert found["stage 1, by type of negative"]["all four"]["R@1"]["seeds"] == [33.3333, 33.3333]
    assert found["stage 2, by candidates"]["limit 511"]["candidates"] == 512
    assert found["differences"]["target"]["limit 31"]["R@1"][0] == -8.33
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    trained.clear()
    setting = Setting(1800, 0, GENERATED, tmp_path / "runs")
    setting.train("negatives")  # the claims take the same runs
    assert not trained
    for name, (stage, config) in negatives.plans(setting).items():
        assert config.init == (str(setting.folder / "stage1") if stage == 2 else None)
        assert config.negatives == negatives.TYPES.get(name, config.negatives)
        assert config.bank == negatives.BANKS.get(name, config.bank)


def test_a_comparison_goes_on_where_it_was(trained: Trained, tmp_path: Path) -> None:
    """What was begun is resumed; other settings in the same folder are refused."""
    setting = Setting(300, 0, GENERATED, tmp_path)
    setting.folder.mkdir(parents=True)
    (setting.folder / "killed").write_text("steps")
    with pytest.raises(KeyboardInterrupt):
        setting.train("steps")
    (setting.folder / "killed").unlink()
    trained.clear()
    setting.train("steps")
    [(folder, stage, config)] = trained
    assert (folder, stage, config.resume) == (setting.folder / "steps", 1, str(setting.folder / "steps"))
    setting.generated = "other.json"
    setting.train("steps")
    setting.seed = 7
    with pytest.raises(InputError, match="stage1 was trained with another seed: delete it"):
        setting.train("steps")


def test_a_picture_needs_matplotlib(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line on what to install; the figures are written all the same."""
    monkeypatch.setattr(negatives, "bank_sizes", lambda: dict.fromkeys(negatives.BANKS, 1))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    places = ["--runs", tmp_path / "runs", "--json", tmp_path / "a.json", "--picture", tmp_path / "a.png"]
    with pytest.raises(InputError, match=r"matplotlib: pip install 'spn4cir\[demo\]'"):
        start(negatives, monkeypatch, *places, "--seeds", 0)
    assert json.loads((tmp_path / "a.json").read_text())["protocol"] and not (tmp_path / "a.png").exists()


def test_zero_shot(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generated triplets beside runs of the claims, which are reused, and beside no training."""
    found = {
        "metrics": dict.fromkeys(claims.METRICS, 12.5),
        "hits": dict.fromkeys(("R@1", "R@10"), [0.0] * 21 + [1.0] * 3),
    }
    measured = claims.measure
    monkeypatch.setattr(claims, "measure", lambda run, splits: measured(run, splits=splits) if run else {"test": found})
    monkeypatch.setattr(claims, "often", lambda config: 2)
    made = tmp_path / "made.json"
    made.write_text("[1, 2]")
    monkeypatch.setattr(zeroshot, "generate", lambda folder: made)
    monkeypatch.setattr(zeroshot, "generate_from_pictures", lambda pictures, folder: (made, {"pictures": 5}))
    Setting(100, 1, "other.json", tmp_path / "claims").train("negatives")
    trained.clear()
    places = ["--claims", tmp_path / "claims", "--runs", tmp_path / "runs", "--output", tmp_path / "new" / "a.json"]
    argv = [*places, "--seeds", 0, 1, "--annotated", 100, "--pictures", tmp_path]
    start(zeroshot, monkeypatch, *argv, "--train-only")
    assert len(trained) == 2 * 2 * 2 + 2 and not (tmp_path / "new").exists()
    trained.clear()
    start(zeroshot, monkeypatch, *argv)
    assert not trained
    report = json.loads((tmp_path / "new" / "a.json").read_text())
    assert report["triplets"] == {"generated": 2, "pictures": 2} and report["pictures of another maker"] == {
        "pictures": 5
    }
    assert report["results"]["differences"]["none"]["generated 2"]["R@1"][0] == 12.5
    assert set(report["results"]["differences"]) == {"none", "annotated 100 1"}
    assert report["runs"]["pictures"]["1"]["negatives"]["steps"] == 2
    assert "| generated triplets, stage 1 | 33.3 ± 0.0 |" in capsys.readouterr().out


def test_curves(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of all rows; before they are trained, one line says with what command."""
    argv = ["--runs", tmp_path, "--max-annotated", 300, "--seeds", 0, 1, "--picture", tmp_path / "a.png"]
    with pytest.raises(InputError, match=r"stage1 is not trained yet: python -m benchmarks.claims --train-only"):
        start(dynamics, monkeypatch, *argv)
    for seed in (0, 1):
        for row in list(claims.ROWS)[1:]:
            Setting(300, seed, GENERATED, tmp_path).train(row)
    start(dynamics, monkeypatch, *argv)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert dynamics.curves(tmp_path / "300-seed0" / "clip4cir" / "both")["recall"] == [(2, 50.0)]
    assert dynamics.mean([[(1, 2.0), (2, 4.0)], [(2, 1.0), (3, 9.0)]]) == ([2], [2.5], [1.0], [4.0])
