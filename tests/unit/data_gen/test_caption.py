"""Captioning: what is asked, what is kept, what is given, and what becomes of bad answers."""

import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from spn4cir.data_gen import caption as steps
from spn4cir.data_gen.answers import repeats, tidy
from spn4cir.data_gen.ask import Answer, Question, Try
from spn4cir.data_gen.caption import caption_images, check_caption, check_captioner
from spn4cir.data_gen.given import known_captions
from spn4cir.data_gen.steps import GenerateConfig, Journal
from spn4cir.dataset import Dataset
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl
from spn4cir.types import ImageRef

IDS = [f"i{n}" for n in range(11)]
SORRY = "I'm sorry, but I cannot see the image."


def dataset_of(folder: Path, captions: dict[str, str] | None = None, category: str = "hat") -> Dataset:
    """Images that nobody opens, since the engine is a fake."""
    return cast(Dataset, SimpleNamespace(
        name="x", image=lambda i: ImageRef(folder / f"{i}.png"), category=lambda i: "" if i == "i9" else category,
        captions=lambda i: (captions or {}).get(i, "").split("|"), training_images=lambda: list(IDS), file=Path,
    ))  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return dataset_of(tmp_path, dict.fromkeys(IDS, ""))


class Fake:
    """An engine that says what it is asked, and which images are asked together."""

    block, workers = 3, 1

    def __init__(self, model: str, tokens: int):
        self.about: dict[str, Any] = {"model": model, "max_new_tokens": tokens}
        self.asked: list[list[str]] = []
        self.prompts: set[str] = set()
        self.says: Callable[[str, int], Answer] = lambda key, number: Answer(f"eine Kappe ä {key}\n")
        self.looked = 0
        self.die_at: int | None = None

    def look(self) -> None:
        self.looked += 1

    def lengths(self, questions: Sequence[Question]) -> None: ...

    def close(self) -> None: ...

    def probe(self, like: Question) -> bool:
        return False

    def answer(self, questions: Sequence[Question], turn: Try) -> list[Answer]:
        if self.die_at is not None and len(self.asked) >= self.die_at:
            raise KeyboardInterrupt
        if not turn.number:
            self.asked.append([question.key for question in questions])
        self.prompts |= {question.chat[-1]["content"] for question in questions}
        return [self.says(question.key, turn.number) for question in questions]

    @property
    def images(self) -> list[str]:
        return [key for keys in self.asked for key in keys]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """All engines that a test makes; the newest last."""
    made: list[Fake] = []

    def make(model: str, endpoint: str | None, config: GenerateConfig, *, images: bool, max_new_tokens: int) -> Fake:
        made.append(Fake(model, max_new_tokens))
        if len(made) > 1:
            made[-1].says, made[-1].die_at = made[0].says, None
        return made[-1]

    monkeypatch.setattr("spn4cir.data_gen.caption.engine_of", make)
    return made


def config_of(folder: Path, pairs: Sequence[tuple[str, str]] | None = None, **settings: Any) -> GenerateConfig:
    """A folder with the files of the steps before; without pairs all images are captioned."""
    config = GenerateConfig(output=str(folder), caption_images="all" if pairs is None else "paired", **settings)
    write_jsonl(config.file("images.jsonl"), [{"image_id": i, "pixels": f"p{i}", "canonical": i} for i in IDS])
    if pairs is not None:
        write_jsonl(config.file("pairs.jsonl"), [{"reference": a, "target": b} for a, b in pairs])
    return config


def rows_of(config: GenerateConfig, name: str = "captions.jsonl") -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in read_jsonl(config.file(name))}


def test_a_row_for_each_image(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """In the dataset's order, on one line, with the model and a short name of the prompt; nothing else is left."""
    config = config_of(tmp_path)
    caption_images(config, dataset)
    rows = read_jsonl(config.file("captions.jsonl"))
    assert [row["image_id"] for row in rows] == IDS and rows[3]["caption"] == "eine Kappe ä i3"
    assert {(row["model"], row["prompt"]) for row in rows} == {("embedded", "12aa91d3")}
    assert len({row["made_by"] for row in rows}) == len(IDS)  # the pixels are part of it
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"images.jsonl", "captions.jsonl", "captions.done.json", "captions.failed.jsonl"}


def test_only_what_is_paired(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """Images of pairs, each once, in the dataset's order and not in that of the pairs."""
    config = config_of(tmp_path, [("i7", "i2"), ("i2", "i5"), ("i7", "i5")])
    caption_images(config, dataset)
    assert fakes[-1].images == ["i2", "i5", "i7"] == list(rows_of(config))


def test_pairs_that_are_missing_or_old(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """Either is one line that says what to run."""
    config = config_of(tmp_path, [])
    config.file("pairs.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"pairs\.jsonl is missing: run match_pairs\.py before, or .* --caption-images all"
    ):
        caption_images(config, dataset)
    with pytest.raises(InputError, match=r'names "i99".* run match_pairs\.py again'):
        caption_images(config_of(tmp_path, [("i1", "i99")]), dataset)
    with pytest.raises(InputError, match="no image to caption"):
        caption_images(config_of(tmp_path, []), dataset)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_killed_and_resumed(tmp_path: Path, dataset: Dataset, fakes: list[Fake], at: int) -> None:
    """Only what is missing is asked and the files are byte-equal."""
    whole = config_of(tmp_path / "whole")
    caption_images(whole, dataset)
    config = config_of(tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spn4cir.data_gen.caption.engine_of", lambda *_, **__: _dying(at))
        with pytest.raises(KeyboardInterrupt):
            caption_images(config, dataset)
    assert not config.file("captions.jsonl").exists()
    caption_images(config, dataset)
    assert fakes[-1].images == IDS[3 * at :]
    for name in ("captions.jsonl", "captions.failed.jsonl", "captions.done.json"):
        assert config.file(name).read_bytes() == whole.file(name).read_bytes()
    assert len(list(config.folder.iterdir())) == 4


def _dying(at: int) -> Fake:
    fake = Fake("embedded", 40)
    fake.die_at = at
    return fake


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_the_end_is_written(tmp_path: Path, dataset: Dataset, fakes: list[Fake], moment: int) -> None:
    """After new pairs, some captions being kept and some failing: nothing is asked twice, nothing is lost."""

    def prepare(folder: Path) -> GenerateConfig:
        caption_images(config_of(folder, [("i1", "i2"), ("i3", "i4")]), dataset)
        return config_of(folder, [("i1", "i5"), ("i6", "i8")])

    fakes.append(Fake("embedded", 40))
    fakes[0].says = lambda key, number: Answer(SORRY if key in ("i2", "i6") else f"Kappe {key}")
    whole = prepare(tmp_path / "whole")
    caption_images(whole, dataset)
    config = prepare(tmp_path / "killed")
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        ends = ((steps, "write_jsonl"), (steps, "mark_done"), (Journal, "remove"), (Path, "unlink"))
        for owner, name in ends:
            patch.setattr(owner, name, _interrupting(getattr(owner, name), calls, moment))
        with pytest.raises(KeyboardInterrupt):
            caption_images(config, dataset)
    caption_images(config, dataset)
    assert fakes[-1].images == []
    for name in ("captions.jsonl", "captions.failed.jsonl", "captions.kept.jsonl", "captions.done.json"):
        assert config.file(name).read_bytes() == whole.file(name).read_bytes(), name
    assert list(rows_of(config)) == ["i1", "i5", "i8"]
    assert list(rows_of(config, "captions.kept.jsonl")) == ["i3", "i4"]


def _interrupting(real: Callable[..., Any], calls: list[str], moment: int) -> Callable[..., Any]:
    """The call number ``moment`` of all that are so treated never happens; files other than the plan go uncounted."""

    def go(*args: Any, **named: Any) -> Any:
        counted = not isinstance(args[0], Path) or real.__name__ != "unlink" or args[0].name.endswith("plan.json")
        if counted and len(calls) == moment:
            raise KeyboardInterrupt
        calls.extend([real.__name__] * counted)
        return real(*args, **named)

    return go


def test_done_is_not_done_again(tmp_path: Path, dataset: Dataset, fakes: list[Fake], capsys: Any) -> None:
    """The same settings: no model is even looked at. Another word count: all is asked anew."""
    caption_images(config_of(tmp_path), dataset)
    caption_images(config_of(tmp_path), dataset)
    assert not fakes[-1].looked and "is done" in capsys.readouterr().out
    caption_images(config_of(tmp_path, words=4), dataset)
    assert fakes[-1].images == IDS and fakes[-1].prompts == {"please briefly describe the image in 4 words"}


def test_captions_are_kept_for_other_pairs(tmp_path: Path, dataset: Dataset, fakes: list[Fake], capsys: Any) -> None:
    """By the same model, prompt and pixels only; what no pair needs now is put by, and found again."""
    caption_images(config_of(tmp_path, [("i1", "i2"), ("i3", "i4")]), dataset)
    before = rows_of(config_of(tmp_path, []))
    config = config_of(tmp_path, [("i1", "i5"), ("i4", "i0")])
    caption_images(config, dataset)
    assert fakes[-1].images == ["i0", "i5"] and "2 captions are kept, 2 images are left" in capsys.readouterr().out
    assert list(rows_of(config)) == ["i0", "i1", "i4", "i5"]
    assert rows_of(config, "captions.kept.jsonl") == {i: before[i] for i in ("i2", "i3")}
    alone = config_of(tmp_path / "alone", [("i1", "i5"), ("i4", "i0")])
    caption_images(alone, dataset)  # what was made before does not show in the file
    assert alone.file("captions.jsonl").read_bytes() == config.file("captions.jsonl").read_bytes()
    caption_images(config_of(tmp_path, [("i1", "i2"), ("i3", "i4")]), dataset)
    assert fakes[-1].images == [] and rows_of(config) == before
    caption_images(config_of(tmp_path, [("i1", "i5"), ("i4", "i0")]), dataset)
    rows = read_jsonl(config.file("images.jsonl"))
    write_jsonl(config.file("images.jsonl"), [{**r, "pixels": "new"} if r["image_id"] == "i1" else r for r in rows])
    caption_images(config, dataset)
    assert fakes[-1].images == ["i1"]
    caption_images(config_of(tmp_path, [("i1", "i5")], captioner="other"), dataset)
    assert fakes[-1].images == ["i1", "i5"] and list(rows_of(config)) == ["i1", "i5"]
    caption_images(config_of(tmp_path, [("i0", "i5")]), dataset)
    assert fakes[-1].images == []  # of the first model


def test_more_retries_ask_only_what_failed(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """What is good stays; the same command again asks nothing."""
    fakes.append(Fake("embedded", 40))
    fakes[0].says = lambda key, number: Answer(SORRY if key == "i4" and number < 3 else f"Kappe {key}")
    caption_images(config_of(tmp_path, retries=1), dataset)
    assert set(IDS) - set(rows_of(config_of(tmp_path))) == {"i4"}
    caption_images(config_of(tmp_path, retries=1), dataset)
    assert fakes[-1].images == []
    config = config_of(tmp_path, retries=4)
    caption_images(config, dataset)
    assert (
        fakes[-1].images == ["i4"] and list(rows_of(config)) == IDS and rows_of(config, "captions.failed.jsonl") == {}
    )


def test_failures_are_listed_and_counted(tmp_path: Path, dataset: Dataset, fakes: list[Fake], capsys: Any) -> None:
    """By reason, with the answer, on the terminal as a count; their images have no caption."""
    fakes.append(Fake("embedded", 40))
    bad = {"i1": Answer(" \n"), "i2": Answer(SORRY), "i3": Answer("red " * 9), "i4": Answer("", problem="server: 500"),
           "i5": Answer("a cap", cut=True), "i6": Answer(SORRY)}  # fmt: skip
    fakes[0].says = lambda key, number: bad.get(key, Answer("a cap"))
    config = config_of(tmp_path)
    caption_images(config, dataset)
    failed = rows_of(config, "captions.failed.jsonl")
    assert {i: row["reason"] for i, row in failed.items()} == {
        "i1": "empty", "i2": "refusal", "i3": "repetition", "i4": "server: 500", "i5": "too long", "i6": "refusal",
    }  # fmt: skip
    assert failed["i2"]["answer"] == SORRY and not failed.keys() & rows_of(config).keys()
    told = capsys.readouterr().out
    assert "5 captions; 6 failed (2 refusal, 1 empty, 1 repetition, 1 no readable answer, 1 too long)" in told


def test_no_caption_at_all(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """An error that says where to look; the step is not done."""
    fakes.append(Fake("embedded", 40))
    fakes[0].says = lambda key, number: Answer(SORRY)
    config = config_of(tmp_path)
    with pytest.raises(InputError, match=r"none of 11 captions passed the checks \(11 refusal\): see .*failed\.jsonl"):
        caption_images(config, dataset)
    assert len(rows_of(config, "captions.failed.jsonl")) == 11 and not config.file("captions.done.json").exists()


def test_given_captions_of_a_file(tmp_path: Path, dataset: Dataset, fakes: list[Fake], capsys: Any) -> None:
    """The published shape, or JSON lines: no model is asked, and all of several are kept."""
    entries = [{"image_id": i, "caption": f"«cap\n{i}»", "image_path": "x"} for i in [*IDS, "other"]]
    entries += [{"image_id": "i2", "caption": "a further one"}]
    (tmp_path / "given.json").write_text(json.dumps(entries))
    (tmp_path / "given.jsonl").write_text("\n".join(map(json.dumps, entries)))  # no newline at the end
    found = []
    for name in ("given.json", "given.jsonl"):
        config = config_of(tmp_path / name.replace(".", "-"), captions=str(tmp_path / name))
        caption_images(config, dataset)
        assert not fakes[-1].asked and not fakes[-1].looked
        found.append(rows_of(config))
        assert f"11 captions are from {tmp_path / name}" in capsys.readouterr().out
    assert found[0] == found[1] and list(found[0]) == IDS
    assert found[0]["i3"]["caption"] == "cap i3" and "captions" not in found[0]["i3"]
    assert found[0]["i2"]["captions"] == ["cap i2", "a further one"] and found[0]["i2"]["caption"] == "cap i2"
    assert {(row["model"], row["prompt"]) for row in found[0].values()} == {("given", None)}
    entries[3]["caption"] = "a correction"
    (tmp_path / "given.json").write_text(json.dumps(entries))
    config = config_of(tmp_path / "given-json", captions=str(tmp_path / "given.json"))
    caption_images(config, dataset)
    assert rows_of(config)["i3"]["caption"] == "a correction"


def test_given_captions_of_a_duplicate(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """An image with the same pixels may be the one that the file names; the image's own caption goes before."""
    (tmp_path / "given.jsonl").write_text(
        '{"image_id": "copy", "caption": "a cap"}\n{"image_id": "i1", "caption": "b"}\n'
    )
    config = config_of(tmp_path, [("i0", "i1")], captions=str(tmp_path / "given.jsonl"))
    rows = [{"image_id": i, "pixels": c, "canonical": c} for i, c in (("i0", "i0"), ("i1", "i1"), ("copy", "i0"))]
    write_jsonl(config.file("images.jsonl"), [*rows, {"image_id": "copy2", "pixels": "i1", "canonical": "i1"}])
    caption_images(config, dataset)
    assert {i: row["caption"] for i, row in rows_of(config).items()} == {"i0": "a cap", "i1": "b"}


@pytest.mark.parametrize(("content", "told"), [
    ("[]", r"one column must be called image_id or .*; there are: none; say which by 'given.json\?image=COLUMN'"),
    ('[{"image_id": "j", "caption": "a"}]', r'lacks captions of 11 of 11 images, the first being "i0": add them'),
    ('[{"image_id": "i0", "caption": " "}]', "lacks captions of 11"),
    ('[{"image_id": "i0", "caption": "a"}]', r'lacks captions of 10 of 11 images, the first being "i1"'),
    ('[{"image_id": "i0"}]', "one column must be called caption or .*; there are: image_id"),
    ("[3]", "entry 1"), ('{"a": 1}', "lacks captions of 11"),
    ('[{"image_id": "i0", "caption": "a"}, {"image_id": {}, "caption": "a"}]', "row 2"), ("[", "not valid JSON"),
])  # fmt: skip
def test_given_captions_that_cannot_be_meant(
    tmp_path: Path, dataset: Dataset, fakes: list[Fake], content: str, told: str
) -> None:
    """One line that names the file; nothing is asked instead."""
    (tmp_path / "given.json").write_text(content)
    for name in ("given.json", "none.json", "none.jsonl"):
        with pytest.raises(InputError, match=told if name == "given.json" else "is missing") as error:
            caption_images(config_of(tmp_path, captions=str(tmp_path / name)), dataset)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not any(fake.asked for fake in fakes)


def test_captions_that_came_with_the_dataset(tmp_path: Path, fakes: list[Fake], capsys: Any) -> None:
    """They are used, and only the other images are asked about, which is said."""
    came = {**dict.fromkeys(IDS, ""), "i1": " a\nred cap ", "i4": "a blue cap"}
    config = config_of(tmp_path, [("i1", "i2"), ("i4", "i5")])
    caption_images(config, dataset_of(tmp_path, came))
    assert fakes[-1].images == ["i2", "i5"]
    assert "2 captions are from the dataset, 2 images are left" in capsys.readouterr().out
    assert [(r["caption"], r["model"]) for r in rows_of(config).values()] == [
        ("a red cap", "given"), ("eine Kappe ä i2", "embedded"), ("a blue cap", "given"),
        ("eine Kappe ä i5", "embedded"),
    ]  # fmt: skip


def test_prompts(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """Words and category are filled in, other braces are the prompt's own; a file says it instead."""
    pairs = [("i1", "i2")]
    caption_images(config_of(tmp_path, pairs, prompt="as {json} in {words} words, a {category} {"), dataset)
    assert fakes[-1].prompts == {"as {json} in 10 words, a hat {"}
    (tmp_path / "prompt.txt").write_text("the {category}, {words} words\n", encoding="utf-8")
    caption_images(config_of(tmp_path, pairs, prompt_file=str(tmp_path / "prompt.txt"), words=5), dataset)
    assert fakes[-1].prompts == {"the hat, 5 words"}


@pytest.mark.parametrize(("text", "told"), [
    ("describe it", r"prompt\.txt must hold \{words\}.*got \"describe it\""), ("", "must hold"),
    (None, "cannot be read"),
    (b"\xff{words}", "cannot be read"),
])  # fmt: skip
def test_prompt_files_that_cannot_be_meant(
    tmp_path: Path, dataset: Dataset, fakes: list[Fake], text: str | bytes | None, told: str
) -> None:
    """Without the number of words, not there, or no text: one line, and no model is looked at."""
    if text is not None:
        (tmp_path / "prompt.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=told) as error:
        caption_images(config_of(tmp_path, prompt_file=str(tmp_path / "prompt.txt")), dataset)
    assert "\n" not in str(error.value) and not any(fake.looked for fake in fakes)


def test_a_prompt_of_a_category_that_is_missing(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """The image is named; one that is not captioned may lack it."""
    with pytest.raises(InputError, match=r'but 1 images have none, the first being "i9"'):
        caption_images(config_of(tmp_path, prompt="a {category} in {words} words"), dataset)
    caption_images(config_of(tmp_path, [("i1", "i2")], prompt="a {category} in {words} words"), dataset)


def test_a_full_disk(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """One line; what was written stays; with room again the run goes on and its file is that of any other."""
    whole = config_of(tmp_path / "whole")
    caption_images(whole, dataset)
    config, before = config_of(tmp_path / "full"), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(InputError, match=r"partial\.jsonl cannot be written: File too large") as error:
            caption_images(config, dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    caption_images(config, dataset)
    assert 0 < len(fakes[-1].images) < len(IDS)
    assert config.file("captions.jsonl").read_bytes() == whole.file("captions.jsonl").read_bytes()


def test_a_broken_image_is_named(tmp_path: Path, dataset: Dataset) -> None:
    """With a real model: one line."""
    for i in IDS:
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
    os.truncate(tmp_path / "i4.png", 30)
    with pytest.raises(InputError, match=r"image .*i4\.png does not decode"):
        caption_images(config_of(tmp_path), dataset)


@pytest.mark.parametrize(("text", "expected"), [
    ("a cap", "a cap"), ("  a\n red\t\u2028cap ", "a red cap"), ('"a cap"', "a cap"), ("“a cap”", "a cap"),
    ("'a cap'", "a cap"),
    ('"a" and "b"', '"a" and "b"'), ("the 'big' cap", "the 'big' cap"), ("a\x00cap\x1b[1m", "a cap [1m"), ('"', '"'),
    ("", ""),
    ("family: 👨\u200d👩", "family: 👨\u200d👩"), ("half a \ud83d smile", "half a smile"),
])  # fmt: skip
def test_tidy(text: str, expected: str) -> None:
    """One line, no quotes around it, and what belongs to it stays."""
    assert tidy(text) == expected


def verdict(text: str, words: int = 10, cut: bool = False) -> str | None:
    return check_caption(words, Question("k", "p"), Answer(text, cut))[1]


@pytest.mark.parametrize(("text", "expected"), [
    ("", "empty"), ("...", "empty"), ('""', "empty"), ("I'm sorry, I cannot help with that.", "refusal"),
    ("Sorry", "refusal"),
    ("I’m not able to describe people.", "refusal"), ("As an AI language model, I see nothing", "refusal"),
    ("I cannot see any image", "refusal"), ("Unfortunately, I do not see it", "refusal"),
    ("I don't see an image.", "refusal"),
    ("a red red red red cap", "repetition"), ("a red cap, a red cap, a red cap", "repetition"),
    ("a dog and a cat and a dog and a cat and a dog and a cat and a dog", "repetition"),
    (" ".join(f"w{n}" for n in range(31)), "too long"),
    (" ".join(f"w{n}" for n in range(30)), None), ("a sorry dog with an AI on its cap", None), ("a canister", None),
    ("an iPad", None), ("a very very very long cap", None), ("a man and a woman and a girl", None),
    ("✨ 2 stars", None),
])  # fmt: skip
def test_verdicts(text: str, expected: str | None) -> None:
    """What is refused, and what only looks like it."""
    assert verdict(text) == expected


def test_verdicts_depend_on_what_was_asked() -> None:
    """A cut answer is too long however short; the bound follows the words."""
    assert verdict("a cap", cut=True) == "too long"
    twenty = " ".join(f"w{n}" for n in range(20))
    assert verdict(twenty, 4) == "too long" and verdict(twenty, 5) is None


def test_no_real_name_is_refused() -> None:
    """All names of the embedded dataset pass, repeated skin tones included."""
    emoji = Emoji()
    names = [emoji.label(i) for i in emoji.training_images()]
    assert len(names) > 2000 and not [name for name in names if verdict(name)]
    assert not repeats("kiss: woman, man, medium-dark skin tone, medium-light skin tone")


def test_captions_in_a_table_by_stem(tmp_path: Path, dataset: Dataset, fakes: list[Fake]) -> None:
    """Pictures may be called by their stems, columns may be named, and a file of none is told before the first step."""
    (tmp_path / "given.csv").write_text("Picture;Said\n" + "".join(f"{i};a cap, {i}\n" for i in IDS))
    config = config_of(tmp_path, captions=f"{tmp_path}/given.csv?image=Picture,caption=Said")
    check_captioner(config, dataset)
    caption_images(config, dataset)
    assert rows_of(config)["i3"]["caption"] == "a cap, i3" and not fakes[-1].asked
    known = known_captions(config, dataset, [f"folder/{i}.jpg" for i in IDS])
    assert known["folder/i3.jpg"] == ("a cap, i3",) and len(known) == len(IDS)
    (tmp_path / "given.csv").write_text("Picture;Said\nother;a cap\n")
    with pytest.raises(InputError, match="lacks captions of 11 of 11"):
        check_captioner(config, dataset)
