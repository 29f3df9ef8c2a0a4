"""Captioning that survives a kill."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, cast

import pytest
from PIL import Image

from data_gen.caption import caption
from data_gen.files import read_jsonl, write_jsonl
from data_gen.settings import GenerateConfig
from spn4cir.errors import InputError
from spn4cir.types import Dataset

IDS = [f"i{n}" for n in range(11)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eleven tiny images of one colour each."""
    folder = tmp_path_factory.mktemp("images")
    for n, i in enumerate(IDS):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(folder / f"{i}.png")
    return cast(Dataset, SimpleNamespace(name="x", path=lambda i: folder / f"{i}.png"))


class Fake:
    """A captioner whose answers depend, as a real one's last bits do, on the whole batch; it may be told to die."""

    seen: ClassVar[list[list[int]]] = []
    made = 0
    die_after: int | None = None
    empty: ClassVar[set[int]] = set()

    def __init__(self, model: str, prompt: str, max_new_tokens: int):
        type(self).made += 1
        self.prompt = prompt

    def __call__(self, pictures: list[Image.Image]) -> list[str]:
        numbers = [picture.getpixel((0, 0))[0] for picture in pictures]
        if Fake.die_after is not None and len(Fake.seen) >= Fake.die_after:
            raise KeyboardInterrupt
        Fake.seen.append(numbers)
        batch = hashlib.sha256(repr((numbers, self.prompt)).encode()).hexdigest()[:6]
        return ["  " if n in Fake.empty else f"bild nr. {n} ä€😀 {batch}" for n in numbers]


@pytest.fixture(autouse=True)
def fake_captioner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_gen.caption.Captioner", Fake)
    for name, value in (("seen", []), ("made", 0), ("die_after", None), ("empty", set())):
        monkeypatch.setattr(Fake, name, value)


def config_of(folder: Path, **settings: object) -> GenerateConfig:
    config = GenerateConfig(output=str(folder), **{"caption_batch_size": 3, **settings})  # type: ignore[arg-type]
    write_jsonl(config.file("images.jsonl"), [{"image_id": i, "pixels": i, "canonical": i} for i in IDS])
    return config


def killed_after(config: GenerateConfig, dataset: Dataset, batches: int) -> Path:
    """Caption until the captioner dies; the partial file."""
    Fake.die_after = batches
    with pytest.raises(KeyboardInterrupt):
        caption(config, dataset)
    Fake.die_after = None
    Fake.seen.clear()
    assert not config.file("captions.jsonl").exists()
    (partial,) = config.folder.glob("captions.*.partial.jsonl")
    return partial


@pytest.fixture
def whole(tmp_path: Path, dataset: Dataset) -> bytes:
    """captions.jsonl of a run that nothing interrupted."""
    config = config_of(tmp_path / "whole")
    caption(config, dataset)
    assert [len(batch) for batch in Fake.seen] == [3, 3, 3, 2]
    Fake.seen.clear()
    return config.file("captions.jsonl").read_bytes()


def test_captions_of_all_images(tmp_path: Path, dataset: Dataset, whole: bytes) -> None:
    """One row per unique image in order; no partial file is left."""
    rows = read_jsonl(tmp_path / "whole" / "captions.jsonl")
    assert [row["image_id"] for row in rows] == IDS
    assert all(row["caption"].startswith(f"bild nr. {n} ") for n, row in enumerate(rows))
    assert not list((tmp_path / "whole").glob("*.partial.jsonl"))


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_resume_is_byte_equal(tmp_path: Path, dataset: Dataset, whole: bytes, batches: int) -> None:
    """Killed after some batches and started again, only what is missing is captioned and the file is the same."""
    config = config_of(tmp_path / "killed")
    killed_after(config, dataset, batches)
    caption(config, dataset)
    assert [n for batch in Fake.seen for n in batch] == list(range(3 * batches, 11))
    assert config.file("captions.jsonl").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 10, 33, 34, 35, 36, 37, 90, 150])
def test_resume_from_a_torn_batch(tmp_path: Path, dataset: Dataset, whole: bytes, cut: int) -> None:
    """Torn in the middle of a batch, or of a letter, the whole batch is done again and the file is the same."""
    config = config_of(tmp_path / "killed")
    partial = killed_after(config, dataset, 2)
    partial.write_bytes(partial.read_bytes()[:-cut])
    caption(config, dataset)
    assert Fake.seen[0] == [3, 4, 5]
    assert config.file("captions.jsonl").read_bytes() == whole


def test_killed_before_the_file_was_written(
    tmp_path: Path, dataset: Dataset, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all batches in the partial file nothing is captioned again."""
    config = config_of(tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_gen.caption.write_jsonl", _interrupt)
        caption(config, dataset)
    Fake.seen.clear()
    caption(config, dataset)
    assert Fake.seen == []
    assert config.file("captions.jsonl").read_bytes() == whole


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_done_is_not_done_again(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """The same settings: no captioner is even built. Another prompt: all is captioned."""
    caption(config_of(tmp_path), dataset)
    made = Fake.made
    caption(config_of(tmp_path), dataset)
    assert Fake.made == made and "is done" in capsys.readouterr().out
    caption(config_of(tmp_path, words=4), dataset)
    assert Fake.made == made + 1 and sum(map(len, Fake.seen)) == 22


def test_a_partial_file_of_other_settings_is_not_used(tmp_path: Path, dataset: Dataset) -> None:
    """Captions of another prompt are never mixed in."""
    killed_after(config_of(tmp_path), dataset, 2)
    caption(config_of(tmp_path, words=4), dataset)
    assert sum(map(len, Fake.seen)) == 11


def test_empty_captions_are_left_out_and_told(tmp_path: Path, dataset: Dataset) -> None:
    """An image with an empty answer has no row; the note names it."""
    Fake.empty = {2, 7}
    config = config_of(tmp_path)
    caption(config, dataset)
    assert [row["image_id"] for row in read_jsonl(config.file("captions.jsonl"))] == [
        i for i in IDS if i not in ("i2", "i7")
    ]
    assert '"i2"' in config.file("captions.done.json").read_text()


def test_other_braces_in_a_prompt(tmp_path: Path, dataset: Dataset) -> None:
    """Only {words} is filled in; other braces are the prompt's own."""
    caption(config_of(tmp_path, prompt="answer as {json} in {words} words {"), dataset)
    assert "answer as {json} in 10 words {" in config_of(tmp_path).file("captions.done.json").read_text()


def test_a_captioner_that_is_none(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a model is an InputError of one line that names it."""
    monkeypatch.undo()
    with pytest.raises(InputError, match="no-such-model") as error:
        caption(config_of(tmp_path, captioner=str(tmp_path / "no-such-model")), dataset)
    assert "\n" not in str(error.value)
