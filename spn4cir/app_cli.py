"""``spn4cir-demo``: the page and the REST service over an index."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spn4cir.cli import Parser
from spn4cir.errors import InputError, run_command
from spn4cir.index_cli import DEFAULT_SOURCE, find_index, is_engine

if TYPE_CHECKING:
    from spn4cir.app.limits import Limits

PORT = 7860
EXTRA = "the page needs Gradio: pip install 'spn4cir[app]'"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _demo() -> None:
    parser = Parser(
        "spn4cir-demo",
        "Open a page that searches an index by a picture and a change, with a REST service beside it.",
        "examples:\n"
        "  spn4cir-demo                                     # the embedded pictures; builds their index\n"
        "  spn4cir-demo --index pictures.index\n"
        "  spn4cir-demo --index first.index second.index    # two models side by side\n"
        "  spn4cir-demo --model embedded RUN                # the embedded pictures by two models\n"
        "  spn4cir-demo --index qdrant://localhost:6333/pictures --port 8000\n"
        "  curl -F image=@reference.png -F text='but in red' http://127.0.0.1:7860/search",
    )
    add = parser.add_argument
    what = "folder, or qdrant://HOST:PORT/NAME; two are shown side by side"
    add("--index", nargs="+", metavar="I", help=f"{what} (default: the only index in runs/index, or a new one)")
    add("--model", nargs="+", metavar="M", help="run folder, hub id or embedded: index the embedded pictures with it")
    add("--host", default=LOOPBACK[0], help="address to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=PORT, help=f"0 takes a free one (default: {PORT})")
    add("--public-name", action="append", default=[], metavar="HOST", help="name by which a proxy asks for the page")
    add("--max-upload-mb", type=float, default=20.0, metavar="N", help="megabytes of an upload (default: 20)")
    add("--max-megapixels", type=float, default=50.0, metavar="N", help="of a request's uploads (default: 50)")
    add(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="queries encoded at once (default: 32; 1: one at a time)",
    )
    add("--max-waiting", type=int, default=128, metavar="N", help="queries that may wait; more get 503 (default: 128)")
    args = parser.parse_args()
    _check(args)
    try:
        import gradio  # noqa: F401 - before an index is built
    except ImportError:
        raise InputError(EXTRA) from None
    from spn4cir.app.limits import Limits

    limits = Limits(
        round(args.max_upload_mb * 1e6), round(args.max_megapixels * 1e6), waiting=args.max_waiting,
        batch_size=args.batch_size,
    )  # fmt: skip
    with _listen(args.host, args.port) as listening:
        _serve(addresses_of(args), limits, listening, args)


demo_command = partial(run_command, _demo)


def _check(args: argparse.Namespace) -> None:
    if args.index and args.model:
        raise InputError("--index and --model exclude each other: an index says which model it was built with")
    for option, given in (("--index", args.index), ("--model", args.model)):
        if given and len(given) > 2:
            raise InputError(f"{option} takes one or two, got {len(given)}")
    for option in ("max_upload_mb", "max_megapixels", "batch_size", "max_waiting"):
        value = getattr(args, option)
        if not 0 < value < 1e6:
            raise InputError(f"--{option.replace('_', '-')} must be above 0 and below a million, got {value:g}")
    for place in args.index or ():
        if not is_engine(place) and not (Path(place) / "index.json").is_file():  # before Gradio and torch are imported
            raise InputError(f"{place} holds no index: make one by spn4cir-index build FOLDER --index {place}")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be from 0 to 65535, got {args.port}")


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises ``InputError`` if it is taken or not of this machine."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}: give another") from None
    return listening


def addresses_of(args: argparse.Namespace) -> list[str]:
    """The indexes to serve; those of the embedded pictures are built where they are missing."""
    from spn4cir.checkpoints import runs_root

    if args.index:
        return list(args.index)
    if args.model:
        return [_build_index(model) for model in args.model]
    if any((runs_root() / "index").glob("*/index.json")):
        return [find_index(None)]
    return [_build_index(None)]


def _build_index(model_name: str | None) -> str:
    """The index of the embedded pictures by a model, or by that of the newest run; built unless it exists."""
    from spn4cir.checkpoints import find_newest_run, runs_root
    from spn4cir.datasets import load_dataset
    from spn4cir.index.local import Index
    from spn4cir.index.snapshot import HEAD
    from spn4cir.model import EMBEDDED, load

    if model_name is None:
        run = find_newest_run(load_dataset(DEFAULT_SOURCE), None)
        print(f"model: {run}" if run else f"model: {EMBEDDED} weights, since there is no run", flush=True)
        model_name = str(run) if run else EMBEDDED
    model = load(model_name)
    name = EMBEDDED if model_name == EMBEDDED else Path(model.name).name
    path = runs_root() / "index" / f"{DEFAULT_SOURCE}-{name}-{model.fingerprint[:8]}"
    if not (path / HEAD).is_file():
        print(f"building {path}, once", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        Index.build(model, DEFAULT_SOURCE, path)
    return str(path)


def _serve(addresses: list[str], limits: Limits, listening: socket.socket, args: argparse.Namespace) -> None:
    """Answer until the process is interrupted; whatever Gradio writes is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="spn4cir-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from spn4cir.app.limits import RefusalsAsJson
        from spn4cir.app.page import build_app
        from spn4cir.app.served import open_served

        served = open_served(addresses, limits)
        app: Any = build_app(served, limits)
        host, port = listening.getsockname()[:2]
        if args.host in LOOPBACK or args.public_name:  # else another site could point its name at this machine
            app = TrustedHostMiddleware(app, [*LOOPBACK, "[::1]", args.host, *args.public_name], www_redirect=False)
        app = RefusalsAsJson(app)
        for one in served:
            place = addresses[one.number] if is_engine(addresses[one.number]) else Path(addresses[one.number])
            print(f"index {place}: {len(one.index):,} images, model {one.index.model.name}")
        listening.listen(1024)  # from here on clients wait instead of being turned away
        shown = f"[{host}]" if ":" in host else host
        print(f"open http://{shown}:{port} (REST: http://{shown}:{port}/docs); stop with Ctrl-C", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])
        for one in served:
            print(f"batches of {one.name}, number by size: {dict(sorted(one.encoder.sizes.items()))}", file=sys.stderr)
