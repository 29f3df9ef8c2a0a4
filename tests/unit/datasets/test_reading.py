"""Annotation files of others: where they lie, and errors that name file, entry and field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spn4cir.dataset import Check
from spn4cir.datasets.reading import Entry, attempt, find_root, inner_path, read_entries, read_ids
from spn4cir.errors import InputError
from spn4cir.files import read_json

INSIDE = (("captions", "notes/captions"), ("images", "pictures"))


def find(given: object = None) -> Path:
    return find_root(
        "shop", given and str(given), ("Shop_dataset",), INSIDE, "captions/ and images/, from shop.example"
    )


def make(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def refused(read: Callable[[], object]) -> str:
    """The message of an InputError, which is one line."""
    with pytest.raises(InputError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("below", ["", "shop", "Shop_dataset"])
@pytest.mark.parametrize("captions", INSIDE[0])
@pytest.mark.parametrize("images", INSIDE[1])
def test_a_given_folder_or_one_below(tmp_path: Path, below: str, captions: str, images: str) -> None:
    """The dataset's own folder, or the one above it, whatever its name and layout."""
    root = tmp_path / below if below else tmp_path
    make(root / captions, root / images)
    assert find(tmp_path) == root


def test_a_whole_folder_is_preferred_to_one_without_pictures(tmp_path: Path) -> None:
    """Annotations that lie above do not hide the dataset; without pictures anywhere they do."""
    make(tmp_path / "captions", tmp_path / "shop" / "captions")
    assert find(tmp_path) == tmp_path
    make(tmp_path / "shop" / "images")
    assert find(tmp_path) == tmp_path / "shop"


@pytest.mark.parametrize("folder", ["shop", "Shop_dataset", "."])
def test_the_environment_names_the_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """SPN4CIR_DATA is the place of all datasets, or of one; --data-root beats it."""
    monkeypatch.setenv("SPN4CIR_DATA", str(tmp_path / "all"))
    make(tmp_path / "all" / folder / "captions", tmp_path / "other" / "captions")
    assert find() == tmp_path / "all" / folder
    assert find(tmp_path / "other") == tmp_path / "other"


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_data_is_looked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """data/<name> of the working directory; an empty variable is none."""
    monkeypatch.delenv("SPN4CIR_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("SPN4CIR_DATA", value)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data" / "shop" / "captions", tmp_path / "captions")
    assert find() == Path("data/shop")


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "images only"])
def test_a_dataset_that_is_not_there(tmp_path: Path, kind: str) -> None:
    """One message: which folder, what is expected there, where it comes from."""
    given = tmp_path / "given"
    if kind == "file":
        given.touch()
    elif kind != "absent":
        make(given / "images" if kind == "images only" else given)
    message = refused(lambda: find(given))
    assert message == (
        f"shop: {given} does not hold the dataset: expected there captions/ and images/, from shop.example"
    )


def test_a_dataset_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --data-root, the folder of the dataset is named."""
    monkeypatch.setenv("SPN4CIR_DATA", str(tmp_path))
    assert str(tmp_path / "shop") in refused(find)


@pytest.mark.parametrize(("content", "words"), [
    (b'[{"a": 1}, {"a"', "is not valid JSON, or cut short"), (b"", "is not valid JSON"), (b"\xff\xfe\x00", "not valid"),
    (b"[" * 5000, "not valid JSON"), (b'{"a": 1, "b": 2, "a": 3}', 'the key "a" occurs twice'),
    (b'[{"x": {"a": 1, "a": 1}}]', 'the key "a" occurs twice'), (b"\xef\xbb\xbf[]", "not valid JSON"),
])  # fmt: skip
def test_damaged_json_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """Cut, empty, of another encoding, too deep, or with a key twice, of which the decoder would drop one."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    message = refused(lambda: read_json(path))
    assert message.startswith(str(path)) and words in message


def test_a_missing_file_says_where_it_comes_from(tmp_path: Path) -> None:
    """A file that is not there, and a folder in its place."""
    assert refused(lambda: read_json(tmp_path / "a.json", "x.example")) == (
        f"{tmp_path / 'a.json'} is missing: it comes from x.example"
    )
    assert refused(lambda: read_json(tmp_path / "a.json")) == f"{tmp_path / 'a.json'} is missing"
    assert "cannot be read" in refused(lambda: read_json(tmp_path))


def test_sound_json_is_read(tmp_path: Path) -> None:
    """Negative control: the same keys in two objects, and letters of any kind."""
    path = tmp_path / "a.json"
    path.write_text('[{"ä": 1}, {"ä": [2, {"ä": null}]}]', encoding="utf-8")
    assert read_json(path) == [{"ä": 1}, {"ä": [2, {"ä": None}]}]
    assert [entry.where for entry in read_entries(path)] == [0, 1]


@pytest.mark.parametrize(("value", "words"), [
    ({"a": 1}, "expected a list, got"), ("text", "expected a list"), (None, "expected a list, got null"),
    ([{}, 3], "entry 1: expected an object, got 3"), ([[]], "entry 0: expected an object, got []"),
])  # fmt: skip
def test_entries_must_be_objects_of_a_list(tmp_path: Path, value: Any, words: str) -> None:
    """File, entry and what stands there instead."""
    write_json(tmp_path / "a.json", value)
    assert f"{tmp_path / 'a.json'}" in (message := refused(lambda: read_entries(tmp_path / "a.json")))
    assert words in message


ENTRY = Entry(Path("f.json"), 7, {
    "text": "a", "number": 3, "yes": True, "texts": ["a", "b"], "mixed": ["a", 3], "inner": {"text": 3}, "null": None,
    "path": "../../x", "paths": ["a", "/etc/passwd"], "long": ["x" * 500],
})  # fmt: skip


def test_fields_of_the_right_type() -> None:
    """Each kind of field as it stands."""
    assert (ENTRY.text("text"), ENTRY.number("number"), ENTRY.texts("texts")) == ("a", 3, ["a", "b"])
    assert ENTRY.image_id("text", {"a"}) == "a" and ENTRY.image_ids("texts", {"a", "b"}) == ["a", "b"]
    assert "text" in ENTRY and "absent" not in ENTRY


@pytest.mark.parametrize(("read", "words"), [
    (lambda: ENTRY.text("absent"), "field 'absent': is missing"),
    (lambda: ENTRY.text("number"), "field 'number': expected a text, got 3"),
    (lambda: ENTRY.text("null"), "field 'null': expected a text, got null"),
    (lambda: ENTRY.number("text"), "field 'text': expected a whole number, got \"a\""),
    (lambda: ENTRY.number("yes"), "field 'yes': expected a whole number, got true"),
    (lambda: ENTRY.texts("text"), "field 'text': expected a list of texts, got \"a\""),
    (lambda: ENTRY.texts("mixed"), "field 'mixed': expected a list of texts, got 3 in it"),
    (lambda: ENTRY.entry("text"), "field 'text': expected an object"),
    (lambda: ENTRY.entry("inner").text("text"), "field 'inner', field 'text': expected a text, got 3"),
    (lambda: ENTRY.image_id("path"), "field 'path': \"../../x\" is no image id"),
    (lambda: ENTRY.image_ids("paths"), "field 'paths': \"/etc/passwd\" is no image id"),
    (lambda: ENTRY.image_id("text", {"b"}, "split.json"), "field 'text': \"a\" is not in split.json"),
    (lambda: ENTRY.text("long"), "xxx..."),
])  # fmt: skip
def test_fields_that_are_wrong(read: Callable[[], object], words: str) -> None:
    """File, entry, field, what is expected and what is there, in one line that is not too long."""
    message = refused(read)
    assert message.startswith("f.json, entry 7, field '") and words in message and len(message) < 160


@pytest.mark.parametrize(
    "value", ["../../x", "/etc/passwd", "a/b", "a\\b", "", ".", "..", ".x", "a b", "a\n", "\0", "-a"]
)
def test_what_is_no_image_id(tmp_path: Path, value: str) -> None:
    """Nothing that could lead out of a folder, or that a terminal would not show."""
    with pytest.raises(InputError, match="is no image id"):
        Entry(Path("f.json"), 0, {"id": value}).image_id("id")
    write_json(tmp_path / "ids.json", ["a", value])
    assert "entry 1: " in refused(lambda: read_ids(tmp_path / "ids.json"))


def test_lists_of_ids(tmp_path: Path) -> None:
    """In order; no object, no number, none twice."""
    path = tmp_path / "ids.json"
    write_json(path, ["b", "B003FGW7MK", "dev-1-0-img0", "a.b_c"])
    assert read_ids(path) == ["b", "B003FGW7MK", "dev-1-0-img0", "a.b_c"]
    for value, words in (
        ({"a": 1}, "a list of image ids"),
        (["a", 3], "entry 1: 3 is no"),
        (["a", "a"], "'a' occurs twice"),
    ):
        write_json(path, value)
        assert words in refused(lambda: read_ids(path))


@pytest.mark.parametrize("value", ["../x", "./train/../../x", "/etc/passwd", "a\\..\\b", "", ".", "./", None, 3, ["a"]])
def test_paths_that_lead_out(value: object) -> None:
    """A path of a file must stay below its root; the message names file and entry."""
    message = refused(lambda: inner_path(Path("split.json"), "img0", value))
    assert message.startswith("split.json, entry 'img0': ") and "below the dataset's root" in message


def test_paths_that_stay_inside() -> None:
    """Negative control: with and without the leading dot."""
    assert [inner_path(Path("f"), "i", p).as_posix() for p in ("./train/34/a.png", "dev/a..b.png")] == [
        "train/34/a.png", "dev/a..b.png",
    ]  # fmt: skip


def test_attempt_turns_an_error_into_a_check() -> None:
    """A problem where it is needed, a note where it is not, nothing where it works; other errors are ours."""

    def fail() -> None:
        raise InputError("mend this")

    checks: list[Check] = []
    assert attempt(checks, "a", True, lambda: 3) == 3 and not checks
    assert attempt(checks, "a", True, fail) is attempt(checks, "b", False, fail) is None
    assert [(c.what, c.level, c.examples) for c in checks] == [
        ("a", "problem", ("mend this",)), ("b", "note", ("mend this",)),
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        attempt(checks, "a", True, lambda: 1 / 0)
