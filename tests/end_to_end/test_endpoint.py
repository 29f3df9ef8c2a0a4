"""Captions from the command line: by a real server, by two processes, onto a disk that is full, and killed."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_gen.ask import Question, Try
from data_gen.caption import check_caption
from data_gen.engines import EMBEDDED, Local
from data_gen.files import read_jsonl, write_jsonl
from data_gen.settings import GenerateConfig
from spn4cir.datasets.emoji import Emoji

ROOT = Path(__file__).parents[2]
IMAGES = Emoji().training_images()[:1200:60]
BASE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def folder_of(path: Path) -> Path:
    """A folder in which a few images are paired."""
    path.mkdir()
    write_jsonl(path / "images.jsonl", [{"image_id": i, "pixels": i, "canonical": i} for i in [*IMAGES, "1f0cf"]])
    write_jsonl(path / "pairs.jsonl", [{"reference": i, "target": IMAGES[0]} for i in IMAGES[::-1]])
    return path


def caption(folder: Path, *options: str, start: tuple[str, ...] = (sys.executable,)) -> "subprocess.Popen[str]":
    """The command, started."""
    command = [*start, str(ROOT / "data_gen" / "caption.py"), "--dataset", "emoji", "--output", str(folder), *options]
    return subprocess.Popen(
        command, env={**os.environ, **BASE}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def whole(folder: Path, *options: str, start: tuple[str, ...] = (sys.executable,)) -> bytes:
    """captions.jsonl of a command that ends well."""
    code, out, err = end(caption(folder, *options, start=start))
    assert code == 0, err
    assert f"{len(IMAGES)} captions → " in out
    assert len(list(folder.iterdir())) == 5, list(folder.iterdir())
    return (folder / "captions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server that runs the embedded captioner; started here, waited for where it is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transformers = Path(sys.executable).parent / "transformers"
    command = [str(transformers), "serve", str(EMBEDDED), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        [*command, "--dtype", "float32"], env={**os.environ, **BASE},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def alone(address: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """captions.jsonl of one process that nothing interrupts, in batches of four."""
    return whole(folder_of(tmp_path_factory.mktemp("alone") / "run"), "--caption-batch-size", "4")


def test_one_process(alone: bytes) -> None:
    """The captions are those of the same model asked one at a time, in the dataset's order."""
    rows = [json.loads(line) for line in alone.decode().splitlines()]
    assert [row["image_id"] for row in rows] == IMAGES
    engine, emoji, prompt = (
        Local("embedded", images=True, batch_size=1, max_new_tokens=40),
        Emoji(),
        GenerateConfig.prompt,
    )
    for row in rows:
        question = Question(row["image_id"], prompt.replace("{words}", "10"), emoji.path(row["image_id"]))
        (answer,) = engine.answer([question], Try(0, 42))
        assert row["caption"] == check_caption(10, question, answer)[0]


def test_a_real_server(tmp_path: Path, alone: bytes, address: str) -> None:
    """The same captions as of the local engine, through HTTP, a data URL and the server's own processor."""
    for _ in range(120):
        try:
            urllib.request.urlopen(address.removesuffix("/v1") + "/health", timeout=1)
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    folder = folder_of(tmp_path / "run")
    served = whole(folder, "--captioner", str(EMBEDDED), "--endpoint", address, "--requests", "3")
    captions = [(row["image_id"], row["caption"]) for row in map(json.loads, served.decode().splitlines())]
    assert captions == [(row["image_id"], row["caption"]) for row in map(json.loads, alone.decode().splitlines())]
    code, _, err = end(caption(folder_of(tmp_path / "no"), "--captioner", "no/such", "--endpoint", address))
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {address}/chat/completions answers "), err
    assert "no/such" in err.splitlines()[-1] or "404" in err.splitlines()[-1]


def test_two_processes(tmp_path: Path, alone: bytes) -> None:
    """Two share the batches, and the file is the same to the byte."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", f"--master_port={_port()}")
    assert whole(folder_of(tmp_path / "run"), "--caption-batch-size", "4", start=torchrun) == alone


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def test_a_full_disk_and_a_kill(tmp_path: Path, alone: bytes) -> None:
    """The disk is full after some batches: one line, exit code 2. With room again it is killed on the way, and then
    goes on to the same file."""
    folder = folder_of(tmp_path / "run")
    limited = (
        sys.executable, "-c",
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
    )  # fmt: skip
    code, _, err = end(caption(folder, "--caption-batch-size", "4", start=limited))
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: ") and "File too large; what is in it stays" in err.splitlines()[-1]
    (journal,) = folder.glob("captions.*.partial.jsonl")
    blocks = len(read_jsonl(journal))
    assert 0 < blocks < 5 and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    process = caption(folder, "--caption-batch-size", "4")
    while process.poll() is None and len(read_jsonl(journal)) == blocks:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert whole(folder, "--caption-batch-size", "4") == alone


def test_an_unknown_model(tmp_path: Path) -> None:
    """Said at once, in one line, before any image is opened."""
    code, _, err = end(caption(folder_of(tmp_path / "run"), "--captioner", "no-such/model"))
    assert code == 2 and len(err.splitlines()) == 1 and "model 'no-such/model' cannot be loaded: name a folder" in err
