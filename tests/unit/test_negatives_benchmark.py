"""The benchmark that compares negatives, with a training that only writes what a run leaves behind."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import spn4cir.train as loop
from benchmarks import negatives
from spn4cir.config import TrainConfig, write_yaml
from spn4cir.errors import InputError


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """It; a run's recall is its seed plus its number of candidates or of types."""
    module: ModuleType = negatives
    monkeypatch.setattr(module, "trained", [], raising=False)
    monkeypatch.setattr(module, "killed", None, raising=False)

    def train(config: TrainConfig, stage: int) -> None:
        assert config.output is not None and (stage == 1 or Path(str(config.init), "result.json").is_file())
        folder = Path(config.output)
        module.trained.append((folder, stage, config.resume))  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, folder / "config.yaml", f"stage {stage}")
        if module.trained[-1][0].name == module.killed:
            raise KeyboardInterrupt
        recall = config.seed + (len(config.negatives.types) if stage == 1 else config.bank.limit or 2000)
        metrics = {"R@1": recall / 100, "R@10": recall / 50}
        found = {"protocol": "p/val", "data": "d", "metrics": metrics, "git": "abc", "seconds": 2.0}
        (folder / "result.json").write_text(json.dumps(found))
        (folder / "test.json").write_text(json.dumps({**found, "protocol": "p/test"}))

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(
        module, "bank_sizes", lambda: dict(zip(module.BANKS, (32, 128, 512, 1024, 1305, 2866), strict=True))
    )
    return module


def start(comparison: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    places = ["--runs", folder / "runs", "--json", folder / "new" / "a.json", "--picture", folder / "new" / "a.png"]
    monkeypatch.setattr(sys, "argv", ["negatives.py", *map(str, places), *more])
    comparison.main()
    found: dict[str, Any] = json.loads((folder / "new" / "a.json").read_text())
    return found


def test_a_comparison(comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages of each seed; means and deviations; where they come from; a picture."""
    found = start(comparison, tmp_path, monkeypatch, "--seeds", "0", "2", "--steps", "7", "5")
    assert len(comparison.trained) == 2 * 11 and found["seconds of training"] == 44.0
    four = found["stage 1, by type of negative"]["all four"]["test"]["R@1"]
    assert four == {"mean": 0.05, "sd": 0.01, "seeds": [0.04, 0.06]}
    drawn = found["stage 2, by candidates"]["limit 511"]
    assert drawn["candidates"] == 512 and drawn["val"]["R@10"]["seeds"] == [10.22, 10.26]
    assert found["protocols"] == {"val": "p/val", "test": "p/test"} and found["git"] == ["abc"]
    assert found["steps"] == {"stage 1": 7, "stage 2": 5} and found["command"].endswith("--seeds 0 2 --steps 7 5")
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_it_goes_on_where_it_was(comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is complete is left alone, what was begun is resumed; other settings in the same folder are refused."""
    comparison.killed = "limit-127"  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        start(comparison, tmp_path, monkeypatch, "--seeds", "0")
    before = [folder.name for folder, _, _ in comparison.trained]
    assert before == ["target", "query", "text", "reference", "all-four", "limit-31", "limit-127"]
    comparison.killed = None  # type: ignore[attr-defined]
    comparison.trained.clear()  # type: ignore[attr-defined]
    found = start(comparison, tmp_path, monkeypatch, "--seeds", "0")
    begun = tmp_path / "runs" / "seed0" / "limit-127"
    assert comparison.trained[0] == (begun, 2, str(begun)) and len(comparison.trained) == 5
    assert found["stage 2, by candidates"]["all"]["val"]["R@1"] == {"mean": 20.0, "sd": None, "seeds": [20.0]}
    with pytest.raises(InputError, match=r"seed0/target was trained with another max_steps: delete it"):
        start(comparison, tmp_path, monkeypatch, "--seeds", "0", "--steps", "3", "3")


def test_without_matplotlib(comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line on what to install; the figures are written all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib: pip install 'spn4cir\[demo\]'"):
        start(comparison, tmp_path, monkeypatch, "--seeds", "0")
    assert json.loads((tmp_path / "new" / "a.json").read_text())["steps"] and not (tmp_path / "new" / "a.png").exists()


def test_settings(comparison: ModuleType, tmp_path: Path) -> None:
    """All runs of a seed differ only in what is compared; stage 2 starts from the targets' run."""
    plans = comparison.plans(4, (7, 5), tmp_path)
    assert list(plans) == [*comparison.TYPES, *comparison.BANKS]
    for name, (stage, config) in plans.items():
        assert (config.seed, config.max_steps, config.eval_every) == (4, 7 if stage == 1 else 5, 0)
        assert config.init == (str(tmp_path / "target") if stage == 2 else None)
        assert config.negatives == comparison.TYPES.get(name, config.negatives)
        assert config.bank == comparison.BANKS.get(name, config.bank)
