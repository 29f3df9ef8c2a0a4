"""16 clients of ``spn4cir-demo`` at once: queries encoded in batches against one at a time.

Two servers, which differ in ``--batch-size`` alone, answer the same requests in turns: a picture and a text each, over
kept connections. Clients and servers share the machine. ``random ViT-B-32`` has the size of a real model and no
training; its index holds fewer pictures, since its answers do not matter.

examples:
  python -m benchmarks.serving --json benchmarks/results/serving.json
  python -m benchmarks.serving --only embedded
"""

import argparse
import http.client
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.measure import Row, bound, report, row, share
from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import save_model
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.index.local import Index
from spn4cir.model import load

CLIENTS, ROUNDS = 16, 3
BATCHED, SINGLE = 32, 1
TEXTS = ("in red", "as a woman", "with dark skin tone", "smaller", "as a heart", "blue instead", "older", "with a hat")
REQUESTS = {"embedded": 25, "random ViT-B-32": 4}
"""Requests of each client in each round, by model."""


def make_index(name: str, folder: Path) -> Path:
    """An index by the embedded model over all embedded pictures, or by a large random one over 128 plain pictures."""
    if name == "embedded":
        Index.build(load(), "emoji", folder / "index")
        return folder / "index"
    save_model(folder / "model", build_backbone("clip4cir", False, model="ViT-B-32"), {})
    (folder / "pictures").mkdir()
    for n in range(128):
        Image.new("RGB", (64, 64), (2 * n, 255 - n, 7 * n % 256)).save(folder / "pictures" / f"{n}.png")
    Index.build(load(folder / "model"), folder / "pictures", folder / "index")
    return folder / "index"


@contextmanager
def serving(index: Path, batch_size: int) -> Iterator[tuple[str, int]]:
    """Run the command until the end of the block; its host and port."""
    command = [sys.executable, "-m", "spn4cir", "demo", "--index", str(index), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--batch-size", str(batch_size)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    place = next(found for line in process.stdout if (found := re.match(r"open http://(.+):(\d+) ", line)))
    try:
        yield place[1], int(place[2])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def make_form(picture: bytes, text: str) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers."""
    line = b"--part\r\nContent-Disposition: form-data; name="
    file = line + b'"image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + picture + b"\r\n"
    words = line + b'"text"\r\n\r\n' + text.encode() + b"\r\n"
    return file + words + b"--part--\r\n", {"Content-Type": "multipart/form-data; boundary=part"}


def ask(place: tuple[str, int], number: int, count: int) -> tuple[list[float], int]:
    """Seconds of each of a client's requests, one after the other, and how many were not answered."""
    data = io.BytesIO()
    Image.new("RGB", (300, 300), (number * 15, 90, 200)).save(data, "PNG")
    client, seconds, errors = http.client.HTTPConnection(*place, timeout=120), [], 0
    for n in range(count):
        body, headers = make_form(data.getvalue(), TEXTS[(number + n) % len(TEXTS)])
        started = time.perf_counter()
        client.request("POST", "/search", body, headers)
        answer = client.getresponse()
        reply = json.loads(answer.read())
        seconds.append(time.perf_counter() - started)
        errors += answer.status != 200 or len(reply["hits"]) != 10
    client.close()
    return seconds, errors


def load_server(place: tuple[str, int], count: int) -> dict[str, Any]:
    """What 16 clients at once see: requests a second, seconds of each request, and errors."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        started = time.perf_counter()
        replies = list(pool.map(lambda number: ask(place, number, count), range(CLIENTS)))
        elapsed = time.perf_counter() - started
    seconds = [one for part, _ in replies for one in part]
    return {"rate": len(seconds) / elapsed, "seconds": seconds, "errors": sum(errors for _, errors in replies)}


def measure_model(name: str) -> tuple[dict[str, Any], Row]:
    """Both servers in turns."""
    with tempfile.TemporaryDirectory() as folder:
        index = make_index(name, Path(folder))
        with serving(index, BATCHED) as batched, serving(index, SINGLE) as single:
            places = {"batched": batched, "one at a time": single}
            rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in places}
            for place in places.values():
                ask(place, 0, 3)  # does not count
            for _ in range(ROUNDS):
                for way, place in places.items():
                    rounds[way].append(load_server(place, REQUESTS[name]))
    found = {way: summarize(parts) for way, parts in rounds.items()}
    p95, errors = ({way: one[key] for way, one in found.items()} for key in ("p95, ms", "errors"))
    figures = (p95["batched"] / 1000, p95["one at a time"] / 1000)
    held = bound("errors", sum(errors.values()), most=0)
    return found, row(f"{name}, p95 of {CLIENTS} clients", "one at a time", figures, (None, None), (held,))


def summarize(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Throughput of the median round; median and 95th percentile of all requests."""
    seconds = [one for part in parts for one in part["seconds"]]
    cuts = statistics.quantiles(seconds, n=20)
    return {
        "requests": len(seconds),
        "requests a second": round(statistics.median(part["rate"] for part in parts), 1),
        "requests a second, by round": [round(part["rate"], 1) for part in parts],
        "p50, ms": round(1000 * statistics.median(seconds), 1),
        "p95, ms": round(1000 * cuts[-1], 1),
        "errors": sum(part["errors"] for part in parts),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").partition("\n\nexamples:")[0]
    )
    parser.add_argument("--only", choices=tuple(REQUESTS), help="one of the models")
    parser.add_argument("--json", type=Path, help="also write the result to a file")
    args = parser.parse_args()
    models, rows = {}, []
    for name in [args.only] if args.only else REQUESTS:
        models[name], line = measure_model(name)
        rows.append(line)
        ways = models[name]
        gain = share(ways["batched"]["requests a second"], ways["one at a time"]["requests a second"])
        print(name, json.dumps({**ways, "throughput, batched / single": gain}), file=sys.stderr, flush=True)
    what = f"{CLIENTS} clients of spn4cir-demo at once, {ROUNDS} rounds in turns"
    result = report("serving", what, rows, models=models)
    print(json.dumps(result))
    if args.json:
        write_text(args.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_command(main)
