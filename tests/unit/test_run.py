"""A run's folder and log."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn

from spn4cir.checkpoints import save_progress
from spn4cir.config import TrainConfig, write_yaml
from spn4cir.config_groups import ComputeConfig
from spn4cir.errors import InputError
from spn4cir.run import Run, changes
from spn4cir.train import train


def alone(main: bool = True) -> Accelerator:
    """What Run asks of accelerate, for one process."""
    return cast(
        Accelerator, SimpleNamespace(is_main_process=main, scaler=None, project_configuration=ProjectConfiguration())
    )


def resumed(folder: Path, main: bool = True) -> Run:
    """A run that was started by ``--resume``."""
    run = Run(folder, 1, alone(main))
    run.config = TrainConfig(resume=str(folder))
    return run


def logged(folder: Path, *steps: int, tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 10}) + "\n" for s in steps) + tail)
    return path


def saved_at(folder: Path, step: int, stage: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A last.safetensors after so many steps, and what to load it into."""
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    save_progress(folder / "last.safetensors", module, optimizer, {"stage": stage, "step": step, "best": None})
    return module, optimizer


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", ["", '{"st', '{"step": 30, "loss": 0.', '{"step": 30, "loss": 3.0}'])
def test_resume_cuts_the_log(tmp_path: Path, tail: str) -> None:
    """Rows after the resumed step and a torn last line disappear; what is kept is untouched."""
    path = logged(tmp_path, 10, 20, 25, tail=tail)
    kept = "".join(path.read_text().splitlines(keepends=True)[:2])
    state = resumed(tmp_path).resume(*saved_at(tmp_path, 20))
    assert state["step"] == 20
    assert path.read_text() == kept


def test_a_whole_last_line_without_newline_is_kept_whole(tmp_path: Path) -> None:
    """If just the newline is missing, the row counts and the next one does not stick to it."""
    path = logged(tmp_path, 10, tail='{"step": 20, "loss": 2.0}')
    resumed(tmp_path).resume(*saved_at(tmp_path, 20))
    assert steps_in(path) == [10, 20] and path.read_text().endswith("\n")


def test_resume_before_the_first_save_starts_the_log_anew(tmp_path: Path) -> None:
    """Killed between the first row and the first save, a run starts at step 0: the row would stand there twice."""
    path = logged(tmp_path, 10)
    module = nn.Linear(2, 2)
    state = resumed(tmp_path).resume(module, torch.optim.AdamW(module.parameters()))
    assert state == {"stage": 1, "step": 0, "best": None, "bank": None}
    assert steps_in(path) == []


def test_a_new_run_has_no_log_to_cut(tmp_path: Path) -> None:
    """Without a log nothing fails."""
    module = nn.Linear(2, 2)
    assert resumed(tmp_path).resume(module, torch.optim.AdamW(module.parameters()))["step"] == 0
    assert resumed(tmp_path).resume(*saved_at(tmp_path, 20))["step"] == 20


def test_nothing_is_resumed_without_being_asked(tmp_path: Path) -> None:
    """A state that lies in the folder is left alone: weights stay what they are, and the first step comes first."""
    module, optimizer = saved_at(tmp_path, 20)
    with torch.no_grad():
        module.weight.add_(1)  # type: ignore[operator]
    before = module.weight.clone()  # type: ignore[operator]
    assert Run(tmp_path, 1, alone()).resume(module, optimizer, bank="abc")["step"] == 0
    assert torch.equal(module.weight, before)  # type: ignore[arg-type]
    assert resumed(tmp_path).resume(module, optimizer)["step"] == 20 and not torch.equal(module.weight, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["config.yaml", "last.safetensors"])
def test_a_folder_that_holds_a_run_is_not_used_again(tmp_path: Path, name: str) -> None:
    """Neither for a new run under ``--output``; one line says how to continue it."""
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=rf"already holds a run: give --resume {tmp_path}, or another --output"):
        Run.open(TrainConfig(output=str(tmp_path)), 1, alone())


def test_only_the_main_process_cuts(tmp_path: Path) -> None:
    """Another process reads the state and leaves the log alone."""
    path = logged(tmp_path, 10, 20, 30)
    assert resumed(tmp_path, main=False).resume(*saved_at(tmp_path, 20))["step"] == 20
    assert steps_in(path) == [10, 20, 30]


def test_resume_of_the_other_stage(tmp_path: Path) -> None:
    """A stage 2 run is not continued as stage 1."""
    saved_at(tmp_path, 20, stage=2)
    with pytest.raises(InputError, match="is a stage 2 run"):
        opened(tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_stage_is_known_before_anything_is_saved(tmp_path: Path, stage: int) -> None:
    """A run that was killed at once is not continued as another stage; its settings say which it is."""
    write_yaml(TrainConfig(), tmp_path / "config.yaml", f"stage {stage}")
    config = TrainConfig(resume=str(tmp_path))
    if stage == 2:
        with pytest.raises(InputError, match=r"is a stage 2 run: resume it as stage 2"):
            Run.open(config, 1, alone())
    else:
        assert Run.open(config, 1, alone()).folder == tmp_path


def test_a_complete_run_is_not_resumed(tmp_path: Path) -> None:
    """It would rewrite its result."""
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InputError, match="is complete"):
        opened(tmp_path)


def test_another_bank_is_refused(tmp_path: Path) -> None:
    """A resumed stage 2 scores against the bank that it began with."""
    module, optimizer = saved_at(tmp_path, 20)
    with pytest.raises(InputError, match="another bank"):
        resumed(tmp_path).resume(module, optimizer, bank="abc")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Said before anything is loaded."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Run.open(TrainConfig(output=str(tmp_path / "file" / "run")), 1, alone())


def opened(folder: Path, **changes: Any) -> Run:
    """Resume a folder whose config was the default."""
    folder.mkdir(exist_ok=True)
    write_yaml(TrainConfig(), folder / "config.yaml")
    return Run.open(TrainConfig(resume=str(folder), **changes), 1, alone())


def test_resume_with_the_same_settings(tmp_path: Path) -> None:
    """What does not decide the result may differ."""
    assert opened(tmp_path, workers=3, keep_pixels=True).folder == tmp_path


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    """What decides the result may not: the message names setting, old and new value."""
    with pytest.raises(InputError, match=r"batch_size was 128, now 64"):
        opened(tmp_path, batch_size=64)


def test_resume_of_no_run(tmp_path: Path) -> None:
    """A folder without config.yaml is no run."""
    with pytest.raises(InputError, match=r"config\.yaml is missing"):
        Run.open(TrainConfig(resume=str(tmp_path)), 1, alone())


@pytest.mark.parametrize(("now", "expected"), [
    ({}, []),
    ({"lr": 0.5}, [("lr", 1e-4, 0.5)]),
    ({"compute": {"chunk": 4}, "bank": {"limit": 9}}, [("bank.limit", None, 9), ("compute.chunk", None, 4)]),
])  # fmt: skip
def test_changes_are_named_with_their_group(now: dict[str, object], expected: list[object]) -> None:
    """Dotted names; a setting that older runs did not save had its default."""
    before = dataclasses.asdict(TrainConfig())
    del before["negatives"], before["compute"]["checkpoint"], before["seed"]
    assert changes(before, TrainConfig(**now)) == expected  # type: ignore[arg-type]


def test_memory_may_be_saved_on_a_resume(tmp_path: Path) -> None:
    """What made a run stop may be out of memory: chunks and checkpoints are free, parts of a batch are not."""
    assert opened(tmp_path, compute=ComputeConfig(chunk=4, checkpoint=True)).folder == tmp_path
    with pytest.raises(InputError, match=r"compute\.accumulate was 1, now 2"):
        opened(tmp_path, compute=ComputeConfig(accumulate=2))


# --- one folder, one run


def test_two_runs_of_one_second_get_folders_of_their_own(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    """One after the other, and both at once: neither resumes the other, and each has its own settings and log."""
    monkeypatch.setattr("spn4cir.run.time.strftime", lambda *_: "20260101-120000")
    first = train(configure(max_steps=2, eval_every=0), 1)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    second = train(configure(max_steps=2, eval_every=0, seed=1), 1)
    assert [first.name, second.name] == ["stage1-20260101-120000", "stage1-20260101-120000-2"]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    rows = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (first, second)]
    losses = [[json.loads(row)["loss"] for row in lines] for lines in rows]
    assert len(losses[0]) == len(losses[1]) == 1 and losses[0] != losses[1]
    assert json.loads((second / "result.json").read_text())["steps"] == 2
    opened = [Run.open(configure(), 1, alone()) for _ in range(2)]  # before either has made its folder
    monkeypatch.setattr("spn4cir.run.broadcast_object_list", lambda found: found)
    for run in opened:
        run.start(configure(), nn.Linear(2, 2))
    assert sorted(path.name for path in first.parent.iterdir()) == [
        "stage1-20260101-120000", *(f"stage1-20260101-120000-{n}" for n in (2, 3, 4)),
    ]  # fmt: skip
    for run in opened:
        run.__exit__()


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_use_is_refused(configure: Callable[..., TrainConfig], tmp_path: Path, resume: bool) -> None:
    """Another process trains in it: one line, and nothing in the folder changes; once that process ends, it is free."""
    folder = tmp_path / "run"
    if resume:
        train(configure(output=str(folder), max_steps=10), 1)
        (folder / "result.json").unlink()
    folder.mkdir(exist_ok=True)
    config = configure(max_steps=10, **{"resume" if resume else "output": str(folder)})
    config.output = str(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(InputError, match=f"^{folder} is in use: another process trains in it$"):
            train(config, 1)
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.lock"} == before
        other.communicate(b"\n")
    assert train(config, 1) == folder and (folder / "result.json").is_file()


def test_a_lock_is_gone_when_a_run_ends(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Well or badly."""
    assert not (train(configure(output=str(tmp_path / "a"), max_steps=1), 1) / "run.lock").exists()
    with pytest.raises(InputError, match="lr_scale"):
        train(configure(output=str(tmp_path / "b"), lr_scale={"nothing": 0.5}), 1)
    assert not (tmp_path / "b" / "run.lock").exists()
