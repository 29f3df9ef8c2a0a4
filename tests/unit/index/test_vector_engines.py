"""An index that an engine holds answers as the index on disk does, and an export copies what has changed."""

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import draw_picture
from tiny_backbones import tiny_backbone
from torch.nn import functional as F

from benchmarks.made_index import draw_columns, draw_vectors, make_index
from spn4cir.errors import InputError
from spn4cir.index import qdrant
from spn4cir.index.local import Index
from spn4cir.index.qdrant import NOTE, QdrantIndex, open_collection
from spn4cir.index.qdrant_collection import Collection, Point
from spn4cir.index.qdrant_server import ServerCollection
from spn4cir.index.searchable import Hit, SearchableIndex
from spn4cir.index.snapshot import Head, read_head, write_head
from spn4cir.index.vector_engines import export_index, open_engine
from spn4cir.model import Model
from spn4cir.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ll]ocal.*:UserWarning")
COUNT, SIZES, GONE = 600, (250, 300, 50), (3, 4, 255, 599)
WHERES: tuple[Any, ...] = (
    [],
    ["category=dress"],
    ["category!=dress", "price<=20"],
    ["price>40", "price<48"],
    ["sold=true", "category=dress|shirt"],
    ["sold!=true", "price>=7"],
    ["price=7|8|9"],
    ["price!=7|8"],
    ["price<inf"],
    ["odd name.[0]=A b"],
    ["category=nothing of that name"],
    {"category": []},
)
OPTIONS = tuple(itertools.product((None, 0.3), (None, 1.0), (None, 0.99), (None, "product"), range(len(WHERES))))

CLIENTS: dict[Path, Any] = {}


def folder_collection(folder: Path) -> Collection:
    pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")
    return open_collection(f"qdrant:{folder}")


def server_collection(folder: Path) -> Collection:
    """The imitation of a server that the client brings, one for each folder, which stays open."""
    package = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    client = CLIENTS.setdefault(folder, package.QdrantClient(":memory:"))
    client.close = lambda: None
    return ServerCollection(client, "pictures", str(folder))


Place = Callable[[], Collection]


@pytest.fixture(params=[folder_collection, server_collection], ids=["folder", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Opens the collection of a test."""
    return lambda: request.param(tmp_path / "engine")


class Both(NamedTuple):
    local: Index
    engine: QdrantIndex


@pytest.fixture(
    scope="module",
    params=itertools.product([folder_collection, server_collection], [1, 4]),
    ids=lambda given: f"{given[0].__name__.split('_')[0]}-{given[1]}",
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    opened, k = request.param
    folder = tmp_path_factory.mktemp("made")
    columns = {**draw_columns(COUNT), "odd name.[0]": [("A b", "a b", None)[n % 3] for n in range(COUNT)]}
    path = make_index(folder / "index", draw_vectors(COUNT, k), columns, SIZES, GONE)
    qdrant.export_qdrant(path, opened(folder / "engine"))
    engine = QdrantIndex(opened(folder / "engine"))
    yield Both(Index(path), engine)
    engine.close()


def draw_query(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(seed)), dim=0)


def assert_equal_hits(found: list[Hit], wanted: list[Hit]) -> None:
    assert [(hit.id, hit.path, hit.columns, hit.folded) for hit in found] == [
        (hit.id, hit.path, hit.columns, hit.folded) for hit in wanted
    ]
    for field in ("score", "z"):
        values = [[getattr(hit, field) for hit in hits] for hits in (found, wanted)]
        assert np.allclose(*values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 10, 700])
def test_an_engine_answers_as_the_index_does(both: Both, k: int) -> None:
    """Cut-offs, folding, groups, filters and left-out ids, in every combination; a third of them where it is slow."""
    options = list(enumerate(OPTIONS))
    if not both.engine.collection.one_process or k == 700:
        options = options[::3]
    some = 0
    for number, (min_score, min_z, fold, group, where) in options:
        selection, exclude = Selection(k, min_score, min_z, fold, group), ["i007", "i300"] if number % 2 else []
        found, wanted = (
            index.search_vector(draw_query(number), selection, WHERES[where], exclude)
            for index in (both.engine, both.local)
        )
        assert_equal_hits(found, wanted)
        some += bool(wanted)
    assert some > len(options) / 2


def test_the_comparison_can_fail(both: Both) -> None:
    """The control: another query, filter, cut-off or exclusion gives other hits."""
    query, wanted = draw_query(1), both.local.search_vector(draw_query(1), Selection(10))
    searches: list[tuple[Any, ...]] = [
        (query.roll(1), Selection(10)),
        (query, Selection(10), ["category!=dress"]),
        (query, Selection(10, min_z=2.5)),
        (query, Selection(10), (), [wanted[0].id]),
    ]
    for given in searches:
        with pytest.raises(AssertionError):
            assert_equal_hits(both.engine.search_vector(*given), wanted)


def test_an_engine_knows_all_about_the_index(both: Both) -> None:
    assert len(both.engine) == len(both.local) == COUNT - len(GONE)
    assert both.engine.kinds == both.local.kinds and list(both.engine.kinds) == list(both.local.kinds)
    assert both.engine.find_image("i042") == both.local.find_image("i042")
    assert both.engine.find_image("i003") is None  # removed
    sample = both.local.snapshot.sample().tolist()
    ids = both.local.snapshot.files["id"].take(sample).to_pylist()
    assert list(both.engine.note.sample) == ids
    order = both.engine.background.flatten(1).sort(0).values
    assert torch.equal(order, both.local.background.flatten(1).sort(0).values)
    assert both.engine.column_values("category") == both.local.column_values("category")
    with pytest.raises(InputError, match="no column 'colour'"):
        both.engine.column_values("colour")
    assert both.engine.refresh_if_changed() is False


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tiny_backbone("clip4cir", tmp_path), "embedded", device="cpu", batch_size=4)


@pytest.fixture
def index(model: Model, tmp_path: Path) -> Index:
    for n in range(20):
        draw_picture(tmp_path / "pictures" / ("red" if n % 3 else "blue") / f"{n:02d}.png", n)
    return Index.build(model, tmp_path / "pictures", tmp_path / "index")


def test_queries_of_parts(index: Index, model: Model, place: Place, tmp_path: Path) -> None:
    """References, texts, weights and negatives, members of the index and other pictures."""
    qdrant.export_qdrant(index.path, place())
    engine = QdrantIndex(place(), model)
    draw_picture(tmp_path / "other.png", "other")
    queries: list[dict[str, Any]] = [
        {"image": "red/01.png", "text": "but in red"},
        {"text": [("a dress", 2.0), "a shirt"], "without": "red"},
        {
            "image": [("red/01.png", 0.5), str(tmp_path / "other.png")],
            "unlike": "blue/03.png",
            "where": ["category=red"],
        },
        {
            "image": "blue/00.png",
            "text": ("in white", 1.5),
            "without": ("dots", 0.2),
            "min_z": -1.0,
            "group": "category",
        },
    ]
    for query in queries:
        assert_equal_hits(engine.search(k=7, **query), index.search(k=7, **query))
    hit = engine.search(text="a dress")[0]
    assert hit.id not in [other.id for other in engine.search(hit, "in red", k=20)]
    engine.close()


class Counting:
    """Counts what an export writes and deletes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, collection: Collection):
        self.written: list[str] = []
        self.deleted: list[str] = []
        write, delete = collection.write, collection.delete

        def count_write(points: list[Point]) -> None:
            self.written += [point.payload["id"] for point in points if point.id != NOTE]
            write(points)

        def count_delete(ids: list[str]) -> None:
            self.deleted += ids
            delete(ids)

        monkeypatch.setattr(collection, "write", count_write)
        monkeypatch.setattr(collection, "delete", count_delete)


def export_counted(index: Index, place: Place, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    collection = place()
    counting = Counting(monkeypatch, collection)
    done = qdrant.export_qdrant(index.path, collection)
    assert (done.written, done.deleted) == (len(counting.written), len(counting.deleted))
    assert done.written + done.unchanged == len(index)
    return sorted(counting.written), sorted(counting.deleted)


def test_an_export_copies_what_has_changed(
    index: Index, model: Model, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant, "NUMBERS", 100)  # several batches
    written, deleted = export_counted(index, place, monkeypatch)
    assert (written, deleted) == (index.ids, [])
    assert export_counted(index, place, monkeypatch) == ([], [])

    pictures = tmp_path / "pictures"
    draw_picture(pictures / "blue/00.png", "another")
    os.utime(pictures / "blue/03.png", ns=(1, 1))
    draw_picture(pictures / "green/new.png", "new")
    (pictures / "red/01.png").unlink()
    index.update()
    index.remove(["blue/06.png"])
    written, deleted = export_counted(index, place, monkeypatch)
    assert written == ["blue/00.png", "green/new.png"]
    assert deleted == sorted(map(qdrant.point_id, ["blue/06.png", "red/01.png"]))
    assert export_counted(index, place, monkeypatch) == ([], [])
    index.compact()
    assert export_counted(index, place, monkeypatch) == ([], [])
    engine = QdrantIndex(place(), model)
    assert_equal_hits(engine.search(text="a dress", k=30), index.search(text="a dress", k=30))
    assert len(engine) == len(index)
    engine.close()


def test_a_column_that_changes_its_kind(place: Place, tmp_path: Path) -> None:
    """Numbers that become texts, and a column that is new."""
    vectors = draw_vectors(40)
    for number, columns in enumerate(
        ({"price": list(range(40))}, {"price": [*map(str, range(39)), "?"], "size": [1] * 40})
    ):
        path = make_index(tmp_path / f"index{number}", vectors, columns)
        write_head(path, read_head(path))
        qdrant.export_qdrant(path, place())
        engine = QdrantIndex(place())
        for where in ("price=3|5", "price!=3"):
            found, wanted = (i.search_vector(vectors[0, 0], Selection(50), [where]) for i in (engine, Index(path)))
            assert [(hit.id, hit.columns) for hit in found] == [(hit.id, hit.columns) for hit in wanted]
        engine.close()
    assert list(engine.kinds.items()) == [("price", "text"), ("size", "number")]


def test_cells_that_json_cannot_hold(place: Place, tmp_path: Path) -> None:
    vectors, infinite = draw_vectors(20), float("inf")
    path = make_index(tmp_path / "index", vectors, {"n": [infinite, -infinite, float("nan"), 1.5, None] * 4})
    qdrant.export_qdrant(path, place())
    engine = QdrantIndex(place())
    for where in ("n>1", "n<1", "n<=inf", "n!=1.5", "n=inf"):
        found, wanted = (i.search_vector(vectors[0, 0], Selection(50), [where]) for i in (engine, Index(path)))
        assert [hit.id for hit in found] == [hit.id for hit in wanted], where
    engine.close()


def test_an_export_that_was_killed_goes_on(index: Index, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "NUMBERS", 100)
    collection, calls = place(), []
    write = collection.write

    def fail_late(points: list[Point]) -> None:
        calls.append(points)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(points)

    monkeypatch.setattr(collection, "write", fail_late)
    with pytest.raises(KeyboardInterrupt):
        qdrant.export_qdrant(index.path, collection)
    collection = place()
    with pytest.raises(InputError, match="its export was interrupted"):
        QdrantIndex(collection)
    collection.close()
    written, _ = export_counted(index, place, monkeypatch)
    there = sum(len(points) for points in calls[1:3])
    assert there and len(written) == len(index) - there
    QdrantIndex(place()).close()


def as_another_model(path: Path) -> None:
    head = read_head(path)
    write_head(path, Head(**{**vars(head), "model": "another", "fingerprint": "of another"}))


def test_another_model_is_refused(index: Index, place: Place, tmp_path: Path) -> None:
    qdrant.export_qdrant(index.path, place())
    shutil.copytree(index.path, tmp_path / "copy")
    as_another_model(tmp_path / "copy")
    with pytest.raises(InputError, match="holds vectors of another model, embedded, not another: give another place"):
        qdrant.export_qdrant(tmp_path / "copy", place())
    (tmp_path / "tgcir").mkdir()
    other = Model(tiny_backbone("tgcir", tmp_path / "tgcir"), "other", device="cpu")
    collection = place()
    with pytest.raises(InputError, match="was built with another model, embedded, not other"):
        QdrantIndex(collection, other)
    collection.close()


def test_a_collection_of_others_is_refused(index: Index, place: Place) -> None:
    collection = place()
    collection.create((1, 3))
    collection.write([Point(qdrant.point_id("x"), {"id": "x"}, [1.0, 0.0, 0.0])])
    collection.close()
    with pytest.raises(InputError, match="was not made by spn4cir-index export"):
        qdrant.export_qdrant(index.path, place())
    collection = place()
    with pytest.raises(InputError, match="was not made by spn4cir-index export"):
        QdrantIndex(collection)
    collection.delete([qdrant.point_id("x")])
    collection.close()
    assert qdrant.export_qdrant(index.path, place()).written == len(index)  # an empty one is replaced


def test_a_missing_collection(place: Place, tmp_path: Path) -> None:
    collection = place()
    with pytest.raises(InputError, match="holds no index: make one by spn4cir-index export"):
        QdrantIndex(collection)
    collection.close()


def test_opening_by_address(index: Index, model: Model, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")
    folder = tmp_path / "engine"
    assert str(export_index(index.path, "qdrant", str(folder))) == "images: 20 written, 0 deleted, 0 unchanged"
    assert export_index(index.path, "qdrant", f"qdrant://{folder}").unchanged == 20
    for address in (f"qdrant:{folder}", f"qdrant://{folder}"):
        engine: SearchableIndex = Index.open(address, model)
        assert isinstance(engine, QdrantIndex) and len(engine) == 20
        with pytest.raises(InputError, match="is open in another process, or twice in this one"):
            Index.open(address, model)
        engine.close()
    assert open_engine(str(folder), model) is None and open_engine("C:\\pictures", model) is None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("milvus://host/x", "there is no engine 'milvus'; known: qdrant, qdrant\\+https"),
        ("qdrant://host:6333", "is no address of Qdrant: expected qdrant://HOST:PORT/COLLECTION or qdrant:FOLDER"),
        ("qdrant://host/x?exakt=false", "is no address of Qdrant"),
        ("qdrant+https:folder", "is no address of Qdrant"),
        ("qdrant://127.0.0.1:9/x", "^qdrant://127.0.0.1:9/x: Qdrant did not answer the request: .*Connection refused"),
    ],
)
def test_addresses_without_an_engine(address: str, message: str) -> None:
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    with pytest.raises(InputError, match=message) as caught:
        Index.open(address)
    assert "\n" not in str(caught.value)


def test_addresses_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("qdrant_client.QdrantClient", lambda **options: given.append(options))
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    plain, cloud = (open_collection(a) for a in ("qdrant://host/x", "qdrant+https://a.b:1/x?exact=false"))
    assert [(one["host"], one["port"], one["https"]) for one in given] == [("host", 6333, False), ("a.b", 1, True)]
    assert given[1]["api_key"] == "secret"
    assert [vars(one)["_exact"] for one in (plain, cloud)] == [True, False]


@pytest.mark.parametrize(("package", "address"), [("qdrant_client", "qdrant://h/x"), ("qdrant_edge", "qdrant:x")])
def test_packages_that_are_missing(package: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"Qdrant needs the package {package}: pip install 'spn4cir\[qdrant\]'"):
        Index.open(address)


def test_damaged_folders(index: Index, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")
    folder = tmp_path / "engine"
    export_index(index.path, "qdrant", str(folder))
    for number, (name, message) in enumerate(
        {
            "edge_config.json": "is damaged",
            "segments/*/segment.json": "is damaged",
            "segments/*/mutable_id_tracker.mappings": "is damaged|images are lost|was not made",
        }.items()
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(folder, copy)
        (file,) = copy.glob(name)
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(InputError, match=message) as caught:
            Index.open(f"qdrant:{copy}")
        assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="holds other files"):
        export_index(index.path, "qdrant", str(tmp_path / "full"))


def test_a_column_whose_name_has_a_quote(place: Place, tmp_path: Path) -> None:
    path = make_index(tmp_path / "index", draw_vectors(20), {'size "': [1] * 20})
    collection = place()
    with pytest.raises(InputError, match="Qdrant cannot filter on column"):
        qdrant.export_qdrant(path, collection)
    collection.close()


def test_unknown_exports(index: Index) -> None:
    with pytest.raises(InputError, match="an index is exported to npy or qdrant, not to 'csv'"):
        export_index(index.path, "csv", "x")
    with pytest.raises(InputError, match="there is no engine 'http'; known: qdrant"):
        export_index(index.path, "qdrant", "http://localhost:6333/x")
