"""Vectors of all images, each encoded once, and partners from a window of their similarity ranks.

The order of images is *defined* by the dot products of their vectors in float64, equal ones by position; products in
float32 find the few images that may have a rank. docs/generation.md says what follows from that.
"""

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.batches import prefetch
from spn4cir.data_gen.matchers import Matcher
from spn4cir.data_gen.steps import ROWS, GenerateConfig, digest, draw_free
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes, cpu_count, own_device
from spn4cir.errors import InputError
from spn4cir.images import ImageSource
from spn4cir.store import BEGUN, EmbeddingStore

Array: TypeAlias = np.ndarray[Any, Any]
Blocks: TypeAlias = Mapping[int, Sequence[str]]  # first row of each block → its images
# A float32 dot product of E terms of unit vectors errs by about √E · 2⁻²⁴, and by more than λ times that with a
# probability below 2 exp(-λ²/2), here 3e-14 (Higham and Mary, "A new approach to probabilistic rounding error
# analysis", SIAM Journal on Scientific Computing, 2019)
ERRORS = 8
PAIRS = 2**15  # images that are compared in float64 at once
HALVINGS = 18  # of the range of scores, where a rank is bracketed by counting
THREADS = 16  # images decoded at the same time, on a machine with that many cores
TOLERANCE = 1e-3  # between one and the length of a vector


def open_store(config: GenerateConfig, ids: Sequence[str], matcher: Mapping[str, Any]) -> EmbeddingStore:
    """Return the store of the vectors of images, in order.

    Its key depends on the images, their pixels and order, the matcher and its batch size, but on no window or pool.
    """
    size, what = config.match_batch_size, f"encoding {len(ids)} images"
    about = {"step": "vectors", "ids": list(ids), "matcher": dict(matcher), "at_once": size}
    key, advice = digest(about, config.file("images.jsonl")), "make room, or set output to a larger disk"
    return EmbeddingStore(config.file("vectors"), key, len(ids), {"vectors": "float32"}, size, what, advice)


def encode_vectors(
    store: EmbeddingStore, dataset: Dataset, ids: Sequence[str], load: Callable[[], Matcher], processes: Processes
) -> Array:
    """Return the L2-normalised vectors (N, E) of all images, memory-mapped; loads the matcher if some are not stored.

    Raises ``InputError`` for an image that is missing or has a vector of another norm, or where there is no room.
    """
    stored = store.open()
    processes.wait()  # no process writes before all have looked
    if stored is None:
        matcher = load().to(own_device())
        images = ImageSource(dataset.image, matcher.transform)
        if processes.first and store.open(BEGUN) is None:
            store.create({"vectors": tuple(matcher.encode(images.stack(ids[:1])).shape[1:])})
        processes.wait()
        own = [s for s in store.missing() if s // store.block % processes.count == processes.index]
        blocks = {start: ids[start : start + store.block] for start in own}
        for start, found in _encode_blocks(blocks, images, matcher, processes.first):
            store.write(start, {"vectors": found})
        store.flush()
        processes.wait()
        if processes.first:
            store.finish()
        processes.wait()
        stored = store.open()
        assert stored is not None
    return stored["vectors"].whole().numpy()


def _encode_blocks(blocks: Blocks, images: ImageSource, matcher: Matcher, shown: bool) -> Iterator[tuple[int, Tensor]]:
    """First row and checked vectors, on the CPU, of each block of images; with a progress bar if it is to be shown."""
    with tqdm(total=sum(map(len, blocks.values())), desc="encode", unit="image", disable=not shown) as bar:
        for start, pixels in prefetch(_decode_blocks(blocks, images)):
            try:
                found = matcher.encode(pixels).float().cpu()  # (b, E)
            except torch.cuda.OutOfMemoryError:
                told = f"{len(pixels)} images at once are too many for the memory of {matcher.device}"
                raise InputError(f"{told}: lower match_batch_size") from None
            for image_id, length in zip(blocks[start], found.norm(dim=1).tolist(), strict=True):
                if not abs(length - 1) <= TOLERANCE:  # NaN is not either
                    told = f"its vector by {matcher.made_by['kind']} {matcher.made_by['model']}"
                    raise InputError(f"image {images.image(image_id)}: {told} has the length {length:.3g}, not 1")
            yield start, found
            bar.update(len(found))


def _decode_blocks(blocks: Blocks, images: ImageSource) -> Iterator[tuple[int, Tensor]]:
    """(b, 3, H, W) of each block, whose images are decoded in threads."""
    share = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the machine's cores
    with ThreadPoolExecutor(max(1, min(THREADS, share))) as pool:
        for start, ids in blocks.items():
            found = list(pool.map(images, ids))
            if len({pixels.shape for pixels in found}) > 1:
                told = f"images {ids[0]} … {ids[-1]} do not become equally large"
                raise InputError(f"{told}: this matcher's preprocessing states no size")
            yield start, torch.stack(found)


Never: TypeAlias = Sequence[Collection[int]]  # positions that are no partner of each image, beside itself
Near: TypeAlias = tuple[int, Array, Array]


class Partner(NamedTuple):
    """A drawn partner: its position among the vectors, its rank (1: the most similar other) and its similarity."""

    position: int
    rank: int
    similarity: float


class Window:
    """Draws partners of images from ranks [lo, hi) of all others.

    ``vectors`` (N, E) are of unit norm, in float32, and only read. Each image has draws of its own, by its name, and
    ``per_image`` partners as far as the window holds so many.
    """

    def __init__(self, vectors: Array, lo: int, hi: int, per_image: int, seed: int):
        assert 1 <= lo < hi <= len(vectors), (lo, hi, len(vectors))
        torch.set_float32_matmul_precision("highest")  # TensorFloat-32 would err by more than is allowed for below
        self.vectors, self.lo, self.hi, self.per_image, self.seed = vectors, lo, hi, per_image, seed
        self.device = _device(vectors)
        self._all = torch.from_numpy(vectors).to(self.device)  # (N, E); on a CPU no copy
        self.slack = 2 * ERRORS * math.sqrt(vectors.shape[1]) * 2.0**-24  # of two scores

    def draw(self, positions: Sequence[int], names: Sequence[str], never: Never) -> list[list[Partner]]:
        """Return the partners of the images at some positions, by rank. Their names key the draws."""
        with torch.inference_mode():
            scores = self._all[torch.as_tensor(positions, device=self.device)] @ self._all.T  # (B, N)
            scores[torch.arange(len(positions)), torch.as_tensor(positions)] = -torch.inf  # itself comes last
            return self._partners(scores, positions, names, never, by_counting=not scores.is_cpu)

    def _partners(
        self, scores: Tensor, positions: Sequence[int], names: Sequence[str], never: Never, by_counting: bool
    ) -> list[list[Partner]]:
        """Partners of images from their scores (B, N); a score at a rank is selected, or bracketed by counting."""
        rows = [(n, other) for n, image in enumerate(positions) for other in never[n] if other != image]
        taken: list[list[int]] = [[] for _ in positions]
        for start in range(0, len(rows), ROWS):  # together, but no more than a block: each copies a row of scores
            some = rows[start : start + ROWS]
            own, others = torch.tensor(some, device=scores.device).T
            values, images = scores[own, others], [positions[n] for n, _ in some]
            near = self._near(scores[own], images, values, values)
            for (n, other), (above, order, _) in zip(some, near, strict=True):
                taken[n].append(int(above + 1 + np.flatnonzero(order == other)[0]))
        drawn = zip(taken, names, strict=True)
        ranks = [draw_free(range(self.lo, self.hi), *one, self.per_image, self.seed) for one in drawn]
        most = max(map(len, ranks))
        padded = [[*found, *[1] * (most - len(found))] for found in ranks]
        wanted = torch.tensor(padded, dtype=torch.long, device=scores.device).T  # (partners, B)
        if by_counting:
            bounds = [bracket(scores, at) for at in wanted]
        else:
            bounds = [(values, values) for values in _select(scores, wanted)]
        out: list[list[Partner]] = [[] for _ in positions]
        for place, (low, high) in enumerate(bounds):
            for n, (above, order, exact) in enumerate(self._near(scores, positions, low, high)):
                if place < len(ranks[n]):
                    at = ranks[n][place] - 1 - above
                    out[n].append(Partner(int(order[at]), ranks[n][place], float(exact[at])))
        return out

    def _near(self, scores: Tensor, positions: Sequence[int], low: Tensor, high: Tensor) -> list[Near]:
        """For each row how many are surely above a range of scores; and those that may be in it, with similarities.

        They are ordered by falling similarity in float64, equal ones by position.
        """
        high, low = (high + self.slack)[:, None], (low - self.slack)[:, None]
        over = scores > high  # on a CPU, NumPy counts them several times as fast as torch
        above = (np.count_nonzero(over.numpy(), 1) if over.is_cpu else over.sum(1)).tolist()
        row, column = ((scores >= low) & (scores <= high)).nonzero(as_tuple=True)  # (n,) each
        image = torch.as_tensor(positions, device=scores.device)[row]
        parts = zip(torch.split(image, PAIRS), torch.split(column, PAIRS), strict=True)
        exact = torch.cat([(self._all[one].double() * self._all[other]).sum(-1) for one, other in parts])  # (n,)
        where, others, values = (part.cpu().numpy() for part in (row, column, exact))
        order = np.lexsort((others, -values, where))
        others, values = others[order], values[order]
        cuts = [0, *np.searchsorted(where, np.arange(1, len(positions))).tolist(), len(others)]
        return [(above[n], others[a:b], values[a:b]) for n, (a, b) in enumerate(itertools.pairwise(cuts))]


def _select(scores: Tensor, ranks: Tensor) -> Tensor:
    """The scores (P, B) at ranks (P, B) of the rows of scores (B, N), by partial selection on the CPU."""
    rows, places = scores.numpy(), (scores.shape[1] - ranks.T).numpy()  # in ascending order
    with ThreadPoolExecutor(cpu_count()) as pool:  # a partition runs outside the interpreter's lock
        values = list(pool.map(lambda row, at: np.partition(row, at)[at], rows, places))
    return torch.from_numpy(np.stack(values, 1))


def bracket(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the score at a rank of each row, by counting what is above a threshold and halving the range.

    Scores (B, N) are at most 1.1 in absolute value but for −inf, ranks (B,) from 1 to the number of finite scores. Of
    low and high, (B,) each, at least ``rank`` scores are above low, and fewer are above high.
    """
    low, high = torch.full_like(scores[:, 0], -1.1), torch.full_like(scores[:, 0], 1.1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (scores > middle[:, None]).sum(1) >= ranks
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low, high


def _device(vectors: Array) -> str:
    """This process's GPU, if it holds the vectors and a block of scores with what is counted in it."""
    own = own_device()
    if own == "cpu":
        return own
    needed = vectors.nbytes + 14 * ROWS * len(vectors)
    if needed < 0.9 * torch.cuda.mem_get_info(own)[0]:
        return own
    print(f"match: {own} has no room for {needed / 1e9:.1f} GB of vectors and scores: the CPU compares them")
    return "cpu"
