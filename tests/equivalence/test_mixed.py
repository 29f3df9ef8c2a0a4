"""Several targets, hard negatives, and queries without a reference or a text: against loops in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXED, TRAIN
from tiny_backbones import TINY, tiny_backbone
from torch import Tensor
from torch.nn import functional as F

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank, assign_rows
from spn4cir.batches import KnownTargets, TripletBatch, TripletCollate, reference_number
from spn4cir.compute import checkpoint_blocks
from spn4cir.images import ImageSource, open_image, pixel_hash
from spn4cir.objective import BankCandidates, Objective
from spn4cir.types import ImageFeatures, Triplet

Found = dict[str, Tensor]
Item = tuple[Triplet, str | None]
T = 0.1


def items_of(triplets: Sequence[Triplet]) -> list[Item]:
    return [(triplet, triplet.texts[0] if triplet.texts else None) for triplet in triplets]


@dataclass
class Case:
    """One batch through a stage, and the same by a loop over queries and candidates."""

    name: str
    toy: Any
    folder: Path
    stage: int
    known: Sequence[Triplet] = tuple(MIXED)  # all triplets of the data
    items: Sequence[Item] = tuple(items_of(MIXED))
    bound: float | None = None
    is_stored: bool = True  # the references of stage 2

    def open(self) -> tuple[Backbone, Callable[[str], Tensor], dict[str, int]]:
        """A fresh model in double precision, pixels by image id, and numbers equal for equal pixels."""
        backbone = tiny_backbone(self.name, self.folder).double().eval()
        backbone.extra_losses = lambda *_: {}  # type: ignore[method-assign]
        if self.stage == 2:
            backbone.freeze_image_side()
        images = ImageSource(self.toy.image, backbone.transform, keep=True)
        numbers = assign_rows({i: pixel_hash(open_image(self.toy.image(i))) for i in TRAIN})
        return backbone, lambda image_id: images(image_id)[None].double(), numbers

    def bank(self, backbone: Backbone, pixels: Callable[[str], Tensor], numbers: dict[str, int]) -> Bank:
        first = {number: image_id for image_id, number in reversed(numbers.items())}
        with torch.no_grad():
            features = [backbone.encode_image(pixels(first[number])) for number in range(len(first))]
        reference, target = (torch.cat(part) for part in zip(*features, strict=True))
        return Bank(reference if self.is_stored else None, target, numbers, "")  # type: ignore[arg-type]

    def batch(self) -> tuple[Objective, TripletBatch]:
        backbone, pixels, numbers = self.open()
        bank = self.bank(backbone, pixels, numbers) if self.stage == 2 else None
        images = ImageSource(self.toy.image, backbone.transform)
        collate = TripletCollate(backbone.tokenize, numbers, images, bank, KnownTargets(self.known, numbers))
        batch = collate(list(self.items))
        batch.pixels = None if batch.pixels is None else batch.pixels.double()
        candidates = None if bank is None else BankCandidates(bank)
        return Objective(backbone, T, True, candidates, max_similarity=self.bound).double().eval(), batch

    def middle(self) -> float:
        """Near the median similarity of two images, where no pair is: of an equal one the last bit decides."""
        backbone, pixels, _ = self.open()
        with torch.no_grad():
            means = torch.stack([mean_of(backbone.encode_image(pixels(i))) for i in TRAIN])
        first, second = torch.triu_indices(len(TRAIN), len(TRAIN), 1)
        ordered = (means @ means.T)[first, second].sort().values
        near = ordered[int(0.4 * len(ordered)) : int(0.6 * len(ordered))]
        widest = int(near.diff().argmax())
        return float(near[widest : widest + 2].mean())

    def fast(self, chunk: int | None = None, checkpoints: bool = False) -> Found:
        objective, batch = self.batch()
        objective.backbone.chunk = chunk
        if checkpoints:
            assert checkpoint_blocks(objective.backbone)
        return gradients(objective(batch), objective.backbone, objective.temperature)

    def slow(self) -> Found:
        """Each query by itself, each candidate by itself, each positive a term of its own."""
        backbone, pixels, numbers = self.open()
        features = {i: backbone.encode_image(pixels(i)) for i in TRAIN}
        temperature = torch.tensor(T, requires_grad=True).double()
        temperature.retain_grad()
        if self.stage == 1:
            candidates = [i for triplet, _ in self.items for i in (*triplet.targets, *triplet.negatives)]
        else:
            candidates = [i for n, i in enumerate(numbers) if numbers[i] not in [*numbers.values()][:n]]
        terms = []
        for triplet, text in self.items:
            query = query_of(backbone, triplet, text, features)
            wanted = {
                numbers[target]
                for other in self.known
                if reference_number(other, numbers) == reference_number(triplet, numbers)
                and (text in other.texts or (text is None and not other.texts))
                for target in other.targets
            }
            negatives = [i for i in candidates if numbers[i] not in wanted]
            if self.bound is not None:
                likes = [mean_of(features[i]) for i in triplet.targets]
                negatives = [i for i in negatives if all(mean_of(features[i]) @ like <= self.bound for like in likes)]
            for target in triplet.targets:
                scores = [
                    max((query @ v for v in features[i].target[0]), key=Tensor.item) for i in (target, *negatives)
                ]
                scores = [score / temperature for score in scores]
                terms.append(torch.stack(scores).logsumexp(0) - scores[0])
        return gradients(torch.stack(terms).mean(), backbone, temperature)


def mean_of(features: ImageFeatures) -> Tensor:
    return F.normalize(features.target[0].detach().mean(0), dim=0)


def query_of(backbone: Backbone, triplet: Triplet, text: str | None, features: dict[str, ImageFeatures]) -> Tensor:
    """(E,): zeros stand for a missing reference, and without a text the query is the mean target vector.

    A backbone that has its own way for either is called by itself, without the batch's other kinds.
    """
    own = type(backbone)
    if text is None:
        assert triplet.reference is not None
        if own.compose_image is not Backbone.compose_image:
            return backbone.compose_image(features[triplet.reference])[0]
        return F.normalize(features[triplet.reference].target[0].mean(0), dim=0)
    if triplet.reference is None and own.compose_text is not Backbone.compose_text:
        return backbone.compose_text(backbone.tokenize([text])).query[0]
    reference = features[triplet.reference or "i00"].reference
    reference = reference if triplet.reference is not None else torch.zeros_like(reference)
    return backbone.compose(reference, backbone.tokenize([text])).query[0]


def gradients(loss: Tensor, backbone: Backbone, temperature: Tensor) -> Found:
    """The loss, and the gradient of each parameter that trains; zeros where none arrives."""
    loss.backward()
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    assert temperature.grad is not None
    return {"loss": loss.detach(), "temperature": temperature.grad, **found}


def apart(one: Found, two: Found) -> float:
    """The largest distance of two of one name, as a share of its norm, or of the largest where it is nearly zero."""
    assert one.keys() == two.keys()
    floor = 1e-3 * max(float(value.norm()) for value in one.values())
    return max(float((one[n] - two[n]).norm()) / max(float(one[n].norm()), floor) for n in one)


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bounded", [False, True])
def test_mixed_batches_equal_the_loop(name: str, stage: int, bounded: bool, toy: Any, tmp_path: Path) -> None:
    """Loss and every gradient: whole queries, text only and image only, several targets, hard negatives, a bound."""
    case = Case(name, toy, tmp_path, stage)
    case.bound = case.middle() if bounded else None
    slow = case.slow()
    assert apart(slow, case.fast()) < 1e-9
    assert not bounded or abs(slow["loss"] - replace(case, bound=None).slow()["loss"]) > 1e-3  # negative control
    for less in ("targets", "negatives"):  # negative control: all targets count, and hard negatives in stage 1
        others = [replace(t, **{less: getattr(t, less)[:1] if less == "targets" else ()}) for t in MIXED]  # type: ignore[arg-type]
        other = replace(case, known=others, items=items_of(others)).fast()
        assert (apart(slow, other) > 1e-3) == (less == "targets" or stage == 1)


@pytest.mark.parametrize("kept", ["image", "text", "image and text", "whole"])
@pytest.mark.parametrize("stage", [1, 2])
def test_batches_of_some_kinds_equal_the_loop(name: str, stage: int, kept: str, toy: Any, tmp_path: Path) -> None:
    """Of one kind or of two, in data that has all: also where nothing that trains is behind any query."""
    kinds = {"image": (3, 6), "text": (2, 5), "image and text": (2, 3, 5, 6), "whole": (0, 1, 4, 7)}
    case = Case(name, toy, tmp_path, stage, items=items_of([MIXED[n] for n in kinds[kept]]))
    slow, found = case.slow(), case.fast()
    assert apart(slow, found) < 1e-9 and float(found["loss"]) > 1e-3


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
@pytest.mark.parametrize("stage", [1, 2])
def test_mixed_batches_in_chunks_are_exact(name: str, stage: int, chunk: int, toy: Any, tmp_path: Path) -> None:
    """Gradient caching, where a chunk holds queries of one kind or of several; with checkpoints too."""
    case = Case(name, toy, tmp_path, stage)
    plain = case.fast()
    assert apart(plain, case.fast(chunk)) < 1e-9
    if chunk == 3:
        assert apart(plain, case.fast(chunk, checkpoints=True)) < 1e-9
    fewer = replace(case, items=case.items[:-1]).fast(chunk)  # negative control
    assert apart(plain, fewer) > 1e-3


def test_references_that_are_recomputed_are_alike(name: str, toy: Any, tmp_path: Path) -> None:
    """Stage 2 with pixels of the references, as with stored ones."""
    case = Case(name, toy, tmp_path, 2)
    assert apart(case.fast(), replace(case, is_stored=False).fast()) < 1e-9


@pytest.mark.parametrize("stage", [1, 2])
def test_targets_alone_equal_the_loop(name: str, stage: int, toy: Any, tmp_path: Path) -> None:
    """Several targets of whole queries, without the masks of missing parts."""
    whole = [replace(t, negatives=()) for t in MIXED if t.reference and t.texts]
    case = Case(name, toy, tmp_path, stage, known=whole, items=items_of(whole))
    batch = case.batch()[1]
    assert batch.has_reference is None and batch.has_text is None and batch.positives == 3
    assert apart(case.slow(), case.fast()) < 1e-9


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_of_images_alone_trains_nothing_in_stage_2(stage: int, toy: Any, tmp_path: Path) -> None:
    """With a fixed temperature the loss has no gradient but zeros there, and the step goes on; stage 1 has others."""
    objective, batch = Case("clip4cir", toy, tmp_path, stage, items=items_of([MIXED[3], MIXED[6]])).batch()
    objective.temperature.requires_grad_(False)
    objective(batch).backward()
    found = [p.grad for p in objective.parameters() if p.requires_grad]
    assert found and all(gradient is not None for gradient in found)
    assert any(bool(gradient.any()) for gradient in found) == (stage == 1)  # type: ignore[union-attr]
