"""A catalogue of one's own: from a folder of pictures with texts beside them to triplets, stage 1 and stage 2."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_picture

from spn4cir import batches
from spn4cir.batches import TripletRows
from spn4cir.cli import data_command
from spn4cir.datasets.emoji import Emoji
from spn4cir.eval_cli import evaluate_command
from spn4cir.files import read_jsonl
from spn4cir.types import Triplet

ROOT = Path(__file__).parents[2]
MAKE, SAMPLE = "data_gen/make_triplets.py", "data_gen/sample_images.py"
STAGES = {1: "recipes/stage1.py", 2: "recipes/stage2.py"}
FEW = ("--max-steps", 3, "--batch-size", 8, "--workers", 0, "--mixed-precision", "no", "--eval-every", 0)
OPTIONS = ("--captioner", "embedded", "--matcher", "embedded", "--window", "[1, 8]", "--pairs-per-image", 3)
COMMANDS = {"spn4cir-eval": evaluate_command, "spn4cir-data": data_command}
Call = Callable[..., tuple[str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a script in this process; returns what it wrote to standard output and to standard error."""

    def run(program: str, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capfd.readouterr()
        if program in COMMANDS:
            COMMANDS[program]()
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        return capfd.readouterr()

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Triplet]:
    """The triplets that the last run trained on."""
    found: list[Triplet] = []

    class Rows(TripletRows):
        def __init__(self, triplets: Sequence[Triplet], seed: int):
            super().__init__(triplets, seed)
            found[:] = triplets

    monkeypatch.setattr(batches, "TripletRows", Rows)
    return found


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty real pictures in folders, each with its name in a text beside it, and one that is broken."""
    monkeypatch.chdir(tmp_path)
    dataset, root = Emoji(), tmp_path / "shop"
    jobs = ("firefighter", "judge", "farmer", "cook")
    found = [(i, job) for i in dataset.training_images() for job in jobs if job in dataset.label(i)][:40]
    assert len(found) == 40
    for image_id, job in found:
        place = root / job / f"<{image_id}>.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dataset.image(image_id).source, place)
        place.with_suffix(".txt").write_text(f"drawn {dataset.label(image_id)}\nnot read\n", encoding="utf-8")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


def result_of(runs: Path, stage: int, dataset: str) -> dict[str, Any]:
    (folder,) = (runs / dataset).glob(f"**/clip4cir/stage{stage}-*")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {"run": folder, **found}


def test_from_a_folder_to_both_stages(call: Call, shop: Path, runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One command makes triplets, two train on them, and the figure says on what it is."""
    data = ("--dataset", "catalogue", "--data-root", shop)
    out, _ = call(MAKE, *data, *OPTIONS)
    made = Path("data/catalogue/shop/generated")
    assert "1 left out: see" in out
    assert [row["image_id"] for row in read_jsonl(made / "images.failed.jsonl")] == ["broken.png"]
    entries = json.loads((made / "triplets.json").read_text())
    assert len(entries) >= 30 and all((shop.parent / e["reference"]).is_file() for e in entries)
    beside = {p.relative_to(shop).with_suffix(".png").as_posix(): p.read_text() for p in shop.rglob("*.txt")}
    said = [beside[row["image_id"]].splitlines()[0] == row["caption"] for row in read_jsonl(made / "captions.jsonl")]
    assert said and all(said)  # no captioner says "drawn"
    for stage in STAGES:
        out, _ = call(STAGES[stage], *data, "--generated", "auto", *FEW)
        found = result_of(runs, stage, "catalogue")
        assert found["steps"] == 3 and found["protocol"] == found["selected_on"] == "catalogue/holdout-generated-0.1"
        assert "held-out triplets, no annotated queries" in out
        assert ("--keep-pixels true keeps them in" in out) == (stage == 1)
    assert "queries of your own, where this says; spn4cir-eval" in out
    with pytest.raises(SystemExit):
        call("spn4cir-eval", "--run", found["run"])
    assert f"write {shop}/queries.csv" in capfd.readouterr().err
    rows = "".join(f'"{e["reference_name"]}","{e["captions"][0]}","{e["target_name"]}"\n' for e in entries[:5])
    (shop / "queries.csv").write_text(f"reference,modification,target\n{rows}", encoding="utf-8")
    (shop / "broken.png").unlink()
    result = json.loads(call("spn4cir-eval", "--run", found["run"], "--json", "-")[0])
    assert result["protocol"] == "catalogue/val" and result["count"] == 5


def refused(call: Call, capfd: pytest.CaptureFixture[str], program: str, *arguments: object) -> str:
    """The one line of a command that stops."""
    with pytest.raises(SystemExit):
        call(program, *arguments)
    line = capfd.readouterr().err.strip().splitlines()[-1].split("\r")[-1].strip()
    assert line.startswith("error: ")
    return line


def test_another_catalogue_is_never_taken(
    call: Call, shop: Path, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two shops with the same names, each trains on its own triplets, and is evaluated with its own runs."""
    other = shop.parent / "other"
    for path in shop.rglob("*.png"):
        draw_picture(other / path.relative_to(shop), path.name)
    made_of = {root: ("--dataset", "catalogue", "--data-root", root) for root in (shop, other)}
    call(MAKE, *made_of[shop], *OPTIONS)
    line = refused(call, capfd, STAGES[1], *made_of[other], *FEW)
    assert "none of other (41 images" in line and f"only of shop (41 images in {shop})" in line
    assert line.endswith(f"{MAKE} --dataset catalogue --data-root {other}") and not runs.exists()
    call(STAGES[1], *made_of[shop], *FEW)
    line = refused(call, capfd, STAGES[2], *made_of[other], "--generated", "null", *FEW)
    assert "no triplets to train on" in line
    line = refused(call, capfd, "spn4cir-eval", *made_of[other])
    assert "holds no run on other (41 images" in line and "only runs on shop" in line and "--run embedded" in line
    names = sorted(path.relative_to(other).as_posix() for path in other.rglob("*.png"))
    (other / "queries.csv").write_text(f'reference,modification,target\n"{names[0]}",red,"{names[1]}"\n')
    assert "not trained on any triplet" in call("spn4cir-eval", *made_of[other], "--run", "embedded")[0]
    (run,) = (runs / "catalogue").glob("*/clip4cir/stage1-*")
    assert "was trained on shop (41 images" in call("spn4cir-eval", *made_of[other], "--run", run)[0]


def test_captions_that_lack_for_a_broken_picture_alone(
    call: Call, shop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No captioner is wanted; for a sound one without a caption it is, in a line that counts, or it is skipped."""
    data = ("--dataset", "catalogue", "--data-root", shop)
    matched = (*data, "--matcher", "embedded", "--window", "[1, 8]")
    out, _ = call("spn4cir-data", "check", *data)
    assert "; training can run once spn4cir-triplets has made triplets, which leaves broken images out" in out
    out, _ = call(MAKE, *matched)
    assert "captions are from the dataset" in out and "1 left out" in out
    draw_picture(shop / "new.png", "new")
    line = refused(call, capfd, MAKE, *matched, "--output", "second")
    assert "1 of 41 images have no caption, and model 'llava" in line and "--without-caption skip" in line
    out, _ = call(MAKE, *matched, "--output", "second", "--without-caption", "skip")
    assert "1 without a caption left out" in out and "next: " in out


def test_an_evaluation_names_all_broken_pictures(call: Call, shop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And the command that looks at them, with the place of the data."""
    (shop / "empty.png").touch()
    (shop / "queries.csv").write_text("reference,modification,target\nempty.png,red,broken.png\n")
    data = ("--dataset", "catalogue", "--data-root", shop)
    line = refused(call, capfd, "spn4cir-eval", *data)
    assert f"image {shop}/broken.png does not decode" in line and f"image {shop}/empty.png does not decode" in line
    assert line.endswith(f"; see spn4cir-data check --dataset catalogue --data-root {shop}")
    with pytest.raises(SystemExit):
        call("spn4cir-data", "check", *data)
    assert "training cannot run" in capfd.readouterr().out


def zero_shot(call: Call, root: Path, stage: int, made: Path) -> str:
    recipe = ROOT / "recipes" / "fashioniq" / f"clip4cir_zeroshot_stage{stage}.yaml"
    given = ("--config", recipe, "--data-root", root, "--generated", made, *FEW)
    return call(STAGES[stage], *given, "--backbone-options", "{model: embedded}")[0]


def test_other_images_for_a_published_dataset(
    call: Call, shop: Path, fashioniq: Path, runs: Path, trained: list[Triplet]
) -> None:
    """Sampled, made into triplets, and learned from by the zero-shot recipes, whose figure is the dataset's own."""
    call(SAMPLE, "--folder", shop, "--images", 30, "--output", "other")
    call(MAKE, "--dataset", "catalogue", "--data-root", "other", *OPTIONS)
    made = Path("data/catalogue/other/generated/triplets.json")
    for stage in STAGES:
        zero_shot(call, fashioniq, stage, made)
        found = result_of(runs, stage, "fashioniq")
        assert found["steps"] == 3 and found["protocol"] == "fashioniq/original-noref"
        assert trained and all(t.generated and (shop / t.reference).is_file() for t in trained)
    named = {i for t in trained for i in t.image_ids}
    held = {json.loads(note.read_text())["rows"] for note in runs.glob("banks/*/store.json")}
    assert len(named) in held  # candidates are these alone


def test_published_out_of_domain_files_say_what_to_do(
    call: Call, fashioniq: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their paths are of the authors' disk: one line."""
    entry = {"reference": "/data/cc/1.jpg", "target": "/data/cc/2.jpg", "captions": ["x"]}
    entry |= {"reference_name": "http://x/1", "target_name": "http://x/2"}
    (tmp_path / "cap.cc.train.json").write_text(json.dumps([entry]))
    with pytest.raises(SystemExit):
        zero_shot(call, fashioniq, 1, tmp_path / "cap.cc.train.json")
    line = capfd.readouterr().err.strip()
    assert "entry 0, field 'reference'" in line and "data_gen/sample_images.py" in line and "\n" not in line
