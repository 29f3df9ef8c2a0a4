"""Any OpenAI-compatible server as an engine: requests at once, a bound on their rate, retries with back-off."""

import base64
import email.utils
import hashlib
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from spn4cir.data_gen.ask import Answer, Engine, Question, Try
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.types import ImageRef

KEY = "SPN4CIR_API_KEY"  # the environment variable that holds the secret; it is never written anywhere
REFUSALS = (400, 413, 415, 422, 451)  # of one picture or text: too large, too thin, or against a content filter
AGAIN = (408, 409, 425, 429)  # and 5xx: refusals that may pass
HINTS = dict.fromkeys((401, 403), f"; the key is taken from {KEY}")
HINTS[404] = "; is the address right, and the model's name?"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a request is sent again: doubled each time
LOSSLESS = 1 << 20  # pixels of an image that is sent as it is; larger ones as a good JPEG


class Trouble(NamedTuple):
    """Why a request got no answer."""

    text: str
    is_refusal: bool = False  # whether the same request would be refused again: what it asks about is the reason
    wait: float = 0.0  # seconds that the server asks for
    away: bool = False  # whether the server answers nobody now, rather than not this question


class Endpoint(Engine):
    """A model behind ``/v1/chat/completions``; one question is one block.

    ``config`` bounds ``requests`` and ``requests_per_minute`` of all processes together. Raises ``InputError`` if the
    address is none, or the key cannot be one.
    """

    block = 1

    def __init__(self, address: str, model: str, config: GenerateConfig, max_new_tokens: int):
        self.address, self.model, self.config = chat_address(address), model, config
        self.max_new_tokens, processes = max_new_tokens, Processes().count
        self.workers = max(1, config.requests // processes)
        # not the address: the same model may be served elsewhere tomorrow, and what it said stays good
        self.about: dict[str, Any] = {"engine": "server", "model": model, "max_new_tokens": max_new_tokens}
        rate = config.requests_per_minute
        self._gap = 60 * processes / rate if rate else 0.0
        self._lock, self._next, self._answered = threading.Lock(), 0.0, 0
        self._closed, self._final = threading.Event(), InputError(f"{self.address}: given up")
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"{KEY} holds letters that no key has")  # http.client would show it
        self._opener = urllib.request.build_opener(_Stay)

    def close(self) -> None:
        """No request is sent again."""
        self._closed.set()

    def answer(self, questions: Sequence[Question], turn: Try) -> list[Answer]:
        """Send each question, again if need be. Raises ``InputError`` if the server is away, or refuses for good."""
        return [self._answer(question, turn) for question in questions]

    def probe(self, like: Question) -> bool:
        """Whether the server describes a plain picture, or a colour where no picture is asked about.

        Two are tried, as a filter may refuse anything.
        """
        for colour in ("gray", "white"):
            picture = ImageRef(partial(_plain_picture, colour)) if like.image else None
            what = "image" if picture else f"colour {colour}"
            asked = Question(f"probe {colour}", f"describe the {what} in 3 words", picture)
            if self._answer(asked, Try(0, 0)).problem is None:
                return True
        return False

    def _answer(self, question: Question, turn: Try) -> Answer:
        body = json.dumps(self._request(question, turn)).encode()
        sent, answered = 0, -1
        while True:
            self._wait_for_turn()
            found = self._send(body)
            if isinstance(found, Trouble) and found.is_refusal:
                return Answer("", problem=found.text)
            if isinstance(found, Answer):
                self._answered += 1
                return found
            if found.away and answered != self._answered:
                sent, answered = 0, self._answered  # others got an answer meanwhile, so waiting is not in vain
            sent += 1
            if sent > self.config.retries:
                if found.away:
                    raise self._stop(f"{found.text}; what was answered stays, and the same command goes on from there")
                return Answer("", problem=found.text)
            self._pause(sent, found)

    def _request(self, question: Question, turn: Try) -> dict[str, Any]:
        from spn4cir.images import open_image

        messages: list[dict[str, Any]] = list(question.chat)
        if question.image:
            picture = {"type": "image_url", "image_url": {"url": make_data_url(open_image(question.image))}}
            messages[-1]["content"] = [picture, {"type": "text", "text": messages[-1]["content"]}]
        request = {"model": self.model, "messages": messages, "max_tokens": self.max_new_tokens, "temperature": 0.0}
        if turn.number:
            named = repr((turn.seed, turn.number, question.key)).encode()
            seed = int.from_bytes(hashlib.sha256(named).digest()[:4], "big") >> 1
            request |= {"temperature": 0.7, "top_p": 0.9, "seed": seed}
        return request

    def _send(self, body: bytes) -> Answer | Trouble:
        """One request. Raises ``InputError`` for what no repetition would mend."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.address, body, headers)
        try:
            with self._opener.open(request, timeout=self.config.timeout) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            return self._refused(error)
        except (http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)  # of a URLError
            if isinstance(reason, TimeoutError):
                return Trouble(f"{self.address} gave no answer within {self.config.timeout:g} seconds")
            dropped = reason is error or isinstance(reason, ConnectionResetError | BrokenPipeError)
            told = "dropped the connection" if dropped else "cannot be reached"
            return Trouble(f"{self.address} {told}: {_line(str(reason) or type(reason).__name__)}", away=not dropped)
        return read_answer(content)

    def _refused(self, error: urllib.error.HTTPError) -> Trouble:
        content = b""
        with suppress(http.client.HTTPException, OSError):
            content = error.read(100_000)
        told = f"{self.address} answers {error.code}: {_message(content) or error.reason}"
        told = told.replace(self._key or "\0", "***")
        if error.code in REFUSALS:
            return Trouble(told, is_refusal=True)
        if error.code not in AGAIN and error.code < 500:
            raise self._stop(told + HINTS.get(error.code, ""))
        return Trouble(told, wait=_seconds(error.headers.get("Retry-After")), away=error.code in (429, 503))

    def _wait_for_turn(self) -> None:
        """Wait until a request may be sent: neither above the rate, nor while the server wants none."""
        while True:
            self._sleep(0)  # only if nothing stops it
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return
                left = self._next - now
            self._sleep(left)

    def _pause(self, sent: int, trouble: Trouble) -> None:
        """Back off; if the server says for how long, then for all requests."""
        if trouble.wait:
            with self._lock:
                self._next = max(self._next, time.monotonic() + trouble.wait)
        pause = min(FIRST_PAUSE * 2 ** (sent - 1), LONGEST_PAUSE)
        self._sleep(max(pause * random.uniform(0.5, 1.0), trouble.wait))

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise self._final

    def _stop(self, reason: str) -> InputError:
        """Send nothing more: the error that all threads raise, whichever of them is asked first."""
        with self._lock:
            if not self._closed.is_set():
                self._final = InputError(reason)
                self._closed.set()
            return self._final


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: the key would go along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _plain_picture(colour: str) -> bytes:
    """A PNG of one colour, of a size that every model takes."""
    content = io.BytesIO()
    Image.new("RGB", (224, 224), colour).save(content, "png")
    return content.getvalue()


def chat_address(address: str) -> str:
    """The whole address of the chat, from one with or without ``/v1``. Raises ``InputError`` if it is none of http."""
    parts = urlsplit(address.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"endpoint must be an address such as http://host:8000/v1, got {address!r}")
    if "@" in parts.netloc:
        raise InputError(f"endpoint must not hold a password: the key is taken from {KEY} in the environment")
    whole = address.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{whole}{'' if urlsplit(whole).path else '/v1'}/chat/completions"


def make_data_url(picture: Image.Image) -> str:
    """Return a data URL that holds an RGB image: as a PNG, or as a JPEG of good quality if it is large."""
    content, kind = io.BytesIO(), "png" if picture.width * picture.height <= LOSSLESS else "jpeg"
    picture.save(content, kind, compress_level=1, quality=95)  # of a PNG, of a JPEG
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def read_answer(content: bytes) -> Answer | Trouble:
    """The answer in what a server sent; or what is wrong with it."""
    try:
        found = json.loads(content)
        choice = found["choices"][0]
        text = choice["message"]["content"]
    except ValueError:
        return Trouble(f"the server's answer is no JSON, or half of it: {_line(content.decode(errors='replace'))!r}")
    except (KeyError, IndexError, TypeError):
        return Trouble(f"the server's answer holds no choices: {_line(json.dumps(found))!r}")
    if isinstance(text, list):  # of parts, as some servers send it
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    if not text and (choice["message"].get("reasoning_content") or choice["message"].get("reasoning")):
        return Trouble("the server's answer holds thoughts alone: raise max_new_tokens, or switch thinking off there")
    if not isinstance(text, str):
        return Trouble(f"the server's answer holds no text: {_line(json.dumps(choice))!r}")
    return Answer(text.strip(), cut=choice.get("finish_reason") == "length")


def _message(content: bytes) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        return _line(content.decode(errors="replace"))
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return _line(found if isinstance(found, str) else json.dumps(found))


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:300]


def _seconds(header: str | None) -> float:
    """Seconds from a Retry-After header, which holds a number or a date; 0 for none."""
    if not header:
        return 0.0
    for read in (float, lambda date: email.utils.parsedate_to_datetime(date).timestamp() - time.time()):
        with suppress(ValueError):
            return max(0.0, read(header))
    return 0.0
