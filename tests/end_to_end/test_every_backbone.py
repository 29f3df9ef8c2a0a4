"""Every backbone through both stages and the evaluation on the embedded dataset; and which recipe a command takes."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import stated
from safetensors.torch import load_file, save_file
from tiny_backbones import COMPOSED

from spn4cir import train
from spn4cir.backbones import BACKBONES, build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.config import TrainConfig, parse
from spn4cir.datasets import DATASETS
from spn4cir.datasets.emoji import Emoji
from spn4cir.eval_cli import evaluate_command
from spn4cir.train_cli import train_command
from spn4cir.types import Benchmark

ROOT = Path(__file__).parents[2]
STAGES = {1: "recipes/stage1.py", 2: "recipes/stage2.py"}
EVAL = "spn4cir-eval"
COMMANDS = {EVAL: evaluate_command, "spn4cir-train": train_command}
CHANGES: dict[str, Any] = {"max_steps": 2, "batch_size": 16, "max_annotated": 64, "eval_every": 0}
FEW = tuple(word for key, value in CHANGES.items() for word in (f"--{key.replace('_', '-')}", str(value)))
FAST = ("--lr", "0.02", "--warmup-steps", "0")  # so that two steps are seen in the figures
RECIPE = re.compile(r"recipe \S+\n")
Call = Callable[..., str]


class Fewer(Emoji):
    """The embedded dataset with 72 of its training images and 16 val queries, ranked over what these name."""

    def list_training_images(self) -> list[str]:
        return super().list_training_images()[::40]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        whole = super().read_benchmark(split, protocol)
        queries = whole.queries[::120]
        named = {i for q in queries for i in (q.reference, *q.targets, *q.candidates)}
        return dataclasses.replace(whole, queries=queries, gallery=tuple(sorted(named)))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run an entry point in this process, on fewer images; what it wrote to standard output."""
    monkeypatch.setitem(DATASETS, "emoji", Fewer)

    def run(program: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capfd.readouterr()
        if program in COMMANDS:
            COMMANDS[program]()
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        return capfd.readouterr().out

    return run


@pytest.fixture
def refused(call: Call, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run an entry point that must fail in one line; that line."""

    def run(program: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            call(program, *arguments)
        out, err = capfd.readouterr()
        lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line]
        assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
        assert not out or RECIPE.fullmatch(out), out
        return lines[0].removeprefix("error: ")

    return run


# --- both stages -----------------------------------------------------------------------------------------------------


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def advice(out: str) -> list[str]:
    """The command that a stage ends with, as arguments of ``call``."""
    words = shlex.split(out.rpartition("next: ")[2])
    return words[2:] if words[:2] == ["accelerate", "launch"] else words


def settings(run: Path) -> dict[str, Any]:
    saved: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return saved


def check_run(run: Path, stage: int, backbone: str, **changes: object) -> dict[str, Any]:
    """A complete run of two steps with the settings of the backbone's own recipe; its result."""
    own = yaml.safe_load((ROOT / f"recipes/emoji/{backbone}_stage{stage}.yaml").read_text()) | CHANGES | changes
    assert stated(settings(run), own) == own
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert (result["stage"], result["steps"], result["protocol"]) == (stage, 2, "emoji/val")
    assert json.loads((run / "model.json").read_text())["backbone"] == backbone
    assert json.loads((run / "metrics.jsonl").read_text())["loss"] > 0
    return result


def check_figures(out: str, run: Path, result: dict[str, Any]) -> None:
    """What the evaluation prints is what the training of that run reported."""
    found = json.loads(out)
    assert found["run"] == str(run) and found["data"] == result["data"]
    assert found["metrics"] == pytest.approx(result["metrics"]) and found["metrics"]["R@50"] > 0
    assert found["tags"] == result["tags"] and found["count"] == result["count"]


@pytest.mark.parametrize("backbone", COMPOSED)
def test_what_a_stage_says_comes_next_runs(call: Call, runs: Path, backbone: str) -> None:
    """Stage 1, what it says, and what that says; the evaluation finds the newest run, with the figures of training."""
    following = advice(call(STAGES[1], "--backbone", backbone, *FEW, *FAST))
    one = only(runs, f"emoji/{backbone}/stage1-*")
    first = check_run(one, 1, backbone, lr=0.02, warmup_steps=0)
    check_figures(call(EVAL, "--backbone", backbone, "--split", "val", "--json", "-"), one, first)
    named = [] if backbone == TrainConfig.backbone else ["--backbone", backbone]
    data = ["--max-annotated", str(settings(one)["max_annotated"])]  # the same triplets
    assert following == [STAGES[2], *named, "--init", str(one), *data]

    following = advice(call(*following, *FEW, *FAST))
    two = only(runs, f"emoji/{backbone}/stage2-*")
    second = check_run(two, 2, backbone, lr=0.02, warmup_steps=0)
    assert settings(two)["init"] == str(one) and following == [EVAL, "--run", str(two), "--ablate"]
    out = call(*following, "--json", "-")
    check_figures(out, two, second)
    assert json.loads(out)["ablation"].keys() == {"image only", "text only", "late fusion", "composed"}
    assert first["metrics"] != second["metrics"]  # negative control: these are figures of their own run


def test_stage_2_finds_the_newest_stage_1_of_its_own_backbone(
    refused: Call, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of another one, which is newer; where there is none, how to get one is said, in a checkout or not."""
    for backbone in ("sprc", "clip4cir"):
        save_model(runs / "emoji" / backbone / "stage1-x", build_backbone(backbone), {})
        (runs / "emoji" / backbone / "stage1-x" / "result.json").write_text("{}")
    config = of("emoji/sprc_stage2")
    assert train.load_backbone(config, 2).name == "sprc"
    assert config.init == str(runs / "emoji" / "sprc" / "stage1-x")
    for place, command in ((ROOT, "accelerate launch recipes/stage1.py"), (tmp_path, "spn4cir-train --stage 1")):
        monkeypatch.chdir(place)
        line = refused(STAGES[2], "--backbone", "tgcir", *FEW)
        assert f"{runs / 'emoji' / 'tgcir'} holds none: run {command} --backbone tgcir" in line


def test_the_script_itself(tmp_path: Path) -> None:
    """As a person starts it, in a process of its own, on the whole dataset."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "SPN4CIR_RUNS": str(tmp_path / "runs"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / STAGES[1]), "--backbone", "sprc", *FEW]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    run = only(tmp_path / "runs", "emoji/sprc/stage1-*")
    check_run(run, 1, "sprc")
    command = ["spn4cir-train", "--stage", "2"]  # there is no script in that folder
    assert advice(told.stdout) == [*command, "--backbone", "sprc", "--init", str(run), "--max-annotated", "64"]


# --- which recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """The settings that a command would train with."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(train, "train", lambda config, stage: seen.append(config))

    def run(*arguments: object) -> TrainConfig:
        call(*arguments)
        return seen.pop()

    return run


def model(folder: Path, backbone: str) -> Path:
    """What of a run the choice of a recipe looks at."""
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_text(json.dumps({"format": 1, "backbone": backbone, "options": {}}))
    return folder


def of(recipe: str, **changes: object) -> TrainConfig:
    return dataclasses.replace(parse(TrainConfig, ROOT / "recipes" / f"{recipe}.yaml", []), **changes)


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ("recipes/stage1.py", "emoji/clip4cir_stage1"),
        ("recipes/stage1.py --dataset cirr --backbone sprc", "cirr/sprc_stage1"),
        ("recipes/stage2.py --backbone=tgcir --dataset=fashioniq", "fashioniq/tgcir_stage2"),
        ("recipes/stage2.py --backbone blip4cir", "emoji/blip4cir_stage2"),
        ("recipes/stage2.py --dataset cirr", "cirr/clip4cir_stage2"),
    ],
)
def test_dataset_and_backbone_have_their_recipe(asked: Callable[..., TrainConfig], arguments: str, recipe: str) -> None:
    """Without --config it is taken, whole."""
    assert asked(*arguments.split()) == of(recipe)


def test_the_command_without_a_checkout(asked: Callable[..., TrainConfig], refused: Call) -> None:
    """``spn4cir-train --stage N`` takes the recipe that the stage's script takes, and a packaged one by its name."""
    assert asked("spn4cir-train", "--stage", 1) == of("emoji/clip4cir_stage1")
    assert asked("spn4cir-train", "--backbone", "sprc", "--stage=2") == of("emoji/sprc_stage2")
    packaged = "recipes/cirr/sprc_stage2_generated.yaml"
    assert asked("spn4cir-train", "--stage", 2, "--config", packaged) == of("cirr/sprc_stage2_generated")
    for wrong in ((), ("--stage", "3"), ("--stage", "stage1")):
        assert "--stage must be one of 1, 2, classes, crossmodal, got " in refused("spn4cir-train", *wrong)


def test_every_run_says_which_recipe(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once, by the first process: a packaged recipe by its short name, others as they were given."""
    monkeypatch.setattr(train, "train", lambda config, stage: None)
    assert call(STAGES[1], "--backbone", "tgcir") == "recipe recipes/emoji/tgcir_stage1.yaml\n"
    mine = tmp_path / "mine.yaml"
    mine.write_text("dataset: cirr\n")
    assert call(STAGES[2], "--config", mine) == f"recipe {mine}\n"
    monkeypatch.setenv("RANK", "1")
    assert call(STAGES[1]) == ""


def test_a_checkpoint_brings_its_recipe(asked: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """That of its backbone, of the dataset that is named; what is stated about the backbone holds."""
    held = model(tmp_path / "held", "sprc")
    assert asked(STAGES[2], "--init", held) == of("emoji/sprc_stage2", init=str(held))
    assert asked(STAGES[1], f"--init={held}", "--dataset", "cirr") == of("cirr/sprc_stage1", init=str(held))
    stated = asked(STAGES[2], "--init", held, "--backbone", "tgcir")
    assert stated == of("emoji/tgcir_stage2", init=str(held))


def test_what_is_given_wins(asked: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """A file over the recipe that dataset, backbone or checkpoint have; an option over both."""
    held, config = model(tmp_path / "held", "sprc"), ROOT / "recipes" / "emoji" / "tgcir_stage1.yaml"
    named = ("--dataset", "cirr", "--backbone", "sprc")
    assert asked(STAGES[1], *named, "--config", config) == of("emoji/tgcir_stage1", dataset="cirr", backbone="sprc")
    assert asked(STAGES[1], "--config", config, "--init", held) == of("emoji/tgcir_stage1", init=str(held))
    assert asked(STAGES[1], *named, "--lr", "0.5") == of("cirr/sprc_stage1", lr=0.5)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dataset", ["emoji", "cirr"])
def test_an_unknown_backbone(
    refused: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Path, dataset: str, stage: int
) -> None:
    """Is named, with those that are known, whether or not the data are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPN4CIR_DATA", raising=False)
    known = f"unknown backbone 'sprk'; known: {', '.join(BACKBONES)}"
    assert refused(STAGES[stage], "--dataset", dataset, "--backbone", "sprk") == known
    assert refused(EVAL, "--backbone", "sprk") == known
    assert not runs.exists()


def test_a_pair_without_a_recipe(refused: Call, asked: Callable[..., TrainConfig], toy: object) -> None:
    """Is refused with the recipes that the dataset has; a file that is given needs none."""
    none = "recipes: there is no recipe for dataset {!r} with backbone {!r}; available: {}".format
    line = refused(STAGES[1], "--dataset", "catalogue", "--backbone", "tgcir")
    assert line == none("catalogue", "tgcir", "clip4cir (stage1, stage2)")
    assert refused(STAGES[2], "--dataset", "toy") == none("toy", "clip4cir", "none, give --config FILE")
    config = ("--config", "recipes/emoji/tgcir_stage1.yaml")
    pair = asked(STAGES[1], "--dataset", "catalogue", "--backbone", "tgcir", *config)
    assert (pair.dataset, pair.backbone, pair.lr) == ("catalogue", "tgcir", of("emoji/tgcir_stage1").lr)


@pytest.mark.parametrize(("arguments", "told"), [
    (("--backbone", "a/b"), "unknown backbone 'a/b'"),
    (("--dataset", "a/b"), "unknown dataset 'a/b'"),
    (("--backbone",), "--backbone needs a value"),
])  # fmt: skip
def test_a_name_that_cannot_be_one(refused: Call, arguments: tuple[str, ...], told: str) -> None:
    """It is looked for as part of a file's name, and refused in one line all the same."""
    assert told in refused("recipes/stage1.py", *arguments)


def test_a_checkpoint_of_another_backbone(refused: Call, tmp_path: Path) -> None:
    """Is no start for the one that is stated."""
    save_model(tmp_path / "held", build_backbone("tgcir"), {})
    for given in (("--backbone", "blip4cir"), ("--config", ROOT / "recipes/emoji/blip4cir_stage2.yaml")):
        line = refused(STAGES[2], "--init", tmp_path / "held", *given)
        assert line == f"{tmp_path / 'held'} holds a tgcir, and the backbone is blip4cir: give --backbone tgcir"


def test_an_evaluation_of_another_backbone(refused: Call, tmp_path: Path) -> None:
    """A checkpoint that is not of the stated backbone is not evaluated under its name."""
    save_model(tmp_path / "start", build_backbone("tgcir"), {})
    line = refused(EVAL, "--run", tmp_path / "start", "--backbone", "sprc")
    assert line.endswith("holds a tgcir, not a sprc")


def test_the_newest_run_is_that_of_any_backbone(call: Call, runs: Path) -> None:
    """Without --backbone the newest run of the dataset is meant, whichever model it holds."""
    for name in ("tgcir", "clip4cir"):
        run = runs / "emoji" / name / "stage1-20260101-000000"
        save_model(run, build_backbone(name), {})
        (run / "result.json").write_text("{}")
    os.utime(runs / "emoji" / "clip4cir" / "stage1-20260101-000000" / "result.json", (1, 1))
    assert "model " in (out := call(EVAL)) and "tgcir" in out.splitlines()[0]
    assert "clip4cir" in call(EVAL, "--backbone", "clip4cir").splitlines()[0]


@pytest.mark.parametrize("content", ["[]", "{", '{"backbone": "sprk", "options": {}}', '{"backbone": "sprc"}'])
def test_a_damaged_note_of_a_checkpoint(refused: Call, tmp_path: Path, content: str) -> None:
    """Whatever stands where a model's name should."""
    save_model(tmp_path / "held", build_backbone("clip4cir"), {})
    (tmp_path / "held" / "model.json").write_text(content)
    words = "unknown backbone 'sprk'" if "sprk" in content else str(tmp_path / "held" / "model.json")
    assert words in refused(STAGES[2], "--init", tmp_path / "held")
    assert words in refused(EVAL, "--run", tmp_path / "held")


@pytest.mark.parametrize("backbone", COMPOSED)
def test_weights_that_do_not_fit(refused: Call, tmp_path: Path, runs: Path, backbone: str) -> None:
    """A tensor that is missing, one too many, one of another shape: all are said, in training and in evaluation."""
    held = tmp_path / "held"
    save_model(held, build_backbone(backbone), {})
    weights = load_file(held / "model.safetensors")
    lost, cut, *_ = (name for name, value in weights.items() if value.ndim == 2)
    del weights[lost]
    save_file(weights | {cut: weights[cut][:, 1:].clone(), "stray": weights[cut]}, held / "model.safetensors")
    for command in ((STAGES[2], "--init", held), (EVAL, "--run", held)):
        line = refused(*command)
        assert line.startswith(f"{held / 'model.safetensors'} does not fit this model: ")
        assert f"1 missing, such as {lost}; 1 unexpected, such as stray; 1 of another shape, such as {cut}" in line
    assert not list(runs.glob("emoji/*/stage*"))
