"""From two captions to a modification text."""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from conftest import stand_in

from spn4cir.batches import TripletRows
from spn4cir.data_gen.make_triplets import print_summary
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.data_gen.texts import WordWeights, caption_similarity, compose_text, difference
from spn4cir.data_gen.write_text import write_triplets
from spn4cir.dataset import Dataset
from spn4cir.datasets import DATASETS
from spn4cir.datasets.generated import read_generated
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl
from spn4cir.types import ImageRef, Triplet

NOBODY = stand_in(lambda image_id: ImageRef(Path("pictures") / f"{image_id}.png"))


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


def test_articles_are_nothing_in_common_and_no_difference() -> None:
    """A frog and a fox share only "a"; "the dog" is no other dog; but "an apple" keeps its article."""
    draw = random.Random(0)
    assert difference("A frog.", "A fox.", draw) == ""
    assert difference("a dog on grass", "the dog on grass", draw) == ""
    assert difference("a dog on the grass", "a dog on grass", draw) == ""
    assert difference("a girl with a pear", "a girl with an apple", draw).count("an apple") == 1


FACES = [f"{kind} face" for kind in ("grinning", "winking", "dog", "cat", "pensive", "fox", "kissing", "lion", "clown")]
TONES = [f"{who} {what} {tone} skin tone" for who in ("man", "woman") for tone in ("dark", "light")
         for what in ("running", "cook", "pilot", "surfing", "judge", "kneeling", "singer", "farmer")]  # fmt: skip
OTHERS = [f"thing {number}" for number in range(100)]


@pytest.mark.parametrize(("reference", "target", "kept"), [
    ("grinning face", "dog face", False),
    ("man running dark skin tone", "woman cook light skin tone", False),
    ("man cook dark skin tone", "woman cook light skin tone", True),
    ("man cook dark skin tone", "woman cook dark skin tone", True),
    ("red heart", "blue heart", True),
    ("a picture of a dog", "a picture of the cat", True),  # among these captions a picture is something
    ("the dog is on it", "the cat is on it", False),
])  # fmt: skip
def test_frequent_words_are_little_in_common(reference: str, target: str, kept: bool) -> None:
    """A shared "face" or "skin tone" leaves nearly the whole target to the text; a shared "cook" does not."""
    weigh = WordWeights([*FACES, *TONES, *OTHERS, "red heart", "blue heart", "a picture of a dog"])
    assert bool(difference(reference, target, random.Random(0), weigh, 0.4)) is kept


def test_weights_of_words() -> None:
    """log(1 + N / n) with at least a hundred for N; function words weigh nothing, unknown words as rare ones."""
    weigh = WordWeights(["red heart", "Red, circle."] + ["thing"] * 198)
    assert weigh(["red"]) == pytest.approx(math.log(1 + 200 / 2))
    assert weigh(["circle", "the", "of"]) == weigh(["circle"]) == weigh(["zebra"]) == pytest.approx(math.log(201))
    assert weigh(["thing", "red"]) == pytest.approx(math.log(1 + 200 / 198) + math.log(101))
    assert WordWeights()(["red"]) == pytest.approx(math.log(101))


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


def test_punctuation_inside_a_word_is_part_of_it() -> None:
    """Prices and abbreviations are not torn."""
    assert "3.50 dollars" in drawn("A coin, 2 marks.", "A coin, 3.50 dollars.")


def test_template_difference() -> None:
    """The fourth form is ``difference`` with the same draw."""
    found = compose_text("difference", "red apple", "green apple", random.Random(3))
    assert found == difference("red apple", "green apple", random.Random(3))


CAPTIONS = {"a": "red apple", "b": "green apple", "c": "Red Apple", "d": "two dogs", "e": "green apple tree"}


def made(
    folder: Path, pairs: list[tuple[str, str]], captions: dict[str, str] = CAPTIONS, **settings: Any
) -> GenerateConfig:
    """A folder with captions and pairs, written out."""
    config = GenerateConfig(output=str(folder), **settings)
    rows = [{"image_id": i, "caption": c, "model": "who"} for i, c in captions.items()]
    write_jsonl(config.file("captions.jsonl"), rows)
    rows = [{"reference": r, "target": t, "rank": 1, "similarity": 0.5} for r, t in pairs]
    write_jsonl(config.file("pairs.jsonl"), rows)
    write_triplets(config, NOBODY)
    return config


def test_the_published_file(tmp_path: Path) -> None:
    """Triplets are readable as generated ones, captions and pair beside; what says nothing is dropped and counted."""
    config = made(tmp_path, [("a", "b"), ("a", "c"), ("a", "d"), ("a", "zz"), ("b", "e")])
    triplets, notes = read_generated(config.file("triplets.json"), known="abcde")
    assert not notes
    rows = read_jsonl(config.file("triplets.jsonl"))
    assert [(t.reference, t.targets) for t in triplets] == [("a", ("b",)), ("b", ("e",))]
    assert triplets == [Triplet(r["reference"], (r["target"],), (r["modification"],), generated=True) for r in rows]
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
    for row in (*alone, *together):
        del row["made_by"]  # of all pairs of a run
    assert alone == together
    assert len({row["template"] for row in together}) > 1


def test_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same step again changes nothing; with another seed it runs."""
    config = made(tmp_path, [("a", "b")])
    before = config.file("triplets.json").stat().st_mtime_ns
    write_triplets(config, NOBODY)
    assert "is done" in capsys.readouterr().out
    assert config.file("triplets.json").stat().st_mtime_ns == before
    write_triplets(GenerateConfig(output=str(tmp_path), seed=7), NOBODY)
    assert "is done" not in capsys.readouterr().out


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("name", ["triplets.json", "triplets.jsonl", "triplets.parquet", "summary.json"])
def test_a_lost_or_cut_file_is_written_again(
    tmp_path: Path, name: str, harm: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """The step writes four files: it is not done while one of them is missing or is not what was written."""
    config = made(tmp_path, [("a", "b")])
    before = config.file(name).read_bytes()
    harm(config.file(name))
    capsys.readouterr()
    write_triplets(config, NOBODY)
    assert config.file(name).read_bytes() == before
    assert f"{config.file(name)} is not the file that was finished: it is made again" in capsys.readouterr().out


def test_texts_stay_what_they_were(tmp_path: Path) -> None:
    """The published figures stand on these texts: the same seed draws the same phrasings, release after release."""
    words = ["red", "green", "cat", "dog", "tree", "small", "old", "boat"]
    draw = random.Random(0)
    captions = {f"i{n}": " ".join(draw.sample(words, 3)) for n in range(40)}
    pairs = [(f"i{a}", f"i{b}") for a in range(40) for b in range(40) if a != b]
    templates = ["difference", "instead", "unlike", "target"]
    rows = read_jsonl(made(tmp_path / "4", pairs, captions, templates=templates, min_shared=0.0).file("triplets.jsonl"))
    rows += read_jsonl(made(tmp_path / "1", pairs, captions, min_shared=0.0).file("triplets.jsonl"))
    texts = json.dumps([[row["reference"], row["target"], row["modification"]] for row in rows])
    assert len(rows) == 2762
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "b6acf0a07f5424bd"
    other = read_jsonl(made(tmp_path / "7", pairs, captions, min_shared=0.0, seed=7).file("triplets.jsonl"))
    assert [row["modification"] for row in other] != [row["modification"] for row in rows[-len(other) :]]


def test_parquet_opens_with_datasets(tmp_path: Path) -> None:
    """The library reads what stands in the JSONL, with the paths of the pictures; the same run gives the same bytes."""
    pairs = [("a", "b"), ("b", "e"), ("d", "e")]
    configs = [made(tmp_path / name, pairs, templates=["unlike", "target"]) for name in "xy"]
    one, other = (config.file("triplets.parquet").read_bytes() for config in configs)
    assert one == other
    import datasets

    found = datasets.load_dataset(
        "parquet", data_files=str(configs[0].file("triplets.parquet")), cache_dir=str(tmp_path / "cache"), split="train"
    )
    rows = read_jsonl(configs[0].file("triplets.jsonl"))
    assert len(found) == len(rows) == 3
    for record, row in zip(found, rows, strict=True):
        assert record["modifications"] == [row["modification"]]
        assert [record["reference_caption"], record["target_caption"]] == row["captions"]
        assert record["reference_path"] == f"pictures/{row['reference']}.png"
        for key in ("reference", "target", "rank", "similarity", "template", "model", "made_by"):
            assert record[key] == row[key]
    assert rows[0]["model"] == "who"


def test_pairs_without_ranks(tmp_path: Path) -> None:
    """Uniform draws have neither rank nor similarity, and the Parquet file says so."""
    config = made(tmp_path, [("a", "b")])
    write_jsonl(config.file("pairs.jsonl"), [{"reference": "a", "target": "b", "rank": None, "similarity": None}])
    write_triplets(config, NOBODY)
    import pandas

    [record] = pandas.read_parquet(config.file("triplets.parquet")).to_dict("records")
    assert pandas.isna(record["rank"]) and pandas.isna(record["similarity"]) and record["target"] == "b"


@pytest.mark.parametrize("dataset", ["cirr", "fashioniq"])
def test_the_json_is_what_the_library_would_write_at_once(tmp_path: Path, dataset: str) -> None:
    """Written entry by entry, the published file has the bytes of one list."""
    config = made(tmp_path, [("a", "b"), ("b", "e")])
    config.file("triplets.done.json").unlink()
    write_triplets(config, stand_in(NOBODY.image, cast(type[Dataset], DATASETS[dataset])))
    text = config.file("triplets.json").read_text()
    entries = json.loads(text)
    assert text == json.dumps(entries, ensure_ascii=False, indent=0) + "\n"
    assert ("pairid" in entries[0]) == (dataset == "cirr") and entries[0]["caption1"] == "red apple"


LONG = " ".join(["apple"] * 20)


@pytest.mark.parametrize(("reference", "target", "expected", "count"), [
    ("a cat", "two dogs", "Unlike a cat, I want two dogs", 0),
    (LONG, "two dogs", "two dogs", 1),
    ("a cat", LONG, None, 0),
    (LONG, LONG + " x", None, 0),
])  # fmt: skip
def test_the_guard(tmp_path: Path, reference: str, target: str, expected: str | None, count: int) -> None:
    """Too long: the target's caption alone; that too long as well: dropped. Both are counted."""
    captions = {"a": reference, "b": target, "c": "red", "d": "blue"}
    config = made(tmp_path, [("a", "b"), ("c", "d")], captions, templates=["unlike"], max_tokens=20)
    rows = {row["reference"]: row for row in read_jsonl(config.file("triplets.jsonl"))}
    summary = json.loads(config.file("summary.json").read_text())
    assert (rows["a"]["modification"] if "a" in rows else None) == expected
    assert summary["counts"]["too_long_so_target_caption_alone"] == count
    assert summary["dropped"] == ({} if expected else {"too long: more than 20 tokens": 1})
    assert all(row["tokens"] <= 20 for row in rows.values())
    if count:
        assert rows["a"]["template"] == "target" and rows["a"]["shortened"] == "unlike"


def test_the_bound_is_the_last_length_that_fits(tmp_path: Path) -> None:
    """A text of exactly ``max_tokens`` is kept: two words and two marks make four."""
    for limit, expected in ((4, "red apple"), (3, None)):
        captions = {"a": "two dogs", "b": "red apple", "c": "tree"}
        pairs = [("a", "b"), ("a", "c")]
        config = made(tmp_path / str(limit), pairs, captions, templates=["target"], max_tokens=limit)
        texts = {row["target"]: row["modification"] for row in read_jsonl(config.file("triplets.jsonl"))}
        assert texts.get("b") == expected and texts["c"] == "tree"


@pytest.mark.parametrize(("one", "other", "shared"), [
    ("red apple", "Apple, red!", 1.0), ("red apple", "green apple", 1 / 3), ("cat", "dog", 0.0), ("", "", 1.0),
    ("a a a cat", "a dog", 1 / 3),
])  # fmt: skip
def test_caption_similarity(one: str, other: str, shared: float) -> None:
    """Words in both over words in either, each once; case and punctuation aside."""
    assert caption_similarity(one, other) == pytest.approx(shared)


def test_filters(tmp_path: Path) -> None:
    """Off by default; each drops what it says, and counts it."""
    pairs = [("a", "b"), ("a", "c"), ("d", "e"), ("e", "b"), ("e", "zz")]
    captions = CAPTIONS | {"f": " green  APPLE"}

    def run(name: str, **settings: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
        config = made(tmp_path / name, pairs, captions, templates=["instead"], **settings)
        rows = read_jsonl(config.file("triplets.jsonl"))
        return [(r["reference"], r["target"]) for r in rows], json.loads(config.file("summary.json").read_text())[
            "dropped"
        ]

    always = {"the two captions are equal": 1, "an image has no caption": 1}
    assert run("off") == ([("a", "b"), ("d", "e"), ("e", "b")], always)
    shared = {"the captions share more than 0.5 of their words": 1}
    assert run("similar", max_caption_similarity=0.5) == ([("a", "b"), ("d", "e")], always | shared)
    assert run("bound", max_caption_similarity=2 / 3)[0] == [("a", "b"), ("d", "e"), ("e", "b")]
    often = {"a caption occurs more than 1 times": 2}
    assert run("often", max_caption_count=1) == ([("d", "e")], always | often)
    assert run("twice", max_caption_count=2)[0] == [("a", "b"), ("d", "e"), ("e", "b")]


def test_nothing_is_left(tmp_path: Path) -> None:
    """No triplet at all is an error that says why; the files of a run before stay as they were."""
    config = made(tmp_path, [("a", "b")])
    before = config.file("triplets.parquet").read_bytes()
    write_jsonl(config.file("pairs.jsonl"), [{"reference": "a", "target": "c", "rank": 1, "similarity": 1.0}])
    with pytest.raises(InputError, match="no triplet: 1 since the two captions are equal"):
        write_triplets(config, NOBODY)
    assert config.file("triplets.parquet").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the folder; no half file takes a place, and the same command then works."""

    replace = os.replace

    def full(source: Path, place: Path) -> None:
        if "triplets" in place.name:
            raise OSError(28, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"triplets.* cannot be written: No space left"):
        made(tmp_path, [("a", "b")])
    assert not list(tmp_path.glob("triplets*"))
    monkeypatch.undo()
    assert made(tmp_path, [("a", "b")]).file("triplets.parquet").is_file()


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, means and settings; nothing that names this machine; and what is printed of it."""
    config = GenerateConfig(output=str(tmp_path))
    images = [{"image_id": i, "canonical": "a" if i == "c" else i} for i in "abcde"]
    write_jsonl(config.file("images.jsonl"), images)
    write_jsonl(config.file("captions.failed.jsonl"), [{"image_id": "x"}])
    made(tmp_path, [("a", "b"), ("b", "e"), ("a", "d")], templates=["target"])
    text = config.file("summary.json").read_text()
    summary = json.loads(text)
    assert summary["counts"] == {
        "images": 5, "unique_images": 4, "pairs": 3, "captions": 5, "captions_failed": 1, "triplets": 3,
        "distinct_texts": 3, "too_long_so_target_caption_alone": 0,
    }  # fmt: skip
    assert (summary["mean_words"], summary["mean_tokens"]) == (2.33, 4.33)
    assert summary["templates"] == {"target": 3} and summary["settings"]["templates"] == ["target"]
    assert str(tmp_path) not in text
    capsys.readouterr()
    print_summary(config, NOBODY)
    told = capsys.readouterr().out
    assert "triplets 3" in told and "dropped: none" in told and "red apple  +  «two dogs»  →  two dogs" in told


def test_all_templates_give_a_pair_several_texts(tmp_path: Path) -> None:
    """As in the published files of CIRR: both texts in one entry, of which one is drawn at each access."""
    settings: dict[str, Any] = {"templates": ["instead", "unlike"], "max_tokens": 20}
    pairs = [("a", "b"), ("a", "c"), ("d", "e"), ("b", "long"), ("a", "longer")]
    captions = {**CAPTIONS, "long": "x y " * 8, "longer": "x y " * 20}
    config = made(tmp_path / "all", pairs, captions, all_templates=True, **settings)
    triplets, notes = read_generated(config.file("triplets.json"), captions)
    assert not notes and [triplet.texts for triplet in triplets] == [
        ("green apple instead of red apple", "Unlike red apple, I want green apple"),
        ("green apple tree instead of two dogs", "Unlike two dogs, I want green apple tree"),
        (captions["long"].strip(),),  # both are too long, and fall back to the target's caption
    ]
    rows = {row["target"]: row for row in read_jsonl(config.file("triplets.jsonl"))}
    assert rows["b"]["template"] == "instead" and "other_texts" not in rows["long"]
    assert rows["b"]["other_texts"] == [
        {"modification": "Unlike red apple, I want green apple", "template": "unlike", "tokens": 10}
    ]
    assert pq.read_table(config.file("triplets.parquet"))["modifications"].to_pylist() == [
        list(triplet.texts) for triplet in triplets
    ]
    summary = json.loads(config.file("summary.json").read_text())
    assert summary["counts"]["triplets"] == 3 and summary["counts"]["texts"] == 5
    assert summary["templates"] == {"instead": 2, "target": 1, "unlike": 2}
    assert sum(summary["dropped"].values()) == 2 and summary["counts"]["pairs"] == 5
    loader = TripletRows(triplets, seed=0)
    assert {loader[epoch, 0][1] for epoch in range(20)} == set(triplets[0].texts)
    one = made(tmp_path / "one", pairs, captions, **settings)  # negative control: one template is drawn for each pair
    assert all(len(triplet.texts) == 1 for triplet in read_generated(one.file("triplets.json"), captions)[0])


def test_one_template_of_all_is_the_same_file(tmp_path: Path) -> None:
    """``all_templates`` changes nothing where there is one template, but for the digest of the settings."""
    pairs = [("a", "b"), ("b", "a"), ("d", "e")]
    for name, flag in (("one", False), ("all", True)):
        made(tmp_path / name, pairs, templates=["instead"], all_templates=flag)
    one, all_of_them = ((tmp_path / name / "triplets.json").read_text() for name in ("one", "all"))
    assert one == all_of_them


def test_each_pair_draws_one_of_several_captions(tmp_path: Path) -> None:
    """Every caption is drawn, the same ones each time, others by another seed."""

    def rows_of(folder: str, captions: dict[str, list[str]], **settings: Any) -> list[dict[str, Any]]:
        config = GenerateConfig(output=str(tmp_path / folder), templates=["target"], **settings)
        rows = [{"image_id": i, "caption": c[0], "captions": c} for i, c in captions.items()]
        write_jsonl(config.file("captions.jsonl"), rows)
        write_jsonl(config.file("pairs.jsonl"), [{"reference": "a", "target": f"b{n}"} for n in range(30)])
        write_triplets(config, NOBODY)
        return read_jsonl(config.file("triplets.jsonl"))

    several = {"a": ["red", "crimson"], **{f"b{n}": [f"{n} blue", f"{n} navy", f"{n} sky"] for n in range(30)}}
    rows = rows_of("1", several)
    assert {row["captions"][0] for row in rows} == {"red", "crimson"}
    assert {row["modification"].split()[1] for row in rows} == {"blue", "navy", "sky"}
    assert all(row["modification"] == row["captions"][1] for row in rows)
    assert rows == rows_of("2", several) != rows_of("3", several, seed=7)
    first = {i: texts[:1] for i, texts in several.items()}
    assert {row["captions"][0] for row in rows_of("4", first)} == {"red"}
