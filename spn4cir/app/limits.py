"""What a server takes: bytes of a request, pixels of a picture, which routes; all else is refused in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from threading import Condition
from typing import Any

from PIL import Image

from spn4cir.errors import InputError
from spn4cir.images import decode
from spn4cir.pixels import register_openers
from spn4cir.types import ImageRef

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FORM_BYTES = 100_000
"""Bytes of a request beside its picture: texts, ids, conditions."""
DRAINED = 10
"""Times the most bytes of a request that are read and dropped before one that is too large is answered."""
POLICY = "; ".join((
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "frame-ancestors 'self'",
    "form-action 'self'",
))  # fmt: skip
HEADERS = (
    (b"content-security-policy", POLICY.encode()),  # no browser asks another server for anything
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Refused(InputError):
    """A request that is refused, with its HTTP status, such as 404, 413, 422 or 503."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        upload_bytes: of a request.
        pixels: of all uploaded pictures of a request, read from their headers before one is decoded; and of all
            pictures that are decoded at once.
        hits: of a search.
        parts: pictures, and texts, of a query.
        waiting: queries that wait to be encoded; further ones are refused.
        batch_size: queries that are encoded at once.
    """

    upload_bytes: int = 20_000_000
    pixels: int = 50_000_000
    hits: int = 200
    parts: int = 8
    waiting: int = 128
    batch_size: int = 32

    @cached_property
    def decoding(self) -> PixelBudget:
        """Pixels that all requests together decode at once."""
        return PixelBudget(self.pixels)


class PixelBudget:
    """Bounds the pixels that several threads hold at once: a thread waits until its picture fits in.

    Args:
        whole: pixels; a picture that has more is held alone.

    Example:
        >>> with PixelBudget(1_000_000).hold(640 * 480):
        ...     pass  # decode and reduce the picture
    """

    def __init__(self, whole: int):
        self._whole, self._free, self._changed = whole, whole, Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait for these pixels, and hold them in the block."""
        taken = min(pixels, self._whole)
        with self._changed:
            self._changed.wait_for(lambda: taken <= self._free)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


def check_uploads(files: Sequence[bytes], limits: Limits) -> list[int]:
    """The pixels of each uploaded picture, read from its header.

    Raises:
        Refused: if they are too large, alone or together, or one is no picture.
    """
    pixels = [count_upload_pixels(data, limits) for data in files]
    if sum(pixels) > limits.pixels:
        size = f"{sum(pixels) / 1e6:.1f} megapixels"
        raise Refused(413, f"the {len(files)} pictures have {size} together: at most {limits.pixels / 1e6:g}")
    return pixels


def count_upload_pixels(data: bytes, limits: Limits) -> int:
    """The pixels of an uploaded picture, read from its header. Raises ``Refused`` as ``read_upload``."""
    if len(data) > limits.upload_bytes:
        raise Refused(413, too_many_bytes(limits))
    register_openers()
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture is too large: at most {limits.pixels / 1e6:g} megapixels") from None
    except Exception:  # hostile bytes: a decoder may raise anything
        raise Refused(422, "the upload is no picture, or of an unknown format") from None
    if width * height > limits.pixels:
        size = f"{width} × {height} pixels, {width * height / 1e6:.1f} megapixels"
        raise Refused(413, f"the picture has {size}: at most {limits.pixels / 1e6:g} megapixels")
    return width * height


def read_upload(data: bytes, limits: Limits, own_mode: bool = False) -> Image.Image:
    """Decode an uploaded picture, as ``images.decode`` does; whoever calls it holds its pixels of ``limits.decoding``.

    Raises:
        Refused: if it is too large, or is no picture that decodes.
    """
    count_upload_pixels(data, limits)
    try:
        return decode(ImageRef(lambda: data), own_mode)
    except Exception:  # hostile bytes again: whatever a decoder raises, the picture is refused
        raise Refused(422, "the picture does not decode: it is damaged or cut short") from None


def too_many_bytes(limits: Limits) -> str:
    """The message for a request that is too large."""
    return f"the upload is too large: at most {limits.upload_bytes / 1e6:g} MB"


class Gate:
    """ASGI middleware: counts the bytes of each request while they arrive, and lets no other route through.

    Args:
        app: what answers.
        limits: how many bytes a request may have.
        is_open: whether a path is answered; all others are 404.
    """

    def __init__(self, app: App, limits: Limits, is_open: Callable[[str], bool]):
        self.app, self.limits, self.is_open = app, limits, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with status 404 or 413 and a message as JSON."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self.is_open(scope["path"]):
            await _refuse(send, Refused(404, "there is nothing at this address"))
            return
        most, count, begun = self.limits.upload_bytes + FORM_BYTES, 0, False

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > most:
                raise _TooLarge
            return message

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if declared.isdigit() and int(declared) > most:
                raise _TooLarge
            await self.app(scope, counted, with_headers)
        except _TooLarge:
            more = True
            while more and count < DRAINED * most:  # a client that is cut off while it sends sees no answer
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
                count += len(message.get("body", b""))
            if not begun:
                await _refuse(send, Refused(413, too_many_bytes(self.limits)))


class RefusalsAsJson:
    """ASGI middleware: an error of another kind, such as plain text, becomes JSON with a message of one line.

    Gradio's own routes, whose errors the page reads, stay as they are.

    Args:
        app: what answers.
    """

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; an error without a message is given that of its status."""
        if scope["type"] != "http" or scope["path"].startswith("/gradio_api/"):
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def checked(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_refusal(send, start, body)

        await self.app(scope, receive, checked)


async def _send_refusal(send: Send, start: Message, body: bytes) -> None:
    if body.startswith(b'{"message"'):
        await send(start)
        await send({"type": "http.response.body", "body": body})
        return
    status = start["status"]
    advice = "unknown host name: allow it by --public-name" if b"host header" in body else ""
    await _refuse(send, Refused(status, advice or HTTPStatus(status).phrase.lower()))


class _TooLarge(BaseException):
    """Passes through the handlers of ``Exception`` between the body and the gate."""


async def _refuse(send: Send, refused: Refused) -> None:
    body = json.dumps({"message": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *HEADERS]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
