"""The REST service: ``POST /search``, pictures of the index, and a page that documents both, without another server."""

from __future__ import annotations

import asyncio
import secrets
import sys
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from spn4cir.app.limits import Limits, Refused, check_uploads, read_upload
from spn4cir.app.reference import render_reference
from spn4cir.app.served import ClientQuery, ServedIndex, public_hit
from spn4cir.errors import InputError
from spn4cir.selection import Selection

KEPT_SIDE = 1024
"""Pixels of the longer side that an upload of the page is reduced to."""
KEPT_UPLOADS = 64
"""Uploads that wait for their page to take them, a moment later."""


FIELDS = (
    "image", "image_id", "text", "unlike", "unlike_id", "without", "where", "group", "min_score", "min_z", "fold", "k",
    "index",
)  # fmt: skip
"""Values of a search."""
OTHERS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"]
"""Methods that addresses which take POST refuse."""


class FoundImage(BaseModel):
    """An image of the index that fits a query."""

    id: str
    score: float
    z: float
    image: str
    columns: dict[str, Any]
    folded: list[str]


class Found(BaseModel):
    """Hits of a query, best first."""

    index: str
    hits: list[FoundImage]


class Problem(BaseModel):
    """What is wrong with a request, in one line."""

    message: str


FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The form does not parse, or the request names another host."},
    404: {"model": Problem, "description": "The index has no image of this id."},
    405: {"model": Problem, "description": "The address takes another method."},
    413: {"model": Problem, "description": "The upload has too many bytes or pixels."},
    422: {"model": Problem, "description": "A value is out of range, or an upload is no picture."},
    503: {"model": Problem, "description": "Too many queries wait, or the index has been removed."},
}


class Uploads:
    """Pictures between their upload and the event that takes them into a session; the oldest are dropped."""

    def __init__(self) -> None:
        self._pictures: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = Lock()

    def put(self, picture: Image.Image) -> str:
        """Keep a picture, reduced; its token."""
        picture.thumbnail((KEPT_SIDE, KEPT_SIDE))
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._pictures[token] = picture
            while len(self._pictures) > KEPT_UPLOADS:
                self._pictures.popitem(last=False)
        return token

    def take(self, token: str) -> Image.Image:
        """The picture of a token, once. Raises ``Refused`` for an unknown one."""
        with self._lock:
            picture = self._pictures.pop(token, None)
        if picture is None:
            raise Refused(422, "the upload is no longer there: upload it again")
        return picture


async def _read_all(files: Sequence[UploadFile], limits: Limits) -> list[bytes]:
    return [await file.read(limits.upload_bytes + 1) for file in files]


def _files(what: str) -> Any:
    return File(description=what, default_factory=list)


def _values(what: str) -> Any:
    return Form(description=what, default_factory=list)


def build_service(served: Sequence[ServedIndex], limits: Limits, uploads: Uploads) -> FastAPI:
    """The service over one or two indexes; ``uploads`` takes the pictures that are uploaded on the page."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # limits are ours, and smaller
    app = FastAPI(
        title="spn4cir", version="1", docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        description="Search an index by a picture, a text, or a picture changed by a text.",
    )  # fmt: skip

    @app.post("/search", response_model=Found, responses=FAILURES, summary="Search the index")
    async def search(
        request: Request,
        image: Annotated[list[UploadFile], _files("reference pictures, as files")],
        image_id: Annotated[list[str], _values("reference pictures, as ids of the index")],
        text: Annotated[list[str], _values("how to change the picture, or what to find")],
        unlike: Annotated[list[UploadFile], _files("pictures to be unlike, as files")],
        unlike_id: Annotated[list[str], _values("pictures to be unlike, as ids of the index")],
        without: Annotated[list[str], _values("what to be without")],
        where: Annotated[list[str], _values("conditions on columns, such as category=dress|skirt or price<=50")],
        group: Annotated[str | None, Form(description="column of which each value occurs in one hit only")] = None,
        min_score: Annotated[float | None, Form(description="lowest score, from -1 to 1")] = None,
        min_z: Annotated[float | None, Form(description="lowest z-score, relative to the query")] = None,
        fold: Annotated[float | None, Form(description="similarity from which near-duplicates are folded")] = None,
        k: Annotated[int, Form(description="number of hits")] = 10,
        index: Annotated[int, Form(description="which index, if there are two: 0 or 1")] = 0,
    ) -> dict[str, Any]:
        """Hits of a query, best first, with scores and columns; the images of the query are left out."""
        if request.headers.get("content-type", "").partition(";")[0].strip().endswith("json"):
            raise Refused(422, "send a form (multipart), not JSON")
        if unknown := [name for name in await request.form() if name not in FIELDS]:
            raise Refused(422, f"there is no value {unknown[0]!r:.60}; known: {', '.join(FIELDS)}")
        one = _choose(served, index)
        files = await _read_all(image, limits), await _read_all(unlike, limits)

        def ask() -> ClientQuery:
            counts = iter(check_uploads([*files[0], *files[1]], limits))
            likes, unlikes = ([one.upload_pixels(data, next(counts)) for data in part] for part in files)
            return ClientQuery(
                [*likes, *map(one.member_pixels, image_id)], text,
                [*unlikes, *map(one.member_pixels, unlike_id)], without,
                [*image_id, *unlike_id], Selection(k, min_score, min_z, fold, group), where,
            )  # fmt: skip

        if max(len(image) + len(image_id) + len(unlike) + len(unlike_id), len(text) + len(without)) > limits.parts:
            raise Refused(422, f"a query has more than {limits.parts} pictures or texts")
        question = await run_in_threadpool(ask)
        query = await asyncio.wrap_future(await run_in_threadpool(one.submit, question))
        hits = await run_in_threadpool(one.select, query, question)
        return {"index": one.name, "hits": [public_hit(one, hit) for hit in hits]}

    @app.get("/image/{image_id:path}", summary="A thumbnail of an image of the index", response_class=Response,
             responses={200: {"content": {"image/webp": {}}}, **FAILURES})  # fmt: skip
    def image(image_id: str, index: Annotated[int, Query(description="which index: 0 or 1")] = 0) -> Response:
        """The image with this id, at most 256 pixels wide and high, as WebP."""
        data = _choose(served, index).thumbnail(image_id)
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=600"})

    @app.post("/upload", include_in_schema=False)
    async def upload(request: Request) -> dict[str, str]:
        """Keep a picture, the body of the request, for the page that uploads it."""
        data = await request.body()

        def keep() -> str:
            with limits.decoding.hold(*check_uploads([data], limits)):
                return uploads.put(read_upload(data, limits))

        return {"token": await run_in_threadpool(keep)}

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        """The description of the service as a page."""
        return HTMLResponse(render_reference(app.openapi(), str(request.base_url).rstrip("/")))

    _refuse_other_methods(app)
    _answer_problems(app)
    return app


def _choose(served: Sequence[ServedIndex], number: int) -> ServedIndex:
    if not 0 <= number < len(served):
        raise Refused(422, f"index is {number}: this server has {len(served)}, counted from 0")
    return served[number]


def _refuse_other_methods(app: FastAPI) -> None:
    """Without this the page, which is mounted below all addresses, would answer."""

    @app.api_route("/search", methods=OTHERS, include_in_schema=False)
    @app.api_route("/upload", methods=OTHERS, include_in_schema=False)
    def refuse_method(request: Request) -> None:
        raise StarletteHTTPException(405, f"{request.url.path} takes POST, not {request.method}", {"Allow": "POST"})


def _answer_problems(app: FastAPI) -> None:
    """Every problem is answered as JSON with a message of one line."""

    def answer(status: int, message: str, given: Mapping[str, str] | None = None) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 503 else given
        return JSONResponse({"message": " ".join(message.split())}, status, headers)

    @app.exception_handler(InputError)
    async def refuse(request: Request, error: InputError) -> JSONResponse:
        return answer(error.status if isinstance(error, Refused) else 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "value_error" and first["loc"][1:2] and first["loc"][1] in ("image", "unlike"):
            return answer(422, f"{first['loc'][1]}: send a file")
        return answer(422, f"{first['loc'][min(1, len(first['loc']) - 1)]}: {first['msg']}")

    @app.exception_handler(StarletteHTTPException)
    async def refuse_request(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        traceback.print_exception(error, file=sys.stderr)
        return answer(500, "the server failed: its terminal says why")
