"""Step 2: pair each image with others from a window of similarity ranks, neither too similar nor too dissimilar.

examples:
  python data_gen/match_pairs.py --dataset emoji --window '[1, 20]' --pairs-per-image 4
  python data_gen/match_pairs.py --dataset fashioniq --matcher unicom:ViT-L/14 --window '[0.4, 0.8]' --pool category
  python data_gen/match_pairs.py --dataset cirr --window null                 # uniformly, without any encoder
"""

import json
import math
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from spn4cir.data_gen.deduplicate import canonical_images, reference_images
from spn4cir.data_gen.steps import ROWS, GenerateConfig, Journal, digest, draw_free, mark_done, run_step, skip_step
from spn4cir.dataset import Dataset
from spn4cir.distributed import Processes
from spn4cir.errors import InputError
from spn4cir.files import Row, read_jsonl, write_jsonl, write_text

if TYPE_CHECKING:
    from spn4cir.data_gen.windows import Array, Window

SAMPLE = 512  # references whose similarities to all others the report shows
BINS = 200


@dataclass(frozen=True)
class Pool:
    """Images that may be partners of each other, and the window over them."""

    category: str  # that they share; empty where all candidates are one pool
    ids: tuple[str, ...]
    window: tuple[int, int] | None  # ranks [lo, hi) among the others; None draws uniformly


Block: TypeAlias = tuple[Pool, Sequence[str]]  # references of a pool


def match_pairs(config: GenerateConfig, dataset: Dataset) -> None:
    """Write pairs.jsonl: reference, target, and the target's rank and similarity as seen from the reference."""
    processes, out = Processes(), config.file("pairs.jsonl")
    pools, never, about = pools_of(config, dataset), annotated_partners(config, dataset), _about(config)
    references = reference_images(config, dataset)
    partners = {i: sorted(targets) for i, targets in sorted(never.items())}
    decides = {"step": "match", "annotated": partners, "references": references, **about}
    made_by = digest(decides | {"pools": [(p.category, p.ids) for p in pools]}, config.file("images.jsonl"))
    if skip_step("match", out, made_by):
        return
    ids = canonical_images(config)
    matching = Matching(config, _vectors(config, dataset, ids, processes), {i: n for n, i in enumerate(ids)}, never)
    _work(matching, _blocks(pools, references), Journal(out, made_by, processes), processes)
    journal = Journal(out, made_by, processes)  # now with the blocks of all
    if processes.first:
        rows, dropped = _kept(config, list(journal.rows()))
        told = ", ".join(f"{count} since {reason}" for reason, count in dropped.items() if count)
        if not rows:
            raise InputError(f"no pair is left of {config.dataset}: {told or 'all partners are annotated'}")
        write_jsonl(out, ({**row, "made_by": made_by} for row in rows))
        write_text(config.file("window.json"), json.dumps(matching.report(pools, references, rows)) + "\n")
        mark_done(out, made_by, settings=about, rows=len(rows), dropped=dropped)
        journal.remove()
        print(f"match: {len(rows)} pairs {_described(pools)}{told and f'; left out: {told}'} → {out}", flush=True)
    processes.wait()


@dataclass
class Matching:
    """Draws pairs."""

    config: GenerateConfig
    vectors: "Array | None"  # (N, E) of all candidates; None where draws are uniform
    row_of: Mapping[str, int]  # image id → its row of them
    never: Mapping[str, Collection[str]]  # image id → targets that it is not to have
    _pool: Pool | None = None
    _place: Mapping[str, int] = field(default_factory=dict)
    _window: "Window | None" = None

    def rows(self, pool: Pool, names: Sequence[str]) -> list[Row]:
        """Pairs of some references of a pool, in their order."""
        self._enter(pool)
        ids, positions = pool.ids, [self._place[i] for i in names]
        never = [[self._place[i] for i in self.never.get(name, ()) if i in self._place] for name in names]
        found: Sequence[Sequence[tuple[int, int | None, float | None]]]
        if self._window is None:
            drawn = draw_uniformly(positions, names, never, len(ids), self.config.pairs_per_image, self.config.seed)
            each = zip(names, drawn, strict=True)
            found = [[(n, None, self._similarity(name, ids[n])) for n in partners] for name, partners in each]
        else:
            found = self._window.draw(positions, names, never)
        return [
            {"reference": name, "target": ids[n], "rank": rank, "similarity": similarity and round(similarity, 4)}
            for name, partners in zip(names, found, strict=True)
            for n, rank, similarity in partners
        ]

    def _enter(self, pool: Pool) -> None:
        if self._pool is pool:
            return  # its blocks come one after another
        self._pool, self._place = pool, {i: n for n, i in enumerate(pool.ids)}
        if pool.window is not None:
            from spn4cir.data_gen.windows import Window

            config = self.config
            self._window = Window(self._vectors_of(pool), *pool.window, config.pairs_per_image, config.seed)

    def _vectors_of(self, pool: Pool) -> "Array":
        """(n, E) of a pool; a view of the stored vectors where it holds all of them."""
        assert self.vectors is not None
        rows = [self.row_of[i] for i in pool.ids]
        return self.vectors if rows == list(range(len(self.vectors))) else self.vectors[rows]

    def _similarity(self, reference: str, target: str) -> float | None:
        if self.vectors is None:
            return None
        one, other = (self.vectors[self.row_of[i]].astype("float64") for i in (reference, target))
        return float((one * other).sum())

    def report(self, pools: Sequence[Pool], references: Sequence[str], rows: Sequence[Row]) -> Row:
        """What people set a window by: similarities of some references to all others, beside those of the pairs."""
        about: Row = {"window": self.config.window, "pool": self.config.pool, "images": len(self.row_of)}
        about |= {"pairs": len(rows), "ranks": {pool.category: pool.window for pool in pools}}
        if self.vectors is None:
            return about
        import numpy as np

        edges = np.linspace(-1, 1, BINS + 1)
        every = np.zeros(BINS, int)
        for pool in pools:
            own = set(pool.ids)
            sample = [i for i in references if i in own]
            vectors = self._vectors_of(pool)
            for name in sample[:: max(1, len(sample) * len(pools) // SAMPLE)]:
                scores = vectors @ self.vectors[self.row_of[name]]  # (n,)
                every += np.histogram(np.delete(scores, pool.ids.index(name)), edges)[0]
        similarities, places = [row["similarity"] for row in rows], [0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1]
        values = np.quantile(similarities, places).tolist()
        quantiles = [[at, round(value, 4)] for at, value in zip(places, values, strict=True)]
        chosen = np.histogram(similarities, edges)[0]
        histogram = {"edges": edges.round(4).tolist(), "all": every.tolist(), "window": chosen.tolist()}
        return {**about, "histogram": histogram, "quantiles": quantiles}


def draw_uniformly(
    places: Sequence[int], names: Sequence[str], never: Sequence[Collection[int]], pool: int, per_image: int, seed: int
) -> list[list[int]]:
    """Partners of images among ``pool`` places, whatever they show; arguments as for ``Window.draw``."""
    each = zip(places, names, never, strict=True)
    return [draw_free(range(pool), {place, *other}, name, per_image, seed) for place, name, other in each]


def pools_of(config: GenerateConfig, dataset: Dataset) -> list[Pool]:
    """All candidates as one pool, or one for each category but those too small for a pair, which are counted aloud.

    Raises ``InputError`` if there are too few images for a pair, or the window reaches beyond all others.
    """
    ids, groups = canonical_images(config), dict[str, list[str]]()
    for image_id in ids:
        groups.setdefault(dataset.category(image_id) if config.pool == "category" else "", []).append(image_id)
    if config.pool == "category" and set(groups) == {""}:
        raise InputError(f"pool category: the images of {config.dataset} have no categories; use --pool all")
    pools, small = [], 0
    for category, members in groups.items():
        others = len(members) - 1
        window = ranks_of(config, others) if others else None
        if others < 1 or (window and window[1] > others + 1):
            small += len(members)
        else:
            pools.append(Pool(category, tuple(members), window))
    if not pools:
        told = "one image alone cannot be paired" if len(ids) == 1 else "no category has images enough for the window"
        if len(groups) == 1 < len(ids):
            lo, hi = config.window or (1, 1)
            told = f"the window [{lo}, {hi}) reaches beyond the {len(ids) - 1} other images"
        raise InputError(f"{config.dataset}: {told}")
    if small:
        Processes().say(f"match: {small} images are left out, whose categories are too small for a pair of the window")
    return pools


def ranks_of(config: GenerateConfig, others: int) -> tuple[int, int] | None:
    """The window as ranks [lo, hi) of so many other images; fractions give one rank at least."""
    if config.window is None:
        return None
    lo, hi = config.window
    if not config.fractions:
        return int(lo), int(hi)
    first = min(math.floor(lo * others) + 1, others)
    return first, max(math.floor(hi * others) + 1, first + 1)


def annotated_partners(config: GenerateConfig, dataset: Dataset) -> dict[str, set[str]]:
    """Image id → targets that annotated triplets give it, all by their canonical ids."""
    canonical = {row["image_id"]: row["canonical"] for row in read_jsonl(config.file("images.jsonl"))}
    partners = defaultdict[str, set[str]](set)
    for triplet in dataset.triplets():
        if triplet.reference is not None:
            own = canonical.get(triplet.reference, triplet.reference)
            partners[own].update(canonical.get(i, i) for i in triplet.targets)
    return partners


def _about(config: GenerateConfig) -> dict[str, Any]:
    from spn4cir.data_gen.matchers import identify

    named = ("window", "pool", "pairs_per_image", "pairs", "max_image_similarity", "seed")
    about: dict[str, Any] = {name: getattr(config, name) for name in named}
    return about | ({"matcher": identify(config.matcher)} if _needs_vectors(config) else {})


def _needs_vectors(config: GenerateConfig) -> bool:
    return config.window is not None or config.max_image_similarity is not None


def _vectors(config: GenerateConfig, dataset: Dataset, ids: Sequence[str], processes: Processes) -> "Array | None":
    """(N, E) unit vectors of all candidates, encoded if they are not there."""
    if not _needs_vectors(config):
        return None
    from spn4cir.data_gen.matchers import identify, load_matcher
    from spn4cir.data_gen.windows import encode_vectors, open_store

    store = open_store(config, ids, identify(config.matcher))
    return encode_vectors(store, dataset, ids, lambda: load_matcher(config.matcher), processes)


def _blocks(pools: Sequence[Pool], references: Sequence[str]) -> list[Block]:
    """All references, pool by pool, in blocks of a fixed size."""
    acting = set(references)
    each = [(pool, [i for i in pool.ids if i in acting]) for pool in pools]
    return [(pool, own[n : n + ROWS]) for pool, own in each for n in range(0, len(own), ROWS)]


def _work(matching: Matching, blocks: Sequence[Block], journal: Journal, processes: Processes) -> None:
    from tqdm import tqdm

    mine = [n for n in range(processes.index, len(blocks), processes.count) if n not in journal]
    for n in tqdm(mine, "match", unit="block", disable=not processes.first or not mine):
        journal.add(n, matching.rows(*blocks[n]))
    journal.close()
    processes.wait()


def _kept(config: GenerateConfig, rows: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """Pairs that pass the filter, or as many of them as are wanted; and how many were left out, by reason."""
    dropped: dict[str, int] = {}
    bound, wanted = config.max_image_similarity, config.pairs
    if bound is not None:
        before, rows = len(rows), [row for row in rows if row["similarity"] <= bound]
        dropped[f"image similarity above {bound}"] = before - len(rows)
    if wanted is not None and wanted < len(rows):
        dropped[f"more than {wanted} pairs"] = len(rows) - wanted
        places = sorted(random.Random(f"{config.seed}/pairs").sample(range(len(rows)), wanted))
        rows = [rows[n] for n in places]
    return rows, dropped


def _described(pools: Sequence[Pool]) -> str:
    windows = sorted({pool.window for pool in pools if pool.window})
    if not windows:
        return "drawn uniformly"
    shown = ", ".join(f"[{lo}, {hi})" for lo, hi in windows[:3]) + " …" * (len(windows) > 3)
    return f"of ranks {shown}" + f" within {len(pools)} categories" * (len(pools) > 1)


if __name__ == "__main__":
    run_step(match_pairs, __doc__)
