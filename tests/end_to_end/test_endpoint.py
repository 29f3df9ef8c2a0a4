"""Captions from the command line: by a real server, by two processes, and onto a disk that is full."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_backbones import EMBEDDED

from spn4cir.data_gen.ask import Question, Try
from spn4cir.data_gen.caption import caption_images, check_caption
from spn4cir.data_gen.engines import Local
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError
from spn4cir.files import read_jsonl, write_jsonl

ROOT = Path(__file__).parents[2]
IMAGES = Emoji().training_images()[:1200:60]
BASE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def folder_of(path: Path) -> Path:
    """A folder in which a few images are paired."""
    path.mkdir()
    write_jsonl(path / "images.jsonl", [{"image_id": i, "pixels": i, "canonical": i} for i in [*IMAGES, "1f0cf"]])
    write_jsonl(path / "pairs.jsonl", [{"reference": i, "target": IMAGES[0]} for i in IMAGES[::-1]])
    return path


def run(folder: Path, *options: str, start: tuple[str, ...] = (sys.executable,)) -> "subprocess.Popen[str]":
    """The command, started."""
    command = [*start, str(ROOT / "data_gen" / "caption.py"), "--dataset", "emoji", "--output", str(folder), *options]
    return subprocess.Popen(
        command, env={**os.environ, **BASE}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


class Server(NamedTuple):
    """A server, its process, and the file that its messages go to."""

    address: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def wait(self) -> None:
        """Returns once the server answers; fails with its messages if it ends instead."""
        deadline = time.monotonic() + 600  # a busy machine needs minutes to start it
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(self.address.removesuffix("/v1") + "/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server does not answer: {self.log.read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server that runs the embedded captioner; started here, waited for where it is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transformers = Path(sys.executable).parent / "transformers"
    command = [
        str(transformers),
        "serve",
        str(EMBEDDED / "llava"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as messages:
        process = subprocess.Popen(
            [*command, "--dtype", "float32"], env={**os.environ, **BASE}, stdout=messages, stderr=subprocess.STDOUT
        )
    yield Server(f"http://127.0.0.1:{port}/v1", process, log)
    process.terminate()
    process.wait(60)


def here(folder: Path, **settings: Any) -> bytes:
    """captions.jsonl as this process makes it, in batches of four."""
    caption_images(GenerateConfig(output=str(folder), caption_batch_size=4, **settings), Emoji())
    return (folder / "captions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """captions.jsonl of one process that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield here(folder_of(tmp_path_factory.mktemp("alone") / "run"))


def captions(content: bytes) -> list[tuple[str, str]]:
    return [(row["image_id"], row["caption"]) for row in map(json.loads, content.decode().splitlines())]


def test_one_process(alone: bytes) -> None:
    """The captions are those of the same model asked one at a time, in the dataset's order."""
    engine, emoji, prompt = (
        Local("embedded", images=True, batch_size=1, max_new_tokens=40),
        Emoji(),
        GenerateConfig.prompt,
    )
    asked = [Question(i, prompt.replace("{words}", "10"), emoji.image(i)) for i in IMAGES]
    assert captions(alone) == [(q.key, check_caption(10, q, *engine.answer([q], Try(0, 42)))[0]) for q in asked]


def test_a_real_server(tmp_path: Path, alone: bytes, server: Server) -> None:
    """The same captions as of the local engine, through HTTP, a data URL and the server's own processor."""
    folder = folder_of(tmp_path / "run")
    server.wait()
    code, _, err = end(
        run(folder, "--captioner", str(EMBEDDED / "llava"), "--endpoint", server.address, "--requests", "3")
    )
    assert code == 0, err
    assert captions((folder / "captions.jsonl").read_bytes()) == captions(alone)
    with pytest.raises(InputError, match=f"{server.address}/chat/completions answers 4.*no/such"):
        here(folder_of(tmp_path / "no"), captioner="no/such", endpoint=server.address)


def test_two_processes(tmp_path: Path, alone: bytes) -> None:
    """Two share the batches, and the file is the same to the byte."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", f"--master_port={_port()}")
    folder = folder_of(tmp_path / "run")
    code, out, err = end(run(folder, "--caption-batch-size", "4", start=torchrun))
    assert code == 0, err
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert out.count(f"{len(IMAGES)} captions → ") == 1 and len(left) == 5, left
    assert (folder / "captions.jsonl").read_bytes() == alone


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def test_a_full_disk(tmp_path: Path, alone: bytes) -> None:
    """After some batches nothing more can be written: one line and exit code 2. With room again the run goes on from
    there to the same file."""
    # torchvision is imported before the limit holds: torch 2.6 writes a temporary file when it is imported
    folder = folder_of(tmp_path / "run")
    limited = (
        sys.executable, "-c",
        "import resource, runpy, signal, sys, torchvision; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
    )  # fmt: skip
    code, _, err = end(run(folder, "--caption-batch-size", "4", start=limited))
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: ") and "File too large; what is in it stays" in err.splitlines()[-1]
    (journal,) = folder.glob("captions.*.partial.jsonl")
    assert 0 < len(read_jsonl(journal)) < 5
    assert here(folder) == alone
