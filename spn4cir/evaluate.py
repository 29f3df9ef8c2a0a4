"""The one evaluator: a benchmark and a backbone in, a ``Result`` out."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank
from spn4cir.distributed import all_reduce, process_rank, world_size
from spn4cir.errors import InputError
from spn4cir.images import ImageSource
from spn4cir.measures import Ranks
from spn4cir.ranking import first_items, rank_fused, rank_negatives, rank_queries
from spn4cir.results import Ranking, Result, compute_ablation, compute_metrics
from spn4cir.types import Benchmark, ImageFeatures

T = TypeVar("T")
COMPOSED, IMAGE_ONLY, TEXT_ONLY, LATE_FUSION = "composed", "image only", "text only", "late fusion"


class EncodedBenchmark(NamedTuple):
    """A benchmark as embeddings: ``target`` (G, K, E) of its gallery, and queries (Q, E) by how they were made."""

    target: Tensor
    queries: dict[str, Tensor]


@torch.no_grad()
def encode_benchmark(
    backbone: Backbone,
    benchmark: Benchmark,
    images: ImageSource,
    bank: Bank | None = None,
    batch_size: int = 256,
    modes: Sequence[str] = (COMPOSED,),
) -> EncodedBenchmark:
    """Encode each item of a benchmark once, and compose its queries while their references are in memory.

    Reference features are large, so at most ``batch_size`` images have theirs in memory. Of several processes each
    encodes every n-th batch, and all return the same. Arguments are those of ``evaluate``, but for two.

    Args:
        backbone: its mode is left as it is, so call ``eval`` first.
        modes: ``composed``; ``text only`` and ``image only`` leave out the other part of each query that has both.

    Raises ``InputError`` if the gallery holds texts and the backbone cannot embed them, or an embedding is not finite.
    """
    device = next(backbone.parameters()).device
    row = {item: n for n, item in enumerate(benchmark.gallery)}
    by_reference: dict[str, list[int]] = {}
    for number, query in enumerate(benchmark.queries):
        if query.reference is not None:
            by_reference.setdefault(query.reference, []).append(number)
    targets = _Rows(len(benchmark.gallery), device)
    queries = {mode: _Rows(len(benchmark.queries), device) for mode in modes}
    text_items = [item for item in benchmark.gallery if item in benchmark.texts]
    text_queries = [n for n, query in enumerate(benchmark.queries) if query.reference is None]

    with tqdm(total=len(benchmark.image_ids), desc=f"encode {benchmark.name}", unit="image", leave=False) as bar:
        for ids in _share(benchmark.image_ids, batch_size):
            held = [n for n, i in enumerate(ids) if i in by_reference]
            target, reference = _features(backbone, images, bank, ids, held)
            pairs = [(place, number) for place, n in enumerate(held) for number in by_reference[ids[n]]]
            for first in range(0, len(pairs), batch_size):
                places, numbers = (list(part) for part in zip(*pairs[first : first + batch_size], strict=True))
                features = ImageFeatures(reference[places], target[[held[place] for place in places]])
                for mode, rows in queries.items():
                    rows.put(numbers, _compose(backbone, benchmark, numbers, features, mode))
            del reference  # before the next ones are made
            inside = [n for n, i in enumerate(ids) if i in row]
            targets.put([row[ids[n]] for n in inside], target[inside])
            bar.update(len(ids))
    for items in _share(text_items, batch_size):
        tokens = _tokenize(backbone, [benchmark.texts[item] for item in items], device)
        targets.put([row[item] for item in items], backbone.encode_text_target(tokens).float())
    for part in _share(text_queries, batch_size):
        for mode, rows in queries.items():
            rows.put(part, _compose(backbone, benchmark, part, None, mode))
    encoded = EncodedBenchmark(targets.joined(), {mode: rows.joined() for mode, rows in queries.items()})
    if not all(bool(vectors.isfinite().all()) for vectors in (encoded.target, *encoded.queries.values())):
        what = f"embeddings of {benchmark.name} are not finite"
        raise InputError(f"{backbone.name}: {what}: lower lr, or check the weights")
    return encoded


def _share(items: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    """This process's batches: the same batches whatever the number of processes."""
    for start in range(process_rank() * batch_size, len(items), world_size() * batch_size):
        yield items[start : start + batch_size]


class _Rows:
    """Rows of a tensor that is allocated once the shape of a row is known; each process fills its own."""

    def __init__(self, count: int, device: torch.device):
        self.count, self.device, self.values = count, device, torch.empty(0)

    def put(self, rows: Sequence[int], values: Tensor) -> None:
        if not len(self.values):
            self.values = values.new_zeros(self.count, *values.shape[1:])
        self.values[list(rows)] = values

    def joined(self) -> Tensor:
        """The rows of all processes."""
        if world_size() == 1:
            return self.values
        shape = torch.tensor([*self.values.shape[1:], 0, 0, 0][:3], dtype=torch.long, device=self.device)
        shape = all_reduce(shape, "MAX")
        if not len(self.values):  # this process had no batch
            self.values = torch.zeros(self.count, *(n for n in shape.tolist() if n), device=self.device)
        return all_reduce(self.values)


def _features(
    backbone: Backbone, images: ImageSource, bank: Bank | None, ids: Sequence[str], held: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Targets (b, K, E) of these images, and references (h, L, D) of those at the places ``held``."""
    device = next(backbone.parameters()).device
    if bank is None:
        features = backbone.encode_image(images.stack(ids).to(device))
        return features.target.float(), features.reference[held]
    target = bank.target[[bank.rows[i] for i in ids]].to(device).float()
    return target, bank.references([ids[n] for n in held]).to(device).float() if held else target[:0]


def _tokenize(backbone: Backbone, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in backbone.tokenize(texts).items()}


def _compose(
    backbone: Backbone, benchmark: Benchmark, numbers: Sequence[int], features: ImageFeatures | None, mode: str
) -> Tensor:
    """Query vectors (B, E) of these queries, all of which have a reference, or none.

    A query that lacks the part that a mode keeps gets zeros: all items score the same, by chance the right one first.
    """
    texts = [benchmark.queries[number].text for number in numbers]
    device = next(backbone.parameters()).device
    has_text = torch.tensor([text is not None for text in texts], device=device)
    tokens = _tokenize(backbone, [text or "" for text in texts], device)
    if mode == IMAGE_ONLY:
        if features is None:
            return torch.zeros_like(backbone.compose_text(tokens).query)
        return backbone.compose_image(features)
    if mode == TEXT_ONLY:
        if features is not None and not bool(has_text.any()):  # a model may have no texts at all
            return torch.zeros(len(numbers), features.target.shape[2], device=device)
        return backbone.compose_text(tokens).query * has_text[:, None]
    return backbone.compose_partial(features, tokens, None, has_text).query


def benchmark_fingerprint(benchmark: Benchmark) -> str:
    """Digest of everything that decides a number, except for the model."""
    candidates: dict[int, str] = {}
    digest = hashlib.sha256()
    head = [benchmark.name, benchmark.gallery, benchmark.exclude_reference, dict(benchmark.texts), benchmark.macro]
    digest.update(json.dumps([*head, [asdict(measure) for measure in benchmark.measures]]).encode())
    for query in benchmark.queries:
        if id(query.candidates) not in candidates:
            candidates[id(query.candidates)] = hashlib.sha256(json.dumps(query.candidates).encode()).hexdigest()
        about = [query.reference, query.text, query.targets, query.tags, query.name, candidates[id(query.candidates)]]
        if query.negatives or query.need:  # else the digest is that of before there were any
            about += [query.negatives, query.need]
        digest.update(json.dumps(about).encode())
    return digest.hexdigest()[:16]


def evaluate(
    backbone: Backbone,
    benchmark: Benchmark,
    images: ImageSource,
    bank: Bank | None = None,
    ablate: bool = False,
    batch_size: int = 256,
    top: int = 0,
) -> Result:
    """Evaluate a backbone under a protocol. All processes take part, and all return the same.

    Args:
        backbone: any; evaluated in eval mode, its mode restored.
        benchmark: the protocol.
        images: pixels by image id.
        bank: of the gallery, by a model whose image side has not moved since, or None.
        ablate: also rank by the image alone, by the text alone, and by late fusion of both, queries that have both.
        batch_size: images encoded at once.
        top: number of first items to keep of each query.

    Raises ``InputError`` if there is no query, or its targets are not public and no first items are asked for.
    """
    if not benchmark.queries:
        raise InputError(f"{benchmark.name} has no query")
    if benchmark.missing_tags:
        raise InputError(f"{benchmark.name} has no query of {benchmark.missing_tags[0]}: no mean over all tags")
    if not benchmark.has_known_targets and not top:
        raise InputError(f"{benchmark.name}: its targets are not public, so there is no recall to compute")
    was_training = backbone.training
    backbone.eval()
    modes = (IMAGE_ONLY, TEXT_ONLY, COMPOSED) if ablate else (COMPOSED,)
    found = encode_benchmark(backbone, benchmark, images, bank, batch_size, modes)
    backbone.train(was_training)
    ranks: dict[str, Ranks] = {}
    by_mode: dict[str, dict[str, Ranks]] = {}
    if benchmark.has_known_targets:
        by_mode = {mode: rank_queries(benchmark, found.queries[mode], found.target) for mode in modes}
        if ablate:
            by_mode[LATE_FUSION] = rank_fused(
                benchmark, found.queries[IMAGE_ONLY], found.queries[TEXT_ONLY], found.target
            )
        ranks = by_mode[COMPOSED]
    negatives = rank_negatives(benchmark, found.queries[COMPOSED], found.target) if ranks else None
    metrics, tags = compute_metrics(benchmark, ranks, negatives) if ranks else ({}, {})
    parts = compute_ablation(benchmark, by_mode) if ablate else {}
    lists = first_items(benchmark, found.queries[COMPOSED], found.target, top) if top else {}
    rankings = {over: Ranking(ranks.get(over), *lists.get(over, ((), ()))) for over in {**ranks, **lists}}
    return Result(
        protocol=benchmark.name,
        metrics=metrics,
        tags=tags,
        ablation={mode: of_mode for mode, (of_mode, _) in parts.items()},
        ablation_tags={mode: of_tag for mode, (_, of_tag) in parts.items() if of_tag},
        count=len(benchmark.queries),
        data=benchmark_fingerprint(benchmark),
        is_holdout=benchmark.is_holdout,
        skipped=benchmark.skipped,
        queries=benchmark.queries,
        rankings=rankings,
        benchmark=benchmark,
        by_mode=by_mode,
        negatives=negatives,
    )
