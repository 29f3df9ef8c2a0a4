"""The REST service answers what the Python API finds, and every problem in one line."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
from fastapi.testclient import TestClient

from spn4cir import app_cli
from spn4cir.app.desk import Desk
from spn4cir.app.limits import Limits
from spn4cir.app.page import _heading
from spn4cir.app.rest import KEPT_UPLOADS, Uploads, build_service
from spn4cir.app.served import ServedIndex, open_served
from spn4cir.checkpoints import save_model
from spn4cir.errors import InputError
from spn4cir.index.local import Index
from spn4cir.model import Model
from tests.served_index import HOSTILE, KINDS, NAMES, huge_png, png
from tests.tiny_backbones import tiny_backbone

LIMITS = Limits(upload_bytes=1_000_000, pixels=2_000_000, hits=20, parts=3)


@pytest.fixture(scope="module")
def served(shop_index: Path) -> Iterator[list[ServedIndex]]:
    opened = open_served([str(shop_index)], LIMITS)
    yield opened
    opened[0].encoder.close()


@pytest.fixture(scope="module")
def client(served: list[ServedIndex]) -> TestClient:
    return TestClient(build_service(served, LIMITS, Uploads()), raise_server_exceptions=False)


def test_a_search_finds_what_python_finds(client: TestClient, shop_index: Path, tmp_path: Path) -> None:
    """Uploads, ids, texts, negatives, filters; without a path of this machine."""
    (tmp_path / "up.png").write_bytes(png())
    told = client.post(
        "/search", files=[("image", ("up.png", png())), ("unlike", ("x.png", png(colour="blue")))],
        data={"image_id": "shoes/3.png", "text": "in red", "without": "dots", "k": 5, "where": "category=dress|shirt"},
    )  # fmt: skip
    (tmp_path / "down.png").write_bytes(png(colour="blue"))
    hits = Index.open(shop_index).search(
        [str(tmp_path / "up.png"), "shoes/3.png"], "in red", 5, unlike=str(tmp_path / "down.png"), without="dots",
        where=["category=dress|shirt"],
    )  # fmt: skip
    assert told.status_code == 200
    found = told.json()["hits"]
    assert [one["id"] for one in found] == [hit.id for hit in hits] and len(hits) == 5
    assert [one["score"] for one in found] == pytest.approx([hit.score for hit in hits], abs=1e-5)
    assert [one["columns"] for one in found] == [dict(hit.columns) for hit in hits]
    assert "shoes/3.png" not in [one["id"] for one in found]
    assert str(shop_index.parent) not in told.text and str(Path.cwd()) not in told.text


def test_no_picture_is_kept_while_a_query_waits(
    client: TestClient, served: list[ServedIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are reduced to the model's pixels one by one; the encoder is given those alone."""
    given: list[Any] = []
    encode = served[0].encoder._embed

    def embed(images: Any, texts: Any) -> Any:
        given.extend(images)
        return encode(images, texts)

    monkeypatch.setattr(served[0].encoder, "_embed", embed)
    told = client.post("/search", files=[("image", ("a.png", png((900, 900))))] * 2, data={"unlike_id": "ü.png"})
    assert told.status_code == 200 and len(given) == 3
    assert {tuple(one.shape) for one in given} == {tuple(served[0].index.model.pixels(Image.new("RGB", (9, 9))).shape)}


def test_requests_at_once_are_answered_alike(client: TestClient, served: list[ServedIndex]) -> None:
    """16 clients, each with a query of its own; some are encoded together; a corrupt upload fails alone."""
    alone = [client.post("/search", data={"text": f"shoe {n}"}).json() for n in range(16)]
    before = dict(served[0].encoder.sizes)

    def ask(n: int) -> Any:
        if n == 99:
            return client.post("/search", files={"image": b"no picture"})
        return client.post("/search", data={"text": f"shoe {n}"})

    with ThreadPoolExecutor(17) as pool:
        told = list(pool.map(ask, [99, *range(16)] * 3))
    assert [one.status_code for one in told] == ([422] + [200] * 16) * 3
    for n, one in enumerate(told):
        if n % 17:
            assert [hit["id"] for hit in one.json()["hits"]] == [hit["id"] for hit in alone[n % 17 - 1]["hits"]]
    sizes = {size: count - before.get(size, 0) for size, count in served[0].encoder.sizes.items()}
    assert max(size for size, count in sizes.items() if count) > 1


@pytest.mark.parametrize(("form", "files", "status", "words"), [
    ({}, None, 422, "a search needs an image or a text"),
    ({"text": "  "}, None, 422, "a text must say something"),
    ({"text": "a" * 10_000}, None, 422, "a text has 10000 characters"),
    ({"text": ["a", "b", "c", "d"]}, None, 422, "more than 3 pictures or texts"),
    ({"image_id": "/etc/passwd"}, None, 404, "has no image '/etc/passwd'"),
    ({"image_id": "../shop/table.csv"}, None, 404, "has no image '../shop/table.csv'"),
    ({"text": "a", "k": 21}, None, 422, "k is 21: at most 20"),
    ({"text": "a", "k": 0}, None, 422, "k must be at least 1"),
    ({"text": "a", "k": "ten"}, None, 422, "k: Input should be a valid integer"),
    ({"text": "a", "min_z": "nan"}, None, 422, "min_z must be a finite number"),
    ({"text": "a", "where": "colour=red"}, None, 422, "no column 'colour'"),
    ({"text": "a", "group": "colour"}, None, 422, "no column 'colour'"),
    ({"text": "a", "index": 1}, None, 422, "index is 1: this server has 1"),
    ({"text": "a", "txet": "b"}, None, 422, "there is no value 'txet'; known: image"),
    ({"image": "a path"}, None, 422, "image: send a file"),
    ({"unlike": "a path"}, None, 422, "unlike: send a file"),
    ({"text": "in red"}, {"image": b"no picture"}, 422, "is no picture"),
    ({"text": "in red"}, {"image": png((300, 300))[:200]}, 422, "does not decode"),
    ({"text": "in red"}, {"image": huge_png()}, 413, "100.0 megapixels: at most 2"),
    ({"text": "in red"}, {"unlike": b"\0" * 1_000_001}, 413, "at most 1 MB"),
    ({}, {"image": png((1000, 900)), "unlike": png((1200, 1000))}, 413, "2.1 megapixels together: at most 2"),
])  # fmt: skip
def test_bad_requests(client: TestClient, form: dict[str, Any], files: Any, status: int, words: str) -> None:
    """Each is one line of JSON, and the service goes on."""
    told = client.post("/search", data=form, files=files)
    assert told.status_code == status and list(told.json()) == ["message"], told.text
    assert words in told.json()["message"] and "\n" not in told.json()["message"]
    assert client.post("/search", data={"text": "a shoe"}).status_code == 200


def test_other_problems_are_json_too(client: TestClient) -> None:
    """A method that is none, a body that is no form, an address without anything."""
    form = {"content-type": "multipart/form-data; boundary=a"}
    asked = [("GET", "/search"), ("GET", "/nothing"), ("POST", "/upload"), ("POST", "/search")]
    for method, path in asked:
        told = client.request(method, path, content=b"x", headers=form)
        assert told.status_code in (400, 404, 405, 422) and list(told.json()) == ["message"], told.text


def test_other_methods(client: TestClient) -> None:
    """Are refused, with the one to use."""
    for path in ("/search", "/upload"):
        told = client.get(path)
        assert told.status_code == 405 and told.headers["allow"] == "POST"
        assert told.json() == {"message": f"{path} takes POST, not GET"}


def test_json_is_no_form(client: TestClient) -> None:
    told = client.post("/search", json={"text": "a shoe"})
    assert told.status_code == 422 and told.json() == {"message": "send a form (multipart), not JSON"}


def test_a_failure_is_one_line(
    client: TestClient, served: list[ServedIndex], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal has the rest."""
    monkeypatch.setattr(served[0].index, "search_vector", None)
    told = client.post("/search", data={"text": "a shoe"})
    assert told.status_code == 500 and told.json() == {"message": "the server failed: its terminal says why"}
    assert "TypeError" in capsys.readouterr().err


def test_a_full_queue(client: TestClient, served: list[ServedIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served[0].encoder._queue, "maxsize", -1)
    monkeypatch.setattr(served[0].encoder._queue, "put_nowait", _raise_full)
    told = client.post("/search", data={"text": "a shoe"})
    assert told.status_code == 503 and told.headers["retry-after"] == "1" and "wait already" in told.json()["message"]


def _raise_full(item: object) -> None:
    import queue

    raise queue.Full


@pytest.mark.parametrize("name", [name for name in NAMES if "%" not in name])  # the test client decodes it twice
def test_thumbnails(client: TestClient, name: str) -> None:
    """By id, whatever letters it has."""
    told = client.get(f"/image/{quote(name, safe='')}")
    assert told.status_code == 200 and told.headers["content-type"] == "image/webp" and told.content[:4] == b"RIFF"


@pytest.mark.parametrize("path", [
    "/image/nothing", "/image/%2Fetc%2Fpasswd", "/image/..%2Ftable.csv", "/image/table.csv", "/image/", "/image/a%00b",
])  # fmt: skip
def test_nothing_but_images_of_the_index(client: TestClient, path: str) -> None:
    told = client.get(path)
    assert told.status_code == 404 and list(told.json()) == ["message"]


def test_the_description(client: TestClient) -> None:
    """Without a script, and without another server; every value and status is in it."""
    told = client.get("/docs").text
    assert "<script" not in told and "//" not in told.replace("http://testserver", "")
    assert all(f"<td>{name}</td>" in told for name in ("image", "image_id", "text", "where", "k", "200", "413", "503"))
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/search", "/image/{image_id}"}
    assert json.dumps(schema).count("megapixels") == 0


def test_two_indexes_and_hostile_titles(client: TestClient, shop_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its number; titles are data and stay as they are in JSON."""
    both = open_served([str(shop_index), str(shop_index)], LIMITS)
    two = TestClient(build_service(both, LIMITS, Uploads()))
    first, second = (two.post("/search", data={"image_id": "ü.png", "k": 20, "index": n}).json() for n in (0, 1))
    assert [one["id"] for one in first["hits"]] == [one["id"] for one in second["hits"]]
    assert all(one["image"].endswith("?index=1") for one in second["hits"])
    assert two.get(second["hits"][0]["image"]).status_code == 200
    titles = {one["columns"]["title"] for one in two.post("/search", data={"text": "x", "k": 20}).json()["hits"]}
    assert titles & set(HOSTILE) or len(titles) == 20
    assert both[0].categories() == sorted(KINDS)
    assert Desk(both, LIMITS, Uploads()).categories == sorted(KINDS)
    assert 'href="#results-1"' in _heading(both) and "#results" not in _heading(both[:1])
    monkeypatch.setattr(both[1].index, "column_values", lambda column: ["dress", "shirt", "sock"])
    assert Desk(both, LIMITS, Uploads()).categories == ["dress", "shirt"]
    monkeypatch.setattr(both[1].index, "column_values", lambda column: [f"kind {n}" for n in range(7)])
    assert both[1].categories() == [] == Desk(both, LIMITS, Uploads()).categories  # 30 images: 4 of each
    assert len({hit.id for hit in both[0].sample(24)}) > 12
    for one in both:
        one.encoder.close()


def test_an_index_that_is_removed_and_comes_back(shop_index: Path, tmp_path: Path) -> None:
    """A message, and no path; the server lives on."""
    moved = tmp_path / "shop.index"
    shutil.copytree(shop_index, moved)
    opened = open_served([str(moved)], LIMITS)
    one = TestClient(build_service(opened, LIMITS, Uploads()))
    assert one.post("/search", data={"text": "a shoe"}).status_code == 200
    moved.rename(tmp_path / "elsewhere")
    for told in (one.post("/search", data={"text": "a shoe"}), one.post("/search", data={"image_id": "ü.png"})):
        assert told.status_code == 503 and "the index shop.index has been removed" in told.json()["message"]
        assert str(tmp_path) not in told.text
    (tmp_path / "elsewhere").rename(moved)
    assert one.post("/search", data={"text": "a shoe"}).status_code == 200
    Index.open(moved).remove(["ü.png"])
    assert one.get("/image/%C3%BC.png").status_code == 404
    assert len(opened[0].index) == 29
    opened[0].encoder.close()


def test_a_picture_that_is_gone(tmp_path: Path, served: list[ServedIndex]) -> None:
    """One line without its path."""
    from tests.served_index import build_shop

    build_shop(tmp_path)
    opened = open_served([str(tmp_path / "shop.index")], LIMITS)
    (tmp_path / "shop" / "shoes" / "1.png").unlink()
    one = TestClient(build_service(opened, LIMITS, Uploads()))
    told = one.post("/search", data={"image_id": "shoes/1.png"})
    assert told.status_code == 404 and "is missing or does not decode" in told.json()["message"]
    assert str(tmp_path) not in told.text
    opened[0].encoder.close()


def test_uploads_of_the_page() -> None:
    """Each is taken once; they are reduced, and the oldest are dropped."""
    uploads = Uploads()
    tokens = [uploads.put(Image.new("RGB", (4000, 10))) for _ in range(KEPT_UPLOADS + 1)]
    assert uploads.take(tokens[-1]).width == 1024
    for token in (tokens[-1], tokens[0], "none"):
        with pytest.raises(InputError, match="upload it again"):
            uploads.take(token)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line names the extra, before an index is built."""
    from spn4cir.app_cli import demo_command

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["spn4cir-demo"])
    with pytest.raises(SystemExit):
        demo_command()
    assert capsys.readouterr().err == "error: the page needs Gradio: pip install 'spn4cir[app]'\n"


def test_help_imports_nothing_heavy() -> None:
    """Neither torch nor Gradio."""
    code = (
        "import sys; from spn4cir.app_cli import demo_command; sys.argv = ['spn4cir-demo', '--help']\n"
        "try:\n    demo_command()\n"
        "except SystemExit:\n    print({'torch', 'gradio', 'fastapi'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.endswith("set()\n") and "two models side by side" in told


def test_a_missing_index_is_seen_at_once(tmp_path: Path) -> None:
    """Before torch and Gradio are imported."""
    code = (
        "import sys; from spn4cir.app_cli import demo_command; sys.argv = ['spn4cir-demo', '--index', 'nosuch']\n"
        "try:\n    demo_command()\n"
        "except SystemExit:\n    print({'torch', 'gradio', 'fastapi'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert told.stdout == "set()\n" and told.stderr.startswith("error: nosuch holds no index: make one by")


def test_what_is_opened_without_an_index(
    runs: Path, shop_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only index; else one over the embedded pictures, by the newest run on them, or by the embedded weights."""
    built: list[tuple[str, str]] = []

    def build(model: Model, source: str, path: Path) -> None:
        built.append((model.name, source))
        shutil.copytree(shop_index, path)

    monkeypatch.setattr(Index, "build", build)
    args = argparse.Namespace(index=None, model=None)
    (first,) = app_cli.addresses_of(args)
    assert built == [("embedded", "emoji")] and Path(first).parent == runs / "index"
    assert "model: embedded weights, since there is no run" in capsys.readouterr().out
    assert app_cli.addresses_of(args) == [first] and len(built) == 1
    args.model = ["embedded"]
    assert app_cli.addresses_of(args) == [first] and len(built) == 1
    shutil.rmtree(runs / "index")
    run = runs / "emoji" / "clip4cir" / "stage1-20260101-000000"
    save_model(run, tiny_backbone("clip4cir", tmp_path), {})
    (run / "result.json").write_text("{}", encoding="utf-8")
    args.model = None
    (second,) = app_cli.addresses_of(args)
    assert built[1:] == [(str(run.resolve()), "emoji")] and Path(second).name.startswith(f"emoji-{run.name}-")
    assert f"model: {run}" in capsys.readouterr().out
    args.index = ["a", "b"]
    assert app_cli.addresses_of(args) == ["a", "b"]
