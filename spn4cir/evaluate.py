"""The one evaluator: a benchmark and a backbone in, metrics out."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from spn4cir.backbone import Backbone
from spn4cir.images import ImageSource
from spn4cir.metrics import Ranks, macro_mean, recalls
from spn4cir.search import rank_of_target
from spn4cir.types import Benchmark, Query

QUERY_BATCH = 256


@dataclass
class Gallery:
    """Encoded images of a benchmark: ``target`` (G, K, E) of all, ``reference`` (R, L, D) of those that queries use."""

    target: Tensor
    reference: Tensor
    reference_row: dict[str, int]


@torch.no_grad()
def encode_gallery(backbone: Backbone, benchmark: Benchmark, images: ImageSource, batch_size: int = 256) -> Gallery:
    """Encode each image of a benchmark once, as candidate and as reference.

    Args:
        backbone: any; its mode is left as it is, so put it in eval mode.
        benchmark: whose gallery and queries.
        images: pixels by image id.
        batch_size: images encoded at once.
    """
    device = next(backbone.parameters()).device
    used = {query.reference for query in benchmark.queries}
    targets, references = [], []
    row: dict[str, int] = {}
    with tqdm(total=len(benchmark.gallery), desc=f"encode {benchmark.name}", unit="image", leave=False) as bar:
        for start in range(0, len(benchmark.gallery), batch_size):
            ids = benchmark.gallery[start : start + batch_size]
            features = backbone.encode_image(images.stack(ids).to(device))
            targets.append(features.target.float())
            held = [n for n, i in enumerate(ids) if i in used]
            row |= {ids[n]: len(row) + m for m, n in enumerate(held)}
            references.append(features.reference[held])
            bar.update(len(ids))
    return Gallery(torch.cat(targets), torch.cat(references), row)


@torch.no_grad()
def compose_queries(backbone: Backbone, queries: Sequence[Query], gallery: Gallery, mode: str = "composed") -> Tensor:
    """Queries (Q, E).

    Args:
        backbone: any.
        queries: whose references the gallery holds.
        gallery: encoded.
        mode: ``composed``; ``text`` puts zeros in the place of the reference; ``image`` is left to ``image_queries``.
    """
    device = gallery.target.device
    found = []
    for start in range(0, len(queries), QUERY_BATCH):
        part = queries[start : start + QUERY_BATCH]
        tokens = {n: v.to(device) for n, v in backbone.tokenize([query.modification for query in part]).items()}
        reference = gallery.reference[[gallery.reference_row[query.reference] for query in part]]
        if mode == "text":
            reference = torch.zeros_like(reference)
        found.append(backbone.compose(reference, tokens).query)
    return torch.cat(found)


def image_queries(benchmark: Benchmark, gallery: Gallery) -> Tensor:
    """Queries (Q, E) that ignore the text: the reference image's own mean target vector."""
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    vectors = gallery.target[[row[query.reference] for query in benchmark.queries]]  # (Q, K, E)
    return F.normalize(vectors.mean(1), dim=-1)


def padded_rows(lists: Sequence[Sequence[str]], row: dict[str, int]) -> Tensor:
    """Lists of ids → (Q, longest) rows, padded with -1."""
    width = max(map(len, lists), default=0)
    return torch.tensor([[row[i] for i in ids] + [-1] * (width - len(ids)) for ids in lists]).view(len(lists), width)


def rank_queries(benchmark: Benchmark, query: Tensor, target: Tensor) -> tuple[Ranks, Ranks | None]:
    """Ranks of the best target of each query, over the gallery and over its subset.

    Args:
        benchmark: what is ranked, and whether the reference stays.
        query: (Q, E).
        target: (G, K, E) of the gallery.

    Returns:
        (Q,) ranks, and (Q,) ranks within the subset, or None where the benchmark has none.
    """
    row = {image_id: n for n, image_id in enumerate(benchmark.gallery)}
    queries = benchmark.queries
    wanted = padded_rows([q.targets for q in queries], row)
    excluded = padded_rows([[q.reference] for q in queries], row) if benchmark.exclude_reference else None
    ranks = rank_of_target(query, target, wanted, excluded).cpu().numpy()
    if not benchmark.subset_ks:
        return ranks, None
    subset_ranks = []
    for n, q in enumerate(queries):
        members = [i for i in q.subset if not (benchmark.exclude_reference and i == q.reference)]
        local = {i: m for m, i in enumerate(members)}
        few = target[[row[i] for i in members]]  # (6, K, E)
        subset_ranks.append(rank_of_target(query[n : n + 1], few, padded_rows([q.targets], local)))
    return ranks, torch.cat(subset_ranks).cpu().numpy()


def metrics_of(
    benchmark: Benchmark, ranks: Ranks, subset_ranks: Ranks | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics over all queries, with macro means over groups, and the same by group."""

    def of(rows: Any) -> dict[str, float]:
        found = recalls(ranks[rows], benchmark.ks)
        if subset_ranks is not None:
            found |= recalls(subset_ranks[rows], benchmark.subset_ks, "Rs")
        return found

    names = np.array([query.group for query in benchmark.queries])
    groups = {str(name): {**of(names == name), "queries": int((names == name).sum())} for name in np.unique(names)}
    metrics = of(slice(None))
    if len(groups) > 1:
        metrics |= macro_mean(groups, [name for name in metrics if name.startswith("R@")])
    return metrics, groups


def evaluate(
    backbone: Backbone,
    benchmark: Benchmark,
    images: ImageSource,
    gallery: Gallery | None = None,
    ablate: bool = False,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Evaluate a backbone under a protocol.

    Args:
        backbone: any; evaluated in eval mode, its mode restored.
        benchmark: the protocol.
        images: pixels by image id.
        gallery: encoded before by a model whose image side has not moved since, or None.
        ablate: also rank by the image alone and by the text alone.
        batch_size: images encoded at once.

    Returns:
        ``{"protocol", "metrics", "groups", "ablation", "data"}``; percentages, 0 to 100.
    """
    was_training = backbone.training
    backbone.eval()
    gallery = gallery or encode_gallery(backbone, benchmark, images, batch_size)
    query = compose_queries(backbone, benchmark.queries, gallery)
    metrics, groups = metrics_of(benchmark, *rank_queries(benchmark, query, gallery.target))
    ablation = {}
    if ablate:
        alone = {
            "image only": image_queries(benchmark, gallery),
            "text only": compose_queries(backbone, benchmark.queries, gallery, "text"),
        }
        for name, vectors in alone.items():
            ablation[name] = metrics_of(benchmark, *rank_queries(benchmark, vectors, gallery.target))[0]
        ablation["composed"] = metrics
    backbone.train(was_training)
    return {
        "protocol": benchmark.name,
        "metrics": metrics,
        "groups": groups,
        "ablation": ablation,
        "data": hashlib.sha256(json.dumps(asdict(benchmark), sort_keys=True).encode()).hexdigest()[:16],
    }


def selection_score(benchmark: Benchmark, metrics: dict[str, float]) -> float:
    """The number that picks the best checkpoint: the mean of the benchmark's selection metrics."""
    return float(np.mean([metrics[name] for name in benchmark.selection]))


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


def table(result: dict[str, Any]) -> str:
    """A result as text for the terminal, protocol id first."""
    names = [name for name in result["metrics"] if not name.startswith("macro")]
    rows = [(f"all ({sum(g['queries'] for g in result['groups'].values())} queries)", result["metrics"])]
    macro = {name: result["metrics"][f"macro {name}"] for name in names if f"macro {name}" in result["metrics"]}
    if macro:
        rows.append(("mean over groups", macro))
    rows += [(f"  {name} ({group['queries']})", group) for name, group in result["groups"].items() if macro]
    rows += [(name, values) for name, values in result["ablation"].items()]
    width = max(len(label) for label, _ in rows)
    lines = [f"protocol {result['protocol']}", " " * width + "".join(f"{name:>8}" for name in names)]
    for label, values in rows:
        cells = "".join(f"{values[name]:8.2f}" if name in values else " " * 8 for name in names)
        lines.append(f"{label:<{width}}{cells}")
    return "\n".join(lines)
