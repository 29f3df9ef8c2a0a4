"""Images: from a file to pixels, the identity of pixels, and the batches that training sees."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from spn4cir.errors import InputError
from spn4cir.types import Tokens, Triplet

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def decode(path: Path) -> Image.Image:
    """Decode a file as RGB; transparent parts become white. Raises whatever the decoder does."""
    with Image.open(path) as picture:
        if picture.format in ("EPS", "IPTC"):
            raise OSError("PostScript, or what may hold it, is a program and no picture")  # a decoder would run it
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        return picture.convert("RGB")


def open_image(path: Path) -> Image.Image:
    """Decode a file as RGB; transparent parts become white.

    Raises:
        InputError: if the file is missing or does not decode.
    """
    try:
        return decode(path)
    except FileNotFoundError:
        raise InputError(f"image {path} is missing") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} does not decode: {error}") from None


def pixel_hash(picture: Image.Image) -> str:
    """Hash of size and pixels: equal exactly for images that look the same to a model."""
    digest = hashlib.sha256(f"{picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def target_pad(picture: Image.Image, ratio: float = 1.25) -> Image.Image:
    """Pad an elongated image with black until its longer side is at most ``ratio`` times the shorter one.

    Source: Baldrati et al., "Effective conditioned and composed image retrieval", CVPR 2022.
    """
    w, h = picture.size
    if max(w, h) / min(w, h) < ratio:
        return picture
    side = max(w, h) / ratio
    across, down = max(int((side - w) / 2), 0), max(int((side - h) / 2), 0)
    padded = Image.new("RGB", (w + 2 * across, h + 2 * down))
    padded.paste(picture, (across, down))
    return padded


@dataclass(frozen=True)
class Transform:
    """RGB image → (3, size, size): pad, resize the shorter side (bicubic), centre crop, normalise."""

    size: int
    pad_ratio: float | None = 1.25
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB image → (3, size, size)."""
        if self.pad_ratio is not None:
            picture = target_pad(picture, self.pad_ratio)
        resized = TF.resize(picture, [self.size], InterpolationMode.BICUBIC)
        pixels = TF.to_tensor(TF.center_crop(resized, [self.size, self.size]))
        normalised: Tensor = TF.normalize(pixels, list(self.mean), list(self.std))
        return normalised


class ImageSource:
    """Image ids to pixels, for one transform; keeps what it decoded if told to.

    Args:
        path: image id → file.
        transform: RGB image → (3, H, W).
        keep: keep decoded pixels in memory (for small datasets).
    """

    def __init__(self, path: Callable[[str], Path], transform: Callable[[Image.Image], Tensor], keep: bool = False):
        self.path, self.transform = path, transform
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __call__(self, image_id: str) -> Tensor:
        """(3, H, W). Raises ``InputError`` naming the file if it is missing or does not decode."""
        if self._kept is None:
            return self.transform(open_image(self.path(image_id)))
        if image_id not in self._kept:
            self._kept[image_id] = self.transform(open_image(self.path(image_id)))
        return self._kept[image_id]

    def stack(self, image_ids: Sequence[str]) -> Tensor:
        """(B, 3, H, W)."""
        return torch.stack([self(i) for i in image_ids])


@dataclass
class TripletBatch:
    """What one training step sees.

    ``identity`` (B,) is equal for equal target pixels, and ``others`` (B, A) are identities of other images that answer
    the same query, padded with -1. ``asked`` (B, 2) is equal for equal pixels of references, and for equal texts. In
    stage 1 ``reference`` and ``target`` (B,) are rows of ``pixels`` (U, 3, H, W), the unique images of the batch. In
    stage 2 ``target``, ``identity`` and ``others`` are rows of the bank; the references are ``features`` (B, L, D),
    gathered from it, or rows of ``pixels`` where they are recomputed.
    """

    tokens: Tokens
    reference: Tensor
    target: Tensor
    identity: Tensor
    pixels: Tensor | None = None
    features: Tensor | None = None
    others: Tensor | None = None
    asked: Tensor | None = None

    def to(self, device: torch.device) -> "TripletBatch":
        """The same batch on another device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}
        moved = {name: value.to(device) for name, value in parts.items() if value is not None}
        return replace(self, tokens={name: value.to(device) for name, value in self.tokens.items()}, **moved)


class TripletRows(TorchDataset[tuple[Triplet, str]]):
    """Triplets with the text that this epoch draws for each: the same whatever the workers, processes or resumes."""

    def __init__(self, triplets: Sequence[Triplet], seed: int):
        self.triplets, self.seed = triplets, seed

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Triplet, str]:
        epoch, item = key
        triplet = self.triplets[item]
        return triplet, random.Random(f"{self.seed}/{epoch}/{item}").choice(triplet.modifications)


class KnownTargets:
    """All targets of each query of the triplets: of equal reference pixels and equal text.

    Args:
        triplets: of training.
        identity: image id → number, equal for equal pixels.
    """

    def __init__(self, triplets: Iterable[Triplet] = (), identity: Mapping[str, int] | None = None):
        found: dict[tuple[int, str], dict[int, None]] = {}
        for triplet in triplets:
            assert identity is not None
            for text in triplet.modifications:
                targets = found.setdefault((identity[triplet.reference], text), {})
                targets[identity[triplet.target]] = None
        self._targets = {query: list(targets) for query, targets in found.items() if len(targets) > 1}
        self.width = max(map(len, self._targets.values()), default=1) - 1

    def others(self, reference: int, text: str, target: int) -> list[int]:
        """The query's other targets, padded with -1 to ``width``, the most that any query has."""
        found = [other for other in self._targets.get((reference, text), ()) if other != target]
        return found + [-1] * (self.width - len(found))


@dataclass
class TripletCollate:
    """Rows to a ``TripletBatch``.

    ``identity`` (image id → number, equal for equal pixels) knows all images of the triplets. With ``rows`` (image id →
    bank row), for stage 2, it is the same. There are ``references`` (B image ids → their stored features, (B, L, D)),
    or reference images are decoded.
    """

    tokenize: Callable[[Sequence[str]], Tokens]
    identity: Mapping[str, int]
    images: ImageSource
    rows: Mapping[str, int] | None = None
    references: Callable[[Sequence[str]], Tensor] | None = None
    answers: KnownTargets = field(default_factory=KnownTargets)

    def __call__(self, items: list[tuple[Triplet, str]]) -> TripletBatch:
        """B triplets with the text drawn for each → one batch."""
        reference, target = [t.reference for t, _ in items], [t.target for t, _ in items]
        if self.references is None:
            shown = reference if self.rows else [i for t, _ in items for i in (t.reference, t.target)]
            unique = {image_id: n for n, image_id in enumerate(dict.fromkeys(shown))}
            pixels, features = self.images.stack(list(unique)), None
        else:
            unique, pixels, features = dict.fromkeys(reference, 0), None, self.references(reference)
        row, number = self.rows or unique, self.identity
        others = [self.answers.others(number[t.reference], text, number[t.target]) for t, text in items]
        return TripletBatch(
            tokens=self.tokenize([text for _, text in items]),
            reference=torch.tensor([unique[i] for i in reference]),
            target=torch.tensor([row[i] for i in target]),
            identity=torch.tensor([number[i] for i in target]),
            others=torch.tensor(others, dtype=torch.long).view(len(items), self.answers.width),
            asked=torch.tensor([[number[t.reference], number_of(text)] for t, text in items]),
            pixels=pixels,
            features=features,
        )


def number_of(text: str) -> int:
    """A number that is the same for equal texts, on all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def prefetch(batches: Iterable[TripletBatch]) -> Iterator[TripletBatch]:
    """The same batches, the next one being made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        iterator = iter(batches)
        waiting = pool.submit(next, iterator, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, iterator, None)
            yield batch


class TripletSampler(Sampler[list[tuple[int, int]]]):
    """This process's share of each batch of one epoch, a pure function of (seed, epoch).

    An epoch is one pass over the annotated triplets if ``generated_share`` is set, that share of each batch being
    generated; without it the two lists are concatenated. The last incomplete batch is dropped.

    Args:
        annotated, generated: item numbers.
        batch_size: triplets of one optimiser step, over all processes.
        generated_share: in [0, 1), or None.
        seed: of the run.
        process: its rank, and how many there are.
        parts: of a batch, each of them a list of its own.
    """

    def __init__(
        self,
        annotated: Sequence[int],
        generated: Sequence[int],
        batch_size: int,
        generated_share: float | None,
        seed: int,
        process: tuple[int, int] = (0, 1),
        parts: int = 1,
    ):
        mixed = generated_share is not None and annotated and generated
        self.main = list(annotated) if mixed else [*annotated, *generated]
        self.side = list(generated) if mixed else []
        self.from_side = round(batch_size * generated_share) if mixed and generated_share else 0
        self.from_main = batch_size - self.from_side
        self.batch_size, self.seed, (self.rank, self.world_size) = batch_size, seed, process
        self.epoch, self.skip, self.parts = 0, 0, parts
        if batch_size % (self.world_size * parts):
            over = f"{self.world_size} processes" + (f" times {parts} parts" if parts > 1 else "")
            raise InputError(f"batch_size {batch_size} does not divide over {over}")
        if mixed and generated_share and not self.from_side:
            raise InputError(f"generated_share {generated_share} of a batch of {batch_size} is less than one triplet")
        if self.from_main == 0:
            raise InputError(
                f"generated_share {generated_share} of a batch of {batch_size} leaves no annotated triplet"
            )
        if len(self) == 0:
            raise InputError(f"{len(self.main)} triplets do not fill one batch of {batch_size}: lower batch_size")

    def __len__(self) -> int:
        return len(self.main) // self.from_main

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of one epoch, over all processes."""
        main = random.Random(f"{self.seed}/{epoch}/order").sample(self.main, len(self.main))
        needed = len(self) * self.from_side
        side: list[int] = []
        for turn in range(-(-needed // len(self.side)) if self.side else 0):
            side += random.Random(f"{self.seed}/{epoch}/generated/{turn}").sample(self.side, len(self.side))
        return [
            main[n * self.from_main : (n + 1) * self.from_main] + side[n * self.from_side : (n + 1) * self.from_side]
            for n in range(len(self))
        ]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // (self.world_size * self.parts)
        for batch in self.batches(self.epoch)[self.skip :]:
            for part in range(self.parts):
                items = batch[part :: self.parts]  # of annotated and of generated ones as large a share as in the batch
                yield [(self.epoch, item) for item in items[self.rank * share : (self.rank + 1) * share]]
