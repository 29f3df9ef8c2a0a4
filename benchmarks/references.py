"""Stage 2 with reference features of the published sizes: what training and evaluation hold in memory.

The real loop, bank and evaluator run on tiny pictures; stand-ins for the models give features of the real shapes at
little cost, so that what is measured is how they are kept. Each way runs in a process of its own, whose anonymous
memory (without mapped files) is sampled, and which must stay below 2 GB. At the smaller size a straightforward way runs
too, which reads the bank into memory in float32; its losses must equal those of the memory-mapped bank.

examples:
  python -m benchmarks.references                       # 20 GB of features, or as much as three quarters of the disk
  python -m benchmarks.references --gigabytes 4 --json result.json
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import anonymous
from spn4cir import bank as banks
from spn4cir.backbone import Backbone
from spn4cir.backbones import BACKBONES
from spn4cir.config import TrainConfig
from spn4cir.config_groups import BankConfig
from spn4cir.dataset import Dataset
from spn4cir.datasets import DATASETS
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.results import git_commit
from spn4cir.store import StoredRows
from spn4cir.types import Benchmark, Composed, ImageFeatures, ImageRef, Query, Tokens, Triplet, recall_measures

ROOT = Path(__file__).parents[1]
SHAPES = {"577 × 768, targets 1 × 256": (577, 768, 1, 128), "257 × 1408, targets 32 × 256": (257, 1408, 32, 32)}
"""L, D, K and the batch of BLIP4CIR and of SPRC."""
EMBED = 256
LIMIT = 2000
SMALL = 2000
STEPS = 20
WORDS = ("red", "green", "blue", "long", "short", "dotted")


class Tiles(Dataset):
    """Pictures of 8 × 8 random pixels: nine tenths to train on, a tenth to search in."""

    name = "tiles"
    protocols: ClassVar = {"val": ("tiles/val",)}

    def __init__(self, root: str | None = None):
        self.root = Path(root or ".")
        self.ids = (self.root / "ids.txt").read_text().split()
        self.cut = len(self.ids) * 9 // 10

    @staticmethod
    def draw(root: Path, count: int) -> None:
        """Make the pictures."""
        root.mkdir()
        for n in range(count):
            Image.frombytes("RGB", (8, 8), random.Random(n).randbytes(192)).save(root / f"{n}.png")
        (root / "ids.txt").write_text("\n".join(map(str, range(count))))

    def find_image(self, image_id: str) -> ImageRef:
        """Where a picture lies."""
        assert self.root is not None
        return ImageRef(self.root / f"{image_id}.png")

    def list_training_images(self) -> list[str]:
        """The first nine tenths."""
        return self.ids[: self.cut]

    def read_triplets(self) -> list[Triplet]:
        """Each training image to another one."""
        chance, ids = random.Random(0), self.list_training_images()
        return [Triplet(i, (chance.choice(ids),), (chance.choice(WORDS),)) for i in ids]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """The last tenth, each image once a reference."""
        ids = tuple(self.ids[self.cut :])
        queries = tuple(Query(i, WORDS[n % len(WORDS)], (ids[n - 1],)) for n, i in enumerate(ids))
        return Benchmark(self.choose_protocol(split, protocol), ids, queries, True, recall_measures(1, 10))


class Wide(Backbone):
    """Features of published shapes from a few products; the text looks at all reference tokens."""

    name = "wide"

    def __init__(self, shape: str):
        super().__init__()
        self.options = {"shape": shape}
        tokens, width, self.vectors, _ = SHAPES[shape]
        self.image, self.project = nn.Linear(192, width), nn.Linear(width, self.vectors * EMBED)
        self.places = nn.Parameter(torch.randn(tokens, width))
        self.words, self.text = nn.Embedding(len(WORDS), width), nn.Linear(width, EMBED)

    def transform(self, picture: Image.Image) -> Tensor:
        """(192,)."""
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255 - 0.5

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """(B,)."""
        return {"word": torch.tensor([WORDS.index(text) for text in texts])}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Reference (B, L, D), target (B, K, 256)."""
        pooled = self.image(pixels)  # (B, D)
        target = self.project(pooled).view(len(pixels), self.vectors, EMBED)
        return ImageFeatures(pooled[:, None] * self.places, F.normalize(target, dim=-1))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """The word looks at the reference."""
        word = self.words(tokens["word"])[:, None]  # (B, 1, D)
        seen = F.scaled_dot_product_attention(word, reference, reference)[:, 0]  # (B, D)
        return Composed(F.normalize(self.text(seen + word[:, 0]), dim=-1))

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """All but words and text."""
        return [self.image, self.project, self.places]


class InMemory(StoredRows):
    """Rows that are read once, as float32."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._read = self.whole().float()

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """A copy of these rows."""
        return self._read[list(rows)]


def read_whole(*args: Any) -> banks.Bank:
    """The straightforward way: a bank that is in memory."""
    bank = LOAD(*args)
    assert bank.reference is not None
    return replace(bank, target=bank.target.float(), reference=InMemory(bank.reference.path))


LOAD = banks.load_or_build


def child(way: str, shape: str, folder: Path) -> None:
    """Train and evaluate one way; prints losses and seconds as JSON."""
    from spn4cir.checkpoints import save_model
    from spn4cir.train import train

    DATASETS[Tiles.name], BACKBONES[Wide.name] = Tiles, Wide
    if way == "in memory":
        banks.load_or_build = read_whole  # type: ignore[assignment]
    init = folder / "init"
    if not init.is_dir():
        torch.manual_seed(0)
        save_model(init, Wide(shape), {})
    config = TrainConfig(
        dataset=Tiles.name,
        data_root=str(folder / "tiles"),
        backbone=Wide.name,
        init=str(init),
        bank=BankConfig(dtype="float16", references="recompute" if way == "recomputed" else "stored"),
        batch_size=SHAPES[shape][3],
        max_steps=STEPS,
        save_every=STEPS // 4,
        eval_every=0,
        eval_batch_size=32,
        output=str(folder / way),
    )
    started = time.perf_counter()
    run = train(config, 2)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {"losses": [row["loss"] for row in rows], "R@10": rows[-1]["R@10"]}
    print(json.dumps({**found, "seconds": time.perf_counter() - started}))


def measure(way: str, shape: str, folder: Path) -> dict[str, Any]:
    """Run a child and sample what it holds."""
    environment = os.environ | {"SPN4CIR_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "benchmarks.references", "--child", way, "--shape", shape]
    command += ["--folder", str(folder)]
    peak = 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        told: list[tuple[str, str]] = []
        reader = threading.Thread(target=lambda: told.append(process.communicate()))
        reader.start()
        while reader.is_alive():
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise InputError(f"{way}: {told[0][1].strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(told[0][0].splitlines()[-1])
    return {**found, "peak anonymous MB": round(peak / 1024)}


def run(gigabytes: float, folder: Path) -> dict[str, Any]:
    """All shapes, sizes and ways; raises if they do not agree, or hold too much."""
    report: dict[str, Any] = {}
    for shape, (tokens, width, _, _) in SHAPES.items():
        row = 2 * tokens * width  # bytes of an image in half precision
        sizes = {SMALL: ("stored", "recomputed", "in memory"), int(gigabytes * 1e9 / row): ("stored", "recomputed")}
        for count, ways in sizes.items():
            place = folder / str(count)
            place.mkdir()
            Tiles.draw(place / "tiles", count)
            found = {way: measure(way, shape, place) for way in ways}
            if "in memory" in found:
                assert found["stored"]["losses"] == found["in memory"]["losses"], "the two banks give other losses"
            close = zip(found["stored"]["losses"], found["recomputed"]["losses"], strict=True)
            assert all(abs(a - b) < 1e-2 for a, b in close), "half precision moved the losses too far"
            for way in ("stored", "recomputed"):
                assert found[way]["peak anonymous MB"] < LIMIT, f"{way} holds {found[way]['peak anonymous MB']} MB"
            report[f"{shape}, {count:,} images, {count * row / 1e9:.1f} GB"] = found
            shutil.rmtree(place)
    return report


def table(report: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [f"{'':66}{'peak anonymous MB':>18}{'seconds':>9}{'last loss':>11}"]
    for size, ways in report.items():
        for way, found in ways.items():
            name = f"{size}, {way}"
            lines.append(
                f"{name:<66}{found['peak anonymous MB']:>18,}{found['seconds']:>9.1f}{found['losses'][-1]:>11.4f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, help="of features at the larger size (default: 20)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed at the end)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.shape, args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        gigabytes = args.gigabytes or min(20.0, 0.75 * shutil.disk_usage(folder).free / 1e9)
        report: dict[str, Any] = {
            "what": f"{STEPS} steps, four states saved, evaluation over a tenth of the images",
            "sizes": run(gigabytes, Path(folder)),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "git": git_commit(),
        }
    print(table(report["sizes"]))
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    return None


if __name__ == "__main__":
    run_command(main)
