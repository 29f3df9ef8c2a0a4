"""The words of the project as types.

Shape legend, used everywhere: B batch · N candidates · P positives of a query · L reference tokens · D token width ·
K target vectors · E embedding width · Q queries · G gallery items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from spn4cir.errors import InputError

if TYPE_CHECKING:  # so that commands can name these types without waiting for torch
    from torch import Tensor

Over: TypeAlias = Literal["gallery", "candidates", "subset"]
Tokens: TypeAlias = "dict[str, Tensor]"  # tokenised texts: each value has B rows
VECTOR = "vector: "  # what a text of given features begins with


class ImageRef(NamedTuple):
    """A file, or a function that returns its bytes, and a crop box (left, upper, right, lower) in pixels, if any.

    Args:
        source: the file, or the function.
        box: crop box, in the picture as it is shown; None for the whole picture.
        name: what messages call an image that is not a file.
        as_published: decode as the published code does, so that published figures do not move: pixels as the file holds
            them, not turned, not scaled and not converted by a colour profile; transparent parts are always white.
    """

    source: Path | Callable[[], bytes]
    box: tuple[int, int, int, int] | None = None
    name: str = ""
    as_published: bool = False

    @property
    def path(self) -> Path | None:
        """The file, or None for an image that has none of its own."""
        return self.source if isinstance(self.source, Path) else None

    def __str__(self) -> str:
        return self.name or str(self.path or "bytes")


@dataclass(frozen=True)
class Triplet:
    """A training example. Each of its targets is a positive; one of its texts is drawn each time it is seen.

    Args:
        reference: image id, or None for a query of text alone.
        targets: image ids, at least one unless there is a ``label``.
        texts: modification texts; empty for a query of an image alone.
        label: class of the example, where the data has classes.
        generated: whether data generation made it, rather than a person.
        negatives: image ids of hard negatives that came with the example.
    """

    reference: str | None
    targets: tuple[str, ...]
    texts: tuple[str, ...]
    label: str | None = None
    generated: bool = False
    negatives: tuple[str, ...] = ()

    @property
    def image_ids(self) -> tuple[str, ...]:
        """All images that the triplet names, the reference first."""
        return (*((self.reference,) if self.reference is not None else ()), *self.targets, *self.negatives)


@dataclass(frozen=True)
class Query:
    """One query of a benchmark: a reference image, a modification text, or both.

    Args:
        reference: image id, in the gallery or outside it; None for a query of text alone.
        text: modification text; None for a query of an image alone.
        targets: all relevant gallery items, the official target first; empty where they are not public.
        tags: what results are broken down by: attribute, category, semantic aspect, style.
        candidates: a small gallery of the query's own, such as CIRR's image group, reference included.
        name: what a submission calls the query.
        negatives: gallery items that are known to be wrong answers.
        need: label that all phrasings of one need share, which have the same targets; empty for a query by itself.
    """

    reference: str | None
    text: str | None
    targets: tuple[str, ...]
    tags: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    name: str = ""
    negatives: tuple[str, ...] = ()
    need: str = ""


@dataclass(frozen=True)
class Measure:
    """One number of a benchmark, such as recall at 10 over the gallery.

    Args:
        kind: name in ``spn4cir.measures.MEASURES``.
        k: cut-off, at least 1.
        over: ``gallery``; ``candidates``, where each query is ranked over its own only; or ``subset``, where its own
            candidates are a second ranking beside the gallery (CIRR), whose measures are written with an s: ``Rs@1``.
        primary: whether the mean of the primary measures selects the best checkpoint.
    """

    kind: str
    k: int
    over: Over = "gallery"
    primary: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise InputError(f"a measure counts from the first rank on, got k={self.k}")
        if self.over not in ("gallery", "candidates", "subset"):
            raise InputError(f"a measure is over gallery, candidates or subset, got {self.over!r}")


def recall_measures(*ks: int, primary: Sequence[int] = (), over: Over = "gallery") -> tuple[Measure, ...]:
    """Recall at each cut-off, of which the ``primary`` ones select the best checkpoint."""
    return tuple(Measure("recall", k, over, k in primary) for k in ks)


@dataclass(frozen=True)
class Benchmark:
    """A protocol as data: everything that decides a number, except for the model.

    Args:
        name: id of the protocol, such as ``fashioniq/original``.
        gallery: ids of all items that are ranked.
        exclude_reference: whether a query's reference is left out of its ranking.
        measures: what is computed; the primary ones select the best checkpoint, and the mean of several primary ones
            is also reported, as ``Rmean``.
        texts: those gallery items that are texts: id to text. All others are images.
        macro: tags whose unweighted mean each metric is; empty for means over all queries.
        is_holdout: whether the queries are training triplets that were held out, rather than annotated queries.
        skipped: number of gallery images that the skip list leaves out.
    """

    name: str
    gallery: tuple[str, ...]
    queries: tuple[Query, ...]
    exclude_reference: bool
    measures: tuple[Measure, ...]
    texts: Mapping[str, str] = field(default_factory=dict)
    macro: tuple[str, ...] = ()
    is_holdout: bool = False
    skipped: int = 0

    def __post_init__(self) -> None:
        known = frozenset(self.gallery)
        if len(known) != len(self.gallery):
            raise InputError(f"{self.name}: the gallery names an item twice")
        if lost := [i for i in self.texts if i not in known]:
            raise InputError(f"{self.name}: the text {lost[0]!r} is not in the gallery")
        if len(set(self.measures)) < len(self.measures) or not self.measures:
            raise InputError(f"{self.name}: needs measures, and each once")
        needs_candidates = any(measure.over != "gallery" for measure in self.measures)
        needs: dict[str, Query] = {}
        checked: dict[int, frozenset[str]] = {}  # one tuple of candidates may serve thousands of queries
        for number, query in enumerate(self.queries):
            is_new = id(query.candidates) not in checked
            own = checked.setdefault(id(query.candidates), frozenset(query.candidates) if is_new else frozenset())
            lacks = "has no candidates, and a measure is over them" if needs_candidates and not own else ""
            if query.need and {*needs.setdefault(query.need, query).targets} != {*query.targets}:
                lacks = f"({query.text!r}) and {needs[query.need].text!r} phrase one need, {query.need!r}, and their"
                lacks += " targets differ"
            if fault := self._fault(query, known, own, is_new) or self._negative_fault(query, known, own) or lacks:
                raise InputError(f"{self.name}: query {number} {fault}")

    def _fault(self, query: Query, known: frozenset[str], own: frozenset[str], is_new: bool) -> str:
        """What leaves a query without a meaning, or nothing; ``own`` are its candidates, checked if they are new."""
        candidates = query.candidates if is_new else ()
        lost = [i for i in (*query.targets, *candidates) if i not in known]
        apart = [i for i in query.targets if own and i not in own]
        is_unranked = self.exclude_reference and query.targets == (query.reference,)
        faults = {
            f"names {lost and lost[0]!r}, which the gallery lacks": lost,
            "has neither a reference nor a text": query.reference is None and query.text is None,
            f"has the text {query.reference!r} as its reference": query.reference in self.texts,
            "names a target twice": len(set(query.targets)) < len(query.targets),
            "names a candidate twice": is_new and len(candidates) > len(own),
            "has tags that are no tuple": not isinstance(query.tags, tuple),
            f"has no target but its reference {query.reference!r}, which is not ranked": is_unranked,
            f"has the target {apart and apart[0]!r}, which its candidates lack": apart,
        }
        return next((fault for fault in faults if faults[fault]), "") if any(faults.values()) else ""

    def _negative_fault(self, query: Query, known: frozenset[str], own: frozenset[str]) -> str:
        """What leaves the wrong answers that a query names without a meaning, or nothing."""
        ranked = own if all(measure.over == "candidates" for measure in self.measures) else known
        faults = {
            "is not ranked": [i for i in query.negatives if i not in ranked],
            "is a target too": [i for i in query.negatives if i in query.targets],
            "is the reference, which is not ranked": [
                i for i in query.negatives if self.exclude_reference and i == query.reference
            ],
            "is named twice": query.negatives if len(set(query.negatives)) < len(query.negatives) else (),
        }
        return next((f"has the wrong answer {items[0]!r}, which {why}" for why, items in faults.items() if items), "")

    @property
    def has_known_targets(self) -> bool:
        """Whether every query's targets are public, so that metrics can be computed."""
        return all(query.targets for query in self.queries)

    @property
    def missing_tags(self) -> list[str]:
        """Tags of ``macro`` that no query has, so that no mean over all of them exists."""
        used = {tag for query in self.queries for tag in query.tags}
        return [tag for tag in self.macro if tag not in used]

    @property
    def outside_references(self) -> tuple[str, ...]:
        """References that the gallery does not hold, each once."""
        known = frozenset(self.gallery)
        references = (query.reference for query in self.queries)
        return tuple(dict.fromkeys(i for i in references if i is not None and i not in known))

    @property
    def image_ids(self) -> tuple[str, ...]:
        """All images of gallery and queries, those of the gallery first."""
        return (*(i for i in self.gallery if i not in self.texts), *self.outside_references)


class ImageFeatures(NamedTuple):
    """What one pass over an image gives: ``reference`` (B, L, D) for ``compose``, ``target`` (B, K, E), unit norm."""

    reference: Tensor
    target: Tensor


@dataclass
class Composed:
    """A composed query (B, E), unit norm, and what a backbone's own extra losses need.

    ``parts`` are what stands for reference and text, (B, E) each, where the query is their normalised sum.
    """

    query: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[Tensor, Tensor] | None = None
