"""Which queries a model solves from one modality alone."""

from collections.abc import Sequence

import numpy as np

from spn4cir.errors import InputError
from spn4cir.evaluate import COMPOSED, IMAGE_ONLY, TEXT_ONLY
from spn4cir.measures import best_ranks
from spn4cir.query_values import select_joint
from spn4cir.results import Result

REQUIRED, SHORTCUT, UNRESOLVED, ONE_PART = "composition required", "one modality", "unresolved", "no composed query"
LABELS = (REQUIRED, SHORTCUT, UNRESOLVED, ONE_PART)
FIRST = 10  # a query is solved if a target is among so many first items


def label_queries(results: Sequence[Result], k: int = FIRST) -> list[str]:
    """Label each query by the modality that solves it, that is, ranks a target among the first k items.

    ``one modality``: some model solves it by the image alone or by the text alone. ``composition required``: none does,
    and some model solves it by both. ``unresolved``: no model solves it. ``no composed query``: it has only an image
    or only a text. A target that ties for ranks over the k-th does not count as solved.

    Args:
        results: evaluations of the same benchmark with ``ablate``; the more models, the surer the labels.
        k: number of first items.

    Raises:
        InputError: if an evaluation was made without ``ablate``.

    Source: CIRCUS, arXiv 2605.14787 (eleven models, k of 10).
    """
    benchmark = results[0].benchmark
    if benchmark is None or not all({IMAGE_ONLY, TEXT_ONLY, COMPOSED} <= one.by_mode.keys() for one in results):
        raise InputError(f"{results[0].protocol}: modalities are compared only after an evaluation with --ablate")
    solved = {mode: np.zeros(len(benchmark.queries), dtype=np.bool_) for mode in (COMPOSED, IMAGE_ONLY, TEXT_ONLY)}
    for result in results:
        for mode, found in solved.items():
            found |= best_ranks(main_ranks(result, mode))[:, 1] <= k
    joint = np.zeros(len(benchmark.queries), dtype=np.bool_)
    joint[select_joint(benchmark)[0]] = True
    one = solved[IMAGE_ONLY] | solved[TEXT_ONLY]
    cases = [~joint, one, solved[COMPOSED]]
    return [str(label) for label in np.select(cases, [ONE_PART, SHORTCUT, REQUIRED], UNRESOLVED)]


def main_ranks(result: Result, mode: str = COMPOSED) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Ranks (Q, P, 2) over the gallery, or over each query's candidates where no gallery is ranked."""
    found = result.by_mode[mode]
    return found.get("gallery", next(iter(found.values())))


def share_labels(labels: Sequence[str]) -> dict[str, float]:
    """Percentage of each label among the composed queries; empty if there are none."""
    composed = [label for label in labels if label != ONE_PART]
    return {label: 100 * composed.count(label) / len(composed) for label in LABELS[:3]} if composed else {}
