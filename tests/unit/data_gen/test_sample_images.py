"""A sample of other images: from shards and folders, the same whatever the order, whatever happens meanwhile."""

import gzip
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from spn4cir.data_gen import sample_images as module
from spn4cir.data_gen.sample_images import SampleConfig, sample_images
from spn4cir.data_gen.sources import Candidate, Smallest, expand, shard_candidates
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.errors import InputError


def image_bytes(seed: object, kind: str = "PNG") -> bytes:
    picture = Image.frombytes("RGB", (6, 6), random.Random(str(seed)).randbytes(6 * 6 * 3))
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | None]]) -> Path:
    """Members in this order; without bytes, a symbolic link to /etc/passwd."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return path


def sample(shard: int, n: int) -> list[tuple[str, bytes | None]]:
    key = f"{shard:02d}{n:03d}"
    about = {"url": f"http://x/{key}.jpg?a=<b>", "caption": "c"}
    return [
        (f"{key}.jpg", image_bytes(key, "JPEG")), (f"{key}.json", json.dumps(about).encode()), (f"{key}.txt", b"c"),
    ]  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of twenty samples."""
    for shard in range(3):
        write_tar(tmp_path / "cc" / f"cc-{shard:04d}.tar", [m for n in range(20) for m in sample(shard, n)])
    return tmp_path / "cc"


def config(source: Path, out: str = "out", **changes: Any) -> SampleConfig:
    settings = {"shards": f"{source}/cc-{{0000..0002}}.tar", "images": 10, "output": str(source.parent / out)}
    return SampleConfig(**{**settings, **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pictures(folder: Path) -> dict[str, bytes]:
    return {name: value for name, value in content(folder).items() if name.startswith("images/")}


def test_a_sample_is_a_catalogue(shards: Path) -> None:
    """As many as asked for, bytes as they are, ids from the JSON beside each, names by hash."""
    sample_images(config(shards))
    dataset = Catalogue(str(shards.parent / "out"))
    ids = dataset.training_images()
    assert len(ids) == 10 and all(i.startswith("http://x/") for i in ids)
    for image_id in ids:
        key = image_id.removeprefix("http://x/").partition(".")[0]
        assert Path(str(dataset.image(image_id))).read_bytes() == image_bytes(key, "JPEG")
    assert not (shards.parent / "out" / "sample.jsonl").exists()


def test_order_does_not_matter(shards: Path) -> None:
    """Shards given in another order and tars packed in another one give the same; another seed does not."""
    sample_images(config(shards))
    names = ["cc-0002", "cc-0000", "cc-0001"]
    sample_images(config(shards, "turned", shards=f"{shards}/{{{','.join(names)}}}.tar"))
    for shard in range(3):
        write_tar(shards / f"cc-{shard:04d}.tar", [m for n in reversed(range(20)) for m in sample(shard, n)])
    sample_images(config(shards, "packed"))
    sample_images(config(shards, "seed", seed=1))
    out = shards.parent
    assert pictures(out / "out") == pictures(out / "turned") == pictures(out / "packed") != pictures(out / "seed")
    tables = [(out / name / "catalogue.csv").read_bytes() for name in ("out", "turned", "packed", "seed")]
    assert tables[0] == tables[1] == tables[2] != tables[3]


def test_a_smaller_sample_is_part_of_a_larger_one(shards: Path) -> None:
    """Its table is the beginning of the other's; all there are is as many as there are."""
    for images in (5, 20, 1000):
        sample_images(config(shards, str(images), images=images))
    few, more, everything = ((shards.parent / n / "catalogue.csv").read_text() for n in ("5", "20", "1000"))
    assert more.startswith(few) and everything.startswith(more) and everything.count("\n") == 61


def test_broken_images_are_replaced_by_the_next(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In hash order; they are counted; the others stay the same ones; many broken ones ask for a second look."""
    sample_images(config(shards, "whole", images=60))
    rows = (shards.parent / "whole" / "catalogue.csv").read_text().splitlines()[1:]
    order = [row.split(",")[1].removeprefix("http://x/").partition(".")[0] for row in rows]
    for broken in ({order[0], order[3]}, {*order[:40]}):
        for shard in range(3):
            members = [m for n in range(20) for m in sample(shard, n)]
            cut = [(n, c[:60] if c and n[:5] in broken and n.endswith("jpg") else c) for n, c in members]
            write_tar(shards / f"cc-{shard:04d}.tar", cut)
        name = f"broken{len(broken)}"
        sample_images(config(shards, name))
        table = (shards.parent / name / "catalogue.csv").read_text().splitlines()[1:]
        assert table == [row for key, row in zip(order, rows, strict=True) if key not in broken][:10]
        assert f"{len(broken)} broken ones passed over" in capsys.readouterr().out
        assert len(pictures(shards.parent / name)) == 10


def test_a_second_look_when_spares_run_out(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates remembered are too few: the next pass remembers more, and the outcome is the same."""
    for shard in range(3):
        members = [m for n in range(20) for m in sample(shard, n)]
        write_tar(shards / f"cc-{shard:04d}.tar", [(n, c and (c if n[2:5] < "008" else b"x")) for n, c in members])
    sample_images(config(shards, "spare"))
    seen: list[int] = []
    real = module._candidates
    monkeypatch.setattr(module, "_candidates", lambda *a: (seen.append(a[-1]), real(*a[:-1], max(1, a[-1] - 64)))[1])
    sample_images(config(shards, "tight"))
    assert len(seen) > 1 and pictures(shards.parent / "spare") == pictures(shards.parent / "tight")


HOSTILE: list[tuple[str, bytes | None]] = [
    ("../../escape.png", image_bytes("a")), ("/tmp/absolute.png", image_bytes("b")), ("link.png", None),
    ("a\nb.png", image_bytes("c")), ("d/x.y.png", image_bytes("d")), ("e.PNG", image_bytes("e")),
    ("e.json", b'{"url": "http://x/\\u001b[31m"}'), ("f.png", image_bytes("f")), ("f.json", b"[1]"),
    ("g.txt", b"no picture"), ("h.webp", b""), ("i.png", image_bytes("e")), ("i.json", b'{"url": 3}'),
]  # fmt: skip


def test_hostile_names(tmp_path: Path) -> None:
    """Nothing is written outside the output, links are skipped, ids are on one line."""
    shard = write_tar(tmp_path / "t" / "x.tar", HOSTILE)
    sample_images(SampleConfig(shards=str(shard), images=50, output=str(tmp_path / "a" / "b" / "out")))
    out = tmp_path / "a" / "b" / "out"
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {shard, *(p for p in out.rglob("*") if p.is_file())}
    dataset = Catalogue(str(out))
    ids = dataset.training_images()
    assert len(ids) == 6 and {"x.tar/e", "x.tar/f", "x.tar/i", "x.tar/../../escape"} <= set(ids)
    assert all(i.isprintable() and Path(str(dataset.image(i))).is_file() for i in ids)
    assert {Path(str(dataset.image(i))).suffix for i in ids} == {".png"}


def test_one_address_twice(tmp_path: Path) -> None:
    """The second picture goes by its name."""
    about = b'{"url": "http://x/1"}'
    members = [("a.png", image_bytes(1)), ("a.json", about), ("b.png", image_bytes(2)), ("b.json", about)]
    shard = write_tar(tmp_path / "x.tar", [*members])
    sample_images(SampleConfig(shards=str(shard), images=5, output=str(tmp_path / "out")))
    ids = set(Catalogue(str(tmp_path / "out")).training_images())
    assert "http://x/1" in ids and len(ids) == 2 and ids & {"x.tar/a", "x.tar/b"}


@pytest.mark.parametrize("damage", ["cut", "header", "gzip", "text", "empty"])
def test_damaged_shards(shards: Path, damage: str) -> None:
    """The shard is named, in one line: what is behind the damage must not be missing without a word."""
    path = shards / "cc-0001.tar"
    whole = path.read_bytes()
    headers = [c.start - tarfile.BLOCKSIZE for c in shard_candidates([path])]
    changed = {
        "cut": whole[: headers[10] + 700], "gzip": gzip.compress(whole), "text": b"x" * 2000, "empty": b"",
        "header": whole[: headers[10]] + b"\x01" * 512 + whole[headers[10] + 512 :],
    }[damage]  # fmt: skip
    path.write_bytes(changed)
    with pytest.raises(InputError, match=r"cc-0001\.tar is no plain tar, or cut short") as error:
        sample_images(config(shards))
    assert "\n" not in str(error.value)


def test_a_folder(tmp_path: Path) -> None:
    """Any folder, its paths being the ids; a list limits it, and what it names and is not there is passed over."""
    for n in range(12):
        place = tmp_path / "photos" / f"d{n % 3}" / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image_bytes(n))
    whole = SampleConfig(folder=str(tmp_path / "photos"), images=5, output=str(tmp_path / "out"))
    sample_images(whole)
    ids = Catalogue(str(tmp_path / "out")).training_images()
    assert len(ids) == 5 and all((tmp_path / "photos" / i).is_file() for i in ids)
    (tmp_path / "list.txt").write_text("d1/4.png\n\nd0/gone.png\n./d2/5.png\n")
    sample_images(
        SampleConfig(
            folder=str(tmp_path / "photos"), list=str(tmp_path / "list.txt"), images=5, output=str(tmp_path / "listed")
        )
    )
    assert set(Catalogue(str(tmp_path / "listed")).training_images()) == {"d1/4.png", "d2/5.png"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures and a list of four of them."""
    (tmp_path / "photos").mkdir()
    for n in range(6):
        (tmp_path / "photos" / f"{n}.bmp").write_bytes(image_bytes(n, "BMP"))  # all of one size
    (tmp_path / "list.txt").write_text("0.bmp\n1.bmp\n2.bmp\n3.bmp\n")
    return tmp_path / "photos"


def add(photos: Path) -> None:
    (photos / "new.bmp").write_bytes(image_bytes("new", "BMP"))


def replace(photos: Path) -> None:
    (photos / "1.bmp").write_bytes(image_bytes("other", "BMP"))


def relist(photos: Path) -> None:
    (photos.parent / "list.txt").write_text("0.bmp\n1.bmp\n2.bmp\n4.bmp\n")


@pytest.mark.parametrize(("change", "listed", "seen"), [
    (add, False, True), (replace, False, True), (relist, False, False),
    (add, True, False), (replace, True, True), (relist, True, True),
])  # fmt: skip
def test_a_folder_that_changed(
    photos: Path, change: Any, listed: bool, seen: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture more, another in its place, another list: that is another sample; what does not count does nothing."""
    more = {"list": str(photos.parent / "list.txt")} if listed else {}
    given = SampleConfig(folder=str(photos), images=3, output=str(photos.parent / "out"), **more)
    for _ in range(2):
        sample_images(given)
    assert "is done" in capsys.readouterr().out
    change(photos)
    if seen:
        with pytest.raises(InputError, match="sources that have changed since: give another --output"):
            sample_images(given)
    else:
        sample_images(given)
        assert "is done" in capsys.readouterr().out


def test_an_output_in_the_folder(photos: Path) -> None:
    """It would be sampled from the next time; of a list, it would not."""
    inner = str(photos / "out")
    with pytest.raises(InputError, match="whose pictures it would join: give another"):
        sample_images(SampleConfig(folder=str(photos), output=inner))
    assert not Path(inner).exists()
    sample_images(SampleConfig(folder=str(photos), list=str(photos.parent / "list.txt"), output=inner))
    assert len(Catalogue(inner).training_images()) == 4


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])])
def test_a_copy_that_is_none(photos: Path, damage: Any) -> None:
    """Shorter, or of the same size with other bytes: it is copied again, and the others are not."""
    given = SampleConfig(folder=str(photos), images=6, output=str(photos.parent / "out"))
    sample_images(given)
    whole = pictures(photos.parent / "out")
    (photos.parent / "out" / "catalogue.done.json").unlink()
    first, second = (photos.parent / "out" / name for name in sorted(whole)[:2])
    first.write_bytes(damage(first.read_bytes()))
    kept = second.stat().st_ino
    sample_images(given)
    assert pictures(photos.parent / "out") == whole and second.stat().st_ino == kept


def test_what_to_type_next(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell gives it back as it is."""
    out = str(photos.parent / "my photos; it's $HOME")
    sample_images(SampleConfig(folder=str(photos), output=out))
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:] == ["--data-root", out]


@pytest.mark.parametrize("source", ["tar", "folder"])
def test_postscript_is_not_run(photos: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name is: it is broken; negative control: loaded as a picture, it is run."""
    root, eps = photos.parent, image_bytes("eps", "EPS")
    (photos / "eps.png").write_bytes(eps)
    (root / "bin").mkdir()
    (root / "bin" / "gs").write_text(f"#!/bin/sh\necho run > {root}/marker\nexit 1\n")
    (root / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    shard = write_tar(root / "x.tar", [("a.png", eps), ("b.png", image_bytes("b"))])
    given = {"shards": str(shard)} if source == "tar" else {"folder": str(photos)}
    sample_images(SampleConfig(**given, output=str(root / "out")))
    ids = Catalogue(str(root / "out")).training_images()
    assert len(ids) == (1 if source == "tar" else 6) and not {"x.tar/a", "eps.png"} & set(ids)
    assert not (root / "marker").exists()
    with Image.open(photos / "eps.png") as picture, pytest.raises(Exception, match="gs"):
        picture.load()
    assert (root / "marker").exists()


@pytest.mark.parametrize("line", ["../x.png", "/etc/passwd", "away/x.png", "a\x1b.png", "readme.md"])
def test_lists_that_lead_out(tmp_path: Path, line: str) -> None:
    """By path or by link; the list is named."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "away").symlink_to(tmp_path)
    (tmp_path / "list.txt").write_text(f"{line}\n")
    given = SampleConfig(folder=str(tmp_path / "photos"), list=str(tmp_path / "list.txt"), output=str(tmp_path / "o"))
    with pytest.raises(InputError, match=r"list\.txt"):
        sample_images(given)


@pytest.mark.parametrize(("changes", "said"), [
    ({"shards": None}, "either --shards"), ({"folder": "x"}, "either --shards"), ({"images": 0}, "at least 1"),
    ({"list": "x"}, "give --folder too"),
])  # fmt: skip
def test_settings_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """One line each."""
    with pytest.raises(InputError, match=said):
        config(tmp_path, **changes)


def test_patterns(tmp_path: Path) -> None:
    """Ranges keep their zeros; lists and wildcards; what is missing or called the same is named."""
    for name in ("a/x-08.tar", "a/x-09.tar", "a/x-10.tar", "b/x-08.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in expand(f"{tmp_path}/a/x-{{08..10}}.tar")] == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert expand(f"{tmp_path}/a/*.tar") == expand(f"{tmp_path}/a/x-{{08,09,10}}.tar")
    for pattern, said in (
        ("a/x-{08..11}.tar", r"x-11\.tar is missing"), ("c/*.tar", "no file matches"), ("{a,b}/x-08.tar", "called the"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            expand(f"{tmp_path}/{pattern}")


def test_a_folder_of_another_sample(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not mixed with; the same one is done."""
    sample_images(config(shards))
    before = content(shards.parent / "out")
    sample_images(config(shards))
    assert "is done" in capsys.readouterr().out and content(shards.parent / "out") == before
    with pytest.raises(InputError, match="holds another sample"):
        sample_images(config(shards, seed=3))
    with pytest.raises(InputError, match="is not empty and holds no sample"):
        sample_images(config(shards, "cc"))


def test_the_smallest_are_kept() -> None:
    """The same as sorting all hashes, with a bounded number in memory."""
    found, names = Smallest(7), [str(n) for n in range(200)]
    for name in names:
        found.add(name, Candidate(name, Path(name), 0, 1, ".png"))
    hashed = sorted(names, key=lambda n: hashlib.blake2b(n.encode(), digest_size=12).digest())
    assert [c.name for c in found.sorted()] == hashed[:7] and found.total == 200


def test_killed_at_any_time(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at some moments, then the same command: the same files byte for byte as without."""
    sample_images(config(shards, "straight", images=40))
    given, real = config(shards, "killed", images=40), shutil.copyfileobj

    def slow(source: Any, copy: Any) -> None:
        copy.write(source.read(30))
        copy.flush()
        time.sleep(0.005)
        real(source, copy)

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    for wait in (0, 7, 23):  # pictures that are there when it is killed
        child = os.fork()
        if not child:
            try:
                sample_images(given)
            finally:
                os._exit(1)
        while len([*(shards.parent / "killed").rglob("*.jpg")]) < wait:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert wait <= len([*(shards.parent / "killed").rglob("*.jpg")]) < 40
    sample_images(given)
    killed, straight = content(shards.parent / "killed"), content(shards.parent / "straight")
    for notes in (killed, straight):  # they hold the name of the folder
        for name in ("sample.json", "catalogue.done.json"):
            del notes[name]
    assert killed == straight and len(killed) == 41


def test_a_disk_that_is_full(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; what was copied stays, and the same command goes on."""
    real, calls = shutil.copyfileobj, []

    def full(source: Any, copy: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(source, copy)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match="No space left on device; what is there stays"):
        sample_images(config(shards))
    assert len(pictures(shards.parent / "out")) == 3
    sample_images(config(shards))
    monkeypatch.undo()
    sample_images(config(shards, "straight"))
    assert pictures(shards.parent / "out") == pictures(shards.parent / "straight")


def test_captions_come_with_the_pictures(tmp_path: Path) -> None:
    """Of the text beside a picture, else of a shard's JSON, on one line; left out on request, and without any."""
    about = json.dumps({"caption": "of the JSON"}).encode()
    members: list[tuple[str, bytes | None]] = [
        ("1.png", image_bytes(1)), ("1.txt", b"\n a  red\tcap\nbelow\n"), ("1.json", about),
        ("2.png", image_bytes(2)), ("2.json", about), ("3.png", image_bytes(3)), ("3.json", b'{"caption": 3}'),
    ]  # fmt: skip
    write_tar(tmp_path / "cc" / "cc-0.tar", members)
    shards = f"{tmp_path}/cc/cc-0.tar"
    sample_images(SampleConfig(shards=shards, output=str(tmp_path / "out")))
    dataset = Catalogue(str(tmp_path / "out"))
    found = {i: dataset.captions(i) for i in dataset.training_images()}
    assert found == {"cc-0.tar/1": ("a red cap",), "cc-0.tar/2": ("of the JSON",), "cc-0.tar/3": ()}
    sample_images(SampleConfig(shards=shards, output=str(tmp_path / "bare"), captions=False))
    assert "caption" not in (tmp_path / "bare" / "catalogue.csv").read_text()
    with pytest.raises(InputError, match="holds another sample"):
        sample_images(SampleConfig(shards=shards, output=str(tmp_path / "out"), captions=False))

    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_bytes(image_bytes(name))
    (folder / "a.txt").write_text('a,"red" cap\n')
    sample_images(SampleConfig(folder=str(folder), output=str(tmp_path / "copy")))
    dataset = Catalogue(str(tmp_path / "copy"))
    assert {i: dataset.captions(i) for i in dataset.training_images()} == {"a.png": ('a,"red" cap',), "b.png": ()}
