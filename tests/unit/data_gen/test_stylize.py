"""Photographs in other styles: the same files whatever happens, each picture once, splits that do not mix."""

import io
import json
import os
import re
import shlex
import signal
import time
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import draw_picture
from PIL import Image, ImageDraw, ImageFilter

from spn4cir.config import parse, recipes_folder
from spn4cir.data_gen import style_filters as filters
from spn4cir.data_gen import stylize as module
from spn4cir.data_gen.style_plan import name_pictures, plan_photos, split_pictures
from spn4cir.data_gen.stylize import StylizeConfig, draw_styles, stylize
from spn4cir.dataset import Dataset
from spn4cir.datasets import load_dataset
from spn4cir.datasets.style_folders import SPLITS, STYLES
from spn4cir.datasets.styles import Styles
from spn4cir.errors import InputError
from spn4cir.images import open_image
from spn4cir.types import Benchmark, ImageRef, Query, recall_measures

OF_A_MACHINE = ("stylize.json", "images.cache.jsonl")  # where the source lies, and when its files changed


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven small pictures in two folders, two of them described."""
    root = tmp_path / "photos"
    for n in range(7):
        draw_picture(root / f"{'ab'[n % 2]}/{n}.png", n, (20, 16))
    (root / "captions.csv").write_text('image,caption\na/0.png,"<b>red & ""blue"""\nb/1.png,a second one\n')
    return root


def config(photos: Path, out: str = "out", **changes: Any) -> StylizeConfig:
    return StylizeConfig(**{"folder": str(photos), "output": str(photos.parent / out), **changes})


def content(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: value for name, value in found.items() if name not in OF_A_MACHINE}


def drawn_now(capsys: pytest.CaptureFixture[str]) -> int:
    return int(re.findall(r"(\d+) drawn now", capsys.readouterr().out)[-1])


def test_the_dataset_reads_it(photos: Path) -> None:
    """Photographs, three styles and captions by equal names; splits by pixels; no other files."""
    stylize(config(photos))
    out = photos.parent / "out"
    dataset = Styles(str(out))
    ids = {split: [p["image"] for p in json.loads((out / f"{split}.json").read_text())] for split in SPLITS}
    assert sorted(i for part in ids.values() for i in part) == [
        f"{'b' if n % 2 else 'a'}/{n}.png" for n in (0, 2, 4, 6, 1, 3, 5)
    ]
    assert all(len(part) == len(set(part)) >= 1 for part in ids.values())
    assert dataset.training_images() == [f"images/{i}" for i in ids["train"]] and dataset.notes() == []
    assert len(dataset.triplets()) == len(ids["train"]) * 3 + 4 * len({"a/0.png", "b/1.png"} & {*ids["train"]})
    assert dataset.caption("images/a/0.png") == '<b>red & "blue"'
    listed = {image for images in ids.values() for image in images}
    for folder in ("images", *STYLES):
        assert {p.relative_to(out / folder).as_posix() for p in (out / folder).rglob("*.png")} == listed
        assert all(Image.open(p).size == (20, 16) for p in (out / folder).rglob("*.png"))
    assert sorted(p.name for p in (out / "text").rglob("*.txt")) == ["0.txt", "1.txt"]
    beside = {p.name for p in out.iterdir() if p.is_file()}
    assert beside == {*OF_A_MACHINE, "train.json", "val.json", "test.json", "drawn.jsonl", "sheet.html"}


def test_order_and_workers_do_not_matter(photos: Path) -> None:
    """Files that were made in another order, and several processes, give the same bytes."""
    stylize(config(photos))
    stylize(config(photos, "several", workers=2))
    turned = photos.parent / "turned" / "photos"
    for path in sorted(photos.rglob("*.*"), reverse=True):
        (turned / path.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        (turned / path.relative_to(photos)).write_bytes(path.read_bytes())
    stylize(config(turned))
    out = photos.parent
    assert content(out / "out") == content(out / "several") == content(out / "turned" / "out")


def test_what_is_done_stays(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run draws nothing; another picture, a file that is gone, and one that was edited are drawn, alone."""
    stylize(config(photos))
    out = photos.parent / "out"
    before, times = content(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert drawn_now(capsys) == 7
    stylize(config(photos))
    assert drawn_now(capsys) == 0 and content(out) == before
    (out / "sketch/a/0.png").unlink()
    (out / "art/b/1.png").write_bytes(before["art/a/0.png"])
    stylize(config(photos))
    assert drawn_now(capsys) == 2 and content(out) == before
    draw_picture(photos / "b/3.png", "another", (20, 16))
    stylize(config(photos))
    changed = {name for name, value in content(out).items() if before.get(name) != value}
    pictures = {f"{folder}/b/3.png" for folder in ("images", *STYLES)}
    assert drawn_now(capsys) == 1 and changed == {*pictures, "drawn.jsonl", "sheet.html"}
    again = {p for p, time in times.items() if p.stat().st_mtime_ns != time}
    assert len(again) == 12 and out / "images/a/2.png" not in again


def test_another_setting_draws_all(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And gives what a fresh folder gives; another number of rows on the sheet or of workers draws nothing."""
    stylize(config(photos))
    stylize(config(photos, rows=2))
    assert drawn_now(capsys) == 0
    stylize(config(photos, divisor=2))
    assert drawn_now(capsys) == 7
    stylize(config(photos, "fresh", divisor=2))
    assert content(photos.parent / "out") == content(photos.parent / "fresh")


def test_another_caption(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is written without drawing; one that is gone is listed no longer."""
    stylize(config(photos))
    (photos / "captions.csv").write_text("image,caption\nb/1.png,another\n")
    stylize(config(photos))
    dataset = Styles(str(photos.parent / "out"))
    captions = [dataset.caption(f"images/{name}.png") for name in ("a/0", "b/1")]
    assert drawn_now(capsys) == 0 and captions == ["", "another"]


class Killed(BaseException):
    """Ends a run at once."""


def test_stopped_at_any_point(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each file is put into its place: the folder counts as unfinished, and the same command finishes it."""
    stylize(config(photos, "straight"))
    straight = content(photos.parent / "straight")
    real, left = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    stops = 0
    while left[0] <= 0:
        stops += 1
        given, left[0] = config(photos, f"stopped/{stops}"), stops
        try:
            stylize(given)
        except Killed:
            with pytest.raises(InputError, match=r"python data_gen/stylize\.py"):
                Styles(given.output)
            left[0] = 0
            stylize(given)
            assert content(Path(given.output)) == straight
    assert stops > 7 * 4


def test_stopped_between_two_settings(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is half of one setting and half of another is not read, until it is all of one."""
    stylize(config(photos))
    before, real = content(photos.parent / "out"), module.draw_styles

    def draw(given: StylizeConfig, photo: Any) -> Any:
        if photo.name == "a/6":
            raise Killed
        return real(given, photo)

    monkeypatch.setattr(module, "draw_styles", draw)
    with pytest.raises(Killed):
        stylize(config(photos, divisor=2))
    with pytest.raises(InputError, match=r"train\.json is missing"):
        Styles(str(photos.parent / "out"))
    monkeypatch.undo()
    stylize(config(photos))
    assert content(photos.parent / "out") == before


def test_killed_while_it_draws(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL, a torn log and a half of a picture: what was whole is kept, and the files are the same."""
    stylize(config(photos, "straight"))
    given, real = config(photos), module.draw_styles
    monkeypatch.setattr(module, "draw_styles", lambda *a: (time.sleep(0.05), real(*a))[1])
    child = os.fork()
    if not child:
        try:
            stylize(given)
        finally:
            os._exit(1)
    log = Path(given.output) / "drawn.partial.jsonl"
    while not log.is_file() or log.read_bytes().count(b"\n") < 3:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kept = log.read_bytes().count(b"\n")
    with log.open("ab") as file:
        file.write(b'{"name": "b/5", "made')
    (Path(given.output) / "images/a/4.png.tmp").write_bytes(b"\x89PNG")
    capsys.readouterr()
    monkeypatch.undo()
    stylize(given)
    assert drawn_now(capsys) == 7 - kept and kept >= 3
    (Path(given.output) / "images/a/4.png.tmp").unlink(missing_ok=True)  # of a picture that was whole
    assert content(photos.parent / "out") == content(photos.parent / "straight")


def test_a_damaged_log(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines that are none are passed over, and those photographs are drawn again."""
    stylize(config(photos))
    log = photos.parent / "out" / "drawn.jsonl"
    whole, lines = content(photos.parent / "out"), log.read_text().splitlines()
    log.write_text("\n".join(["[1]", "{", '{"name": ["x"], "files": {}}', '{"name": "a/0", "files": 3}', *lines[2:]]))
    stylize(config(photos))
    assert [drawn_now(capsys), content(photos.parent / "out")] == [2, whole]


def test_a_picture_keeps_its_split_when_others_come() -> None:
    """Or go: about a fifth test and a twentyfifth val, by pixels and not by names; each split has one at least."""
    hashes = {f"{n:04}": f"pixels {n}" for n in range(2000)}
    splits = split_pictures(hashes)
    assert 360 < len(splits["test"]) < 440 and 55 < len(splits["val"]) < 105
    fewer = split_pictures({f"renamed {i}": pixels for i, pixels in hashes.items() if int(i) % 3})
    for split, ids in fewer.items():
        assert {i.removeprefix("renamed ") for i in ids} <= {*splits[split]} and ids == sorted(ids)
    for count in (3, 4, 9):
        few = split_pictures({i: hashes[i] for i in list(hashes)[:count]})
        assert min(map(len, few.values())) >= 1 and sum(map(len, few.values())) == count


def test_equal_pictures_count_once(photos: Path) -> None:
    """In another file format and under another name too; a picture that differs in a pixel does not."""
    with Image.open(photos / "a/0.png") as picture:
        picture.save(photos / "b/copy.bmp")
        picture.putpixel((0, 0), (1, 2, 3))
        picture.save(photos / "b/other.png")
    stylize(config(photos))
    names = [photo.name for photo in plan_photos(load_dataset("catalogue", str(photos)), photos.parent / "cache")]
    assert names == ["a/0", "a/2", "a/4", "a/6", "b/1", "b/3", "b/5", "b/other"]
    assert not (photos.parent / "out/images/b/copy.png").exists()


class Split(Dataset):
    """Pictures with val and test queries; one of train is also a target of test, and one of val equals one of test."""

    name = "split"
    protocols: ClassVar = {"val": ("split/val",), "test": ("split/test",)}

    def __init__(self, root: Path):
        self.folder = root
        for image_id in ("t0", "t1", "v0", "e0", "e1"):
            draw_picture(root / f"{image_id}.png", image_id)
        draw_picture(root / "e2.png", "v0")

    def find_image(self, image_id: str) -> ImageRef:
        return ImageRef(self.folder / f"{image_id}.png")

    def list_training_images(self) -> list[str]:
        return ["t1", "t0"]

    def read_triplets(self) -> list[Any]:
        return []

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        targets = {"val": ("v0",), "test": ("e1", "e0", "t1", "e2")}[split]
        queries = tuple(Query("t0", "x", (target,)) for target in targets)
        return Benchmark(f"split/{split}", ("t0", *targets), queries, False, recall_measures(1))


def test_splits_of_a_dataset_are_kept(tmp_path: Path) -> None:
    """Targets of val and test; what is also in train, or looks like it, is train."""
    photos = plan_photos(Split(tmp_path / "p"), tmp_path / "cache")
    splits = {photo.name: photo.split for photo in photos}
    assert splits == {
        "split/t0": "train", "split/t1": "train", "split/v0": "val", "split/e0": "test", "split/e1": "test",
    }  # fmt: skip
    assert [photo.name for photo in photos] == sorted(splits)


def test_emoji_keep_their_splits(tmp_path: Path) -> None:
    """So that no photograph of val or test is one that the embedded CLIP saw; captions are the Unicode names."""
    dataset = load_dataset("emoji")
    photos = plan_photos(dataset, tmp_path / "cache")
    targets = {s: {t for q in dataset.benchmark(s).queries for t in q.targets} for s in ("val", "test")}
    found = {s: {photo.name.removeprefix("emoji/") for photo in photos if photo.split == s} for s in SPLITS}
    assert {s: found[s] for s in targets} == targets and found["train"] < {*dataset.training_images()}
    assert Counter(photo.split for photo in photos) == {"train": 2866, "val": 332, "test": 332}
    assert len({photo.pixels for photo in photos}) == len({photo.caption for photo in photos}) == 3530
    assert next(photo.caption for photo in photos if photo.name == "emoji/1f34e") == "red apple"


def test_names() -> None:
    """The path of an id where it can be one; else a part of it and a hash, in the dataset's folder."""
    plain = {
        "shoes/a.png": "shoes/a",
        "b.JPG": "shop/b",
        "1f34e": "shop/1f34e",
        "a/b/v1.2": "a/b/v1.2",
        "ü/é.webp": "ü/é",
    }
    assert name_pictures([*plain], "shop") == plain
    strange = [
        "http://x/1.jpg?a=<b>", "../../etc/passwd", "/etc/passwd", "a b/c.png", "a//b.png", "-x.png", ".hidden.png",
        "a\\b.png", "x/" + "y" * 300, "c.png", "c.jpg", "D/e.png", "d/E.png", "", "a/../b.png",
    ]  # fmt: skip
    names = name_pictures(strange, "shop")
    assert len({name.lower() for name in names.values()}) == len(strange)
    assert all(re.fullmatch(r"shop/[A-Za-z0-9-]{0,41}[0-9a-f]{16}", name) for name in names.values())
    assert name_pictures(strange[::-1], "shop") == names
    with pytest.raises(InputError, match="the same name"):
        name_pictures(["c.png", "c.jpg", f"{names['c.png']}.png"], "shop")


def test_markup_in_captions(photos: Path) -> None:
    """On the sheet it is text; the page loads nothing and shows the styles of evenly spaced photographs."""
    stylize(config(photos, rows=3))
    page = (photos.parent / "out" / "sheet.html").read_text()
    assert "&lt;b&gt;red &amp; &quot;blue&quot;" in page and "<b>" not in page
    assert "3 of 7 photographs" in page and page.count("<img") == 12
    assert re.findall(r'alt="images/([^"]*)"', page) == ["a/0", "a/4", "b/1"]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def scene(size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A landscape with a house: slopes of colour, edges and flat parts."""
    width, height = size
    picture = Image.linear_gradient("L").resize(size)
    picture = Image.merge("RGB", (picture, picture.point(lambda v: 120 + v // 3), Image.new("L", size, 210)))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((width * 0.3, height * 0.4, width * 0.7, height * 0.9), fill=(180, 60, 40))
    draw.polygon([(width * f, height * g) for f, g in ((0.25, 0.4), (0.5, 0.1), (0.75, 0.4))], fill=(60, 30, 20))
    draw.ellipse((width * 0.8, height * 0.05, width * 0.95, height * 0.25), fill=(250, 220, 60))
    return picture


DRAW = {"sketch": filters.draw_sketch, "art": filters.draw_art, "mosaic": filters.draw_mosaic}


def distance(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures, from 0 to 255."""
    return float(np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean())


def test_styles_differ() -> None:
    """From the photograph and from each other; negative control: copies, one by JPEG and one blurred, do not."""
    photo, saved = scene(), io.BytesIO()
    photo.save(saved, "JPEG", quality=90)
    drawn = {"photo": photo, **{style: draw(photo) for style, draw in DRAW.items()}}
    pairs = {(a, b): distance(drawn[a], drawn[b]) for a in drawn for b in drawn if a < b}
    assert min(pairs.values()) > 6 and len(pairs) == 6, pairs
    controls = Image.open(saved), photo.filter(ImageFilter.GaussianBlur(0.5))
    assert max(distance(photo, control) for control in controls) < 3


def test_what_a_style_looks_like() -> None:
    """A sketch is grey on white, with lines at edges; art has vivid colours; blocks of a mosaic are means."""
    photo = scene()
    sketch, art = (np.asarray(DRAW[style](photo).convert("RGB"), float) for style in ("sketch", "art"))
    assert (sketch == sketch[..., :1]).all() and np.median(sketch) > 230 and sketch.min() < 80
    assert sketch[60, 46:50].min() < 120 < 200 < sketch[60, 70:90].min()  # a wall, and the inside of the wall
    saturation = [np.ptp(picture, axis=-1).mean() for picture in (np.asarray(photo, float), art, sketch)]
    assert saturation[1] > saturation[0] > 20 and saturation[2] == 0
    mosaic = np.asarray(filters.draw_mosaic(photo, 20), float)
    means = np.asarray(photo, float).reshape(6, 20, 8, 20, 3).mean((1, 3))
    assert np.abs(mosaic[::20, ::20] - means).max() < 1 and (mosaic[:20, :20] == mosaic[0, 0]).all()


@pytest.mark.parametrize(("size", "divisor", "blocks"), [
    ((160, 160), 16, (10, 10)), ((160, 320), 16, (10, 20)), ((72, 72), 16, (4, 4)), ((72, 72), 9, (8, 8)),
    ((100, 40), 16, (6, 2)), ((5, 5), 16, (1, 1)), ((40, 40), 1, (40, 40)),
])  # fmt: skip
def test_blocks_of_a_mosaic(size: tuple[int, int], divisor: int, blocks: tuple[int, int]) -> None:
    """Each side by the divisor, at least one."""
    noise = Image.effect_noise(size, 90).convert("RGB")
    mosaic = np.asarray(filters.draw_mosaic(noise, divisor)).astype(int)
    changes = [1 + int(np.abs(np.diff(mosaic, axis=axis)).any((1 - axis, 2)).sum()) for axis in (1, 0)]
    assert tuple(changes) == blocks


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (300, 2), (7, 5)])
@pytest.mark.parametrize("color", ["white", "black", "red"])
def test_any_size(size: tuple[int, int], color: str) -> None:
    """Of any size, flat ones too: the result has that size, and is the same each time."""
    photo = Image.new("RGB", size, color)
    for draw in DRAW.values():
        assert draw(photo).size == size and draw(photo).tobytes() == draw(photo).tobytes()


def test_what_is_written(photos: Path) -> None:
    """Transparent parts are white, large pictures are shrunk, and nothing but pixels is copied."""
    Image.new("RGBA", (300, 100), (0, 0, 0, 0)).save(photos / "a/clear.png")
    draw_picture(photos / "a/wide.png", 9, (300, 100))
    with Image.open(photos / "a/wide.png") as picture:
        picture.save(photos / "a/wide.png", icc_profile=b"profile", dpi=(72, 72))
    stylize(config(photos, max_side=60))
    out = photos.parent / "out"
    for name in ("clear", "wide"):
        for style in ("images", *STYLES):
            with Image.open(out / style / "a" / f"{name}.png") as picture:
                assert picture.size == (60, 20) and picture.mode in ("RGB", "L") and not picture.info
    assert open_image(out / "images/a/clear.png").getcolors() == [(1200, (255, 255, 255))]


def test_a_picture_that_is_broken(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left out and named; where too few are left, that is the error."""
    (photos / "b/1.png").write_bytes((photos / "b/1.png").read_bytes()[:60])
    stylize(config(photos))
    assert (
        "1 pictures are left out, such as " in (told := capsys.readouterr().out) and "b/1.png, which is trunc" in told
    )
    for path in sorted(photos.rglob("*.png"))[:4]:
        path.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"3 splits take 3 different pictures, and there are 2, 5 being broken"
    ) as error:
        stylize(config(photos, "few"))
    assert "\n" not in str(error.value)


class Stored(Split):
    """Pictures that are the bytes of a function, by ids that are no file names; without val and test."""

    protocols: ClassVar = {}

    def find_image(self, image_id: str) -> ImageRef:
        return ImageRef((self.folder / f"{image_id[-2:]}.png").read_bytes, name=image_id)

    def list_training_images(self) -> list[str]:
        return [f"http://x/{i}" for i in ("t0", "t1", "v0", "e0")]

    def label(self, image_id: str) -> str:
        return "an  e0" if image_id.endswith("e0") else image_id[-2:]


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    """They reach another process as bytes; a label that is no part of the id is a caption."""
    photos = plan_photos(Stored(tmp_path / "p"), tmp_path / "cache")
    assert [photo.caption for photo in photos] == ["an e0", "", "", ""]
    assert sorted(photo.split for photo in photos) == ["test", "train", "train", "val"]
    portable = photos[0]._replace(image=module._portable(photos[0].image))
    sent = ForkingPickler.loads(bytes(ForkingPickler.dumps(portable)))
    given = StylizeConfig(output=str(tmp_path / "out"))
    row = draw_styles(given, sent)
    assert draw_styles(given, photos[0]) == row
    assert [*row["files"]] == [f"{folder}/{photos[0].name}.png" for folder in ("images", *STYLES)]


def test_folders_that_would_mix(photos: Path, tmp_path: Path) -> None:
    """The output in the source, the source in the output, another source's styles, other files."""
    stylize(config(photos))
    other = tmp_path / "other"
    for n in range(3):
        draw_picture(other / f"{n}.png", n)
    for source, out, said in (
        (photos, photos / "styles", "would mix"), (photos, tmp_path, "would mix"), (photos, photos, "would mix"),
        (other, tmp_path / "out", r"holds the styles of .*photos"), (photos, other, "is not empty and holds no styles"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said) as error:
            stylize(StylizeConfig(folder=str(source), output=str(out)))
        assert "\n" not in str(error.value)
    assert not (photos / "styles").exists() and len([*other.iterdir()]) == 3


@pytest.mark.parametrize(("changes", "said"), [
    ({"divisor": 0}, "divisor must be at least 1"), ({"max_side": 0}, "max_side must"),
    ({"rows": 0}, "rows must"), ({"workers": 0}, "workers must"), ({"data_root": "x"}, "give either --folder"),
])  # fmt: skip
def test_settings_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """One line each."""
    with pytest.raises(InputError, match=said):
        config(tmp_path, **changes)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    """The option that was given is named."""
    with pytest.raises(InputError, match=r"gone is no folder .*give --folder FOLDER"):
        stylize(config(tmp_path / "gone"))


def test_defaults_and_what_to_type_next(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe states the defaults; a shell gives the next command back as it is."""
    assert parse(StylizeConfig, recipes_folder() / "stylize.yaml", []) == StylizeConfig()
    stylize(config(photos, "my styles; it's $HOME"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last)[-2:] == ["--data-root", str(photos.parent / "my styles; it's $HOME")]
