"""Catalogues in every form that ``datasets`` opens: the same images as in a folder, read where they lie."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from spn4cir import identity
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset, open_extra_images
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.errors import InputError
from spn4cir.identity import inspect_images
from spn4cir.images import ImageSource, StoredBytes, Transform, open_image
from spn4cir.types import ImageRef

NAMES = ["hats/a.png", "hats/b.png", "shoes/c.jpg", "shoes/d.png"]
WORDS = ["a hat", "a cap", "a shoe", "a boot"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in two folders."""
    root = tmp_path / "shop"
    for n, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (8 + n, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def stored(folder: Path, **columns: list[Any]) -> datasets.Dataset:
    """A data set as people make one, with the pictures in it."""
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in NAMES]
    rows = {"image": images, "caption": WORDS, **columns}
    made = datasets.Dataset.from_dict(rows)
    return made.cast_column("image", datasets.Image())


def write_tar(path: Path, folder: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            text = WORDS[NAMES.index(name)].encode()
            for suffix, data in (("jpg", (folder / name).read_bytes()), ("txt", text)):
                member = tarfile.TarInfo(f"{name.partition('.')[0]}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def as_metadata(suffix: str) -> Any:
    def make(folder: Path, out: Path) -> Path:
        rows = [{"file_name": name, "text": text} for name, text in zip(NAMES, WORDS, strict=True)]
        frame = datasets.Dataset.from_list(rows)
        path = str(folder / f"metadata{suffix}")
        frame.to_csv(path) if suffix == ".csv" else frame.to_json(path)
        return folder

    return make


def as_split_metadata(folder: Path, out: Path) -> Path:
    for place in ("hats", "shoes"):
        rows = [
            {"file_name": name.partition("/")[2], "text": text}
            for name, text in zip(NAMES, WORDS, strict=True)
            if name.startswith(place)
        ]
        datasets.Dataset.from_list(rows).to_csv(str(folder / place / "metadata.csv"))
    return folder


def as_parquet(folder: Path, out: Path) -> Path:
    stored(folder).to_parquet(str(out / "mine.parquet"))
    return out / "mine.parquet"


def as_shards(folder: Path, out: Path) -> Path:
    (out / "data").mkdir()
    for n, split in enumerate(("train", "test")):
        stored(folder).select([2 * n, 2 * n + 1]).to_parquet(str(out / "data" / f"{split}-00000-of-00001.parquet"))
    return out


def as_tars(folder: Path, out: Path) -> Path:
    write_tar(out / "00.tar", folder, NAMES[:3])
    write_tar(out / "01.tar", folder, NAMES[3:])
    return out


def as_tar(folder: Path, out: Path) -> Path:
    return write_tar(out / "00.tar", folder, NAMES)


def as_saved(folder: Path, out: Path) -> Path:
    stored(folder).save_to_disk(str(out / "saved"))
    return out / "saved"


def as_saved_splits(folder: Path, out: Path) -> Path:
    whole = stored(folder)
    parts = {"train": whole.select([0, 1]), "test": whole.select([2, 3])}
    datasets.DatasetDict(parts).save_to_disk(str(out / "saved"))
    return out / "saved"


FORMS = {
    "metadata.csv": as_metadata(".csv"), "metadata.jsonl": as_metadata(".jsonl"), "split metadata": as_split_metadata,
    "parquet": as_parquet, "shards": as_shards, "tar": as_tar, "tars": as_tars,
    "saved": as_saved, "saved splits": as_saved_splits,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_images_are_those_of_the_folder(form: str, folder: Path, tmp_path: Path) -> None:
    """Ids (of a tar: but for the suffix), pixels, hashes, captions: whatever holds them; nothing is unpacked."""
    out = tmp_path / "out"
    out.mkdir()
    place = FORMS[form](folder, out)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    found = load_dataset("catalogue", str(place))
    ids = found.training_images()
    kept = [Path(name).name if "saved" in form else name for name in NAMES]  # of a path, save_to_disk keeps the name
    assert [i.rpartition(".")[0] for i in ids] == [name.rpartition(".")[0] for name in kept]
    assert [found.caption(i) for i in ids] == WORDS
    expected = inspect_images({name: ImageRef(folder / name) for name in NAMES}, show=False)
    inspected = inspect_images({i: found.image(i) for i in ids}, show=False)
    assert [one.pixels for one in inspected.values()] == [one.pixels for one in expected.values()]
    source, plain = ImageSource(found.image, Transform(8)), ImageSource(Path, Transform(8))
    assert source.stack(ids).equal(plain.stack([str(folder / name) for name in NAMES]))
    sent = pickle.loads(pickle.dumps(found))  # as data loaders of some systems have it
    assert open_image(sent.image(ids[3])).tobytes() == open_image(found.image(ids[3])).tobytes()
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert examine(found).can_train


def test_a_hub_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of the same layout, here in the current folder; it has no root, and one that is missing is said."""
    (tmp_path / "owner" / "name" / "data").mkdir(parents=True)
    stored(folder).to_parquet(str(tmp_path / "owner/name/data/train-00000-of-00001.parquet"))
    monkeypatch.chdir(tmp_path)
    found = load_dataset("catalogue", "hf:owner/name")
    assert found.training_images() == NAMES and found.root is None and not found.skip_reasons
    assert open_image(found.image(NAMES[1])).tobytes() == open_image(folder / NAMES[1]).tobytes()
    with pytest.raises(InputError, match="hf:owner/absent cannot be read as a table of datasets"):
        Catalogue("hf:owner/absent").training_images()


def test_ids(folder: Path, tmp_path: Path) -> None:
    """A column says them; else the path; where paths are missing or occur twice, split and row."""
    path = tmp_path / "t.parquet"
    stored(folder, image_id=["1", "2", "3", "4"]).to_parquet(str(path))
    assert Catalogue(str(path)).training_images() == ["1", "2", "3", "4"]
    data = [(folder / name).read_bytes() for name in NAMES]
    parquet.write_table(pa.table({"img": pa.array(data), "label": pa.array([4, 5, 6, None])}), path)
    found = Catalogue(str(path))
    assert found.training_images() == ["train/1", "train/2", "train/3", "train/4"] and found.category("train/2") == "5"
    twice = [{"bytes": one, "path": "x.png"} for one in data]
    parquet.write_table(pa.table({"image": twice}), tmp_path / "twice.parquet")
    found = Catalogue(str(tmp_path / "twice.parquet"))
    assert found.training_images()[3] == "train/4" and "occur twice: ids are splits and rows" in found.notes()[0]
    assert open_image(found.image("train/4")).tobytes() == open_image(folder / NAMES[3]).tobytes()


def test_what_does_not_decode_is_named_by_file_and_row(folder: Path, tmp_path: Path) -> None:
    """Of one file, of several files, and of a tar; the rest is read."""
    data = [(folder / name).read_bytes() for name in NAMES]
    rows = [data[0], data[1][:100], b"no picture", None]
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train-0", "train-1"):
        parquet.write_table(pa.table({"image": pa.array(rows, pa.binary())}), out / f"{name}.parquet")
    for place, before in ((out, 4), (out / "train-1.parquet", 0)):
        found = Catalogue(str(place))
        report = examine(found)
        problems = [
            (f"train/{before + row}", problem)
            for row, problem in ((2, "truncated"), (3, "unreadable"), (4, "unreadable"))
        ]
        assert list(report.broken.items())[-3:] == problems
        for row, said in ((2, "does not decode"), (3, "cannot identify the bytes as an image"), (4, "holds no image")):
            with pytest.raises(InputError, match=rf"train-1\.parquet, row {row} .*{said}") as error:
                open_image(found.image(f"train/{before + row}"))
            assert "0x" not in str(error.value) and "\n" not in str(error.value)
    (folder / NAMES[1]).write_bytes(b"no picture")
    found = Catalogue(str(write_tar(tmp_path / "tars" / "7.tar", folder, NAMES)))
    with pytest.raises(InputError, match=r"7\.tar, hats/b does not decode"):
        open_image(found.image("hats/b.jpg"))


@pytest.mark.parametrize(("columns", "box"), [
    ({"x0": [1], "y0": [2], "x1": [5.0], "y1": [6]}, (1, 2, 5, 6)), ({"box": [[1, 2, 5, 6]]}, (1, 2, 5, 6)),
    ({"bbox": [[1.2, 2, 4, 4]]}, (1, 2, 5, 6)), ({"box": [None]}, None),
])  # fmt: skip
@pytest.mark.parametrize("form", ["parquet", "jsonl", "bytes"])
def test_boxes(folder: Path, tmp_path: Path, form: str, columns: dict[str, Any], box: Any) -> None:
    """Corners, or COCO's left, upper, width and height, which cut the picture; a crop has pixels of its own."""
    if form != "bytes" and "x1" in columns:
        columns["x1"] = [5]
    rows = {"image": [NAMES[0]], **columns}
    path = folder / f"t.{'jsonl' if form == 'jsonl' else 'parquet'}"
    made = datasets.Dataset.from_dict(rows)
    if form == "bytes":
        made = made.map(lambda row: {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}})
    made.to_json(str(path)) if form == "jsonl" else made.to_parquet(str(path))
    found = Catalogue(str(path)).image(NAMES[0])
    whole = open_image(folder / NAMES[0])
    assert found.box == box and open_image(found).tobytes() == (whole.crop(box) if box else whole).tobytes()
    seen = inspect_images({"crop": found, "whole": found._replace(box=None)}, tmp_path / "pixels.jsonl", show=False)
    again = inspect_images({"crop": found, "whole": found._replace(box=None)}, tmp_path / "pixels.jsonl", show=False)
    assert (seen["crop"] == seen["whole"]) == (box is None) and seen == again


@pytest.mark.parametrize(("box", "said"), [
    ([5, 2, 1, 6], "row 1, column 'box': .* is no box of left, upper, right"), ([1, 2, 3], "are not four numbers"),
    ([-1, 0, 3, 3], "is no box"), ([0, 0, 99, 4], r"t\.parquet, row 1 .*the box \(0, 0, 99, 4\) leaves the picture"),
])  # fmt: skip
def test_boxes_that_are_refused(folder: Path, tmp_path: Path, box: list[int], said: str) -> None:
    """File, row and what is wrong."""
    image = {"bytes": (folder / NAMES[0]).read_bytes(), "path": "a.png"}
    parquet.write_table(pa.table({"image": [image], "box": [box]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=said):
        open_image(Catalogue(str(tmp_path / "t.parquet")).image("a.png"))


@pytest.mark.parametrize("path", ["../out.png", "/etc/passwd", "link.png", "away/x.png", "a\tb.png"])
def test_paths_that_leave_the_root(folder: Path, tmp_path: Path, path: str) -> None:
    """A row without bytes names a file: below the folder of its table, and not by a link."""
    (tmp_path / "out.png").write_bytes((folder / NAMES[0]).read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "away").symlink_to(tmp_path)
    rows = [{"bytes": None, "path": NAMES[0]}, {"bytes": None, "path": path}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    parquet.write_table(pa.table({"image": pa.array(rows[:1], kind)}), folder / "t.parquet")
    assert Catalogue(str(folder / "t.parquet")).image(NAMES[0]).path == folder / NAMES[0]
    parquet.write_table(pa.table({"image": pa.array(rows, kind)}), folder / "t.parquet")
    with pytest.raises(
        InputError, match=r"t\.parquet, row 2, column 'image': .* is (no path below|a link that leaves)"
    ):
        Catalogue(str(folder / "t.parquet")).training_images()


def test_folders_that_are_no_table(folder: Path, tmp_path: Path) -> None:
    """Pictures win over tables beside them, which is said; two formats, or no column of images, are refused."""
    stored(folder).to_parquet(str(folder / "more.parquet"))
    found = Catalogue(str(folder))
    assert found.training_images() == NAMES and "1 tables are passed over" in found.notes()[0]
    (tmp_path / "two").mkdir()
    write_tar(tmp_path / "two" / "a.tar", folder, NAMES)
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "two" / "a.parquet")
    with pytest.raises(InputError, match=r"two holds files of several formats, \.parquet, \.tar"):
        Catalogue(str(tmp_path / "two")).training_images()
    (tmp_path / "two" / "a.tar").unlink()
    with pytest.raises(InputError, match=r"two: one column must be called image or .*there are: x"):
        Catalogue(str(tmp_path / "two")).training_images()


@pytest.mark.parametrize(("name", "content"), [("t.tar", b"x" * 600), ("a/t.parquet", b"PAR1")])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes) -> None:
    """The place is named, in one line."""
    (tmp_path / "a").mkdir()
    (tmp_path / name).write_bytes(content)
    place = tmp_path / (name if name == "t.tar" else "a")
    with pytest.raises(InputError, match=f"{place} cannot be read as a table of datasets") as error:
        Catalogue(str(place)).training_images()
    assert "\n" not in str(error.value)


def test_splits_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    """The folder is named."""
    parts = {"train": stored(folder), "test": datasets.Dataset.from_dict({"image": [1, 2]})}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="saved cannot be read as a table of datasets"):
        Catalogue(str(tmp_path / "saved")).training_images()


def test_pixels_of_rows_are_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start decodes nothing; a table that has changed is decoded anew."""
    path, pixels, opened = tmp_path / "t.parquet", tmp_path / "pixels.jsonl", list[Any]()
    decode = identity.decode
    monkeypatch.setattr(identity, "decode", lambda image: (opened.append(image), decode(image))[1])

    def look() -> Any:
        found = Catalogue(str(path))
        return inspect_images({i: found.image(i) for i in found.training_images()}, pixels, show=False)

    stored(folder).to_parquet(str(path))
    first = look()
    assert len(opened) == 4 and look() == first and len(opened) == 4
    noise = np.random.default_rng(9).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / NAMES[0])
    path.unlink()
    stored(folder).to_parquet(str(path))
    assert look()[NAMES[0]] != first[NAMES[0]] and len(opened) == 8


def test_images_of_a_table_as_further_negatives(folder: Path, tmp_path: Path) -> None:
    """``bank.extra`` takes any form."""
    stored(folder).to_parquet(str(tmp_path / "t.parquet"))
    wider, ids = open_extra_images(load_dataset("emoji"), str(tmp_path / "t.parquet"))
    assert ids[0] == f"bank.extra:{NAMES[0]}" and isinstance(wider.image(ids[0]).source, StoredBytes)
    assert open_image(wider.image(ids[3])).tobytes() == open_image(folder / NAMES[3]).tobytes()
