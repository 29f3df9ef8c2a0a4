"""Folders: what is passed over is said, and pipes and devices are never opened."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw_picture
from PIL import Image

from spn4cir.data_gen.engines import _area
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.datasets.reading import read_first_line
from spn4cir.errors import InputError
from spn4cir.identity import inspect_images
from spn4cir.images import open_image
from spn4cir.index.source import content_hashes
from spn4cir.pixels import picture_suffixes
from spn4cir.types import ImageRef


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Opening a pipe that nobody writes to would wait for ever."""

    def stop(*_: object) -> None:
        raise AssertionError("a pipe was opened")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path / "pipe.png"


@pytest.mark.parametrize("name", ["pipe", "device"])
def test_what_is_no_file_is_not_opened(pipe: Path, name: str) -> None:
    """By none of those who open pictures: it is said in one line, or counts as unreadable."""
    path = pipe if name == "pipe" else Path("/dev/zero")
    with pytest.raises(InputError, match=r"does not decode: not a regular file"):
        open_image(path)
    (found,) = inspect_images({"a": ImageRef(path)}, show=False).values()
    assert found[:3] == ("", "unreadable", "not a regular file")
    assert content_hashes([ImageRef(path)]) == [""] and _area(ImageRef(path)) == 0
    with pytest.raises(InputError, match=r"not a regular file|cannot be read"):
        read_first_line(path)


def test_a_table_that_names_a_pipe(pipe: Path) -> None:
    """Its other pictures are read; the pipe is an error, and does not hang."""
    draw_picture(pipe.parent / "a.png", 1)
    (pipe.parent / "items.csv").write_text("image\na.png\npipe.png\n")
    catalogue = Catalogue(str(pipe.parent / "items.csv"))
    open_image(catalogue.image("a.png"))
    with pytest.raises(InputError, match=r"pipe\.png does not decode: not a regular file"):
        open_image(catalogue.image("pipe.png"))


def test_a_folder_says_what_it_passes_over(pipe: Path) -> None:
    """Every suffix that Pillow opens counts; others by suffix, with what would open them; pipes by name."""
    root = pipe.parent
    for name in ("a.jfif", "b.jpe", "c.JP2", "d.tga", "e.ppm", "f.ico"):
        kind = {"jfif": "JPEG", "jpe": "JPEG", "JP2": "JPEG2000"}.get(name[2:])
        Image.new("RGB", (32, 32), "red").save(root / name, kind)
    for name in ("i.heic", "j.jxl", "k.svg", "l.svg", "notes.md", "Makefile", "captions.csv", "m.eps", "a.txt"):
        (root / name).write_text("image,caption\n" if name.endswith("csv") else "no picture")
    catalogue = Catalogue(str(root))
    assert catalogue.training_images() == ["a.jfif", "b.jpe", "c.JP2", "d.tga", "e.ppm", "f.ico"]
    for image_id in catalogue.training_images():
        open_image(catalogue.image(image_id))
    special, others = catalogue.notes()
    assert "1 pipes, sockets, devices or broken links are not opened" in special and "pipe.png" in special
    assert others.startswith("catalogue: 7 files are passed over: 2 .svg (draw it as PNG first)")
    for part in ("1 .md", "1 without suffix", "1 .eps (draw it as PNG first)"):
        assert part in others
    (root / "x.\x1b[31m").write_text("")
    assert Catalogue(str(root)).notes()[1].isprintable()
    for suffix, extra in ((".heic", "heif"), (".jxl", "jxl")):
        if suffix not in picture_suffixes():
            assert f"1 {suffix} (pip install 'spn4cir[{extra}]')" in others


def test_which_suffixes_are_pictures() -> None:
    """What Pillow only recognises, or would run, is none."""
    known = picture_suffixes()
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".jp2", ".psd", ".mpo"} <= known
    assert not known & {".eps", ".ps", ".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf", ".txt"}
