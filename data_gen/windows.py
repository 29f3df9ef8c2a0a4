"""Vectors of all images, each encoded once, and partners from a window of their similarity ranks.

Ranks are exact, without the dense matrix and without sorting it. The order of images is *defined* by the dot products
of their vectors in float64, equal ones by position. Products in float32 find a wanted rank up to their rounding error;
the few images within that error are then ordered by the definition. So neither the block size, nor the number of
threads or processes, nor the device moves a pair.
"""

import itertools
import math
import os
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from spn4cir.data_gen.steps import GenerateConfig, digest
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes, cpu_count, own_device
from spn4cir.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from spn4cir.data_gen.matchers import Matcher
    from spn4cir.images import ImageSource
    from spn4cir.store import EmbeddingStore

Array: TypeAlias = "np.ndarray[Any, Any]"
ROWS = 256  # references compared with all others at once: (ROWS, N) scores are all that is held
# A float32 dot product of E terms of unit vectors errs by about √E · 2⁻²⁴, and by more than λ times that with a
# probability below 2 exp(-λ²/2), here 3e-14 (Higham and Mary, "A new approach to probabilistic rounding error
# analysis", SIAM Journal on Scientific Computing, 2019)
ERRORS = 8
PAIRS = 2**15  # images that are compared in float64 at once
HALVINGS = 18  # of the range of scores, where a rank is bracketed by counting
THREADS = 16  # images decoded at the same time, on a machine with that many cores
AHEAD = 2  # blocks of pixels in memory: the one that is encoded, and the next
TOLERANCE = 1e-3  # between one and the length of a vector


def open_store(config: GenerateConfig, ids: Sequence[str], matcher: Mapping[str, Any]) -> "EmbeddingStore":
    """Return the store of the vectors of images, in order.

    Its key depends on the images, their pixels and order, the encoder and its batch size, not on windows or pools, so
    that another window encodes nothing again.

    Args:
        config: of the step.
        ids: N images.
        matcher: what ``matchers.identify`` returns.
    """
    from spn4cir.store import EmbeddingStore

    size, what = config.match_batch_size, f"encoding {len(ids)} images"
    about = {"step": "vectors", "ids": list(ids), "matcher": dict(matcher), "at_once": size}
    key, advice = digest(about, config.file("images.jsonl")), "make room, or set output to a larger disk"
    return EmbeddingStore(config.file("vectors"), key, len(ids), {"vectors": "float32"}, size, what, advice)


def encode_vectors(
    store: "EmbeddingStore", dataset: Dataset, ids: Sequence[str], load: "Callable[[], Matcher]", processes: Processes
) -> Array:
    """Return the L2-normalised vectors (N, E) of all images, memory-mapped; encodes what the store lacks.

    Args:
        store: what ``open_store`` returns.
        dataset: knows where images lie.
        ids: N images, in order.
        load: loads the matcher; not called where all vectors are stored.
        processes: which share the work.

    Raises:
        InputError: if an image is missing or its vector is not of unit norm, or the disk or the device has no room.
    """
    stored = store.open()
    processes.wait()  # no process writes before all have looked
    if stored is None:
        from spn4cir.images import ImageSource
        from spn4cir.store import BEGUN

        matcher = load().to(own_device())
        images = ImageSource(dataset.image, matcher.transform)
        if processes.first and store.open(BEGUN) is None:
            store.create({"vectors": tuple(matcher.encode(images.stack(ids[:1])).shape[1:])})
        processes.wait()
        blocks = {
            start: ids[start : start + store.block]
            for start in store.missing()
            if start // store.block % processes.count == processes.index
        }
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


def _encode_blocks(
    blocks: Mapping[int, Sequence[str]], images: "ImageSource", matcher: "Matcher", shown: bool
) -> "Iterator[tuple[int, Tensor]]":
    """First row and checked vectors, on the CPU, of each block of images; with a progress bar if it is to be shown."""
    import torch
    from tqdm import tqdm

    with tqdm(total=sum(map(len, blocks.values())), desc="encode", unit="image", disable=not shown) as bar:
        for start, pixels in _decode_blocks(blocks, images):
            try:
                found = matcher.encode(pixels).float().cpu()  # (b, E)
            except torch.cuda.OutOfMemoryError:
                raise InputError(
                    f"{len(pixels)} images at once are too many for the memory of {matcher.device}: lower "
                    "match_batch_size"
                ) from None
            wrong = ((found.norm(dim=1) - 1).abs() <= TOLERANCE).logical_not().nonzero().flatten().tolist()
            if wrong:
                raise InputError(
                    f"image {images.image(blocks[start][wrong[0]])}: its vector by {matcher.made_by['kind']} "
                    f"{matcher.made_by['model']} has the length {found[wrong[0]].norm().item():.3g}, not 1"
                )
            yield start, found
            bar.update(len(found))


def _decode_blocks(blocks: Mapping[int, Sequence[str]], images: "ImageSource") -> "Iterator[tuple[int, Tensor]]":
    """(b, 3, H, W) of each block, images being decoded in threads ahead."""
    import torch

    waiting, todo = deque[tuple[int, "list[Future[Tensor]]"]](), iter(blocks.items())
    share = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the machine's cores
    pool = ThreadPoolExecutor(max(1, min(THREADS, share)))
    try:
        while True:
            while len(waiting) < AHEAD and (block := next(todo, None)):
                waiting.append((block[0], [pool.submit(images, image_id) for image_id in block[1]]))
            if not waiting:
                return
            n, futures = waiting.popleft()
            found = [future.result() for future in futures]
            del futures
            if len({pixels.shape for pixels in found}) > 1:
                raise InputError(
                    f"images {blocks[n][0]} … {blocks[n][-1]} do not become equally large: this matcher's "
                    "preprocessing states no size"
                )
            stacked = torch.stack(found)
            del found
            yield n, stacked
    finally:
        pool.shutdown(cancel_futures=True)


class Partner(NamedTuple):
    """A drawn partner: its position among the vectors, its rank (1: the most similar other) and its similarity."""

    position: int
    rank: int
    similarity: float


class Window:
    """Draws partners of images from ranks [lo, hi) of all others.

    Args:
        vectors: (N, E) of unit norm, float32; only read.
        lo: first rank, at least 1.
        hi: behind the last rank, at most N.
        per_image: partners of each image, as far as the window holds so many.
        seed: of the draws; each image has its own, by its name.
    """

    def __init__(self, vectors: Array, lo: int, hi: int, per_image: int, seed: int):
        assert 1 <= lo < hi <= len(vectors), (lo, hi, len(vectors))
        import torch

        torch.set_float32_matmul_precision("highest")  # TensorFloat-32 would err by more than is allowed for below
        self.vectors, self.lo, self.hi, self.per_image, self.seed = vectors, lo, hi, per_image, seed
        self.device = _device(vectors)
        self._all = torch.from_numpy(vectors).to(self.device)  # (N, E); on a CPU no copy
        self.slack = 2 * ERRORS * math.sqrt(vectors.shape[1]) * 2.0**-24  # of two scores

    def draw(
        self, positions: Sequence[int], names: Sequence[str], never: Sequence[Collection[int]]
    ) -> list[list[Partner]]:
        """Partners of some images.

        Args:
            positions: B images, by position among the vectors.
            names: of them, that key the draws.
            never: positions that are no partner of each, beside itself.

        Returns:
            For each image its partners, by rank.
        """
        import torch

        with torch.inference_mode():
            scores = self._all[torch.as_tensor(positions, device=self.device)] @ self._all.T  # (B, N)
            scores[torch.arange(len(positions)), torch.as_tensor(positions)] = -torch.inf  # itself comes last
            return (self._select if scores.is_cpu else self._count)(scores, positions, names, never)

    def _select(
        self, scores: "Tensor", positions: Sequence[int], names: Sequence[str], never: Sequence[Collection[int]]
    ) -> list[list[Partner]]:
        """Partners of images from their scores (B, N), by partial selection in each row."""
        rows = scores.numpy()
        taken = [
            [self._rank(row, image, other) for other in others if other != image]
            for row, image, others in zip(rows, positions, never, strict=True)
        ]
        ranks = [self._ranks(*one) for one in zip(taken, names, strict=True)]
        parts = np.array_split(np.arange(len(rows)), cpu_count())
        with ThreadPoolExecutor(len(parts)) as pool:  # a partition runs outside the interpreter's lock
            values = [
                one for part in pool.map(lambda own: [_at(rows[n], ranks[n]) for n in own], parts) for one in part
            ]
        return [
            [self._partner(row, image, rank, value) for rank, value in zip(own, at, strict=True)]
            for row, image, own, at in zip(rows, positions, ranks, values, strict=True)
        ]

    def _ranks(self, taken: list[int], name: str) -> list[int]:
        """The ranks that an image draws, but for those whose images it may not have."""
        taken = sorted(rank for rank in taken if self.lo <= rank < self.hi)
        free = self.hi - self.lo - len(taken)
        drawn = sorted(random.Random(f"{self.seed}/{name}").sample(range(free), min(self.per_image, free)))
        found = []
        for rank in (self.lo + offset for offset in drawn):
            for other in taken:
                rank += other <= rank
            found.append(rank)
        return found

    def _rank(self, scores: Array, position: int, other: int) -> int:
        """The rank of another image, by counting."""
        value = scores[other]
        near = np.flatnonzero((scores >= value - self.slack) & (scores <= value + self.slack))
        order, _ = self._sorted(position, near)
        return int(np.count_nonzero(scores > value + self.slack) + 1 + np.flatnonzero(order == other)[0])

    def _partner(self, scores: Array, position: int, rank: int, value: float) -> Partner:
        """The image at a rank, where ``value`` stands in the sorted scores: one of those that may be level with it."""
        near = np.flatnonzero((scores >= value - self.slack) & (scores <= value + self.slack))
        level = scores[near]
        if np.count_nonzero(level == value) == 1:
            above = rank - 1 - np.count_nonzero(level > value)  # so many are better than any of these
        else:
            above = np.count_nonzero(scores > value + self.slack)
        order, exact = self._sorted(position, near)
        return Partner(int(order[rank - 1 - above]), rank, float(exact[rank - 1 - above]))

    def _sorted(self, position: int, others: Array) -> tuple[Array, Array]:
        """Others by falling exact similarity, equal ones by position; and these similarities."""
        exact = np.einsum(
            "nd,d->n", self.vectors[others], self.vectors[position], dtype=np.float64
        )  # each summed alike
        order = np.lexsort((others, -exact))
        return others[order], exact[order]

    def _count(
        self, scores: "Tensor", positions: Sequence[int], names: Sequence[str], never: Sequence[Collection[int]]
    ) -> list[list[Partner]]:
        """As ``_select`` for scores (B, N) on a GPU, whose rows are counted together."""
        import torch

        rows = [(n, other) for n, image in enumerate(positions) for other in never[n] if other != image]
        taken: list[list[int]] = [[] for _ in positions]
        for start in range(0, len(rows), ROWS):  # together, but no more than a block: each copies a row of scores
            some = rows[start : start + ROWS]
            own, others = torch.tensor(some, device=scores.device).T
            values, images = scores[own, others], [positions[n] for n, _ in some]
            for (n, other), (above, order, _) in zip(
                some, self._near(scores[own], images, values, values), strict=True
            ):
                taken[n].append(int(above + 1 + np.flatnonzero(order == other)[0]))
        ranks = [self._ranks(*one) for one in zip(taken, names, strict=True)]
        out: list[list[Partner]] = [[] for _ in positions]
        for place in range(max(map(len, ranks))):
            wanted = torch.tensor([found[place] if place < len(found) else 1 for found in ranks], device=scores.device)
            for n, (above, order, exact) in enumerate(self._near(scores, positions, *bracket(scores, wanted))):
                if place < len(ranks[n]):
                    own = ranks[n][place] - 1 - above
                    out[n].append(Partner(int(order[own]), ranks[n][place], float(exact[own])))
        return out

    def _near(
        self, scores: "Tensor", positions: Sequence[int], low: "Tensor", high: "Tensor"
    ) -> list[tuple[int, Array, Array]]:
        """For each row how many are surely above a range of scores, and those that may be in it, as of ``_sorted``."""
        import torch

        high, low = (high + self.slack)[:, None], (low - self.slack)[:, None]
        above = (scores > high).sum(1).tolist()
        row, column = ((scores >= low) & (scores <= high)).nonzero(as_tuple=True)  # (n,) each
        image = torch.as_tensor(positions, device=scores.device)[row]
        parts = zip(torch.split(image, PAIRS), torch.split(column, PAIRS), strict=True)
        exact = torch.cat([(self._all[one].double() * self._all[other]).sum(-1) for one, other in parts])  # (n,)
        where, others, values = (part.cpu().numpy() for part in (row, column, exact))
        order = np.lexsort((others, -values, where))
        others, values = others[order], values[order]
        cuts = [0, *np.searchsorted(where, np.arange(1, len(positions))).tolist(), len(others)]
        return [(above[n], others[a:b], values[a:b]) for n, (a, b) in enumerate(itertools.pairwise(cuts))]


def _at(scores: Array, ranks: list[int]) -> Array:
    """What stands at ranks of the sorted scores (N,)."""
    places = [len(scores) - rank for rank in ranks]  # in ascending order
    return np.partition(scores, places)[places] if places else scores[:0]


def bracket(scores: "Tensor", ranks: "Tensor") -> "tuple[Tensor, Tensor]":
    """Bounds of the score at a rank of each row, by counting what is above a threshold and halving the range.

    Args:
        scores: (B, N), at most 1.1 in absolute value but for −inf.
        ranks: (B,), from 1, at most as many as there are finite scores.

    Returns:
        low and high, (B,) each: at least ``rank`` scores are above low, and fewer are above high.
    """
    import torch

    low, high = torch.full_like(scores[:, 0], -1.1), torch.full_like(scores[:, 0], 1.1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (scores > middle[:, None]).sum(1) >= ranks
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low, high


def _device(vectors: Array) -> str:
    """This process's GPU, if it holds the vectors and a block of scores with what is counted in it."""
    import torch

    own = own_device()
    if own == "cpu":
        return own
    needed = vectors.nbytes + 14 * ROWS * len(vectors)
    if needed < 0.9 * torch.cuda.mem_get_info(own)[0]:
        return own
    print(f"match: {own} has no room for {needed / 1e9:.1f} GB of vectors and scores: the CPU compares them")
    return "cpu"
