"""``spn4cir-index`` and ``spn4cir-search``: what they print and write, and one line for bad input."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.index import vector_engines
from spn4cir.index.local import Index
from spn4cir.index.sheet import MOST, Tile, save_sheet
from spn4cir.index_cli import file_size, index_command
from spn4cir.model import load
from spn4cir.search_cli import hit_json, search_command
from tests.conftest import Toy, draw_picture
from tests.tiny_backbones import tiny_backbone

COMMANDS = {"index": index_command, "search": search_command}
CSV = "image,title,price,product\na.png,Red shoe,10,1\nb.png,Blue shoe,20.5,1\nc.png,,30,2\n"


class Told(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


Call = Callable[..., Told]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call a command; what a progress bar wiped is left out of its errors."""

    def run(command: str, *arguments: object) -> Told:
        monkeypatch.setattr(sys, "argv", [f"spn4cir-{command}", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            COMMANDS[command]()
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
        out, err = capfd.readouterr()
        lines = [line.split("\r")[-1].strip() for line in err.split("\n")]
        return Told(code, out, "\n".join(line for line in lines if line and not line.startswith("index: 100%")))

    return run


@pytest.fixture
def fails(call: Call) -> Callable[..., str]:
    """Call a command that must fail in one line; returns it."""

    def run(command: str, *arguments: object) -> str:
        told = call(command, *arguments)
        assert told.code == 2 and told.out == "" and told.err.startswith("error: ") and "\n" not in told.err, told
        return told.err

    return run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of toy pictures, and an index of it by the embedded model; not to be changed."""
    root = tmp_path_factory.mktemp("built")
    Toy.draw(root / "toy")
    Index.build(load(), root / "toy", root / "toy.index")
    return root / "toy", root / "toy.index"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A table of three pictures, with a title, a price and a product."""
    for name in "abc":
        draw_picture(tmp_path / "shop" / f"{name}.png", name)
    table = tmp_path / "shop" / "products.csv"
    table.write_text(CSV, encoding="utf-8")
    return table


def test_from_build_to_search(call: Call, shop: Path, runs: Path) -> None:
    """The default place, the report, and the next command, which works as it is printed."""
    told = call("index", "build", shop)
    path = runs / "index" / "products"
    assert told.code == 0 and f"read {shop}: 3 pictures" in told.out and f"{path}: 3 images" in told.out
    _, _, following = told.out.partition("next: spn4cir-search ")
    assert following == f"--index {path} --image=a.png --text 'but in red'\n"
    found = call("search", "--image=a.png", "--text", "but in red")  # the only index
    assert found.code == 0 and found.err == "" and f"index {path}: 3 images" in found.out
    head, *rows = [line.split() for line in found.out.splitlines()[1:]]
    assert head == ["rank", "score", "z", "id", "title", "price", "product", "path"]
    assert {row[3] for row in rows} == {"b.png", "c.png"} and rows[0][0] == "1"
    assert str(shop.parent / "b.png") in found.out and "20.5" in found.out


def test_every_part_of_a_query(call: Call, built: tuple[Path, Path]) -> None:
    """What ``--json`` says is what the Python API finds."""
    folder, path = built
    told = call(
        "search", "--index", path, "--image", "i01.png", "--image", folder / "i02.png", 0.5, "--text", "in red", 2,
        "--text", "and blue", "--unlike", "i03.png", "--without", "dots", 0.25, "-k", 6, "--min-score", -0.9,
        "--min-z", -3, "--fold", 0.999, "--json", "-",
    )  # fmt: skip
    assert told.code == 0 and f"index {path}: 48 images" in told.err
    hits = Index.open(path).search(
        ["i01.png", (str(folder / "i02.png"), 0.5)], [("in red", 2.0), "and blue"], 6, unlike="i03.png",
        without=("dots", 0.25), min_score=-0.9, min_z=-3, fold=0.999,
    )  # fmt: skip
    result = json.loads(told.out)
    assert result["hits"] == [hit_json(hit) for hit in hits] and len(hits) == 6
    assert result["query"]["unlike"] == ["i03.png"] and result["query"]["without"] == [["dots", 0.25]]
    plain = json.loads(call("search", "--index", path, "--image", "i01.png", "-k", 6, "--json", "-").out)
    assert plain["hits"] != result["hits"]


def test_what_the_model_sees(call: Call, shop: Path, tmp_path: Path) -> None:
    """Sketches, texts and pairs search the same index; on request, the styles that the model sees, in both ways."""
    torch.manual_seed(0)
    backbone = build_backbone("freestyle")
    pixels = torch.randn(24, 3, 64, 64)
    backbone.fit_statistics(pixels[:18], ["sketch", "art", "mosaic"] * 6, pixels[18:])
    save_model(tmp_path / "model", backbone, {})
    assert call("index", "build", shop, "--model", tmp_path / "model", "--index", tmp_path / "i").code == 0
    drawn = shop.parent / "b.png"
    ask = ["--index", tmp_path / "i", "--image", drawn, "--text", "in red", "--image", "a.png", "0.5", "--describe"]
    told = call("search", *ask, "--json", tmp_path / "found.json")
    assert told.code == 0 and f"{drawn}: " in told.out and "a.png: " in told.out
    seen = Index.open(tmp_path / "i").describe([drawn, ("a.png", 0.5)])
    written = json.loads((tmp_path / "found.json").read_text())["seen"]
    assert len(written) == 2 and all(one == pytest.approx(other) for one, other in zip(written, seen, strict=True))
    assert [set(one) for one in seen] == [{"photo", "sketch", "art", "mosaic"}] * 2
    assert all(sum(one.values()) == pytest.approx(1) for one in seen)
    likely = max(seen[0], key=lambda name: seen[0][name])
    assert f"{drawn}: {likely} {seen[0][likely]:.2f}, " in told.out
    other = call("search", "--index", tmp_path / "i", "--text", "red", "--describe")
    assert other.code == 0 and "sketch" not in other.out  # a text has no picture to describe


def test_a_model_that_describes_nothing_says_so(call: Call, built: tuple[Path, Path]) -> None:
    folder, index = built
    told = call("search", "--index", index, "--image", next(folder.rglob("*.png")), "--describe")
    assert told.code == 0 and "this model describes no picture" in told.out


def test_filters_and_groups(call: Call, shop: Path, tmp_path: Path) -> None:
    """Both take columns of the table; what leaves nothing over is named in one line."""
    assert call("index", "build", shop).code == 0

    def ids(*options: object) -> set[str]:
        told = call("search", "--text", "red", "--json", tmp_path / "hits.json", *options)
        assert told.code == 0, told
        return {hit["id"] for hit in json.loads((tmp_path / "hits.json").read_text())["hits"]}

    assert ids("--where", "price<=25") == {"a.png", "b.png"}
    assert ids("--where", "price<=25", "--where", "title=Blue shoe") == {"b.png"}
    assert len(ids("--group", "product")) == 2 and "c.png" in ids("--group", "product")
    for options, words in (
        (("--min-z", 50), "no hit: lower --min-z 50 (the best image has "),
        (("--where", "price<5"), "no hit: no image satisfies --where 'price<5': leave it out"),
        (("--where", "price<15", "--where", "price>25"), "'price<15', --where 'price>25' together: leave one out"),
    ):
        told = call("search", "--text", "red", *options)
        assert told.code == 0 and words in told.out and len(told.out.splitlines()) == 2 and told.err == ""


def test_changes_of_an_index(call: Call, tmp_path: Path, runs: Path) -> None:
    """Add, remove by id and by file, update, compact and info; a broken picture is left out and named."""
    folder, more, path = tmp_path / "pictures", tmp_path / "more", runs / "index" / "pictures"
    for n in range(6):
        draw_picture(folder / f"{n}.png", n)
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    draw_picture(more / "new.png", "new")
    told = call("index", "build", folder)
    assert told.code == 0 and str(folder / "broken.png") in told.out and f"{path}: 6 images" in told.out
    assert "1 added" in call("index", "add", more).out
    assert "2 removed" in call("index", "remove", "0.png", "1.png").out
    (tmp_path / "ids.txt").write_text("2.png\n\n", encoding="utf-8")
    assert "1 removed" in call("index", "remove", "--from", tmp_path / "ids.txt").out
    draw_picture(folder / "3.png", "another")
    draw_picture(folder / "7.png", 7)
    assert "1 added, 1 changed, 0 removed, 2 encoded" in call("index", "update", "--batch-size", 2).out
    assert f"{path}: 5 images" in call("index", "compact").out
    told = call("index", "info", "--json", "-")
    about = json.loads(told.out)
    assert about["images"] == 5 and about["segments"] == 1 and list(about["broken"]) == ["broken.png"]
    assert (
        about["model"] == "embedded" and about["dtype"] == "float32" and about["removed"] == ["0.png", "1.png", "2.png"]
    )
    assert "left out  1 broken" in told.err and str(folder / "broken.png") in told.err


def test_options_of_a_build(call: Call, shop: Path, tmp_path: Path) -> None:
    """A model of one's own, half the size on disk, and a place."""
    save_model(tmp_path / "model", tiny_backbone("clip4cir", tmp_path), {})
    told = call("index", "build", shop, "--index", tmp_path / "i", "--model", tmp_path / "model", "--dtype", "float16")
    assert told.code == 0, told
    about = json.loads(call("index", "info", "--index", tmp_path / "i", "--json", "-").out)
    assert about["model"] == str(tmp_path / "model") and about["dtype"] == "float16" and about["width"] == 24


def test_export_is_passed_on(call: Call, built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the index, the engine and the address."""
    given: list[object] = []
    monkeypatch.setattr(vector_engines, "export_index", lambda *some: given.extend(some) or "48 written", raising=False)
    told = call("index", "export", "--index", built[1], "--to", "npy", "out")
    assert told.out == "48 written\n" and given == [built[1], "npy", "out"]


def test_timing(call: Call, built: tuple[Path, Path], tmp_path: Path) -> None:
    """Encoding and search apart, in milliseconds."""
    told = call("search", "--index", built[1], "--image", "i01.png", "--timing", 3, "--json", tmp_path / "t.json")
    timing = json.loads((tmp_path / "t.json").read_text())["timing"]
    assert all(0 < timing[name]["p50"] <= timing[name]["p95"] for name in ("encode", "search"))
    assert "encode: p50 " in told.out and "search: p50 " in told.out and "(3 repetitions)" in told.out


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_saved_sheet(call: Call, built: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    """Opens, and has a row of the query and a row for five hits each."""
    path = tmp_path / f"sheet.{suffix}"
    told = call("search", "--index", built[1], "--image", "i01.png", "--without", "red", "-k", 7, "--save", path)
    assert told.code == 0 and f"saved {path}" in told.out
    with Image.open(path) as sheet:
        assert sheet.size == (1200, 1000 - 12) and sheet.convert("L").getextrema()[0] < 50
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_sheets_of_all_kinds_of_pictures(tmp_path: Path) -> None:
    """100 hits; a narrow, a wide and a missing picture, long texts, and letters of other scripts."""
    narrow, wide = Image.new("RGB", (1, 4000), "red"), Image.new("RGB", (4000, 1), "blue")
    texts = ["x" * 3000, "many words " * 300, "日本語 текст", "two\nlines"]
    tiles = [Tile(picture, texts) for picture in (narrow, wide, None, tmp_path / "missing.png", str(tmp_path))]
    query = [Tile(None, ["text"], text) for text in texts] + tiles
    save_sheet(tmp_path / "sheet.webp", "hits " * 9, query, tiles * (MOST // len(tiles)))
    with Image.open(tmp_path / "sheet.webp") as sheet:
        assert sheet.width == 1200 and sheet.height > 22 * 280


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give --image PICTURE, --text TEXT or both"),
        (("--without", "red"), "give --image PICTURE, --text TEXT or both"),
        (("--text", " "), "a text must say something"),
        (("--text", "x" * 10_000), "a text has 10000 characters"),
        (("--image", "broken.png"), "broken.png does not decode"),
        (("--image", "nowhere.png"), 'nowhere.png" is neither an id of the index nor a file'),
        (("--image", "i01.png", "big"), "the weight 'big' is no number"),
        (("--image", "i01.png", -1), "weights must be positive numbers below 1e+06, got -1.0"),
        (("--image", "i01.png", "nan"), "weights must be positive numbers below 1e+06, got nan"),
        (("--text", "but", "in", "red"), "--text takes one value and a weight, got 3 values: put a text in quotes"),
        (("--text", "red", "-k", 0), "k must be at least 1, a whole number, got 0"),
        (("--text", "red", "-k", "ten"), "invalid int value: 'ten'"),
        (("--text", "red", "--where", "colour=red"), "the index has no column 'colour'; columns: "),
        (("--text", "red", "--where", "colour"), "expected COLUMN=VALUE"),
        (("--text", "red", "--group", "colour"), "the index has no column 'colour'"),
        (("--text", "red", "--fold", 2), "fold is a similarity"),
        (("--text", "red", "--min-score", "nan"), "nan is no finite number"),
        (("--text", "red", "--timing", 0), "--timing must be at least 1"),
        (("--text", "red", "--save", "sheet.gif"), "sheet.gif: the suffix must be one of .png, .jpg, .jpeg, .webp"),
        (("--text", "red", "--save", "nowhere/sheet.png"), "the folder nowhere is missing"),
        (("--text", "red", "--model", "nowhere"), "model nowhere is missing"),
        (("--text", "red", "--model", "model"), "was built with another model, embedded, not "),
        (("--text", "red", "--index", "nowhere"), "nowhere holds no index"),
        (
            ("--text", "red", "--index", "qdrant://here/i", "--device", "cpu"),
            "--device needs --model for an index in an",
        ),
        (("--text", "red", "--colour", "red"), "unrecognized arguments: --colour red (see spn4cir-search --help)"),
    ],
)
def test_bad_searches(
    fails: Callable[..., str], built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...], words: str,
) -> None:  # fmt: skip
    """One line each, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    if "model" in options:
        save_model(tmp_path / "model", tiny_backbone("clip4cir", tmp_path), {})
    before = sorted(tmp_path.rglob("*"))
    where = () if "--index" in options else ("--index", built[1])
    assert words in fails("search", *where, *options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: COMMAND (see spn4cir-index --help)"),
        (("build", "empty"), "holds no pictures"),
        (("build", "nowhere"), "nowhere is missing"),
        (("build", "broken", "--index", "new"), "no picture decodes"),
        (("build", "toy", "--index", "toy.index"), "toy.index already holds an index"),
        (("build", "toy", "--index", "empty/words.txt"), "words.txt is a file"),
        (("build", "toy", "--kind", "magic"), "unknown kind of index 'magic'; known: exact"),
        (("build", "toy", "--dtype", "int8"), "not 'int8'"),
        (("build", "toy", "--batch-size", 0), "batch_size must be at least 1"),
        (("build", "toy", "--device", "moon"), "device moon"),
        (("build", "--dataset", "fashioniq", "empty"), "empty"),
        (("add", "empty", "--index", "toy.index"), "holds no pictures"),
        (("add", "toy", "--index", "toy.index", "--model", "model"), "built with another model"),
        (("remove", "--index", "toy.index"), "give the ids of pictures, or --from FILE"),
        (("remove", "i99.png", "--index", "toy.index"), "1 ids are not in the index, such as 'i99.png'"),
        (("remove", "--from", "nowhere.txt", "--index", "toy.index"), "--from nowhere.txt cannot be read"),
        (("remove", "--from", "empty/words.txt", "--index", "toy.index"), "holds no id"),
        (("info", "--index", "empty"), "empty holds no index"),
        (("info", "--index", "toy.index", "--json", "empty"), "--json empty is a folder"),
        (("info", "--index", "qdrant://here/name"), "is an engine: this command needs the folder of an index"),
        (("export", "--to", "tape", "x"), "invalid choice: 'tape'"),
        (("update",), "holds no index: make one by spn4cir-index build FOLDER, or give --index PATH"),
    ],
)
def test_bad_changes(
    fails: Callable[..., str], built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...], words: str,
) -> None:  # fmt: skip
    """One line each."""
    monkeypatch.chdir(tmp_path)
    for folder in built:
        shutil.copytree(folder, tmp_path / folder.name)
    for folder, name in (("empty", "words.txt"), ("broken", "broken.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("\n", encoding="utf-8")
    if "model" in arguments:
        save_model(tmp_path / "model", tiny_backbone("clip4cir", tmp_path), {})
    assert words in fails("index", *arguments)
    assert len(Index.open(tmp_path / "toy.index")) == 48


def test_which_index(fails: Callable[..., str], built: tuple[Path, Path], runs: Path) -> None:
    """Without ``--index`` there must be only one."""
    assert "holds no index: make one by spn4cir-index build" in fails("search", "--text", "red")
    for name in ("one", "two"):
        shutil.copytree(built[1], runs / "index" / name)
    line = fails("search", "--text", "red")
    assert f"give --index, one of {runs / 'index' / 'one'}, {runs / 'index' / 'two'}" in line


def test_another_model_at_the_same_place(fails: Callable[..., str], call: Call, shop: Path, tmp_path: Path) -> None:
    """A run that was trained on since the index was built is refused."""
    model = tmp_path / "model"
    save_model(model, tiny_backbone("clip4cir", tmp_path), {})
    assert call("index", "build", shop, "--model", model).code == 0
    backbone = tiny_backbone("clip4cir", tmp_path)
    for weights in backbone.parameters():
        weights.data += 0.1
    save_model(model, backbone, {})
    assert "has changed since: build the index anew" in fails("search", "--text", "red")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_an_index_that_may_not_be_read(fails: Callable[..., str], built: tuple[Path, Path], tmp_path: Path) -> None:
    """One line for a folder without the right to read it."""
    path = Path(shutil.copytree(built[1], tmp_path / "locked"))
    path.chmod(0)
    assert "locked" in fails("search", "--index", path, "--text", "red")
    path.chmod(0o755)


def test_sizes_of_files() -> None:
    """With the unit that people read."""
    assert [file_size(count) for count in (0, 999, 1500, 2_300_000)] == ["0 bytes", "999 bytes", "1.5 kB", "2.3 MB"]
