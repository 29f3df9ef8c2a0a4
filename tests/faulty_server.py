"""A server of ``/v1/chat/completions`` that answers, and misbehaves as it is told to."""

import base64
import io
import json
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


class FaultyServer:
    """Captions an image by its colour; ``faults`` says what becomes of the first requests about each image.

    Attributes:
        requests: bodies, in the order of their arrival.
        times: when they came.
        most: how many waited for their answers at once.
        keys: the Authorization headers.
    """

    def __init__(self) -> None:
        self.faults: dict[str, list[str]] = {}  # colour, or "*" for every one → faults, the first first
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.most = self.now = 0
        self.slow, self.text = 0.0, "a plain picture of {colour}"
        self._seen, self._lock = Counter[str](), threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.handle(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            self.requests.append({**body, "path": request.path})
            self.times.append(time.monotonic())
            self.keys.append(request.headers.get("Authorization"))
            self.now += 1
            self.most = max(self.most, self.now)
            colour = colour_of(body["messages"][-1]["content"])
            faults = self.faults.get(colour, self.faults.get("*", []))
            fault = faults[self._seen[colour]] if self._seen[colour] < len(faults) else ""
            self._seen[colour] += 1
        kind, _, detail = fault.partition(":")
        time.sleep(float(detail) if kind == "slow" else self.slow)
        with self._lock:
            self.now -= 1  # before the answer leaves: a client that has it may send its next request at once
        self._answer(request, fault, colour)

    def _answer(self, request: BaseHTTPRequestHandler, fault: str, colour: str) -> None:
        text = self.text.format(colour=colour)
        good = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        content = json.dumps(good).encode()
        kind, _, detail = fault.partition(":")
        if kind == "status":
            code, _, after = detail.partition(":")
            message = {"error": {"message": f"told\nyou so {code}, key {request.headers.get('Authorization')}"}}
            send(request, json.dumps(message).encode(), int(code), after)
        elif kind == "half":  # fewer bytes than were promised
            send(request, content[: len(content) // 2], length=len(content))
        elif kind == "torn":  # as many as were promised, but half of the answer
            send(request, content[: len(content) // 2])
        elif kind == "drop":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()  # a reset
            request.close_connection = True
        elif kind == "silent":  # closed in order, without a word
            request.close_connection = True
        elif kind == "answer":
            send(request, detail.encode())
        else:
            send(request, content)


def send(request: BaseHTTPRequestHandler, content: bytes, code: int = 200, after: str = "", length: int = 0) -> None:
    try:
        request.send_response(code)
        request.send_header("Content-Length", str(length or len(content)))
        if after:
            request.send_header("Retry-After", after)
        if 300 <= code < 400:
            request.send_header("Location", "http://127.0.0.1:9/elsewhere")
        request.end_headers()
        request.wfile.write(content)
    except OSError:
        pass  # the other side waits no more


def colour_of(content: Any) -> str:
    """The colour of the first pixel in a request's image; of text alone, the text."""
    if isinstance(content, str):
        return content
    url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2])))
    assert picture.mode == "RGB"
    return "-".join(map(str, picture.getpixel((0, 0))))  # type: ignore[arg-type]
