"""Images whose pixels are equal."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from PIL import Image

from data_gen.deduplicate import canonical_images, deduplicate
from data_gen.files import read_jsonl
from data_gen.settings import GenerateConfig
from spn4cir.errors import InputError
from spn4cir.types import Dataset

COLORS = {"c": "blue", "a": "red", "b": "green"}  # the dataset's order is not that of the alphabet


def dataset(folder: Path, ids: list[str]) -> Dataset:
    return cast(
        Dataset, SimpleNamespace(name="x", path=lambda i: folder / f"{i}.png", training_images=lambda: list(ids))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and copies: the same file, the same pixels in another mode, and one pixel wider."""
    for name, color in COLORS.items():
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "a2.png")
    Image.new("RGBA", (4, 4), "red").save(tmp_path / "a3.png")
    Image.new("RGB", (5, 4), "red").save(tmp_path / "wide.png")
    return tmp_path


def test_first_of_each_class_stands_for_all(folder: Path) -> None:
    """Copies name the first image in the dataset's order; what differs in size is no copy."""
    config = GenerateConfig(output=str(folder / "out"))
    deduplicate(config, dataset(folder, ["c", "a2", "a", "b", "a3", "wide"]))
    rows = read_jsonl(config.file("images.jsonl"))
    assert {r["image_id"]: r["canonical"] for r in rows} == {
        "c": "c", "a2": "a2", "a": "a2", "b": "b", "a3": "a2", "wide": "wide",
    }  # fmt: skip
    assert canonical_images(config) == ["c", "a2", "b", "wide"]


def test_done_until_the_images_are_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same list is done; a longer one is not."""
    config = GenerateConfig(output=str(folder / "out"))
    deduplicate(config, dataset(folder, ["a", "b"]))
    capsys.readouterr()
    deduplicate(config, dataset(folder, ["a", "b"]))
    assert "is done" in capsys.readouterr().out
    deduplicate(config, dataset(folder, ["a", "b", "c"]))
    assert canonical_images(config) == ["a", "b", "c"]


def test_an_image_that_changed_is_seen(folder: Path) -> None:
    """Under the same name an image may be replaced: the step is then not done."""
    config = GenerateConfig(output=str(folder / "out"))
    deduplicate(config, dataset(folder, ["a", "b"]))
    shutil.copy(folder / "a.png", folder / "b.png")
    deduplicate(config, dataset(folder, ["a", "b"]))
    assert canonical_images(config) == ["a"]


def test_a_broken_image_is_named(folder: Path) -> None:
    """Which file to mend is told, and nothing is marked as done."""
    (folder / "b.png").write_bytes(b"")
    config = GenerateConfig(output=str(folder / "out"))
    with pytest.raises(InputError, match=r"b\.png"):
        deduplicate(config, dataset(folder, ["a", "b"]))
    assert not list((folder / "out").glob("*"))


def test_the_first_of_several_broken_images_is_named(folder: Path) -> None:
    """In the dataset's order, whatever was looked at first, in one line; a missing one is called missing."""
    config, broken = GenerateConfig(output=str(folder / "out")), ["a", *(f"x{n}" for n in range(40)), "b", "c"]
    for n in range(40):
        shutil.copy(folder / "a.png", folder / f"x{n}.png")
    (folder / "b.png").unlink()
    (folder / "c.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"^image .*b\.png is missing$"):
        deduplicate(config, dataset(folder, broken))
    with pytest.raises(InputError, match=r"^image .*c\.png does not decode: [^\n]*$"):
        deduplicate(config, dataset(folder, [*reversed(broken)]))
