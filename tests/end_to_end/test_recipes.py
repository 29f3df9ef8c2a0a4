"""The entry points as a person starts them, on the embedded dataset, a few steps each; and every recipe file."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_gen.settings import GenerateConfig
from spn4cir.backbones import BACKBONES
from spn4cir.config import TrainConfig, parse
from spn4cir.datasets import DATASETS
from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.fashioniq import FashionIQ

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FEW = ("--max-steps", "2", "--batch-size", "16", "--annotated", "64", "--eval-every", "0")
EVAL = ("-c", "from spn4cir.cli import evaluate_command as e; e()")


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
    assert {path.name for path in run.iterdir()} == files
    assert yaml.safe_load((run / "config.yaml").read_text())["annotated"] == 64
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
    assert list(result) == ["protocol", "run", "metrics", "groups", "ablation", "data", "git"]
    two = only(work, "runs/emoji/clip4cir/stage2-*")
    assert (work / result["run"]).resolve() == two.resolve()
    trained = json.loads((two / "result.json").read_text())
    assert result["protocol"] == "emoji/val" and result["data"] == trained["data"]
    assert result["metrics"] == pytest.approx(trained["metrics"])
    assert set(result["ablation"]) == {"image only", "text only", "composed"}
    assert result["ablation"]["text only"] != result["metrics"]
    assert all(0 <= value <= 100 for value in result["metrics"].values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    """Each key is known and each value of its type; what the file says is what the settings hold."""
    kind = GenerateConfig if path.name.startswith("triplets_") else TrainConfig
    config = dataclasses.asdict(parse(kind, path, []))
    said = yaml.safe_load(path.read_text())
    assert said and {key: config[key] for key in said} == said


def test_there_are_recipes() -> None:
    """Both stages of the embedded dataset and its triplets are among them."""
    names = {path.stem for path in RECIPES}
    assert {"emoji_clip4cir_stage1", "emoji_clip4cir_stage2", "triplets_emoji"} <= names
    assert all(name.startswith("triplets_") or "_stage" in name or name.endswith("_combiner") for name in names)


PUBLISHED = {  # the SPN paper, tables 2 (means over categories) and 3, rows CLIP4CIR and CLIP4CIR +SPN
    "fashioniq_clip4cir_stage1": {"R@10": 42.52, "R@50": 65.60, "Rmean": 54.06},
    "fashioniq_clip4cir_stage1_generated": {},
    "fashioniq_clip4cir_stage2": {},
    "fashioniq_clip4cir_stage2_generated": {"R@10": 44.48, "R@50": 66.88, "Rmean": 55.68},
    "cirr_clip4cir_stage1": {
        "R@1": 42.80, "R@5": 75.88, "R@10": 86.26, "R@50": 97.64,
        "Rs@1": 70.00, "Rs@2": 87.45, "Rs@3": 94.99, "Rmean": 72.94,
    },
    "cirr_clip4cir_stage1_generated": {},
    "cirr_clip4cir_stage2": {},
    "cirr_clip4cir_stage2_generated": {
        "R@1": 45.33, "R@5": 78.07, "R@10": 87.61, "R@50": 98.17,
        "Rs@1": 73.93, "Rs@2": 89.28, "Rs@3": 95.61, "Rmean": 76.00,
    },
}  # fmt: skip
# The protocol that training evaluates, and the one that the figures belong to.
PROTOCOL = {"fashioniq": ("fashioniq/original-noref", "fashioniq/original-noref"), "cirr": ("cirr/val", "cirr/test1")}
COMMON = {  # of both published stages
    "backbone": "clip4cir", "candidates": "named", "weight_decay": 0.01, "beta2": 0.999, "eps": 1e-7,
    "schedule": "constant", "warmup_steps": 0, "learn_temperature": False, "generated_share": None, "selection": "val",
    "seed": 42, "mixed_precision": "fp16",
}  # fmt: skip
STAGES = {
    "stage1": {**COMMON, "batch_size": 128, "epochs": 100, "lr": 2e-6, "temperature": 0.01},
    "stage2": {**COMMON, "batch_size": 256, "epochs": 3, "lr": 2e-5, "temperature": 0.02},
}
GENERATED = {
    "fashioniq": "captions/cap.extend_clip.train.json",
    "cirr": "captions/cap.rc2.train.extend_clip.json",
}


def header(path: Path) -> str:
    """The comment above the settings, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_the_published_rows_are_all_there() -> None:
    """Two datasets, two stages, with and without generated positives; none that this table does not know."""
    found = {path.stem for path in RECIPES if path.name.startswith(("fashioniq", "cirr"))}
    assert found == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_header_says_what_is_published(name: str) -> None:
    """The figures of the paper and no others, beside the id of their protocol and of what training evaluates."""
    text, dataset = header(ROOT / "recipes" / f"{name}.yaml"), name.partition("_")[0]
    found = {metric: float(value) for metric, value in re.findall(r"(Rs?@\d+|Rmean) (\d+\.\d+)", text)}
    assert found == PUBLISHED[name]
    trained, published = PROTOCOL[dataset]
    assert trained in text and (not found or f"protocol {published}:" in text)
    assert bool(found) != ("No figure of this row is published" in text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    """Batch, epochs, learning rate, temperature, optimiser; the protocol is one that the dataset knows."""
    config = parse(TrainConfig, ROOT / "recipes" / f"{name}.yaml", [])
    dataset, _, stage, *generated = name.split("_")
    assert (config.dataset, config.protocol) == (dataset, PROTOCOL[dataset][0])
    known = {"fashioniq": FashionIQ, "cirr": CIRR}[dataset].protocols["val"]
    assert config.protocol in known
    wanted = STAGES[stage] | {"generated": GENERATED[dataset] if generated else None}
    assert {key: getattr(config, key) for key in wanted} == wanted
    model = {"model": "RN50x4-quickgelu", "pretrained": "openai"} if stage == "stage1" else {}
    assert config.backbone_options == model
    seven = ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"]
    assert config.select_by == (seven if (dataset, stage) == ("cirr", "stage1") else None)


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.name.startswith("triplets_")], ids=lambda path: path.stem)
def test_a_recipe_names_what_is_known(path: Path) -> None:
    """Dataset and backbone are those of the library, and the file's name begins with the dataset's."""
    config = parse(TrainConfig, path, [])
    assert config.dataset in DATASETS and config.backbone in BACKBONES and path.name.startswith(f"{config.dataset}_")


HELP = """
import runpy, sys
try:
    {call}
except SystemExit as stopped:
    assert not stopped.code, stopped.code
heavy = [name for name in ("torch", "open_clip", "accelerate", "transformers") if name in sys.modules]
assert not heavy, heavy
"""
PROGRAMS = ["recipes/stage1.py", "recipes/stage2.py", "data_gen/make_triplets.py", "spn4cir-eval"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_waits_for_nothing(program: str, tmp_path: Path) -> None:
    """``--help`` prints its examples and imports no heavy library."""
    path = f"runpy.run_path({str(ROOT / program)!r}, run_name='__main__')"
    call = "from spn4cir.cli import evaluate_command as e; e()" if program == "spn4cir-eval" else path
    told = python(tmp_path, "-c", HELP.format(call=call), "--help")
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout and "examples:" in told.stdout


def test_the_check_of_imports_can_fail(tmp_path: Path) -> None:
    """Negative control: a program that imports torch is caught."""
    assert python(tmp_path, "-c", HELP.format(call="sys.modules['torch'] = sys")).returncode != 0
