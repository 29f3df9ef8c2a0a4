"""Images whose pixels are equal."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from PIL import EpsImagePlugin, Image

from spn4cir import identity as inspection
from spn4cir.data_gen.deduplicate import canonical_images, deduplicate, reference_images
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset import Dataset
from spn4cir.datasets import load_dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl
from spn4cir.types import ImageRef, Triplet

COLORS = {"c": "blue", "a": "red", "b": "green"}  # the dataset's order is not that of the alphabet


def dataset(folder: Path, ids: list[str]) -> Dataset:
    return cast(
        Dataset,
        SimpleNamespace(
            name="x",
            root=None,
            image=lambda i: ImageRef(folder / f"{i}.png"),
            training_images=lambda: list(ids),
            provenance=lambda: None,
        ),
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
    deduplicate(config, dataset(folder, ["a", "b", "c"]))
    shutil.copy(folder / "a.png", folder / "b.png")
    deduplicate(config, dataset(folder, ["a", "b", "c"]))
    assert canonical_images(config) == ["a", "c"]


def test_broken_images_are_left_out_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the dataset's order with the reason; the list goes when all are mended."""
    config, ids = GenerateConfig(output=str(folder / "out")), ["a", "gone", "b", "c"]
    (folder / "b.png").write_bytes(b"")
    deduplicate(config, dataset(folder, ids))
    assert canonical_images(config) == ["a", "c"] and "2 left out: see" in capsys.readouterr().out
    failed = read_jsonl(config.file("images.failed.jsonl"))
    assert [row["image_id"] for row in failed] == ["gone", "b"] and failed[0]["reason"] == "is missing"
    assert failed[1]["reason"].startswith("does not decode: ") and str(folder) not in failed[1]["reason"]
    shutil.copy(folder / "wide.png", folder / "b.png")
    shutil.copy(folder / "a3.png", folder / "gone.png")
    deduplicate(config, dataset(folder, ids))
    assert canonical_images(config) == ["a", "b", "c"] and not config.file("images.failed.jsonl").exists()


@pytest.mark.parametrize(("ids", "said"), [
    ([], "x has no images"), (["gone"], r"none of 1 images can be used, such as .*gone\.png, which is missing: see"),
    (["a"], "1 image is left, of 1 picture, which cannot be paired"),
    (["a", "gone"], r"1 image is left.*failed\.jsonl"),
    (["a", "a2", "a3"], "3 images are left, of 1 picture"),
])  # fmt: skip
def test_too_few_images(folder: Path, ids: list[str], said: str) -> None:
    """One line, and nothing is marked as done."""
    config = GenerateConfig(output=str(folder / "out"))
    with pytest.raises(InputError, match=said):
        deduplicate(config, dataset(folder, ids))
    assert not list((folder / "out").glob("*done*")) and not (folder / "out" / "images.jsonl").exists()


def of_catalogue(root: Path, output: Path) -> GenerateConfig:
    config = GenerateConfig(dataset="catalogue", data_root=str(root), output=str(output))
    deduplicate(config, load_dataset("catalogue", str(root)))
    return config


def test_its_own_pictures_are_no_candidates(folder: Path) -> None:
    """Below the root, whatever of its own files is deleted; negative control: a folder that is not its own."""
    ids = ["a.png", "a2.png", "a3.png", "b.png", "c.png", "wide.png"]
    for gone in ("images.cache.jsonl", "images.done.json", "images.jsonl"):
        config = of_catalogue(folder, folder / "gen")
        Image.new("RGB", (9, 9)).save(config.file("sheet.png"))
        config.file(gone).unlink()
        of_catalogue(folder, folder / "gen")
        assert [row["image_id"] for row in read_jsonl(config.file("images.jsonl"))] == ids
    (folder / "other").mkdir()
    shutil.copy(folder / "gen" / "sheet.png", folder / "other")
    of_catalogue(folder, folder / "gen")
    assert "other/sheet.png" in [row["image_id"] for row in read_jsonl(config.file("images.jsonl"))]


@pytest.mark.parametrize(("root", "output"), [
    ("", ""), ("", "shoes/../"), ("", "link"), ("", "shoes"), ("t.csv", ""), ("t.csv", "shoes"),
])  # fmt: skip
def test_an_output_among_the_pictures(folder: Path, root: str, output: str) -> None:
    """The root, by any name, the folder of the table, a folder of pictures: one line, nothing is written."""
    (folder / "shoes").mkdir()
    (folder / "link").symlink_to(folder)
    shutil.move(folder / "b.png", folder / "shoes" / "b.png")
    (folder / "t.csv").write_text("image\na.png\nshoes/b.png\n")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="holds files of catalogue itself: name another --output") as error:
        of_catalogue(folder / root, folder / output)
    assert "\n" not in str(error.value) and sorted(folder.rglob("*")) == before
    assert canonical_images(of_catalogue(folder / root, folder / "shoes2"))


def test_an_output_that_is_the_root_of_pictures_elsewhere(folder: Path) -> None:
    """Of a dataset whose pictures do not lie below its root, the root is no output either; a folder in it is."""
    found, root = dataset(folder, ["a", "b"]), folder / "root"
    root.mkdir()
    found.root = root
    with pytest.raises(InputError, match="holds files of x itself"):
        deduplicate(GenerateConfig(output=str(root)), found)
    deduplicate(GenerateConfig(output=str(root / "out")), found)
    assert [path.name for path in root.iterdir()] == ["out"]


def test_an_output_of_another_source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Other pictures by the same names, a dataset or table are refused; the same ones elsewhere are not."""
    out, other = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("other")
    for name in ("a", "b"):
        Image.new("RGB", (7, 7), COLORS[name]).save(other / f"{name}.png")
    (other / "t.csv").write_text("image\na.png\nb.png\n")
    config = of_catalogue(folder, out)
    note = config.file("images.done.json")
    assert json.loads(note.read_text())["source"] == {"dataset": "catalogue", "root": str(folder.resolve())}
    of_catalogue(folder / "." / ".." / folder.name, out)
    moved = tmp_path_factory.mktemp("moved") / "shop"
    shutil.copytree(folder, moved)
    of_catalogue(moved, out)
    assert json.loads((out / "made_from.json").read_text())["name"] == "shop"
    of_catalogue(folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    told = rf"holds the triplets of {folder.name} \(6 images in {folder}\), .*: give another with --output"
    for root in (other, other / "t.csv"):
        with pytest.raises(InputError, match=told):
            of_catalogue(root, out)
    with pytest.raises(InputError, match=f"holds the triplets of catalogue of {folder}: give another with --output"):
        deduplicate(config, dataset(folder, ["a", "b"]))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "source"}))
    (out / "made_from.json").unlink()
    assert canonical_images(of_catalogue(other, out)) == ["a.png", "b.png"]
    assert canonical_images(of_catalogue(other / "t.csv", out)) == ["a.png", "b.png"]  # the same pictures
    with pytest.raises(InputError, match=f"triplets of {other.name}-t "):
        of_catalogue(folder, out)


def test_a_dataset_without_a_folder(folder: Path) -> None:
    """Only its name is noted."""
    config = GenerateConfig(output=str(folder / "out"))
    deduplicate(config, dataset(folder, ["a", "b"]))
    assert json.loads(config.file("images.done.json").read_text())["source"] == {"dataset": "x"}
    renamed = dataset(folder, ["a", "b"])
    renamed.name = "y"
    with pytest.raises(InputError, match="holds the triplets of x: give another"):
        deduplicate(config, renamed)


def test_postscript_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name is; negative control: loaded as a picture, it is."""
    Image.new("RGB", (4, 4)).save(folder / "eps.png", "EPS")
    (folder / "bin").mkdir()
    (folder / "bin" / "gs").write_text(f"#!/bin/sh\necho run > {folder}/marker\nexit 1\n")
    (folder / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    config = of_catalogue(folder, folder / "out")
    (failed,) = read_jsonl(config.file("images.failed.jsonl"))
    assert failed["image_id"] == "eps.png" and not (folder / "marker").exists()
    with Image.open(folder / "eps.png") as picture, pytest.raises(Exception, match="gs"):
        picture.load()
    assert (folder / "marker").exists()


def annotated(folder: Path, *pairs: tuple[str, str]) -> Dataset:
    found = dataset(folder, ["c", "a2", "a", "b", "wide"])
    found.triplets = lambda: [Triplet(r, (t,), ("x",)) for r, t in pairs]  # type: ignore[method-assign]
    return found


def test_candidates_and_references_of_annotated_triplets(folder: Path) -> None:
    """Only what they name, in the dataset's order; a reference is known by its class."""
    config = GenerateConfig(output=str(folder / "out"), candidates="named", references="annotated")
    source = annotated(folder, ("b", "a"), ("a", "c"))
    deduplicate(config, source)
    assert canonical_images(config) == ["c", "a", "b"] and reference_images(config, source) == ["a", "b"]
    config.candidates = "all"
    deduplicate(config, source)
    assert canonical_images(config) == ["c", "a2", "b", "wide"] and reference_images(config, source) == ["a2", "b"]
    config.references = "all"
    assert reference_images(config, source) == canonical_images(config)


def test_without_annotated_triplets(folder: Path) -> None:
    """One line for each setting that needs some."""
    config = GenerateConfig(output=str(folder / "out"), candidates="named", references="annotated")
    with pytest.raises(InputError, match="candidates: named needs annotated triplets, and x has none"):
        deduplicate(config, annotated(folder))
    config.candidates = "all"
    deduplicate(config, annotated(folder))
    with pytest.raises(InputError, match="references: annotated needs annotated triplets"):
        reference_images(config, annotated(folder))
    with pytest.raises(InputError, match="no reference of x's triplets is among the images"):
        reference_images(config, annotated(folder, ("elsewhere", "a")))


def test_what_was_decoded_is_not_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at any image, the next run goes on behind it."""
    config, looked = GenerateConfig(output=str(folder / "out")), []
    monkeypatch.setattr(inspection, "BLOCK", 1)
    monkeypatch.setattr(inspection, "cpu_count", lambda: 1)

    def slow(image: ImageRef) -> Image.Image:
        looked.append(Path(str(image)).stem)
        if len(looked) == 3:
            raise KeyboardInterrupt
        return decode(image)

    decode = inspection.decode
    monkeypatch.setattr(inspection, "decode", slow)
    with pytest.raises(KeyboardInterrupt):
        deduplicate(config, dataset(folder, ["c", "a", "b"]))
    deduplicate(config, dataset(folder, ["c", "a", "b"]))
    assert looked == ["c", "a", "b", "b"] and canonical_images(config) == ["c", "a", "b"]


def test_only_the_first_process_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it."""
    waited: list[int] = []
    monkeypatch.setattr(Processes, "wait", lambda self: waited.append(self.index))
    config = GenerateConfig(output=str(folder / "out"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    deduplicate(config, dataset(folder, ["a", "b"]))
    assert waited == [1] and not (folder / "out").exists()
    monkeypatch.setenv("RANK", "0")
    deduplicate(config, dataset(folder, ["a", "b"]))
    assert waited == [1, 0] and canonical_images(config) == ["a", "b"]
