"""What the page lists of single queries, as data for its script."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spn4cir.evaluate import COMPOSED
from spn4cir.intervals import Array
from spn4cir.measures import best_ranks
from spn4cir.query_values import NegativeRanks
from spn4cir.results import Result
from spn4cir.shortcuts import LABELS, main_ranks
from spn4cir.types import Query

ITEMS = 6  # first items of a query that the page shows
TARGETS = 3  # targets of a query that it shows


def mean_ranks(result: Result, mode: str = COMPOSED) -> Array:
    """Rank (Q,) of each query's best target; the mean of those that it shares with other items of equal score."""
    return np.asarray(best_ranks(main_ranks(result, mode)).mean(1))


def change_of_ranks(results: Mapping[str, Result]) -> Array:
    """How far each query's rank moved, as a ratio (Q,): 2 where it doubled or halved.

    Between the first and any other model; of one model alone, between its composed query and its better single part.
    """
    first, *others = results.values()
    base = mean_ranks(first)
    if others:
        moved = [np.log(mean_ranks(other) / base) for other in others]
    else:
        alone = [mean_ranks(first, mode) for mode in first.by_mode if mode.endswith(" only")]
        moved = [np.log(np.min(alone, axis=0) / base)] if alone else [np.zeros(len(base))]
    return np.asarray(np.exp(np.abs(moved).max(0)))


def wrong_first(negatives: NegativeRanks | None, count: int) -> list[int]:
    """Numbers of the queries, of ``count``, of which a named wrong answer is the first item, alone or in a tie."""
    if negatives is None:
        return []
    return [number for number in range(count) if (negatives.whole[number, :, 0] == 1).any()]


def choose_shown(results: Mapping[str, Result], shown: int) -> dict[str, list[int]]:
    """Numbers of the queries that are shown with pictures: at most ``shown`` of each list, by the list's name."""
    first = next(iter(results.values()))
    ranks, changed = mean_ranks(first), change_of_ranks(results)
    order = np.argsort(-changed, kind="stable")[:shown]
    lists = {
        "worst": np.argsort(-ranks, kind="stable")[:shown].tolist(),
        "changed": [number for number in order.tolist() if changed[number] > 1],
        "wrong": wrong_first(first.negatives, len(ranks))[:shown],
    }
    return {name: numbers for name, numbers in lists.items() if numbers}


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Each model's name on the page: the fewest last folders of its path that tell it from the other models.

    Example:
        >>> short_names(["emoji/clip4cir/a", "emoji/tgcir/a", "embedded weights"])
        {'emoji/clip4cir/a': 'clip4cir/a', 'emoji/tgcir/a': 'tgcir/a', 'embedded weights': 'embedded weights'}
    """
    ends = {model: ["/".join(model.split("/")[-n:]) for n in range(1, model.count("/") + 2)] for model in models}
    found = {}
    for model, own in ends.items():
        others = {end for other in models if other != model for end in ends[other]}
        found[model] = next((end for end in own if end.strip() and end not in others), model)
    return found


def query_content(
    results: Mapping[str, Result], labels: Sequence[str], shown: int, describe: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of the list of queries, column by column, and the items to picture, each with its number there.

    Args:
        results: model to evaluation, of the same benchmark, with ``ITEMS`` first items each.
        labels: of each query, by ``label_queries``; empty if there was no ablation.
        shown: queries that are shown with pictures, at most, of each list.
        describe: item to what people are shown beside its id.
    """
    first = next(iter(results.values()))
    lists = choose_shown(results, shown)
    items: dict[str, int] = {}

    def place(item: str) -> int:
        return items.setdefault(item, len(items))

    pictured = sorted({number for numbers in lists.values() for number in numbers})
    seen: dict[str, None] = {}  # items that are shown as pictures
    tops = {}
    for number in pictured:
        query = first.queries[number]
        firsts = [list(_first_items(result)[number][:ITEMS]) for result in results.values()]
        seen |= dict.fromkeys([i for i in (query.reference, *query.targets[:TARGETS]) if i is not None])
        seen |= dict.fromkeys(item for found in firsts for item in found)
        tops[number] = [[[place(item), _state(query, item)] for item in found] for found in firsts]
    tags = sorted({tag for query in first.queries for tag in query.tags})
    tag_place = {tag: n for n, tag in enumerate(tags)}
    modes = sorted(first.by_mode, key=lambda mode: mode != COMPOSED)
    ranks = {
        (model, mode): mean_ranks(result, mode)
        for model, result in results.items()
        for mode in modes
        if mode in result.by_mode
    }
    models = list(results)
    rows = first.queries
    content = {
        "columns": [[models.index(model), modes.index(mode)] for model, mode in ranks],  # of ranks
        "models": models,
        "modes": modes,
        "ranks": [[_short_number(value) for value in column.tolist()] for column in ranks.values()],
        "text": [query.text for query in rows],
        "reference": [None if query.reference is None else place(query.reference) for query in rows],
        "targets": [[place(i) for i in query.targets[:TARGETS]] for query in rows],
        "targetCounts": [len(query.targets) for query in rows],
        "need": {str(n): query.need for n, query in enumerate(rows) if query.need},
        "tags": [[tag_place[tag] for tag in query.tags] for query in rows],
        "tagNames": tags,
        "labels": [LABELS.index(label) for label in labels],
        "labelNames": list(LABELS),
        "lists": lists,
        "tops": tops,
    }
    content["items"] = list(items)
    content["names"] = {str(n): name for item, n in items.items() if (name := describe(item)) != item}
    return content, {item: items[item] for item in seen}


def _state(query: Query, item: str) -> str:
    return "target" if item in query.targets else "wrong" if item in query.negatives else ""


def _first_items(result: Result) -> Sequence[Sequence[str]]:
    return result.rankings.get("gallery", next(iter(result.rankings.values()))).top


def _short_number(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 1)
