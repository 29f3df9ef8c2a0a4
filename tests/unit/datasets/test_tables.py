"""Tables as people have them: encodings, quotes, columns by name, shared pictures, and the shapes of known exports."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from conftest import draw_picture
from PIL import Image
from pyarrow import parquet

from benchmarks.table_shapes import NAMES, SHAPES, text_table
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset, open_extra_images
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.datasets.generated import read_generated
from spn4cir.datasets.html_text import strip_html
from spn4cir.datasets.roles import ROLES
from spn4cir.datasets.table_settings import fill_template, read_place, split_place
from spn4cir.datasets.tables import load_table
from spn4cir.errors import InputError
from spn4cir.evaluate import benchmark_fingerprint
from spn4cir.index.source import read_source
from spn4cir.types import Triplet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder of pictures 0.png to 7.png."""
    (tmp_path / "shop").mkdir()
    for n in range(8):
        Image.new("RGB", (8 + n, 8), (30 * n, 0, 0)).save(tmp_path / "shop" / f"{n}.png")
    return tmp_path / "shop"


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


# --- known shapes, each by one command ---


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes(name: str, tmp_path: Path) -> None:
    """Ids, pictures, captions, title and category are what the export says, in strict mode too, and all decode."""
    shape = SHAPES[name]()
    place = shape.write(tmp_path / name)
    for settings in ("", ("," if "?" in place else "?") + "strict=true"):
        dataset = load_dataset("catalogue", place + settings)
        ids = dataset.training_images()
        assert ids == shape.ids and dataset.captions(ids[0]) == shape.captions
        assert dataset.label(ids[0]) == (shape.title or ids[0]) and dataset.category(ids[0]) == shape.category
        assert dataset._contents.image_rows == shape.image_rows  # type: ignore[attr-defined]
        assert all(dataset.caption(i) for i in ids if i != ids[-1] or name != "flickr30k")
    assert examine(dataset).can_train
    assert sum(len(table) for table in dataset.other_columns()) in (0, len(ids))


@pytest.mark.parametrize("name", ["shopify", "laion", "woocommerce"])
def test_addresses_whose_pictures_are_not_there(name: str, tmp_path: Path) -> None:
    """The row, and the command of img2dataset with the table's own columns; names that two addresses share too."""
    shape = SHAPES[name]()
    shape.pictures = []
    place = shape.write(tmp_path)
    with pytest.raises(InputError, match=r"row \d+, column .* is an address, and no picture below") as error:
        Catalogue(place).training_images()
    said, column = str(error.value), {"shopify": "'Image Src'", "laion": "URL", "woocommerce": "Images"}[name]
    assert f"img2dataset --url_list {place} " in said and f"--url_col {column} --caption_col" in said
    assert "\n" not in said and said.endswith("and give --data-root OUT")


def test_addresses_with_the_same_name(shop: Path) -> None:
    """One picture would stand for two."""
    place = write(shop / "t.csv", "url,caption\nhttp://x/a/1.png,a\nhttp://x/b/1.png,b\n")
    with pytest.raises(InputError, match=r"row 2, column 'url': the files of .* have the same name"):
        Catalogue(place).training_images()


# --- text: encoding, separator, quotes ---

TEXT = "image,caption\n0.png,a café\n1.png,€ 12\n2.png,plain\n"


@pytest.mark.parametrize(("encoding", "said"), [
    ("utf-8", ""), ("utf-8-sig", ""), ("utf-16", "is read as UTF-16"), ("utf-16-le", "is read as UTF-16"),
    ("utf-16-be", "is read as UTF-16"), ("cp1252", "is read as cp1252"),
])  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings(shop: Path, encoding: str, said: str, end: str) -> None:
    """Recognised, and named where it is none of UTF-8."""
    dataset = Catalogue(write(shop / "t.csv", TEXT.replace("\n", end), encoding))
    assert [dataset.caption(f"{n}.png") for n in range(3)] == ["a café", "€ 12", "plain"]
    notes = " ".join(dataset.notes())
    assert said in notes and bool(notes) == bool(said)


def test_other_encodings(shop: Path) -> None:
    """By a setting; without it, or with an unknown one, a line says what to do."""
    text = "image,caption\n0.png,日本語の説明\n"
    place = write(shop / "t.csv", text, "shift_jis")
    with pytest.raises(InputError, match=r"t\.csv is neither UTF-8, UTF-16 nor cp1252: .* encoding=gb18030"):
        Catalogue(place).training_images()
    assert Catalogue(f"{place}?encoding=shift_jis").caption("0.png") == "日本語の説明"
    with pytest.raises(InputError, match="Python knows no encoding 'klingon'"):
        Catalogue(f"{place}?encoding=klingon").training_images()
    (shop / "t.csv").write_bytes(TEXT.encode()[:26])
    with pytest.raises(InputError, match="is cut short within a letter"):
        Catalogue(place).training_images()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("before", ["", "\n", "sep=;\n"])
def test_separators(shop: Path, separator: str, suffix: str, before: str) -> None:
    """The one that gives a column of images, whatever the suffix; columns without names say nothing."""
    if before.startswith("sep"):
        separator = ";"
    rows = [["", "image", "caption", "caption", "", ""], ["0", "0.png", "a, b; c | d\te", "other", "", "x"]]
    dataset = Catalogue(write(shop / f"t{suffix}", before + text_table(rows, separator)))
    assert dataset.training_images() == ["0.png"] and dataset.caption("0.png") == "a, b; c | d e"
    assert dataset.other_columns()[0].column_names == ["caption.1"]


SWALLOWING = 'image,caption\n0.png,red\n1.png,"Retro blue\n2.png,green\n3.png,black 12"\n4.png,"a ""b"", c"\n'


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_quote_that_swallows_rows(shop: Path, separator: str) -> None:
    """It is a letter, and that is said; strict mode stops at its line. (case 09)"""
    text = SWALLOWING.replace(",", separator).replace(f"{separator} c", ", c")
    place = write(shop / ("t.csv" if separator == "," else "t.tsv"), text)
    dataset = Catalogue(place)
    assert [dataset.caption(f"{n}.png") for n in range(5)] == ["red", '"Retro blue', "green", 'black 12"', 'a "b", c']
    assert "line 3 opens a quote that swallows rows; it is read as a letter" in dataset.notes()[0]
    with pytest.raises(InputError, match=r"t\.[ct]sv, line 3: a quote is opened, and line 4, which holds an image"):
        Catalogue(f"{place}?strict=true").training_images()


def test_quotes_that_mean_something(shop: Path) -> None:
    """Texts over several lines, and words in quotes within a text."""
    text = 'image,caption\n0.png,"first\nsecond, line"\n1.png,"Retro" is the word\n2.png,a 12" mug\n'
    dataset = Catalogue(write(shop / "t.csv", text) + "?strict=true")
    captions = ["first second, line", '"Retro" is the word', 'a 12" mug']
    assert [dataset.caption(f"{n}.png") for n in range(3)] == captions and not dataset.notes()


@pytest.mark.parametrize(("rows", "said"), [
    ("0.png,red,x\n", "line 2: rows have more fields than the head line"),
    ("0.png,red\n1.png\n2.png\n half\n", "line 5 has 1 of the 2 fields"),
    ('0.png,red\n1.png,"blue', "line 3: a quote is opened and not closed"),
    ('0.png,red\n1.png,"blue\n 2.png , x, y\n', "line 3: a quote is opened"),
])  # fmt: skip
def test_strict_mode_names_the_line(shop: Path, rows: str, said: str) -> None:
    """No row is lost, and none made up."""
    with pytest.raises(InputError, match=said) as error:
        Catalogue(write(shop / "t.csv", f"image,caption\n{rows}") + "?strict=true").training_images()
    assert "\n" not in str(error.value)


def test_rows_without_an_image(shop: Path) -> None:
    """They are left out, and counted."""
    dataset = Catalogue(write(shop / "t.csv", "image,caption\n0.png,a\n,b\n,\n\n2.png,c\n"))
    assert dataset.training_images() == ["0.png", "2.png"] and "1 rows name no image" in dataset.notes()[0]


@pytest.mark.parametrize("rows", ["", ",a\n,b\n"])
def test_a_table_without_any_image(shop: Path, rows: str) -> None:
    """The table is named."""
    with pytest.raises(InputError, match=r"holds no pictures .*t\.csv: no row names an image"):
        Catalogue(write(shop / "t.csv", f"image,caption\n{rows}")).training_images()


def test_a_damaged_schema(shop: Path) -> None:
    """A column whose name is no UTF-8 is one line. (found by the fuzz)"""
    parquet.write_table(pa.table({"image": ["0.png"], "caption": ["a"]}), shop / "t.parquet", store_schema=False)
    (shop / "t.parquet").write_bytes((shop / "t.parquet").read_bytes().replace(b"caption", b"ca\xd3tion"))
    with pytest.raises(InputError, match=r"t\.parquet cannot be read as a table"):
        Catalogue(str(shop / "t.parquet")).training_images()


@pytest.mark.parametrize(("text", "plain"), [
    ("<p>A <b>red</b>&nbsp;mug.</p>\n<ul><li>one</li><li>two &lt; 3</li></ul>", "A red mug. one two < 3"),
    ("a<br>b<script>x()</script><!-- c -->", "a b"), ("salt &amp; pepper", "salt & pepper"),
    ("a <b> shape, 1 < 2 > 0 & so on", "a <b> shape, 1 < 2 > 0 & so on"), ("R&D;", "R&D;"),
])  # fmt: skip
def test_html(text: str, plain: str) -> None:
    """What a browser shows; what only looks like HTML stays."""
    assert " ".join(strip_html(text).split()) == plain


# --- settings of a data root ---


def test_columns_by_name(shop: Path) -> None:
    """In the data root: for the check, the index, extra images and training alike; commas in names and texts too."""
    text = 'Image Src,"Title, long",Body\n0.png,One,"<p>the first</p>"\n1.png,,second\n'
    place = write(shop / "t.csv", text) + "?image=Image Src,title=Title, long,caption=Title, long|Body"
    dataset = load_dataset("catalogue", place)
    assert dataset.training_images() == ["0.png", "1.png"] and dataset.label("0.png") == "One"
    assert dataset.captions("0.png") == ("One", "the first") and dataset.captions("1.png") == ("second",)
    source = read_source(place)
    assert list(source.images) == ["0.png", "1.png"] and source.note.place == place
    assert list(read_source(source.note.place).images) == list(source.images)
    assert open_extra_images(load_dataset("emoji"), place)[1] == ["bank.extra:0.png", "bank.extra:1.png"]


def test_settings_in_a_file(shop: Path) -> None:
    """``catalogue.yaml`` in the folder, or given itself; a data root's own settings win."""
    write(shop / "my.csv", "Pic;Words\n0;one\n1;two\n")
    write(shop / "catalogue.yaml", "table: my.csv\nimage: '{pic}.png'\ncaption: [Words]\n")
    for place in (str(shop), str(shop / "catalogue.yaml")):
        assert Catalogue(place).caption("1.png") == "two"
    assert read_place(f"{shop}?caption=Pic")[1].caption == "Pic"
    write(shop / "catalogue.yaml", "colour: red\n")
    with pytest.raises(InputError, match=r"catalogue\.yaml: unknown key 'colour'"):
        Catalogue(str(shop))


@pytest.mark.parametrize(("settings", "said"), [
    ("?colour=red", "there is no setting .colour.; known: table, image"),
    ("?image=a,image=b", "image is given twice"), ("?strict=maybe", "strict is true or false"),
    ("?image={}.png", "a template holds columns in braces"), ("?image={id:zz}.png", "'zz' is no format of a text"),
    ("?image=absent", "t.csv: one column must be called absent"), ("?caption=absent", "must be called absent"),
    ("?image={absent}.png", "must be called absent"), ("?table=*.tsv", r"there is no table \*\.tsv below it"),
])  # fmt: skip
def test_settings_that_cannot_be_meant(shop: Path, settings: str, said: str) -> None:
    """One line says which."""
    place = write(shop / "t.csv", "id,file\n0,0.png\n")
    with pytest.raises(InputError, match=said) as error:
        Catalogue(f"{shop if 'table' in settings else place}{settings}").training_images()
    assert "\n" not in str(error.value)


def test_a_template() -> None:
    """Columns in braces, with Python's formats."""
    cells = {"id": "12", "shop": "x"}
    assert fill_template("{shop}/{id:0>10}.jpg", cells.__getitem__) == "x/0000000012.jpg"
    assert split_place("a.csv?image={id}, x.jpg,strict=true")[1].image == "{id}, x.jpg"


def test_a_place_whose_name_holds_a_question_mark(tmp_path: Path) -> None:
    """Is that place."""
    (tmp_path / "what?").mkdir()
    assert split_place(str(tmp_path / "what?"))[0] == str(tmp_path / "what?")


def test_names_of_files_below_the_folder(tmp_path: Path) -> None:
    """A name, with or without its suffix, is found wherever it lies; a name of two pictures is refused."""
    for name in ("x/a.PNG", "y/b.png", "y/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    place = write(tmp_path / "t.csv", "image\na.png\nb\ny/c\ngone\n")
    assert Catalogue(place).training_images() == ["x/a.PNG", "y/b.png", "y/c.png", "gone"]
    Image.new("RGB", (4, 4)).save(tmp_path / "x/b.png")
    with pytest.raises(InputError, match=r'row 2, column \'image\': "b" may be "x/b.png" or "y/b.png": give paths'):
        Catalogue(place).training_images()


# --- several captions, several names ---


@pytest.mark.parametrize("form", ["rows", "list", "captions.csv", "captions.json"])
def test_several_captions(shop: Path, form: str) -> None:
    """All are kept, in their order and each once. (cases 10 and 13)"""
    place = str(shop)
    if form == "rows":
        place = write(shop / "t.csv", "image,caption\n0.png,a\n1.png,b\n0.png,c\n0.png,a\n")
    elif form == "list":
        parquet.write_table(pa.table({"image": ["0.png", "1.png"], "caption": [["a", "c"], ["b"]]}), shop / "t.parquet")
        place = str(shop / "t.parquet")
    elif form == "captions.csv":
        write(shop / form, "image,caption\n0.png,a\n1.png,b\n0.png,c\n")
    else:
        write(shop / form, json.dumps({"0.png": ["a", "c"], "1": "b"}))
    dataset = Catalogue(place)
    assert dataset.captions("0.png") == ("a", "c") and dataset.captions("1.png") == ("b",)
    assert dataset.caption("0.png") == "a" and ("further captions of these", 1) in [
        c[:2] for c in map(_pair, dataset.checks())
    ]


def _pair(check: object) -> tuple[str, int]:
    return check.what, check.found  # type: ignore[attr-defined]


def test_a_title_is_a_caption_where_there_is_no_other(shop: Path) -> None:
    """So that no captioner is wanted. (case 10)"""
    dataset = Catalogue(write(shop / "t.csv", "image,title,caption\n0.png,a mug,\n1.png,a lamp,bright\n"))
    assert [dataset.caption(i) for i in dataset.training_images()] == ["a mug", "bright"]


def variants(shop: Path, is_with: bool) -> str:
    rows = [["id", "image", "title", "price"]]
    for n in range(8):
        rows.append([f"S{n}", f"{n}.png", f"mug {n}", str(n)])
        rows += [[f"S{n}-L", f"{n}.png", f"mug {n}, large", str(10 + n)]] * is_with
    write(shop / "queries.csv", "reference,modification,target\nS0,in red,S1\nS2,in red,S3\n")
    return write(shop / f"products{is_with}.csv", text_table(rows))


def test_rows_that_share_a_picture_are_one_image(shop: Path) -> None:
    """Evaluation and index are the same with and without variants, whose names are known everywhere. (case 06)"""
    plain, whole = (load_dataset("catalogue", variants(shop, is_with)) for is_with in (False, True))
    assert benchmark_fingerprint(plain.benchmark("val")) == benchmark_fingerprint(whole.benchmark("val"))
    assert whole.training_images() == plain.training_images() and whole.further_names["S3-L"] == "S3"
    assert whole.image("S3-L") == whole.image("S3") and whole.captions("S3") == ("mug 3",)
    write(shop / "queries.csv", "reference,modification,target\nS0-L,in red,S1\nS2,in red,S3-L\nS2,in red,S3\n")
    queries = Catalogue(str(shop / "productsTrue.csv")).benchmark("val").queries
    assert [(q.reference, q.targets) for q in queries] == [("S0", ("S1",)), ("S2", ("S3",))]
    source = read_source(str(shop / "productsTrue.csv"))
    assert list(source.images) == [f"S{n}" for n in range(8)]
    assert source.columns["names"].to_pylist()[3] == "S3-L" and source.columns["price"].to_pylist() == list(range(8))
    assert "names" not in read_source(str(shop / "productsFalse.csv")).columns.column_names


def test_further_names_in_triplets(shop: Path) -> None:
    """Annotated and generated ones name the image; a target that is named twice counts once."""
    Path(variants(shop, True)).rename(shop / "catalogue.csv")
    rows = [
        {"reference": "S0-L", "modification": "x", "target": ["S1", "S1-L"]},
        {"reference": "S2", "modification": "y", "target": ["S3-L"]},
    ]
    write(shop / "triplets.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset("pairs", str(shop))
    assert list(dataset.triplets()) == [Triplet("S0", ("S1",), ("x",)), Triplet("S2", ("S3",), ("y",))]
    write(shop / "made.json", json.dumps([{"candidate": "S0-L", "target": "S1-L", "captions": ["z"]}]))
    triplets, _ = read_generated(shop / "made.json", dataset.training_images(), names=dataset.further_names)
    assert triplets == [Triplet("S0", ("S1",), ("z",), generated=True)]


def test_crops_of_one_picture_are_images_of_their_own(shop: Path) -> None:
    """Equal crops are one."""
    text = "image,id,box\n0.png,a,0 0 2 2\n0.png,b,0 0 4 4\n0.png,c,0 0 2 2\n"
    dataset = Catalogue(write(shop / "t.csv", text))
    assert dataset.training_images() == ["a", "b"] and dataset.further_names == {"c": "a"}


def test_one_id_for_two_pictures(shop: Path) -> None:
    """Is refused in a table of one's own; a known export that does so gets numbers, and that is said."""
    with pytest.raises(InputError, match=r"row 2, column 'image_id': \"a\" occurs twice, with another picture"):
        Catalogue(write(shop / "t.csv", "image,id\n0.png,a\n1.png,a\n")).training_images()
    place = write(shop / "t.csv", "item_id,item_name,main_image_id\na,x,0\na,y,1\n")
    assert Catalogue(place).training_images() == ["a", "a/2"] and "1 ids name several" in " ".join(
        Catalogue(place).notes()
    )


# --- files of captions ---

CAPTION_FILES = {
    "stem.json": json.dumps([{"image_id": f"{n}", "caption": NAMES[n]} for n in range(8)]),
    "int.json": json.dumps([{"image_id": n, "caption": NAMES[n]} for n in range(8)]),
    "dict.json": json.dumps({f"{n}.png": NAMES[n] for n in range(8)}),
    "coco.json": json.dumps({
        "images": [{"id": 70 + n, "file_name": f"{n}.png"} for n in range(8)],
        "annotations": [{"image_id": 70 + n, "caption": NAMES[n]} for n in range(8)],
    }),
    "file.jsonl": "".join(json.dumps({"image": f"{n}.png", "caption": NAMES[n]}) + "\n" for n in range(8)),
    "captions.csv": "image,caption\n" + "".join(f"{n}.png,{NAMES[n]}\n" for n in range(8)),
    "captions.tsv": "file_name\ttext\n" + "".join(f"./{n}.png\t{NAMES[n]}\n" for n in range(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_caption_files(shop: Path, name: str) -> None:
    """By a setting, in any form, with paths, names, numbers or stems for pictures. (case 16)"""
    write(shop.parent / "beside" / name, CAPTION_FILES[name])
    dataset = Catalogue(f"{shop}?captions=../beside/{name}")
    assert [dataset.caption(i) for i in dataset.training_images()] == NAMES[:8] and not dataset.notes()


@pytest.mark.parametrize(("text", "said"), [
    ("[1]", "entry 1: expected images and annotations"), ('{"images": [], "annotations": [{}]}', "annotation 1"),
    ('{"images": [{"id": 1}]}', "image 1: expected an object with a file_name"),
    ('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "1 image_id of annotations name no image"),
    ('[{"image_id": "", "caption": "x"}]', "row 1, column 'image_id': names no image"),
    ('[{"image_id": "1", "text": 1.5}]', "column 'text': expected a text, got 1.5"),
    ("[" * 100_000, "nested too deeply"),
    ('[{"x": 1}]', "one column must be called"), ('{"1.png": {"a": 1}}', "expected a text"), ("{", "cut short"),
])  # fmt: skip
def test_caption_files_that_are_refused(shop: Path, text: str, said: str) -> None:
    """The file, and the entry."""
    write(shop / "captions.json", text)
    with pytest.raises(InputError, match=said) as error:
        Catalogue(str(shop)).training_images()
    assert "captions.json" in str(error.value) and "\n" not in str(error.value)


def test_captions_of_pictures_that_are_not_there(shop: Path) -> None:
    """Are noted, and an error in strict mode."""
    write(shop / "captions.csv", "image,caption\n0.png,a\ngone.png,b\n")
    assert "describes 1 images that are not there" in Catalogue(str(shop)).notes()[0]
    with pytest.raises(InputError, match="describes 1 images that are not there"):
        Catalogue(f"{shop}?strict=true").training_images()


# --- tables of triplets ---


def test_triplets_as_people_export_them(shop: Path) -> None:
    """The same reader: semicolons, cp1252, and columns by name; a quote that swallows rows is an error."""
    text = "Von;Bitte;Nach\n0.png;größer;1.png\n2.png;kürzer;3.png\n"
    place = write(shop / "t.csv", text, "cp1252") + "?reference=Von,modification=Bitte,target=Nach"
    dataset = load_dataset("pairs", place)
    assert next(iter(dataset.triplets())) == Triplet("0.png", ("1.png",), ("größer",))
    assert "is read as cp1252" in dataset.notes()[0]
    text = 'reference,modification,target\n0.png,"larger,1.png\n2.png,"shorter,3.png\n'
    with pytest.raises(InputError, match=r"t\.csv, line 2: a quote is opened"):
        load_dataset("pairs", write(shop / "t.csv", text)).triplets()


def test_a_name_with_a_line_end_is_one_row(tmp_path: Path) -> None:
    """A quoted path of two lines is told as such; a stray quote that swallows a row is still a letter."""
    path = tmp_path / "p.csv"
    path.write_text('image,caption\n0.png,a\n"new\nline.png",b\n2.png,c\n')
    assert load_table(path, ROLES).text("image") == ["0.png", "new\nline.png", "2.png"]
    draw_picture(tmp_path / "0.png", 0)
    with pytest.raises(InputError, match=r"row 2, column 'image'.*control characters"):
        Catalogue(str(path)).training_images()
    path.write_text('image,caption\n0.png,"a\n1.png,b"\n2.png,c\n')
    table = load_table(path, ROLES)
    assert table.text("image") == ["0.png", "1.png", "2.png"] and "opens a quote that swallows rows" in table.notes[0]


@pytest.mark.parametrize(("content", "told"), [
    (b"image,caption\n0.png,a\0b\n1.png,x\n", "line 2: holds a byte of zero"),
    ("image,caption\n0.png,café\n".encode() + "1.png,crème\n".encode("cp1252"), "line 3 is no UTF-8, and letters"),
])  # fmt: skip
def test_encodings_that_are_none(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=told):
        load_table(tmp_path / "t.csv", ROLES)


def test_a_list_in_a_cell_of_text(tmp_path: Path) -> None:
    """As JSON or Python writes one; other brackets are text. A column that occurs twice is told."""
    path = tmp_path / "t.csv"
    path.write_text(
        'image,caption,caption\na,"[""a cat"", ""a pet""]",x\nb,"[\'b\', \'c\']",y\nc,[sic] d [e],z\nd,[1],z\n'
    )
    table = load_table(path, ROLES)
    assert table.texts("caption") == [("a cat", "a pet"), ("b", "c"), ("[sic] d [e]",), ("[1]",)]
    assert table.text("caption.1") == ["x", "y", "z", "z"] and "'caption' occurs twice" in table.notes[0]


def test_a_table_beside_pictures_is_told(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", 0)
    (tmp_path / "products.csv").write_text("image,caption\na.png,red\n")
    assert any(
        "1 .csv (name it to read it: --data-root FOLDER/NAME)" in note for note in Catalogue(str(tmp_path)).notes()
    )
