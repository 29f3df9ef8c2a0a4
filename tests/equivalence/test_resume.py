"""A run that was stopped and continued equals one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_backbones import tiny_backbone

from spn4cir.checkpoints import read_tensors, save_model
from spn4cir.config import TrainConfig
from spn4cir.run import Run
from spn4cir.train import schedule, train

SCRIPT = Path(__file__).parent / "toy_script.py"


def log_of(folder: Path) -> list[dict[str, object]]:
    """The lines of a run's log, without what they say about the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("items_per_second") > 0 and line.pop("peak_memory_mb") > 0 for line in lines)
    return lines


def same(one: Path, two: Path) -> dict[str, bool]:
    """File by file, whether two runs hold the same numbers, to the last bit."""
    found = {"metrics.jsonl": json.dumps(log_of(one)) == json.dumps(log_of(two))}
    for name in ("model.safetensors", "last.safetensors"):
        (a, about_a), (b, about_b) = read_tensors(one / name), read_tensors(two / name)
        assert a.keys() == b.keys()
        found[name] = about_a == about_b and all(torch.equal(a[key], b[key]) for key in a)
    return found


ALL_SAME = {"metrics.jsonl": True, "model.safetensors": True, "last.safetensors": True}


@pytest.fixture
def settings(configure: Callable[..., TrainConfig], backbone, tmp_path: Path) -> Callable[..., TrainConfig]:  # type: ignore[no-untyped-def]
    """Settings of a run named ``output`` of two epochs of three steps, from the embedded weights in either stage."""
    save_model(tmp_path / "init", backbone, {})

    def of(output: str, **changes: object) -> TrainConfig:
        return configure(init=str(tmp_path / "init"), output=str(tmp_path / output), max_annotated=24, **changes)

    return of


def interrupted(config: TrainConfig, stage: int, at: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train, stopped by Ctrl-C before step ``at``."""

    def stop(config: TrainConfig, step: int, *length: int) -> float:
        if step == at:
            raise KeyboardInterrupt
        return schedule(config, step, *length)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("spn4cir.train.schedule", stop)
        train(config, stage)
    assert not (Path(config.output or "") / "result.json").exists()
    return Path(config.output or "")


@pytest.mark.parametrize(
    ("stage", "save_every", "at"),
    [(1, 0, 4), (1, 2, 3), (2, 0, 3), (2, 2, 5)],
    ids=["inside an epoch", "between epochs, saved inside", "stage 2 between epochs", "stage 2 saved inside"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(  # type: ignore[no-untyped-def]
    stage: int, save_every: int, at: int, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimiser and log, wherever the run is stopped."""
    whole = train(settings("whole", save_every=save_every), stage)
    folder = interrupted(settings("parts", save_every=save_every), stage, at, monkeypatch)
    assert train(settings("parts", save_every=save_every, resume=str(folder)), stage) == folder
    assert same(whole, folder) == ALL_SAME


@pytest.mark.parametrize(
    ("name", "stage", "plan", "options"),
    [
        ("sprc", 1, "onecycle", {"epochs": 3, "warmup": 0.4}),
        ("sprc", 2, "multistep", {"epochs": [0.5, 1], "factor": 0.3}),
        ("blip4cir", 1, "constant", {}),
        ("tgcir", 2, "cosine", {"epochs": 1}),
    ],
)
def test_dropout_rates_and_schedules_are_resumed(  # type: ignore[no-untyped-def]
    name: str, stage: int, plan: str, options: dict[str, object], settings, tmp_path: Path, monkeypatch
) -> None:
    """With dropout, factors of the rate, a learned temperature and each schedule; another draw of dropout is seen."""
    save_model(tmp_path / "init", tiny_backbone(name, tmp_path), {})
    common = {"backbone": name, "dropout": True, "lr_scale": {"text": 0.3, "bias": 2.0}, "save_every": 2}
    common |= {"schedule": plan, "schedule_options": options, "warmup_steps": 1}
    whole = train(settings("whole", **common), stage)
    folder = interrupted(settings("parts", **common), stage, 3, monkeypatch)
    train(settings("parts", **common, resume=str(folder)), stage)
    assert same(whole, folder) == ALL_SAME
    rows = log_of(whole)
    assert [row["step"] for row in rows] == [2, 3, 4, 6] and len({row["temperature"] for row in rows}) == 4
    if name != "tgcir":  # negative control: it has no dropout
        folder = interrupted(settings("drawn", **common), stage, 3, monkeypatch)
        seed = torch.manual_seed
        monkeypatch.setattr(torch, "manual_seed", lambda number: seed(number + 1))
        train(settings("drawn", **common, resume=str(folder)), stage)
        found = same(whole, folder)
        assert not found["metrics.jsonl"] and not found["last.safetensors"]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 3, 4, 6])])
def test_log_lines_between_saved_states_are_resumed(  # type: ignore[no-untyped-def]
    every: int, steps: list[int], settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line every ``log_every`` steps, each with the mean since the last one; what was logged after the save once."""
    whole = train(settings("whole", log_every=every), 1)
    folder = interrupted(settings("parts", log_every=every), 1, 5, monkeypatch)
    assert [row["step"] for row in log_of(folder)] == [step for step in steps if step <= 5]  # saved at 3
    train(settings("parts", log_every=every, resume=str(folder)), 1)
    assert same(whole, folder) == ALL_SAME
    assert [row["step"] for row in log_of(whole)] == steps


def test_a_run_stopped_twice_equals_an_uninterrupted_one(settings, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Resuming a resumed run loses nothing either."""
    whole = train(settings("whole", save_every=2), 1)
    folder = interrupted(settings("parts", save_every=2), 1, 3, monkeypatch)
    interrupted(settings("parts", save_every=2, resume=str(folder)), 1, 5, monkeypatch)
    train(settings("parts", save_every=2, resume=str(folder)), 1)
    assert same(whole, folder) == ALL_SAME


@pytest.mark.parametrize("nth", [1, 2])
def test_stopped_between_the_log_and_the_save(settings, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:  # type: ignore[no-untyped-def]
    """What was logged but not saved is logged once in the end, also where nothing was saved yet."""
    whole, calls = train(settings("whole"), 1), []

    def stop(self, *args) -> None:  # type: ignore[no-untyped-def]
        calls.append(args)
        if len(calls) == nth:
            raise KeyboardInterrupt
        save(self, *args)

    save = Run.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", stop)
        train(settings("parts"), 1)
    folder = train(settings("parts", resume=settings("parts").output), 1)
    assert same(whole, folder) == ALL_SAME


@pytest.mark.parametrize("change", [{"seed": 7}, {"lr": 1.001e-3}], ids=["seed", "lr"])
def test_other_settings_give_another_run(settings, change: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    """Negative control: the comparison sees another seed, and a learning rate a thousandth higher."""
    one, two = train(settings("one"), 1), train(settings("two", **change), 1)
    assert same(one, two) == dict.fromkeys(ALL_SAME, False)


def test_the_same_settings_give_the_same_run(settings) -> None:  # type: ignore[no-untyped-def]
    """Two runs from one seed are equal; loader processes do not matter."""
    assert same(train(settings("one"), 1), train(settings("two", workers=1), 1)) == ALL_SAME


def test_a_killed_process_can_be_resumed(toy, settings, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """SIGKILL in the middle of an epoch, no chance to clean up: what is on disk is whole and enough."""
    whole = train(settings("whole", save_every=2), 1)
    arguments = [toy.folder, tmp_path / "init", tmp_path / "parts"]
    command = [sys.executable, SCRIPT, "killed", *arguments]
    told = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert told.returncode == -signal.SIGKILL, told.stderr.decode()
    train(settings("parts", save_every=2, resume=str(tmp_path / "parts")), 1)
    assert same(whole, tmp_path / "parts") == ALL_SAME


def test_a_date_is_a_seed(settings) -> None:  # type: ignore[no-untyped-def]
    """Large seeds, such as 20260101, are seeds like others."""
    assert (train(settings("one", seed=20260101, max_steps=1), 1) / "result.json").is_file()
