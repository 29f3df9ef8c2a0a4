"""Bad input: one clear line, an exit code that is not 0, and nothing half-written."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spn4cir.cli import import_command
from spn4cir.eval_cli import evaluate_command

ROOT = Path(__file__).parent.parent.parent
Call = Callable[..., str]
COMMANDS = {"spn4cir-eval": evaluate_command, "spn4cir-import": import_command}


def shown(text: str) -> list[str]:
    """Lines as a terminal shows them: what a progress bar wiped is gone."""
    lines = []
    for line in text.split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        lines.append(screen.strip())
    return [line for line in lines if line.replace("\x1b[A", "")]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, runs: Path) -> Call:
    """Call an entry point that must fail in one line and leave no file; returns that line."""

    def files() -> list[Path]:
        """What lies there, but for the cache of pixels that were seen."""
        return sorted(p for p in tmp_path.rglob("*") if p != runs and runs / "pixels" not in (p, p.parent))

    def call(program: str, *arguments: object) -> str:
        before = files()
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            if program in COMMANDS:
                COMMANDS[program]()
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
        out, err = capfd.readouterr()
        assert stopped.value.code not in (0, None)
        assert not out or re.fullmatch(r"(recipe|preset:) \S+\n", out), out
        assert len(shown(err)) == 1, err
        assert "Traceback" not in err and shown(err)[0].startswith("error: ")
        assert files() == before, "something was left behind"
        return shown(err)[0]

    return call


STAGE1, STAGE2, EVAL, DATA = "recipes/stage1.py", "recipes/stage2.py", "spn4cir-eval", "data_gen/make_triplets.py"
IMPORT = "spn4cir-import"
PLAIN = ("--config", ROOT / "recipes" / "emoji" / "clip4cir_stage1.yaml")  # the toy dataset has no recipe


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((STAGE1, "--max-annotated", 0), "no triplets"),
        ((STAGE1, "--max-annotated", 4, "--batch-size", 8), "4 triplets do not fill one batch of 8"),
        ((STAGE1, "--max-annotated", -1), "annotated must be 0 or more, got -1"),
        ((STAGE1, "--max-steps", 0, "--max-annotated", 4, "--batch-size", 8), "max_steps"),
        ((STAGE1, "--max-steps", -1, "--max-annotated", 4, "--batch-size", 8), "max_steps"),
        ((STAGE1, "--batch-size", "many"), "batch_size"),
        ((STAGE1, "--bach-size", 8), "bach"),
        ((STAGE1, "stray"), "stray"),
        ((STAGE1, "--dataset", "nowhere"), "unknown dataset 'nowhere'; known: emoji"),
        ((STAGE1, "--backbone", "nothing"), "unknown backbone 'nothing'; known: clip4cir"),
        ((STAGE1, "--backbone-options", "{size: 3}"), "size"),
        ((STAGE1, "--backbone-options", "{model: no-such-model}"), "no-such-model"),
        ((STAGE1, "--config", "no.yaml"), "no.yaml is missing"),
        ((STAGE1, "--resume", "nowhere"), "nowhere is no run folder"),
        ((STAGE1, "--init", "nowhere"), "nowhere holds no model"),
        ((STAGE1, "--generated", "no.json"), "no.json are missing"),
        ((STAGE2,), "stage 2 starts from a completed stage 1 run"),
        ((STAGE2, "--backbone", "nothing"), "unknown backbone 'nothing'; known: clip4cir"),
        ((EVAL, "--dataset", "nowhere"), "unknown dataset 'nowhere'; known: emoji"),
        ((EVAL, "--split", "nowhere"), "known: val, test"),
        ((EVAL, "--backbone", "nothing"), "unknown backbone 'nothing'; known: clip4cir"),
        ((EVAL, "--run", "nowhere"), "nowhere holds no model"),
        ((EVAL, "--nonsense"), "--nonsense"),
        ((EVAL, "--batch-size", 0), "batch"),
        ((IMPORT,), "required: FILE, --backbone, --output"),
        ((IMPORT, "no.pt", "--backbone", "nothing", "--output", "new"), "unknown backbone 'nothing'; known: clip4cir"),
        ((IMPORT, "no.pt", "--backbone", "clip4cir", "--output", "new"), "no.pt is missing"),
        ((IMPORT, ".", "--backbone", "clip4cir", "--output", "new"), ". is a folder: give the file"),
        ((IMPORT, "no.pt", "--backbone", "clip4cir", "--output", "."), ". is not empty: give a new folder"),
        ((DATA, "--dataset", "nowhere"), "unknown dataset 'nowhere'; known: emoji"),
        ((DATA, "--nonsense", 1), "nonsense"),
        ((DATA, "--window", "[5, 2]"), "window must be two ranks"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(fails: Call, arguments: tuple[object, ...], words: str) -> None:
    """Each names what is wrong."""
    assert words in fails(*arguments)


@pytest.mark.parametrize("program", [STAGE1, DATA])
@pytest.mark.parametrize(
    ("text", "words"),
    [("sed: 3\n", "'sed'; did you mean 'seed'?"), ("[1, 2]\n", "keys and values"), ("a: [\n", "YAML")],
    ids=["key", "list", "broken"],
)
def test_a_bad_recipe_is_named(fails: Call, tmp_path: Path, program: str, text: str, words: str) -> None:
    """The file and the key stand in the message."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    line = fails(program, "--config", recipe)
    assert str(recipe) in line and words in line


@pytest.mark.parametrize("text", ["epochs: many", "schedule: cosin", "bank: {dtype: int8}", "trackers: 3"])
def test_a_bad_value_in_a_recipe_is_named(fails: Call, tmp_path: Path, text: str) -> None:
    """A value in the file is held to the same types and choices as an option."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text + "\nmax_annotated: 4\nbatch_size: 8\n")
    line = fails(STAGE1, "--config", recipe)
    assert str(recipe) in line and text.split(":")[0] in line


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "cut early", "flipped"])
@pytest.mark.parametrize("image", ["i05", "i39"], ids=["of a triplet", "of the bank"])
def test_a_bad_training_image_is_named(fails: Call, toy, image: str, damage: str) -> None:  # type: ignore[no-untyped-def]
    """A missing image, and one that does not decode, are found before anything is written."""
    spoil(toy.image(image).path, damage)
    line = fails(STAGE1, *PLAIN, "--dataset", "toy", "--data-root", toy.folder, "--batch-size", 8, "--max-steps", 1)
    assert str(toy.image(image).path) in line and ("is missing" if damage == "missing" else "does not decode") in line


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_bad_gallery_image_is_named(fails: Call, toy, damage: str) -> None:  # type: ignore[no-untyped-def]
    """Images that only the evaluation reads are checked before training too, and by the evaluation."""
    spoil(toy.image("i45").path, damage)
    data = ("--dataset", "toy", "--data-root", toy.folder)
    assert str(toy.image("i45").path) in fails(EVAL, *data)
    assert str(toy.image("i45").path) in fails(STAGE1, *PLAIN, *data, "--batch-size", 8, "--max-steps", 1)


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    new = {"empty": b"", "text": b"not a picture", "cut": content[:middle], "cut early": content[:20]}
    path.unlink()
    if damage != "missing":
        path.write_bytes(new.get(damage, content))


@pytest.mark.parametrize("kept", ["nothing", "model.json", "model.safetensors", "torn weights", "torn note"])
def test_a_run_without_weights_is_named(fails: Call, tmp_path: Path, backbone, kept: str) -> None:  # type: ignore[no-untyped-def]
    """An evaluation of a folder that holds no whole model says what is missing."""
    from spn4cir.checkpoints import save_model

    run = tmp_path / "run"
    save_model(run, backbone, {})
    note, weights = run / "model.json", run / "model.safetensors"
    if kept in ("nothing", "model.json"):
        weights.unlink()
    if kept in ("nothing", "model.safetensors"):
        note.unlink()
    if kept == "torn weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    if kept == "torn note":
        note.write_text(note.read_text()[:20])
    assert str(run) in fails(EVAL, "--run", run)


def test_a_result_that_cannot_be_written_is_named(fails: Call, tmp_path: Path) -> None:
    """The place for the JSON is tried before the evaluation, not after."""
    assert "nowhere" in fails(EVAL, "--json", tmp_path / "nowhere" / "result.json")


def test_other_settings_on_resume_are_refused(fails: Call, toy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A resume with another learning rate is another run."""
    from spn4cir.config import TrainConfig, write_yaml

    (tmp_path / "run").mkdir()
    config = TrainConfig(dataset="toy", data_root=str(toy.folder), batch_size=8)
    write_yaml(config, tmp_path / "run" / "config.yaml")
    line = fails(STAGE1, "--resume", tmp_path / "run", "--lr", 0.5)
    assert "lr was 0.0001, now 0.5" in line


def test_good_input_is_no_error(toy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """Negative control: the same call with nothing wrong runs and prints its result."""
    arguments = ["--dataset", "toy", "--data-root", str(toy.folder), "--json", "-"]
    monkeypatch.setattr(sys, "argv", ["spn4cir-eval", *arguments])
    evaluate_command()
    assert json.loads(capfd.readouterr().out)["protocol"] == "toy/val"
