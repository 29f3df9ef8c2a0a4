"""The batches that training sees: which triplets, which text of each, which pixels, tokens and features."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from spn4cir.bank import Bank
from spn4cir.errors import InputError
from spn4cir.images import ImageSource
from spn4cir.triplets import Numbers, TripletTable, item_numbers, shuffle
from spn4cir.types import ImageFeatures, Tokens, Triplet

T = TypeVar("T")
PADDING = -1


@dataclass
class TripletBatch:
    """One part of a training step: B queries, their positive targets, and what is no negative of them.

    T is the number of candidates that a triplet brings: its targets, which are positives, and then its hard negatives.
    Integers are padded with -1.

    Attributes:
        tokens: of the texts; of the empty text where there is none.
        reference: (B,) rows of ``pixels``, or of ``features``.
        target: (B, T) rows of ``pixels`` in stage 1, of the bank in stage 2.
        positives: number of columns of ``target`` that are positives; the others are hard negatives.
        identity: (B, T), equal for equal target pixels.
        others: (B, A) identities of further images that are targets of the same query.
        query_identity: (B, 2), equal for equal pixels of references, and for equal texts.
        pixels: (U, 3, H, W) of the unique images of the batch, or None where features are given.
        features: stored features of the references, or None; their ``target`` is empty unless a text is missing.
        has_reference, has_text: (B,) booleans; None if every query of the training has a reference and a text.
        label: (B,) classes, or None without classes.
        triplets: one line per triplet, for messages.
    """

    tokens: Tokens
    reference: Tensor
    target: Tensor
    identity: Tensor
    positives: int = 1
    others: Tensor | None = None
    query_identity: Tensor | None = None
    pixels: Tensor | None = None
    features: ImageFeatures | None = None
    has_reference: Tensor | None = None
    has_text: Tensor | None = None
    label: Tensor | None = None
    step: int = 0
    triplets: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.reference)

    def to(self, device: torch.device) -> "TripletBatch":
        """The same batch on another device."""
        moved: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        features = self.features and ImageFeatures(*(part.to(device) for part in self.features))
        tokens = {name: value.to(device) for name, value in self.tokens.items()}
        return replace(self, tokens=tokens, features=features, **moved)


class TripletRows(TorchDataset[tuple[Triplet, str | None]]):
    """Triplets with the text that this epoch draws for each: the same whatever the workers, processes or resumes."""

    def __init__(self, triplets: Sequence[Triplet], seed: int):
        self.triplets, self.seed = triplets, seed

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Triplet, str | None]:
        epoch, item = key
        triplet = self.triplets[item]
        if not triplet.texts:
            return triplet, None
        return triplet, random.Random(f"{self.seed}/{epoch}/{item}").choice(triplet.texts)


class KnownTargets:
    """All targets of each query of the training triplets: of equal reference pixels and equal text.

    Attributes:
        positives, negatives: the largest numbers of targets and of hard negatives of a triplet.
        width: the largest number of further targets of a query.
        is_partial: whether some triplets lack their reference or their text.
    """

    def __init__(self, triplets: Iterable[Triplet] = (), identity: Mapping[str, int] | None = None):
        found: dict[tuple[int, str], dict[int, None]] = {}
        self.positives, self.negatives, self.is_partial = 1, 0, False
        if isinstance(triplets, TripletTable) and identity is not None:
            self.positives, self.negatives, self.is_partial = triplets.widths()
            triplets = triplets.ambiguous(identity)  # in a list, all are looked at
        for triplet in triplets:
            assert identity is not None
            self.positives = max(self.positives, len(triplet.targets))
            self.negatives = max(self.negatives, len(triplet.negatives))
            self.is_partial |= triplet.reference is None or not triplet.texts
            for text in triplet.texts or ("",):
                targets = found.setdefault((reference_number(triplet, identity), text), {})
                targets.update(dict.fromkeys(identity[target] for target in triplet.targets))
        self._targets = {query: list(targets) for query, targets in found.items() if len(targets) > 1}
        self.width = max(map(len, self._targets.values()), default=1) - 1

    def others(self, reference: int, text: str, targets: Sequence[int]) -> list[int]:
        """The query's other targets, padded to ``width``."""
        return _pad([other for other in self._targets.get((reference, text), ()) if other not in targets], self.width)


def reference_number(triplet: Triplet, identity: Mapping[str, int]) -> int:
    """A number that is equal for equal pixels of the reference, -1 where there is none."""
    return PADDING if triplet.reference is None else identity[triplet.reference]


class TripletCollate:
    """Triplets with their drawn texts → a ``TripletBatch``.

    Args:
        identity: image id → number, equal for equal pixels; knows all images of the triplets.
        bank: frozen features, for stage 2; its rows must be the numbers of ``identity``. None for stage 1.
        classes: class name → number, where queries are scored against classes; None without.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], Tokens],
        identity: Mapping[str, int],
        images: ImageSource,
        bank: Bank | None = None,
        known: KnownTargets | None = None,
        classes: Mapping[str, int] | None = None,
    ):
        self.tokenize, self.identity, self.images, self.bank = tokenize, identity, images, bank
        self.known, self.classes = known or KnownTargets(), classes

    def __call__(self, items: list[tuple[Triplet, str | None]]) -> TripletBatch:
        """B triplets with the text drawn for each, None for an image alone → one batch."""
        triplets, texts = [triplet for triplet, _ in items], [text or "" for _, text in items]
        is_stored = self.bank is not None and self.bank.reference is not None
        named = [t.reference for t in triplets if t.reference is not None]
        shown = named if self.bank or self.classes else [i for t in triplets for i in t.image_ids]
        unique = {image_id: n for n, image_id in enumerate(dict.fromkeys(shown))}
        row = [0 if t.reference is None else n if is_stored else unique[t.reference] for n, t in enumerate(triplets)]
        queries = [(reference_number(t, self.identity), text) for t, text in zip(triplets, texts, strict=True)]
        targets = ([self.identity[i] for i in t.targets] for t in triplets)
        others = [self.known.others(*query, known) for query, known in zip(queries, targets, strict=True)]
        is_partial = self.known.is_partial
        return TripletBatch(
            tokens=self.tokenize(texts),
            reference=torch.tensor(row),
            target=self._padded(triplets, self.bank.rows if self.bank else unique),
            identity=self._padded(triplets, self.identity),
            positives=self.known.positives,
            others=torch.tensor(others, dtype=torch.long).view(len(items), self.known.width),
            query_identity=torch.tensor([[reference, text_number(text)] for reference, text in queries]),
            pixels=None if is_stored or not unique else self.images.stack(list(unique)),
            features=self._stored(items) if is_stored and named else None,
            has_reference=torch.tensor([t.reference is not None for t in triplets]) if is_partial else None,
            has_text=torch.tensor([text is not None for _, text in items]) if is_partial else None,
            label=torch.tensor([self.classes[t.label or ""] for t in triplets]) if self.classes else None,
            triplets=tuple(f"{t.reference} + {text!r} → {', '.join(t.targets) or t.label}" for t, text in items),
        )

    def _padded(self, triplets: Sequence[Triplet], number: Mapping[str, int]) -> Tensor:
        """(B, T) numbers of targets and hard negatives, each image once."""

        def padded(ids: tuple[str, ...], width: int) -> list[int]:
            return _pad([number.get(i, PADDING) for i in dict.fromkeys(ids)], width)

        positives, negatives = self.known.positives, self.known.negatives
        return torch.tensor([padded(t.targets, positives) + padded(t.negatives, negatives) for t in triplets])

    def _stored(self, items: Sequence[tuple[Triplet, str | None]]) -> ImageFeatures:
        """Features of the references, in the type they are stored in; zeros where there is none."""
        assert self.bank is not None
        named = [(n, triplet.reference) for n, (triplet, _) in enumerate(items) if triplet.reference is not None]
        ids = [image_id for _, image_id in named]
        reference = self.bank.references(ids)  # (n, L, D)
        lacks_text = self.known.is_partial and any(text is None for _, text in items)
        target = self.bank.target[[self.bank.rows[i] for i in ids]] if lacks_text else reference[:, :0]
        if len(named) == len(items):
            return ImageFeatures(reference, target)
        places = torch.tensor([n for n, _ in named])
        parts = ((part, part.new_zeros(len(items), *part.shape[1:])) for part in (reference, target))
        return ImageFeatures(*(whole.index_copy_(0, places, part) for part, whole in parts))


def _pad(numbers: list[int], width: int) -> list[int]:
    return numbers + [PADDING] * (width - len(numbers))


def text_number(text: str) -> int:
    """A number that is the same for equal texts, on all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def prefetch(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        iterator = iter(batches)
        waiting = pool.submit(next, iterator, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, iterator, None)
            yield batch


class TripletSampler(Sampler[list[tuple[int, int]]]):
    """This process's share of each batch of one epoch, a pure function of (seed, epoch).

    An epoch is one pass over the annotated triplets if ``generated_share``, in [0, 1), is set, that share of each batch
    being generated; without it the two lists are concatenated. The last incomplete batch is dropped.

    Args:
        annotated, generated: item numbers; arrays, whose order NumPy draws, for a table of triplets.
        batch_size: triplets of one optimiser step, over all processes.
        process: its rank, and how many there are.
        parts: of a batch, each of them a list of its own.
    """

    def __init__(
        self,
        annotated: Sequence[int] | Numbers,
        generated: Sequence[int] | Numbers,
        batch_size: int,
        generated_share: float | None,
        seed: int,
        process: tuple[int, int] = (0, 1),
        parts: int = 1,
    ):
        share = generated_share if len(annotated) and len(generated) else None  # of nothing there is no share
        self.main = item_numbers(annotated, generated) if share is None else item_numbers(annotated)
        self.side = [] if share is None else item_numbers(generated)
        self.from_side = round(batch_size * (share or 0))
        self.from_main = batch_size - self.from_side
        self.batch_size, self.seed, (self.rank, self.world_size) = batch_size, seed, process
        self.epoch, self.skip, self.parts = 0, 0, parts
        if batch_size % (self.world_size * parts):
            over = f"{self.world_size} processes" + (f" times {parts} parts" if parts > 1 else "")
            raise InputError(f"batch_size {batch_size} does not divide over {over}")
        if share and not 0 < self.from_side < batch_size:
            what = "leaves no annotated triplet" if self.from_side else "is less than one triplet"
            raise InputError(f"generated_share {share} of a batch of {batch_size} {what}")
        if len(self) == 0:
            raise InputError(f"{len(self.main)} triplets do not fill one batch of {batch_size}: lower batch_size")

    def __len__(self) -> int:
        return len(self.main) // self.from_main

    def batches(self, epoch: int) -> list[list[int]] | Numbers:
        """All batches of one epoch, over all processes; (number, B) for a table of triplets."""
        main = shuffle(self.main, f"{self.seed}/{epoch}/order")
        needed = len(self) * self.from_side
        turns = range(-(-needed // len(self.side)) if len(self.side) else 0)
        sides = [shuffle(self.side, f"{self.seed}/{epoch}/generated/{turn}") for turn in turns]
        parts = [main[: len(self) * self.from_main], *([np.concatenate(sides)[:needed]] if sides else ())]
        drawn: Numbers = np.concatenate([np.asarray(part).reshape(len(self), -1) for part in parts], axis=1)
        return drawn.tolist() if isinstance(main, list) else drawn

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // (self.world_size * self.parts)
        for batch in self.batches(self.epoch)[self.skip :]:
            for part in range(self.parts):
                items = batch[part :: self.parts]  # of annotated and of generated ones as large a share as in the batch
                yield [(self.epoch, int(item)) for item in items[self.rank * share : (self.rank + 1) * share]]


class BalancedSampler(TripletSampler):
    """As many examples of each group in each batch, one more of some in turn; an epoch is as long as without groups.

    Examples of a small group come several times in an epoch, those of a large one may wait for a later one.

    Args:
        groups: of each example, such as the source of its image.
        batch_size, seed, process, parts: as of ``TripletSampler``.
    """

    def __init__(
        self, groups: Sequence[str], batch_size: int, seed: int, process: tuple[int, int] = (0, 1), parts: int = 1
    ):
        super().__init__(range(len(groups)), [], batch_size, None, seed, process, parts)
        members: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            members.setdefault(group, []).append(number)
        self.groups = [members[name] for name in sorted(members)]
        if len(self.groups) > batch_size:
            raise InputError(f"classes.balance: a batch of {batch_size} has no room for {len(self.groups)} sources")

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of one epoch, over all processes."""
        turns = [n % len(self.groups) for n in range(len(self) * self.batch_size)]  # which group comes at each place
        drawn = []
        for number, group in enumerate(self.groups):
            first = epoch * turns.count(number)  # a group goes on where the last epoch has ended
            places = range(first, first + turns.count(number))
            orders: dict[int, Any] = {}
            for turn in {place // len(group) for place in places}:
                orders[turn] = shuffle(group, f"{self.seed}/{turn}/group/{number}")
            drawn.append(iter([int(orders[place // len(group)][place % len(group)]) for place in places]))
        items = [next(drawn[group]) for group in turns]
        return [items[n : n + self.batch_size] for n in range(0, len(items), self.batch_size)]


class TripletLoader:
    """The batches of a training, from any step on; ``workers`` processes load them, or a thread of this one if 0."""

    def __init__(self, triplets: Sequence[Triplet], collate: TripletCollate, sampler: TripletSampler, workers: int = 0):
        self.sampler, self.parts = sampler, sampler.parts  # batches of one optimiser step
        rows = TripletRows(triplets, sampler.seed)
        self._loader = DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers)

    def __len__(self) -> int:
        """Optimiser steps of one epoch."""
        return len(self.sampler)

    def from_step(self, step: int) -> Iterator[TripletBatch]:
        """The batches from an optimiser step of the run to the end of its epoch, each with its step."""
        self.sampler.epoch, self.sampler.skip = divmod(step, len(self))
        for number, batch in enumerate(prefetch(self._loader)):
            batch.step = step + number // self.parts
            yield batch
