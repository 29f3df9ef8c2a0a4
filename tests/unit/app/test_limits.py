"""What a server takes, and what it refuses: bytes, pixels, files that are no picture, other routes."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from spn4cir.app import limits as module
from spn4cir.app.limits import (
    FORM_BYTES,
    Gate,
    Limits,
    PixelBudget,
    RefusalsAsJson,
    Refused,
    check_uploads,
    read_upload,
)
from tests.served_index import huge_png, png

SMALL = Limits(upload_bytes=1_000_000, pixels=2_000_000)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


def test_a_picture_is_decoded() -> None:
    assert read_upload(png((7, 5)), SMALL).size == (7, 5)


def test_pixels_are_counted_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few kilobytes that holds 100 megapixels is never decoded."""
    data = huge_png()
    assert len(data) < 100_000
    monkeypatch.setattr(module, "decode", None)
    with pytest.raises(Refused, match=r"10000 × 10000 pixels, 100.0 megapixels: at most 2 megapixels") as error:
        read_upload(data, SMALL)
    assert error.value.status == 413


@pytest.mark.parametrize(("data", "status", "words"), [
    (b"", 422, "is no picture"),
    (b"no picture", 422, "is no picture"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, 422, "is no picture"),
    (png((600, 400))[:-200], 422, "does not decode"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", 422, "is no picture"),
    (EPS, 422, "does not decode"),
    (b"\0" * 1_000_001, 413, "at most 1 MB"),
], ids=["empty", "text", "header", "cut", "svg", "program", "bytes"])  # fmt: skip
def test_uploads_that_are_refused(data: bytes, status: int, words: str) -> None:
    """One line each, without an address of an object."""
    with pytest.raises(Refused, match=words) as error:
        read_upload(data, SMALL)
    assert error.value.status == status and "\n" not in str(error.value) and "0x" not in str(error.value)


def send(chunks: list[bytes], path: str = "/search", headers: tuple[tuple[bytes, bytes], ...] = ()) -> dict[str, Any]:
    """What a gate answers to a body in chunks, and how many bytes its application was given."""
    given = {"bytes": 0}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            given["bytes"] += len(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    waiting = [{"type": "http.request", "body": body, "more_body": True} for body in chunks]
    waiting[-1]["more_body"] = False
    answers: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def answer(message: Any) -> None:
        answers.append(message)

    gate = Gate(app, SMALL, lambda path: path == "/search")
    asyncio.run(gate({"type": "http", "path": path, "headers": headers}, receive, answer))
    return {"status": answers[0]["status"], "headers": dict(answers[0]["headers"]), "body": answers[1]["body"], **given}


def test_bytes_are_counted_while_they_arrive() -> None:
    """Also where no length is declared; what is too large is dropped, and answered at its end."""
    most = SMALL.upload_bytes + FORM_BYTES
    assert send([b"x" * most])["status"] == 200
    refused = send([b"x" * 500_000] * 5)
    assert refused["status"] == 413 and refused["bytes"] <= most and b"at most 1 MB" in refused["body"]


def test_a_declared_length_is_refused_at_once() -> None:
    told = send([b"x"], headers=((b"content-length", b"99000000"),))
    assert told["status"] == 413 and told["bytes"] == 0


def test_no_other_route_is_answered() -> None:
    """And a browser is told to ask no other server."""
    told = send([b""], "/gradio_api/file=/etc/passwd")
    assert told["status"] == 404 and told["bytes"] == 0
    assert b"default-src 'self'" in send([b""])["headers"][b"content-security-policy"]


def test_pixels_of_all_pictures_are_counted_before_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are each small enough may not be too large together."""
    monkeypatch.setattr(module, "decode", None)
    assert check_uploads([png((1000, 900)), png((10, 10))], SMALL) == [900_000, 100]
    with pytest.raises(Refused, match=r"the 3 pictures have 2\.7 megapixels together: at most 2") as error:
        check_uploads([png((1000, 900))] * 3, SMALL)
    assert error.value.status == 413


def test_threads_hold_no_more_pixels_than_told() -> None:
    """Small pictures at once, a huge one alone; what fails gives its pixels back."""
    budget, held, most = PixelBudget(100), [0], [0]

    def use(pixels: int) -> None:
        with budget.hold(pixels):
            held[0] += pixels
            most[0] = max(most[0], held[0])
            time.sleep(0.01)
            held[0] -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [40, 40, 60, 100, 30, 30, 30, 90, 10, 50]))
    assert 60 <= most[0] <= 100
    with pytest.raises(ValueError, match="broken"), budget.hold(1000):
        raise ValueError("broken")
    use(100)


@pytest.mark.parametrize(("status", "chunks", "path", "told"), [
    (404, [b"Not ", b"Found"], "/static/../x", b'{"message": "not found"}'),
    (405, [b'{"detail":"Method Not Allowed"}'], "/image/a", b'{"message": "method not allowed"}'),
    (422, [b'{"message":"a line"}'], "/search", b'{"message":"a line"}'),
    (200, [b"a ", b"page"], "/", b"a page"),
    (404, [b'{"detail":"x"}'], "/gradio_api/queue/data", b'{"detail":"x"}'),
])  # fmt: skip
def test_errors_of_any_kind_are_one_line_of_json(status: int, chunks: list[bytes], path: str, told: bytes) -> None:
    """But for routes that the page's own scripts read."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        for n, body in enumerate(chunks):
            await send({"type": "http.response.body", "body": body, "more_body": n + 1 < len(chunks)})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    asyncio.run(RefusalsAsJson(app)({"type": "http", "path": path}, receive, send))
    assert sent[0]["status"] == status and b"".join(one["body"] for one in sent[1:]) == told
