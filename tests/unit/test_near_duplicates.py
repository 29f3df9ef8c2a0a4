"""The same picture at another size or quality is found; distinct emoji are not merged."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_picture
from PIL import Image

from spn4cir.bank import assign_rows
from spn4cir.config import TrainConfig, parse, recipes_folder
from spn4cir.data import hash_pixels, merge_near_duplicates
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset
from spn4cir.identity import PUBLISHED_CLASSES, group_near_duplicates, inspect_images
from spn4cir.images import open_image
from spn4cir.near_duplicates import near_duplicate_ids, small_version
from spn4cir.types import ImageRef

NORWAY, BOUVET = "1f1f3-1f1f4", "1f1e7-1f1fb"  # one flag, drawn twice


def photo(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A picture of smooth colours with grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def at_quality(picture: Image.Image, kind: str, quality: int) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, kind, quality=quality)
    return Image.open(content).convert("RGB")


def groups(pictures: dict[str, Image.Image]) -> dict[str, str]:
    return near_duplicate_ids({name: (small_version(one), one.size) for name, one in pictures.items()})


@pytest.mark.parametrize("seed", range(6))
def test_other_sizes_and_qualities_are_one(seed: int) -> None:
    """Half, a third, double; JPEG and WebP of good and poor quality; both at once."""
    whole = photo(seed)
    copies = {
        "whole": whole,
        "half": whole.resize((160, 120)), "third": whole.resize((107, 80), 2), "double": whole.resize((640, 480), 1),
        "good": at_quality(whole, "JPEG", 90), "poor": at_quality(whole, "JPEG", 40),
        "webp": at_quality(whole, "WEBP", 60), "both": at_quality(whole.resize((200, 150), 3), "JPEG", 70),
        "other": photo(seed + 100),
    }  # fmt: skip
    assert groups(copies) == {name: "other" if name == "other" else "whole" for name in copies}


def test_shape_contrast_and_a_small_change_tell_apart() -> None:
    """Negative controls: squeezed, nearly plain, one patch in another colour, mirrored."""
    whole = photo(1)
    changed = whole.copy()
    changed.paste((200, 0, 0), (40, 40, 80, 80))
    plain = {f"p{n}": Image.new("RGB", (50, 50), (200 + n, 200, 200)) for n in range(3)}
    others = {"squeezed": whole.resize((240, 240)), "changed": changed, "mirrored": whole.transpose(0)}
    assert groups({"whole": whole, **others, **plain}) == {name: name for name in ("whole", *others, *plain)}


def test_the_search_finds_what_a_comparison_of_all_finds() -> None:
    """The cells of the search lose no pair, however close to their borders; order decides who leads."""
    rng = np.random.default_rng(0)
    bases = rng.integers(3, 253, (40, 192))
    changes = rng.integers(-2, 3, (200, 192)) * (rng.random((200, 192)) < 0.02)  # of few numbers each
    levels = [bases[n // 5] + changes[n] for n in range(200)]
    seen = {f"i{n}": (bytes(one.astype(np.uint8)).hex(), (10, 10)) for n, one in enumerate(levels)}
    expected: dict[str, str] = {}
    for n, one in enumerate(levels):
        leaders = [int(name[1:]) for name in dict.fromkeys(expected.values())]
        gaps = [np.abs(levels[m] - one).reshape(3, 64).max(1) for m in leaders]
        same = [m for m, gap in zip(leaders, gaps, strict=True) if gap[0] <= 2 and gap[1:].max() <= 3]
        expected[f"i{n}"] = f"i{min([*same, n])}"
    found = near_duplicate_ids(seen)
    assert found == expected and 40 < len(set(found.values())) < 200


def test_distinct_emoji_are_not_merged() -> None:
    """Of all pictures in the embedded dataset, two of the same flag alone; so the rate of false merges is zero."""
    dataset = load_dataset("emoji")
    found = inspect_images({i: dataset.image(i) for i in dataset.training_images()}, show=False)
    distinct = {one.pixels: i for i, one in reversed(list(found.items()))}
    merged = group_near_duplicates({i: found[i] for i in reversed(list(distinct.values()))})
    assert {frozenset((i, first)) for i, first in merged.items() if i != first} <= {frozenset((NORWAY, BOUVET))}


def test_equal_pixels_are_one_and_broken_files_none(tmp_path: Path) -> None:
    """Classes of equal pixels hold, also of pictures without contrast."""
    draw_picture(tmp_path / "a.png", 1)
    open_image(tmp_path / "a.png").save(tmp_path / "b.bmp")
    Image.new("RGB", (5, 5)).save(tmp_path / "c.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "d.png")
    (tmp_path / "e.png").write_bytes(b"")
    found = inspect_images({path.name: ImageRef(path) for path in sorted(tmp_path.iterdir())}, show=False)
    assert group_near_duplicates(found) == {"a.png": "a.png", "b.bmp": "a.png", "c.png": "c.png", "d.png": "c.png"}
    assert [one.is_plain for one in found.values()] == [False, False, True, True, False]


def test_the_doctor_and_deduplicate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The doctor counts near-duplicates and names odd pictures; asked for, they are one class for training."""
    from spn4cir.cli import data_command

    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo(1).save(folder / "a.png")
    photo(1).resize((160, 120)).save(folder / "b.png")
    photo(2).save(folder / "c.png")
    Image.new("RGB", (20, 300), "red").save(folder / "d.png")
    options = ["--dataset", "catalogue", "--data-root", str(folder)]
    monkeypatch.setattr("sys.argv", ["spn4cir-data", "check", *options, "--json", str(tmp_path / "report.json")])
    data_command()
    report = json.loads((tmp_path / "report.json").read_text())
    notes = {check["what"]: check for check in report["checks"] if check["level"] == "note"}
    assert report["near_duplicates"] == [["a.png", "b.png"]] and report["duplicates"] == []
    assert [check["examples"] for check in notes.values()] == [["a.png ≈ b.png"], ["d.png"], ["d.png: 20 × 300"]]
    assert all(part in " ".join(notes) for part in ("nearly a copy", "of one colour", "times as long as wide"))
    capsys.readouterr()


def test_training_has_one_row_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, and by either spelling of the option: a class has one row, so no image is a negative of its twin."""
    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, one in (("a.png", photo(1)), ("b.png", photo(1).resize((160, 120))), ("c.png", photo(2))):
        one.save(folder / name)
    dataset = load_dataset("catalogue", str(folder))
    hashes = hash_pixels(dataset, dataset.training_images(), print, show=False)
    assert len(set(assign_rows(hashes).values())) == 3
    said: list[str] = []
    classes = merge_near_duplicates(dataset, hashes, said.append)
    assert assign_rows(classes) == {"a.png": 0, "b.png": 0, "c.png": 1} and classes["a.png"] == hashes["a.png"]
    assert said == ["catalogue: 1 pictures are near-duplicates of another, and one image with it"]
    recipe = recipes_folder() / "emoji" / "clip4cir_stage1.yaml"
    for option in ("--near-duplicates", "--negatives.near-duplicates"):
        assert parse(TrainConfig, recipe, [option, "true"]).negatives.near_duplicates
    assert not parse(TrainConfig, recipe, []).negatives.near_duplicates


def test_deduplicate_writes_them_as_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with the option, and the doctor then finds nothing wrong with the file."""
    from spn4cir.cli import data_command

    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path / "runs"))
    photo(1).save(tmp_path / "a.png")
    photo(1).resize((160, 120)).save(tmp_path / "b.png")
    options = ["--dataset", "catalogue", "--data-root", str(tmp_path)]
    for more, count in (([], 2), (["--near-duplicates"], 1)):
        monkeypatch.setattr("sys.argv", ["spn4cir-data", "deduplicate", *options, *more])
        data_command()
        assert len(json.loads((tmp_path / PUBLISHED_CLASSES).read_text())[0]) == count
    wrong = [check for check in examine(load_dataset("catalogue", str(tmp_path))).checks if "disagrees" in check.what]
    assert [check.found for check in wrong] == [0]
