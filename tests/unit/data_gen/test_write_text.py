"""From two captions to a modification text."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_gen.files import read_jsonl, write_jsonl
from data_gen.settings import GenerateConfig
from data_gen.write_text import compose_text, difference, write_text
from spn4cir.datasets.generated import read_generated
from spn4cir.types import Dataset, Triplet

NOBODY = cast(Dataset, SimpleNamespace(name="x", path=lambda image_id: Path("pictures") / f"{image_id}.png"))


def drawn(reference: str, target: str) -> set[str]:
    """All phrasings that come up."""
    return {difference(reference, target, random.Random(seed)) for seed in range(60)}


def test_difference_of_a_changed_word() -> None:
    """Only the target's new words are named, and perhaps what they replace."""
    assert drawn("red apple", "green apple") == {
        "green", "but green", "make it green", "green instead of red",
    }  # fmt: skip


def test_difference_of_an_added_word() -> None:
    """Nothing is gone: nothing is replaced."""
    assert drawn("a man", "a man running") == {"running", "but running", "make it running", "with running"}


def test_difference_of_a_lost_word() -> None:
    """Nothing is new: what is gone is named."""
    assert drawn("man facing right", "man") == {"without facing right"}


@pytest.mark.parametrize(("reference", "target"), [
    ("red apple", "red apple"), ("red apple", "Apple, RED."), ("red apple", "two dogs"), ("", "dog"),
    ("dog", ""), ("", ""),
])  # fmt: skip
def test_nothing_to_say(reference: str, target: str) -> None:
    """The same words, or no word in common, say nothing."""
    assert drawn(reference, target) == {""}


def test_difference_ignores_case_and_punctuation_but_keeps_the_target_s_spelling() -> None:
    """Words are compared without case and punctuation, and quoted in order as they stand."""
    assert "Big GREEN" in drawn("Red apple.", "Big, GREEN apple!")


@pytest.mark.parametrize(("template", "expected"), [
    ("instead", "two dogs instead of a {cat}"), ("unlike", "Unlike a {cat}, I want two dogs"), ("target", "two dogs"),
])  # fmt: skip
def test_templates_of_the_paper(template: str, expected: str) -> None:
    """The three published forms; braces in a caption are just braces."""
    assert compose_text(template, "a {cat}", "two dogs", random.Random(0)) == expected


def test_template_difference() -> None:
    """The fourth form is ``difference`` with the same draw."""
    found = compose_text("difference", "red apple", "green apple", random.Random(3))
    assert found == difference("red apple", "green apple", random.Random(3))


def made(folder: Path, pairs: list[tuple[str, str]], **settings: Any) -> GenerateConfig:
    """A folder with captions and pairs, written out."""
    config = GenerateConfig(output=str(folder), **settings)
    captions = {"a": "red apple", "b": "green apple", "c": "Red Apple", "d": "two dogs", "e": "green apple tree"}
    write_jsonl(config.file("captions.jsonl"), ({"image_id": i, "caption": c} for i, c in captions.items()))
    rows = [{"reference": r, "target": t, "rank": 1, "similarity": 0.5} for r, t in pairs]
    write_jsonl(config.file("pairs.jsonl"), rows)
    write_text(config, NOBODY)
    return config


def test_the_published_file(tmp_path: Path) -> None:
    """Triplets are readable as generated ones, captions and pair beside; what says nothing is dropped and counted."""
    config = made(tmp_path, [("a", "b"), ("a", "c"), ("a", "d"), ("a", "zz"), ("b", "e")])
    triplets, notes = read_generated(config.file("triplets.json"), known="abcde")
    assert not notes
    rows = read_jsonl(config.file("triplets.jsonl"))
    assert [(t.reference, t.target) for t in triplets] == [("a", "b"), ("b", "e")]
    assert triplets == [Triplet(r["reference"], r["target"], (r["modification"],), generated=True) for r in rows]
    assert rows[0]["captions"] == ["red apple", "green apple"]
    note = json.loads(config.file("triplets.done.json").read_text())
    assert note["triplets"] == 2 and sum(note["dropped"].values()) == 3


def test_text_of_a_pair_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """A pair draws by its own name: alone or among others it gets the same text, with several templates too."""
    settings: dict[str, Any] = {"templates": ["instead", "unlike", "target", "difference"]}
    pairs = [("a", "b"), ("b", "a"), ("b", "e"), ("e", "b"), ("e", "a"), ("a", "e")]
    together = read_jsonl(made(tmp_path / "all", pairs, **settings).file("triplets.jsonl"))
    alone = [
        read_jsonl(made(tmp_path / f"{n}", [p], **settings).file("triplets.jsonl"))[0] for n, p in enumerate(pairs)
    ]
    assert alone == together
    assert len({row["template"] for row in together}) > 1


def test_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same step again changes nothing; with another seed it runs."""
    config = made(tmp_path, [("a", "b")])
    before = config.file("triplets.json").stat().st_mtime_ns
    write_text(config, NOBODY)
    assert "is done" in capsys.readouterr().out
    assert config.file("triplets.json").stat().st_mtime_ns == before
    write_text(GenerateConfig(output=str(tmp_path), seed=7), NOBODY)
    assert "is done" not in capsys.readouterr().out


def test_a_lost_half_is_written_again(tmp_path: Path) -> None:
    """The step writes two files: it is not done while one of them is missing."""
    config = made(tmp_path, [("a", "b")])
    config.file("triplets.jsonl").unlink()
    write_text(config, NOBODY)
    assert len(read_jsonl(config.file("triplets.jsonl"))) == 1
