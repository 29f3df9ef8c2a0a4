"""The entry points as a person starts them, on the embedded dataset, a few steps each; and every recipe file."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import stated

from spn4cir.__main__ import COMMANDS
from spn4cir.backbones import BACKBONES
from spn4cir.config import TrainConfig, parse
from spn4cir.data_gen.sample_images import SampleConfig
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.data_gen.stylize import StylizeConfig
from spn4cir.datasets import DATASETS

ROOT = Path(__file__).parent.parent.parent
PROMPTS = sorted((ROOT / "recipes" / "prompts").glob("*.yaml"))  # which tests of rewriting read
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path not in PROMPTS]
TRAINING = [path for path in RECIPES if path.parent.name in DATASETS]
FEW = ("--max-steps", "2", "--batch-size", "16", "--max-annotated", "64", "--eval-every", "0")
EVAL = ("-m", "spn4cir", "eval")


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a working folder of its own, with the checkout importable."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "SPN4CIR_RUNS": str(folder / "runs"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which both stages ran with a few steps."""
    folder = tmp_path_factory.mktemp("work")
    for stage in (1, 2):
        told = python(folder, str(ROOT / f"recipes/stage{stage}.py"), *FEW)
        assert told.returncode == 0, told.stderr
        assert (
            f"stage {stage}: step 2 of 2, the best on emoji/val: selected on what it reports" in told.stdout
            and "next: " in told.stdout
        )
    return folder


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_leaves_a_complete_run(work: Path, stage: int) -> None:
    """All files of a run, nothing temporary, the settings that were given, the result of the protocol."""
    run = only(work, f"runs/emoji/clip4cir/stage{stage}-*")
    files = {"config.yaml", "model.json", "model.safetensors", "last.safetensors", "metrics.jsonl", "result.json"}
    files |= {"README.md"}
    assert {path.name for path in run.iterdir()} == files
    assert yaml.safe_load((run / "config.yaml").read_text())["max_annotated"] == 64
    result = json.loads((run / "result.json").read_text())
    assert result["protocol"] == "emoji/val" and result["steps"] == 2 and 0 < result["metrics"]["R@50"] <= 100
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] and rows[0]["loss"] > 0


def test_stage_2_starts_from_the_newest_stage_1(work: Path) -> None:
    """The saved settings say from which."""
    one, two = (only(work, f"runs/emoji/clip4cir/stage{stage}-*") for stage in (1, 2))
    init = yaml.safe_load((two / "config.yaml").read_text())["init"]
    assert (work / init).resolve() == one.resolve()


def test_the_evaluation_prints_json(work: Path) -> None:
    """``--json -``: one object on standard output, the newest run's, equal to what training reported."""
    told = python(work, *EVAL, "--json", "-", "--ablate")
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert list(result) == [
        "protocol", "run", "metrics", "intervals", "tags", "ablation", "ablation_tags", "count", "data", "is_holdout",
        "skipped", "git", "modalities",
    ]  # fmt: skip
    two = only(work, "runs/emoji/clip4cir/stage2-*")
    assert (work / result["run"]).resolve() == two.resolve()
    trained = json.loads((two / "result.json").read_text())
    assert result["protocol"] == "emoji/val" and result["data"] == trained["data"]
    assert result["metrics"] == pytest.approx(trained["metrics"])
    assert set(result["ablation"]) == {"image only", "text only", "late fusion", "composed"}
    assert result["ablation"]["text only"] != result["metrics"]
    assert all(0 <= value <= 100 for value in result["metrics"].values())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_loads(path: Path) -> None:
    """Each key is known and each value of its type; what the file says is what the settings hold."""
    kinds: dict[str, type] = {
        "triplets": GenerateConfig, "sample_images": SampleConfig, "stylize": StylizeConfig
    }  # fmt: skip
    kind = kinds.get(path.parent.name, kinds.get(path.stem, TrainConfig))
    config = dataclasses.asdict(parse(kind, path, ["--folder", "x"] if kind is SampleConfig else []))
    said = yaml.safe_load(path.read_text())
    assert said and stated(config, said) == said


def test_there_are_recipes() -> None:
    """Both stages of the embedded dataset and its triplets are among them."""
    assert {"emoji/clip4cir_stage1", "emoji/clip4cir_stage2"} <= {name_of(path) for path in TRAINING}
    of_stage = re.compile("_(stage[12]|combiner|classes|crossmodal)")
    assert all(of_stage.search(path.stem) for path in TRAINING)
    beside = {name_of(path) for path in {*RECIPES} - {*TRAINING}}
    assert beside and all(name.startswith(("triplets", "sample_images", "stylize")) for name in beside)
    assert "triplets/emoji" in beside
    assert {path.stem for path in PROMPTS} == {"rewrite", "rewrite_fashioniq", "rewrite_cirr"}


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_a_recipe_names_what_is_known(path: Path) -> None:
    """Dataset and backbone are those of the library, and of the folder and the file's name."""
    config = parse(TrainConfig, path, [])
    assert config.dataset == path.parent.name
    assert config.backbone in BACKBONES and path.name.startswith(f"{config.backbone}_")


HELP = """
import runpy, sys
try:
    {call}
except SystemExit as stopped:
    assert not stopped.code, stopped.code
heavy = [name for name in ("torch", "open_clip", "accelerate", "transformers") if name in sys.modules]
assert not heavy, heavy
"""
PROGRAMS = ["recipes/stage1.py", "recipes/stage2.py", "data_gen/make_triplets.py", "data_gen/stylize.py", *COMMANDS]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_waits_for_nothing(program: str, tmp_path: Path) -> None:
    """``--help`` prints its examples and imports no heavy library."""
    path = f"runpy.run_path({str(ROOT / program)!r}, run_name='__main__')"
    call = "from spn4cir.__main__ import main; main()" if program in COMMANDS else path
    named = [program] if program in COMMANDS else []
    told = python(tmp_path, "-c", HELP.format(call=call), *named, "--help")
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout and "examples:" in told.stdout
    assert program not in COMMANDS or f"usage: spn4cir-{program} " in told.stdout


def test_the_check_of_imports_can_fail(tmp_path: Path) -> None:
    """Negative control: a program that imports torch is caught."""
    assert python(tmp_path, "-c", HELP.format(call="sys.modules['torch'] = sys")).returncode != 0
