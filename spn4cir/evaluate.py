"""The one evaluator: a benchmark and a backbone in, metrics out."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank
from spn4cir.errors import InputError
from spn4cir.images import ImageSource
from spn4cir.measures import Ranks, macro_mean, recalls
from spn4cir.search import rank_of_target, top_k
from spn4cir.types import Benchmark


@dataclass
class EncodedBenchmark:
    """A benchmark as vectors: ``target`` (G, K, E) of its gallery, and queries (Q, E) by how they were made."""

    target: Tensor
    queries: dict[str, Tensor]


@torch.no_grad()
def embed(
    backbone: Backbone,
    benchmark: Benchmark,
    images: ImageSource,
    bank: Bank | None = None,
    batch_size: int = 256,
    modes: Sequence[str] = ("composed",),
) -> EncodedBenchmark:
    """Encode each image of a benchmark once, and compose its queries while their references are at hand.

    Reference features are large, so those of more than ``batch_size`` images never exist at a time.

    Args:
        backbone: any; its mode is left as it is, so put it in eval mode.
        benchmark: whose gallery and queries.
        images: pixels by image id.
        bank: of all images of the gallery, by a model whose image side has not moved since; None encodes them.
        batch_size: images encoded, and queries composed, at once.
        modes: ``composed``; ``text only`` puts zeros in the place of the reference; ``image only`` takes the reference
            image's own mean target vector.
    """
    asked: dict[str, list[int]] = {}
    for number, query in enumerate(benchmark.queries):
        asked.setdefault(query.reference, []).append(number)
    targets: Tensor | None = None
    queries: dict[str, list[Tensor]] = {mode: [torch.empty(0)] * len(benchmark.queries) for mode in modes}
    with tqdm(total=len(benchmark.gallery), desc=f"encode {benchmark.name}", unit="image", leave=False) as bar:
        for start in range(0, len(benchmark.gallery), batch_size):
            ids = benchmark.gallery[start : start + batch_size]
            held = [n for n, i in enumerate(ids) if i in asked]
            target, reference = _features(backbone, images, bank, ids, held)
            pairs = [(row, number) for row, n in enumerate(held) for number in asked[ids[n]]]
            for first in range(0, len(pairs), batch_size):
                rows, numbers = (list(part) for part in zip(*pairs[first : first + batch_size], strict=True))
                own = target[[held[row] for row in rows]]  # (b, K, E)
                texts = [benchmark.queries[number].modification for number in numbers]
                for mode, found in queries.items():
                    vectors = _compose(backbone, reference[rows], own, texts, mode)
                    for number, vector in zip(numbers, vectors, strict=True):
                        found[number] = vector
            del reference  # before the next ones are made
            if targets is None:
                targets = target.new_empty(len(benchmark.gallery), *target.shape[1:])
            targets[start : start + len(ids)] = target
            bar.update(len(ids))
    assert targets is not None, "a gallery has images"
    return EncodedBenchmark(targets, {mode: torch.stack(found) for mode, found in queries.items()})


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


def _compose(backbone: Backbone, reference: Tensor, own: Tensor, texts: Sequence[str], mode: str) -> Tensor:
    """Queries (B, E) of references (B, L, D) whose own target vectors are (B, K, E)."""
    if mode == "image only":
        return F.normalize(own.mean(1), dim=-1)
    tokens = {name: value.to(reference.device) for name, value in backbone.tokenize(texts).items()}
    return backbone.compose(torch.zeros_like(reference) if mode == "text only" else reference, tokens).query


def padded_rows(lists: Sequence[Sequence[str]], row: dict[str, int]) -> Tensor:
    """Lists of ids → (Q, longest) rows, padded with -1."""
    width = max(map(len, lists), default=0)
    return torch.tensor([[row[i] for i in ids] + [-1] * (width - len(ids)) for ids in lists]).view(len(lists), width)


def rank_queries(benchmark: Benchmark, query: Tensor, target: Tensor) -> tuple[Ranks, Ranks | None]:
    """Places of the best target of each query, in its gallery and in its subset.

    Args:
        benchmark: what is ranked, and whether the reference stays.
        query: (Q, E).
        target: (G, K, E) of the gallery.

    Returns:
        (Q, 2) places, and (Q, 2) places within the subset, or None where the benchmark has none.
    """
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    ranks = np.zeros((len(benchmark.queries), 2), np.int64)
    subset_ranks = np.zeros_like(ranks) if benchmark.subset_ks else None
    for ids, asked in _by_gallery(benchmark):
        whole = len(ids) == len(benchmark.gallery)
        vectors = target if whole else target[[row[i] for i in ids]]  # (g, K, E)
        local = row if whole else {image_id: n for n, image_id in enumerate(ids)}
        queries = [benchmark.queries[n] for n in asked]
        wanted = padded_rows([q.targets for q in queries], local)
        excluded = padded_rows([[q.reference] for q in queries], local) if benchmark.exclude_reference else None
        vector = query[asked]  # (q, E)
        ranks[asked] = rank_of_target(vector, vectors, wanted, excluded).cpu().numpy()
        if subset_ranks is not None:
            members = padded_rows([q.subset for q in queries], local)
            subset_ranks[asked] = rank_of_target(vector, vectors, wanted, excluded, members).cpu().numpy()
    return ranks, subset_ranks


def _by_gallery(benchmark: Benchmark) -> list[tuple[tuple[str, ...], list[int]]]:
    """Each gallery with the numbers of the queries that are ranked over it."""
    asked: dict[str, list[int]] = {}
    for number, query in enumerate(benchmark.queries):
        asked.setdefault(query.group if query.group in benchmark.group_gallery else "", []).append(number)
    return [(benchmark.group_gallery.get(group, benchmark.gallery), numbers) for group, numbers in asked.items()]


def metrics_of(
    benchmark: Benchmark, ranks: Ranks, subset_ranks: Ranks | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of a benchmark and the same by group; over all queries, or as means over groups if it says so."""

    def of(rows: Any) -> dict[str, float]:
        found = recalls(ranks[rows], benchmark.ks)
        if subset_ranks is not None:
            found |= recalls(subset_ranks[rows], benchmark.subset_ks, "Rs")
        if len(benchmark.selection) > 1:
            found["Rmean"] = float(np.mean([found[name] for name in benchmark.selection]))
        return found

    names = np.array([query.group or "all" for query in benchmark.queries])
    groups = {str(name): {**of(names == name), "queries": int((names == name).sum())} for name in np.unique(names)}
    metrics = of(slice(None))
    means = macro_mean(groups, list(metrics))
    if benchmark.mean_over_groups:
        metrics = means
    elif len(groups) > 1:
        metrics |= {f"macro {name}": value for name, value in means.items() if name.startswith("R@")}
    return metrics, groups


def evaluate(
    backbone: Backbone,
    benchmark: Benchmark,
    images: ImageSource,
    bank: Bank | None = None,
    ablate: bool = False,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Evaluate a backbone under a protocol.

    Args:
        backbone: any; evaluated in eval mode, its mode restored.
        benchmark: the protocol.
        images: pixels by image id.
        bank: of the gallery, by a model whose image side has not moved since, or None.
        ablate: also rank by the image alone and by the text alone.
        batch_size: images encoded at once.

    Returns:
        ``{"protocol", "metrics", "groups", "ablation", "data"}``; percentages, 0 to 100.

    Raises:
        InputError: if the targets are not public, or no query is left.
    """
    if not benchmark.queries:
        raise InputError(f"{benchmark.name} has no query")
    if benchmark.silent_groups:
        raise InputError(f"{benchmark.name} has no query of {benchmark.silent_groups[0]}: no mean over all groups")
    if not benchmark.answered:
        raise InputError(f"{benchmark.name}: its targets are not public, so there is no recall to compute")
    was_training = backbone.training
    backbone.eval()
    modes = ("composed", "image only", "text only") if ablate else ("composed",)
    found = embed(backbone, benchmark, images, bank, batch_size, modes)
    results = {
        mode: metrics_of(benchmark, *rank_queries(benchmark, query, found.target))
        for mode, query in found.queries.items()
    }
    metrics, groups = results["composed"]
    ablation = {mode: results[mode][0] for mode in (*modes[1:], modes[0])} if ablate else {}
    backbone.train(was_training)
    return {
        "protocol": benchmark.name,
        "metrics": metrics,
        "groups": groups,
        "ablation": ablation,
        "data": hashlib.sha256(json.dumps(asdict(benchmark), sort_keys=True).encode()).hexdigest()[:16],
    }


def rank_images(
    backbone: Backbone, benchmark: Benchmark, images: ImageSource, k: int, batch_size: int = 256
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By query name: the first k images of the gallery, and all images of the subset, best first, reference left out.

    Args:
        backbone: any; used in eval mode, its mode restored.
        benchmark: whose queries have names; targets need not be known.
        images: pixels by image id.
        k: how many of the gallery.
        batch_size: images encoded at once.
    """
    was_training = backbone.training
    backbone.eval()
    found = embed(backbone, benchmark, images, batch_size=batch_size)
    query = found.queries["composed"]
    backbone.train(was_training)
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    excluded = padded_rows([[q.reference] for q in benchmark.queries], row)
    members = padded_rows([q.subset for q in benchmark.queries], row)

    def named(ranked: tuple[Tensor, Tensor]) -> dict[str, list[str]]:
        rows = zip(benchmark.queries, ranked[0].tolist(), ranked[1].tolist(), strict=True)
        return {
            q.name: [benchmark.gallery[n] for s, n in zip(scores, ns, strict=True) if s > -np.inf]
            for q, scores, ns in rows
        }

    width = members.shape[1]
    return (
        named(top_k(query, found.target, k, excluded)),
        named(top_k(query, found.target, width, excluded, members)) if width else {},
    )


def metric_names(benchmark: Benchmark) -> list[str]:
    """What can be selected by."""
    known = [f"R@{k}" for k in benchmark.ks] + [f"Rs@{k}" for k in benchmark.subset_ks]
    if len({query.group for query in benchmark.queries}) > 1 and not benchmark.mean_over_groups:
        known += [f"macro R@{k}" for k in benchmark.ks]
    return known


def selection_score(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """The number that picks the best checkpoint: the mean of the named metrics."""
    return float(np.mean([metrics[name] for name in names]))


def combine(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each metric over results of one protocol on the same data.

    Args:
        results: as ``evaluate`` returns them, such as those of several seeds.

    Raises:
        InputError: if there are none, or two of them differ in protocol or data: such numbers do not belong together.
    """
    if not results:
        raise InputError("there are no results to combine")
    for key in ("protocol", "data"):
        found = list(dict.fromkeys(str(result[key]) for result in results))
        if len(found) > 1:
            raise InputError(f"results of different {key} are never combined: {', '.join(found)}")
    for result in results:
        if result["metrics"].keys() != results[0]["metrics"].keys():
            raise InputError("results of different metrics are never combined")
    values = {name: [result["metrics"][name] for result in results] for name in results[0]["metrics"]}
    spread = 1 if len(results) > 1 else 0
    return {name: (float(np.mean(v)), float(np.std(v, ddof=spread))) for name, v in values.items()}


def git_commit() -> str | None:
    """The commit of the source that runs, marked if there are changes on top, or None outside a checkout."""
    where = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=where, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()


def table(result: Mapping[str, Any]) -> str:
    """A result as text for the terminal, protocol id first."""
    names = [name for name in result["metrics"] if not name.startswith("macro")]
    groups = result["groups"]
    macro = {name: result["metrics"][f"macro {name}"] for name in names if f"macro {name}" in result["metrics"]}
    total = sum(group["queries"] for group in groups.values())
    several = len(groups) > 1
    rows = [(f"all ({total} queries)" if macro or not several else "mean over groups", result["metrics"])]
    if macro:
        rows.append(("mean over groups", macro))
    rows += [(f"  {name} ({group['queries']})", group) for name, group in groups.items() if several]
    rows += [(name, values) for name, values in result["ablation"].items()]
    width = max(len(label) for label, _ in rows)
    lines = [f"protocol {result['protocol']}", " " * width + "".join(f"{name:>8}" for name in names)]
    for label, values in rows:
        cells = "".join(f"{values[name]:8.2f}" if name in values else " " * 8 for name in names)
        lines.append(f"{label:<{width}}{cells}")
    return "\n".join(lines)
