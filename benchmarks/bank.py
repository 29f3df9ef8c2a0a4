"""How many images are encoded for a bank: each unique image once, against both images of each triplet.

The structure is real, the features are eight numbers made up from an image's number: FashionIQ's annotated triplets,
and generated ones as the paper has them, one from each of 12,400 distinct reference images to another image that
annotated triplets name. The bank is made by the real function, and has to hold for both images of each triplet what the
straightforward way, a dictionary by triplet, holds. Time is that of all but models and pictures.

examples:
  python -m benchmarks.bank                              # seconds
  python -m benchmarks.bank --data FOLDER                # annotations of FashionIQ are there
  python -m benchmarks.bank --json benchmarks/results/bank.json
"""

import argparse
import json
import os
import platform
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.measure import anonymous, bound, row
from spn4cir.backbone import Backbone
from spn4cir.bank import load_or_build
from spn4cir.datasets.fashioniq import FashionIQ
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.images import ImageSource, Transform
from spn4cir.results import git_commit
from spn4cir.types import Composed, ImageFeatures, Tokens

T = TypeVar("T")
Pairs = list[tuple[str, str]]
DATA = Path(__file__).parents[2] / "shared" / "data"
ANNOTATED, REFERENCES, TARGETS, IMAGES, GENERATED = 18_000, 12_525, 17_839, 25_136, 12_400
BATCH, SEED = 256, 42
PARTS = ("seconds", "peak extra MB", "encodes")
PRIMES = (211, 223, 227, 229, 233, 239, 241, 251)


class Counting(Backbone):
    """Features from an image's number alone, without rounding that depends on a batch; counts what it encodes."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.options, self.transform, self.encoded = {}, Transform(1), 0
        self.modulus = nn.Parameter(torch.tensor(PRIMES, dtype=torch.float32))
        self.freeze_image_side()

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 1, 1, 1) → (B, 1, 8) twice."""
        self.encoded += len(pixels)
        reference = pixels.view(-1, 1, 1) % self.modulus  # (B, 1, 8)
        return ImageFeatures(reference, reference / self.modulus)

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """Nothing is composed here."""
        raise NotImplementedError

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """What stands for weights."""
        return [self.modulus]


class Numbered(ImageSource):
    """Instead of pixels (1, 1, 1) with the number of the image."""

    def __init__(self, image_ids: Sequence[str]):
        super().__init__(Path, Transform(1))
        self.numbers = {image_id: n for n, image_id in enumerate(image_ids, 1)}

    def __call__(self, image_id: str) -> Tensor:
        """(1, 1, 1)."""
        return torch.full((1, 1, 1), float(self.numbers[image_id]))


def annotated(data: Path) -> tuple[Pairs, str]:
    """Reference and target of each annotated triplet, or as many made up; and which of the two."""
    try:
        triplets = FashionIQ(str(data)).triplets()
        return [(t.reference, t.targets[0]) for t in triplets if t.reference], "FashionIQ's annotations"
    except InputError as error:
        print(f"made-up triplets of the same counts, since {error}")
    ids = [f"image {n:05d}" for n in range(IMAGES)]
    pairs = [(ids[n % REFERENCES], ids[IMAGES - TARGETS + n % TARGETS]) for n in range(ANNOTATED)]
    return pairs, "made-up triplets of the same counts"


def generated(pairs: Pairs) -> Pairs:
    """One pair for each of so many distinct references of these, the other image being any that these name."""
    chance, images = random.Random(SEED), list(dict.fromkeys(i for pair in pairs for i in pair))
    references = chance.sample(list(dict.fromkeys(reference for reference, _ in pairs)), GENERATED)
    found = []
    for reference in references:
        target = chance.choice(images)
        while target == reference:
            target = chance.choice(images)
        found.append((reference, target))
    return found


def straightforward(backbone: Backbone, images: ImageSource, pairs: Pairs) -> dict[int, tuple[Tensor, Tensor]]:
    """By number of a triplet what its reference and its target image are to the model: (1, 8) each."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(pairs), BATCH):
        block = pairs[start : start + BATCH]
        with torch.no_grad():
            reference = backbone.encode_image(images.stack([one for one, _ in block])).reference
            target = backbone.encode_image(images.stack([other for _, other in block])).target
        found |= {start + n: pair for n, pair in enumerate(zip(reference, target, strict=True))}
    return found


def measured(task: Callable[[], T]) -> tuple[T, float, float | None]:
    """Its result, its seconds, and its peak of extra anonymous memory in MB."""
    before = peak = anonymous(os.getpid())
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = task()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return result, seconds, round((peak - before) / 1024, 1) if before else None


def run(data: Path) -> dict[str, Any]:
    """Both ways; asserts that they agree."""
    human, structure = annotated(data)
    pairs = [*human, *generated(human)]
    unique = list(dict.fromkeys(i for pair in pairs for i in pair))
    images, backbone, plain = Numbered(unique), Counting(), Counting()
    hashes = dict(zip(unique, unique, strict=True))
    Counting().encode_image(images.stack(unique[:1]))  # libraries wake up
    with tempfile.TemporaryDirectory() as folder:
        bank, seconds, memory = measured(lambda: load_or_build(backbone, images, hashes, Path(folder), BATCH))
        twice, plain_seconds, plain_memory = measured(lambda: straightforward(plain, images, pairs))
        assert backbone.encoded == len(unique) == len(bank.target), "not each unique image once"
        assert plain.encoded == 2 * len(pairs) == 2 * len(twice), "not both images of each triplet"
        references, targets = bank.references([r for r, _ in pairs]), bank.target[[bank.rows[t] for _, t in pairs]]
        assert torch.equal(references, torch.stack([twice[n][0] for n in range(len(pairs))])), "references differ"
        assert torch.equal(targets, torch.stack([twice[n][1] for n in range(len(pairs))])), "targets differ"
        assert len(set(map(tuple, targets[:, 0].tolist()))) == len({t for _, t in pairs}), (
            "features do not tell images apart"
        )
        again = load_or_build(backbone, images, hashes, Path(folder), BATCH)
        assert backbone.encoded == len(unique) + 1 and torch.equal(again.target, bank.target), "made a second time"
    return {
        "benchmark": "bank",
        "what": "images encoded for all triplets; features of 8 numbers, without models and pictures",
        "structure": structure,
        "triplets": {"annotated": len(human), "generated": len(pairs) - len(human)},
        "images": len(unique),
        "encodes": {"ours": len(unique), "both images of each triplet": plain.encoded},
        "encodes when it is there": 1,
        "seconds": {"ours": round(seconds, 2), "both images of each triplet": round(plain_seconds, 2)},
        "peak extra MB": {"ours": memory, "both images of each triplet": plain_memory},
        "ratio": round(plain.encoded / len(unique), 3),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "git": git_commit(),
    }


def suite(data: Path = DATA) -> dict[str, Any]:
    """The same with a row of the table."""
    found, plain = run(data), "both images of each triplet"
    seconds, memory, encodes = ((part["ours"], part[plain]) for part in (found[name] for name in PARTS))
    what = f"bank of {sum(found['triplets'].values()):,} triplets, {encodes[0]:,} encodes, without models and pictures"
    bounds = (bound("encodes", encodes[0], most=found["images"]),)
    return {**found, "rows": [row(what, f"{plain}, {encodes[1]:,}", seconds, memory, bounds)]}


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="where fashioniq/captions is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    report = run(args.data)
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
