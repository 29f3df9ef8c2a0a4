"""``spn4cir-data``: exit codes, what is printed where, and what is written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spn4cir.cli import data_command
from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.skip import NAME
from spn4cir.eval_cli import evaluate_command
from spn4cir.identity import PUBLISHED_CLASSES, read_optimized


class Told(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


Call = Callable[..., Told]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call a command, by default spn4cir-data; what a progress bar wrote is left out."""

    def run(*arguments: object, command: Callable[[], None] = data_command) -> Told:
        monkeypatch.setattr(sys, "argv", ["spn4cir-data", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            command()
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
        out, err = capfd.readouterr()
        return Told(code, out, "\n".join(line.split("\r")[-1].strip() for line in err.split("\n")).strip())

    return run


def fails(told: Told) -> str:
    """The one line of a command that stopped."""
    assert told.code == 2 and told.out == "" and told.err.startswith("error: ") and "\n" not in told.err, told
    return told.err


def check(call: Call, root: Path, *more: object) -> Told:
    return call("check", "--dataset", root.name, "--data-root", root, "--workers", 2, *more)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file: what ``change`` returns, or what it makes of its argument."""
    content = json.loads(path.read_text(encoding="utf-8"))
    new = change(content)
    path.write_text(json.dumps(content if new is None else new), encoding="utf-8")


@pytest.mark.parametrize("name", ["fashioniq", "cirr"])
def test_a_whole_dataset(call: Call, name: str, request: pytest.FixtureRequest) -> None:
    """Exit code 0, and the verdict in the last line; nothing is written into the dataset."""
    root = request.getfixturevalue(name)
    before = sorted(root.rglob("*"))
    told = check(call, root)
    assert told.code == 0 and told.err == ""
    assert told.out.startswith(f"{name} in {root}\n")
    assert (last := told.out.splitlines()[-1]).startswith("problems: 0, ") and last.endswith("; training can run")
    assert sorted(root.rglob("*")) == before


def test_the_embedded_dataset(call: Call) -> None:
    """The default; it is whole, and needs no skip list."""
    told = call("check")
    assert told.code == 0 and told.out.startswith("emoji in embedded\n")
    assert "emoji is embedded: it needs no skip list" in fails(call("check", "--write-skip-list"))


@pytest.mark.parametrize("damage", ["picture", "captions", "target", "no pictures"])
def test_a_damaged_dataset(call: Call, cirr: Path, damage: str) -> None:
    """Exit code 1 whenever training would stop: the table says why, and there is no traceback."""
    captions = cirr / "cirr" / "captions" / "cap.rc2.val.json"
    words = {"picture": "dev-0-0-img0", "captions": "cut short", "target": "is not in", "no pictures": "no pictures"}
    if damage == "picture":
        (cirr / "dev/dev-0-0-img0.png").unlink()
    elif damage == "captions":
        captions.write_text(captions.read_text()[:-10])
    elif damage == "target":
        edit(captions, lambda rows: rows[0]["img_set"]["members"].append("train-0-0-img0"))
    else:
        for folder in "train", "dev", "test1":
            (cirr / folder).rename(cirr / f"no {folder}")
    told = check(call, cirr)
    assert told.code == 1 and told.err == ""
    assert words[damage] in told.out and told.out.splitlines()[-1].startswith("problems: 1, ")
    assert "training cannot run" in told.out


def test_json_on_standard_output(call: Call, fashioniq: Path) -> None:
    """Only the report; the table goes to standard error. The exit code is the same."""
    (fashioniq / "images/BDTR00005.png").unlink()
    told = check(call, fashioniq, "--json", "-")
    report = json.loads(told.out)
    assert told.code == 1 and report["can_train"] is False and report["broken"] == {"BDTR00005": "missing"}
    assert "training cannot run" in told.err


def test_json_in_a_file(call: Call, fashioniq: Path, tmp_path: Path) -> None:
    """Beside the table on standard output, also where training cannot run."""
    (fashioniq / "images/BDTR00005.png").unlink()
    told = check(call, fashioniq, "--json", tmp_path / "report.json")
    assert told.code == 1 and "training cannot run" in told.out
    assert json.loads((tmp_path / "report.json").read_text())["broken"] == {"BDTR00005": "missing"}


@pytest.mark.parametrize(("place", "words"), [
    ("nowhere/report.json", "--json {}: the folder {parent} is missing"), ("", "--json {} is a folder: give a file"),
])  # fmt: skip
def test_a_report_that_cannot_be_written(call: Call, fashioniq: Path, tmp_path: Path, place: str, words: str) -> None:
    """Said before the pictures are looked at."""
    path = tmp_path / place if place else tmp_path
    assert words.format(path, parent=path.parent) in fails(check(call, fashioniq, "--json", path))


@pytest.mark.parametrize("arguments", [("--json", "report.json"), ("--write-skip-list",)])
def test_a_read_only_folder(
    call: Call, fashioniq: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """Said in one line and before the pictures are looked at; without these options nothing is written at all."""
    monkeypatch.chdir(fashioniq)
    asked = os.access
    read_only = {str(fashioniq), ".", ""}
    monkeypatch.setattr(os, "access", lambda p, mode, **k: str(p) not in read_only and asked(p, mode, **k))
    monkeypatch.setattr("spn4cir.dataset_check.inspect_images", lambda *_: pytest.fail("pictures were looked at"))
    assert f"{arguments[0]} " in (line := fails(check(call, fashioniq, *arguments))) and "is read-only" in line
    monkeypatch.undo()


def test_a_read_only_dataset_can_be_checked(call: Call, fashioniq: Path) -> None:
    """A shared folder that only others may write."""
    folders = [fashioniq, fashioniq / "images", fashioniq / "captions", fashioniq / "image_splits"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert check(call, fashioniq).code == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_full_disk_is_one_line(call: Call, fashioniq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skip list that cannot be written after all leaves no file."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spn4cir.files.os.replace", full)
    assert fails(check(call, fashioniq, "--write-skip-list")).endswith(
        f"{fashioniq / NAME} cannot be written: No space left on device"
    )
    assert not list(fashioniq.glob(f"{NAME}*"))


def test_the_skip_list_from_damage_to_mending(call: Call, fashioniq: Path) -> None:
    """A missing picture stops training; listed, it does not; mended, it is told; listed anew, it is used again."""
    picture, other = fashioniq / "images/BDTR00005.png", fashioniq / "images/BSVA00009.png"
    content = picture.read_bytes()
    picture.unlink()
    cut = other.read_bytes()[:100]
    other.unlink()
    other.write_bytes(cut)
    assert check(call, fashioniq).code == 1
    told = check(call, fashioniq, "--write-skip-list")
    assert told.code == 0 and told.out.startswith(f"{fashioniq / NAME}: 2 images to leave out\n")
    assert "missing (on the skip list)" in told.out and "truncated (on the skip list)" in told.out
    assert json.loads((fashioniq / NAME).read_text()) == {"BDTR00005": "missing", "BSVA00009": "truncated"}
    assert check(call, fashioniq).code == 0

    picture.write_bytes(content)
    told = check(call, fashioniq, "--json", "-")
    mended = next(c for c in json.loads(told.out)["checks"] if c["what"] == "images on the skip list that decode")
    assert told.code == 0 and mended["examples"] == ["BDTR00005"]
    edit(fashioniq / NAME, lambda listed: listed.update(BTTR00007="shows a dog"))
    assert check(call, fashioniq, "--write-skip-list").code == 0
    assert json.loads((fashioniq / NAME).read_text()) == {"BSVA00009": "truncated", "BTTR00007": "shows a dog"}


def test_a_skip_list_of_nothing(call: Call, cirr: Path) -> None:
    """Nothing is broken: the list is empty, and protocols keep their ids."""
    assert check(call, cirr, "--write-skip-list").code == 0
    assert json.loads((cirr / NAME).read_text()) == {}


def test_no_skip_list_of_everything(call: Call, cirr: Path) -> None:
    """Without any picture, the folder is wrong, not each image; an older list stays as it was."""
    for folder in "train", "dev", "test1":
        (cirr / folder).rename(cirr / f"no {folder}")
    (cirr / NAME).write_text('{"dev-0-0-img0": "mine"}')
    assert "a skip list would leave nothing" in fails(check(call, cirr, "--write-skip-list"))
    assert (cirr / NAME).read_text() == '{"dev-0-0-img0": "mine"}'


def test_an_evaluation_honours_the_skip_list_and_says_so(call: Call, cirr: Path) -> None:
    """The picture is gone: with the list the evaluation runs under an id of its own, without it it stops."""
    (cirr / "dev/dev-0-0-img0.png").unlink()
    asked = ("--dataset", "cirr", "--data-root", cirr)
    assert "dev-0-0-img0.png is missing" in fails_anywhere(call(*asked, command=evaluate_command))
    assert check(call, cirr, "--write-skip-list").code == 0
    told = call(*asked, command=evaluate_command)
    assert told.code == 0 and "protocol cirr/val+skip" in told.out
    assert f"cirr: {cirr / NAME} leaves out 1 images (1 missing)" in told.out + told.err


def fails_anywhere(told: Told) -> str:
    """The last line of a command that stopped after it had said something."""
    assert told.code == 2 and "Traceback" not in told.err
    return told.err.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "COMMAND"), (("nonsense",), "invalid choice: 'nonsense'"), (("check", "--nonsense"), "--nonsense"),
    (("check", "--workers", "0"), "--workers must be at least 1, got 0"),
    (("deduplicate", "--workers", "-1"), "--workers must be at least 1, got -1"),
    (("check", "--workers", "many"), "--workers"),
    (("check", "--dataset", "nowhere"), "unknown dataset 'nowhere'; known: emoji, fashioniq, cirr"),
    (("check", "--dataset", "cirr", "--data-root", "nowhere"), "cirr: nowhere does not hold the dataset: expected the"),
    (("check", "--dataset", "fashioniq"), "expected there captions/, image_splits/ and the pictures as images/ID.png"),
    (("deduplicate",), "emoji is embedded: give --output FILE"),
    (("validate-submission",), "FILE"),
    (("validate-submission", "x.json", "--dataset", "emoji"), "emoji has no evaluation server"),
])  # fmt: skip
def test_bad_arguments(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    """One line that says what is wrong, or what is expected where."""
    monkeypatch.setenv("SPN4CIR_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert words in fails(call(*arguments))


@pytest.fixture
def submissions(cirr: Path) -> list[Path]:
    """Two sound files."""
    dataset = CIRR(str(cirr))
    benchmark = dataset.benchmark("test1")
    ranked = {q.name: [i for i in benchmark.gallery if i != q.reference] for q in benchmark.queries}
    within = {q.name: [i for i in q.candidates if i != q.reference] for q in benchmark.queries}
    return dataset.write_submission(cirr.parent / "submission", ranked, within)


def test_sound_submissions(call: Call, cirr: Path, submissions: list[Path]) -> None:
    """A line for each file; pictures are not needed."""
    for folder in "train", "dev", "test1":
        (cirr / folder).rename(cirr / f"no {folder}")
    told = call("validate-submission", *submissions, "--data-root", cirr)
    assert told.code == 0 and told.err == ""
    assert [line.split(":")[0] for line in told.out.splitlines()] == [str(path) for path in submissions]


def test_a_damaged_submission(call: Call, cirr: Path, submissions: list[Path]) -> None:
    """Exit code 2, and the file, the pair id and the fault in one line."""
    edit(submissions[1], lambda content: content["12003"].pop() and None)
    line = fails(call("validate-submission", submissions[1], "--data-root", cirr))
    assert line == f"error: {submissions[1]}, entry '12003': expected 3 images, got 2"
    told = call("validate-submission", *submissions, "--data-root", cirr)
    assert told.code == 2 and "a sound recall submission" in told.out and "'12003'" in told.err


def test_equal_images_are_written(call: Call, cirr: Path, tmp_path: Path) -> None:
    """By default where training reads them; only images of triplets, without skipped ones."""
    (cirr / "train/7/train-4-0-img0.png").unlink()
    shutil.copy(cirr / "train/7/train-0-0-img0.png", cirr / "train/7/train-4-0-img0.png")
    (cirr / "train/7/train-5-0-img1.png").unlink()
    (cirr / NAME).write_text('{"train-5-0-img1": "missing"}')
    arguments = ("deduplicate", "--dataset", "cirr", "--data-root", cirr)
    told = call(*arguments)
    assert told.code == 0 and told.out == f"17 images, 16 unique → {cirr / PUBLISHED_CLASSES}\n"
    classes = read_optimized(cirr / PUBLISHED_CLASSES)
    assert classes["train-4-0-img0"] == "train-0-0-img0" == classes["train-0-0-img0"] and len(classes) == 17
    assert call(*arguments, "--output", tmp_path / "mine.json").code == 0
    assert (tmp_path / "mine.json").read_text() == (cirr / PUBLISHED_CLASSES).read_text()
    told = check(call, cirr)
    assert told.code == 0 and f"{PUBLISHED_CLASSES}: images whose class disagrees with their pixels" in told.out


def test_the_embedded_datasets_equal_images(call: Call, tmp_path: Path) -> None:
    """With a file of its own."""
    told = call("deduplicate", "--output", tmp_path / "emoji.json")
    assert told.code == 0 and "unique" in told.out
    assert len(set(read_optimized(tmp_path / "emoji.json").values())) < len(read_optimized(tmp_path / "emoji.json"))


def test_equal_images_need_sound_ones(call: Call, cirr: Path, tmp_path: Path) -> None:
    """A broken picture, damaged captions and a place that cannot be written: one line each, and no file."""
    picture, captions = cirr / "train/7/train-5-0-img1.png", cirr / "cirr/captions/cap.rc2.train.json"
    arguments = ("deduplicate", "--dataset", "cirr", "--data-root", cirr)
    assert "folder" in fails(call(*arguments, "--output", tmp_path / "nowhere" / "a.json"))
    picture.unlink()
    line = fails(call(*arguments))
    assert "1 images are missing or broken" in line and str(picture) in line and "spn4cir-data check" in line
    captions.write_text(captions.read_text()[:-10])
    line = fails(call(*arguments))
    assert str(captions) in line and "cut short" in line
    assert not (cirr / PUBLISHED_CLASSES).exists()
