"""What others take the place of, which candidates are drawn, and what is no negative, against formulas written out."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Toy, draw_picture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spn4cir import stages
from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.bank import Bank
from spn4cir.batches import TripletBatch
from spn4cir.config import TrainConfig
from spn4cir.config_groups import BankConfig, NegativesConfig
from spn4cir.datasets import open_extra_images
from spn4cir.errors import InputError
from spn4cir.in_batch import InBatch
from spn4cir.objective import BankCandidates, Objective
from spn4cir.train import train
from spn4cir.types import Composed, ImageFeatures, Tokens

KINDS = ("target", "query", "text", "reference")
T = 0.2
# 11 triplets as (reference, text, target). 0 and 1 have one reference and one target; 2 and 3 ask the same, with two
# answers; 4 and 5 share a text, 5 and 6 a text and a target; 7 has 3's reference and 2's target with another text.
TRIPLETS = [
    (0, 0, 10), (0, 1, 10), (1, 2, 11), (1, 2, 12), (2, 3, 13), (3, 3, 14), (4, 3, 14), (1, 4, 11), (5, 5, 15),
    (6, 6, 16), (7, 7, 10),
]  # fmt: skip
OTHERS = [[-1], [-1], [12], [11], *[[-1]] * 7]
B, WIDTH = len(TRIPLETS), 13
Triplets = list[tuple[int, int, int]]


class Sum(Backbone):
    """Tables of what stands for images and texts, which are their own numbers; a query is a sum, as in CLIP4CIR."""

    name = "sum"

    def __init__(self, vectors: int = 1, width: int = WIDTH, count: int = 20):
        super().__init__()
        self.options = {}
        made = torch.Generator().manual_seed(3)
        self.references, self.texts = (
            nn.Parameter(torch.randn(count, width, generator=made, dtype=torch.float64)) for _ in range(2)
        )
        self.targets = nn.Parameter(torch.randn(count, vectors, width, generator=made, dtype=torch.float64))

    @property
    def query_is_sum(self) -> bool:
        return True

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        rows = pixels.flatten().long()
        return ImageFeatures(self.references[rows][:, None], F.normalize(self.targets[rows], dim=-1))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        parts = reference[:, 0], self.texts[tokens["row"]]
        return Composed(F.normalize(sum(parts), dim=-1), parts=parts)  # type: ignore[call-overload]

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        return [self.references, self.targets]


def batch_of(triplets: Triplets = TRIPLETS, others: list[list[int]] = OTHERS) -> TripletBatch:
    reference, text, target = torch.tensor(triplets).T
    pixels, rows = torch.unique(torch.cat([reference, target]), return_inverse=True)
    return TripletBatch(
        tokens={"row": text}, reference=rows[: len(text)], target=rows[len(text) :, None], identity=target[:, None],
        others=torch.tensor(others), query_identity=torch.stack([reference, text], 1),
        pixels=pixels[:, None, None, None],
    )  # fmt: skip


def false_negatives(kind: str, triplets: Triplets = TRIPLETS, others: list[list[int]] = OTHERS) -> Tensor:
    """(B, B), true where what takes the place gives a query that the target answers, pair by pair as documented."""
    hidden = torch.zeros(len(triplets), len(triplets), dtype=torch.bool)
    for i, (ri, wi, ti) in enumerate(triplets):
        for j, (rj, wj, tj) in enumerate(triplets):
            answered = ti == tj or ti in others[j]
            hidden[i, j] = (
                i != j
                and {
                    "target": ti == tj or tj in others[i],
                    "query": answered,
                    "text": wi == wj or (ri == rj and answered),
                    "reference": ri == rj or (wi == wj and answered),
                }[kind]
            )
    return hidden


def written_out(kind: str, model: Sum, temperature: Tensor, hidden: Tensor, triplets: Triplets = TRIPLETS) -> Tensor:
    """The table of the paper's study, with all B × B × D sums of text and reference as one tensor."""
    rows = torch.tensor(triplets)
    r, w, t = model.references[rows[:, 0]], model.texts[rows[:, 1]], F.normalize(model.targets[rows[:, 2], 0], dim=-1)
    scores = {
        "target": lambda: F.normalize(r + w, dim=-1) @ t.T,
        "query": lambda: t @ F.normalize(r + w, dim=-1).T,
        "text": lambda: torch.einsum("ijd,id->ij", F.normalize(r[:, None] + w[None], dim=-1), t),
        "reference": lambda: torch.einsum("ijd,id->ij", F.normalize(r[None] + w[:, None], dim=-1), t),
    }[kind]()
    return F.cross_entropy((scores / temperature).masked_fill(hidden, -torch.inf), torch.arange(len(rows)))


def values(loss: Tensor, model: Sum, temperature: Tensor) -> list[Tensor]:
    """The loss, and its gradients by r, w, t and temperature."""
    leaves = [leaf for leaf in (model.references, model.texts, model.targets, temperature) if leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def found(kinds: list[str], batch: TripletBatch | None = None, above: float | None = None) -> list[Tensor]:
    model = Sum()
    objective = Objective(model, T, True, types=kinds, max_similarity=above).double()
    return values(objective(batch or batch_of()), model, objective.temperature)


def expected(kinds: list[str], hidden: Callable[[str], Tensor] = false_negatives) -> list[Tensor]:
    model, temperature = Sum(), torch.tensor(T, requires_grad=True).double()
    losses = [written_out(kind, model, temperature, hidden(kind)) for kind in kinds]
    return values(torch.stack(losses).mean(), model, temperature)


def equal(one: list[Tensor], two: list[Tensor], rtol: float = 1e-9) -> bool:
    return len(one) == len(two) and all(
        torch.allclose(a.double(), b.double(), rtol=rtol, atol=1e-12) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), ["query", "reference"], list(KINDS)], ids=" ".join)
def test_types_equal_the_formulas(kinds: list[str]) -> None:
    """Loss and gradients of references, texts, targets and temperature; of several types, the mean."""
    assert equal(found(kinds), expected(kinds))


@pytest.mark.parametrize("kind", KINDS)
def test_false_negatives_are_left_out_and_matter(kind: str) -> None:
    """Negative controls: each of the masks leaves something out, and without it the loss and a gradient are others."""
    whole = expected([kind], lambda kind: torch.zeros(B, B, dtype=torch.bool))
    masked = found([kind])
    assert whole[0] > masked[0] + 1e-3 and not equal(whole[1:], masked[1:], 1e-3)


def test_each_reason_to_leave_out_matters() -> None:
    """Equal texts, references and targets, and other accepted targets: without any of them the loss is larger."""
    for kind, without in (
        ("target", {"identity": torch.arange(B)[:, None]}),
        ("target", {"others": torch.full((B, 1), -1)}),
        ("query", {"identity": torch.arange(B)[:, None]}),
        ("query", {"others": torch.full((B, 1), -1)}),
        ("text", {"identity": torch.arange(B)[:, None]}),
        ("text", {"others": torch.full((B, 1), -1)}),
        ("text", {"query_identity": torch.arange(2 * B).view(B, 2)}),
        ("reference", {"query_identity": torch.arange(2 * B).view(B, 2)}),
        ("reference", {"identity": torch.arange(B)[:, None]}),
    ):
        loose = replace(batch_of(), **without)  # type: ignore[arg-type]
        assert found([kind], loose)[0] > found([kind])[0] + 1e-4, (kind, list(without))


def test_text_and_reference_are_not_each_other() -> None:
    """Negative control: with the two parts exchanged the loss is another."""
    one, two = expected(["text"]), expected(["reference"])
    assert abs(one[0] - two[0]) > 1e-2 and not equal(found(["reference"]), one, 1e-2)


@pytest.mark.parametrize("vectors", [1, 3])
def test_queries_against_targets_of_several_vectors(vectors: int) -> None:
    """The query takes the place also where a target has K vectors: the maximum over them."""
    made = torch.Generator().manual_seed(1)
    leaves = [torch.randn(B, *shape, generator=made).double().requires_grad_() for shape in ((7,), (vectors, 7))]
    loss = InBatch(torch.tensor(TRIPLETS)[:, 2], T, torch.tensor(OTHERS)).by_query(*leaves)
    scores = torch.stack([torch.stack([(t @ q).max() for q in leaves[0]]) for t in leaves[1]]) / T
    slow = F.cross_entropy(scores.masked_fill(false_negatives("query"), -torch.inf), torch.arange(B))
    assert equal([loss, *torch.autograd.grad(loss, leaves)], [slow, *torch.autograd.grad(slow, leaves)])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else [made]:
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return made


@pytest.mark.parametrize("kind", ["text", "reference"])
def test_no_tensor_holds_all_sums(kind: str) -> None:
    """Forward and backward, nothing is larger than B × B or B × D; written out, all sums are held at once."""
    count, width = 67, 41
    triplets, others = [(n, n, n) for n in range(count)], [[-1]] * count
    batch, no_mask = batch_of(triplets, others), torch.zeros(count, count, dtype=torch.bool)
    model = Sum(width=width, count=count)
    objective = Objective(model, T, types=[kind])
    with Largest() as fast:
        objective(batch).backward()
    with Largest() as slow:
        written_out(kind, model, objective.temperature, no_mask, triplets).backward()
    assert fast.elements <= 2 * count * max(count, width) and slow.elements >= count * count * width


def test_sums_that_nearly_cancel_stay_finite() -> None:
    """A text that is all but the opposite of a reference: loss and gradients are finite, in float32 too."""
    model = Sum().float()
    with torch.no_grad():
        model.texts[5] = -model.references[5] * (1 + 1e-6)
    objective = Objective(model, T, True, types=["text", "reference"])
    assert all(part.isfinite().all() for part in values(objective(batch_of()), model, objective.temperature))


# ---- similar to the positive


def similar(bound: float) -> Tensor:
    """(B, B), true where two of the batch's targets are more similar than the bound."""
    targets = F.normalize(Sum().targets[[t for _, _, t in TRIPLETS], 0], dim=-1)
    return (targets @ targets.T > bound) & ~torch.eye(B, dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_similar_targets_are_left_out_in_stage_1(kind: str) -> None:
    """Above the bound a target is as good as equal, whichever part others take the place of."""
    bound = 0.2
    hidden = false_negatives(kind)
    rows = torch.tensor(TRIPLETS)
    same = {"text": rows[:, 0], "reference": rows[:, 1]}.get(kind)
    more = similar(bound) if same is None else similar(bound) & (same[:, None] == same)
    assert more.any() and equal(found([kind], above=bound), expected([kind], lambda kind: hidden | more))
    if (more & ~hidden).any():  # negative control
        assert found([kind], above=bound)[0] < found([kind])[0] - 1e-4
    else:
        assert kind in ("text", "reference")


# ---- stage 2: what is drawn from a bank

N, SEED = 18, 4
QUERIES = [(0, 0, 3), (1, 1, 17), (2, 2, 3), (3, 3, 0), (4, 4, 9)]  # two with one target
ACCEPTED = [[5, -1], [3, 9], [-1, -1], [-1, -1], [17, 2]]


def drawn(step: int, limit: int) -> set[int]:
    return set(np.random.default_rng((SEED, step)).choice(N, limit, replace=False).tolist())


def against_bank(
    limit: int | None, step: int = 0, above: float | None = None, accepted: list[list[int]] = ACCEPTED
) -> list[Tensor]:
    """Loss and gradients of stage 2 with so many candidates drawn."""
    model = Sum(2)
    model.freeze_image_side()
    bank = Bank(None, F.normalize(model.targets[:N].detach(), dim=-1), {}, "")
    objective = Objective(model, T, True, BankCandidates(bank, limit, SEED), max_similarity=above).double()
    reference, text, target = (column.contiguous() for column in torch.tensor(QUERIES).T)
    stored = ImageFeatures(model.references[reference][:, None].detach(), torch.zeros(len(QUERIES), 0))
    batch = TripletBatch(
        tokens={"row": text}, reference=torch.arange(len(QUERIES)), target=target[:, None], identity=target[:, None],
        others=torch.tensor(accepted), features=stored, step=step,
    )  # fmt: skip
    return values(objective(batch), model, objective.temperature)


def by_hand(candidates: Callable[[int], set[int]]) -> list[Tensor]:
    """The same, query by query, over the rows that each is given, its positive beside."""
    model, temperature, terms = Sum(2), torch.tensor(T, requires_grad=True).double(), []
    model.freeze_image_side()
    targets = F.normalize(model.targets, dim=-1)
    for i, (reference, text, positive) in enumerate(QUERIES):
        query = F.normalize(model.references[reference] + model.texts[text], dim=0)
        rows = [positive, *sorted(candidates(i) - {positive})]
        scores = torch.stack([(targets[row] @ query).max() for row in rows]) / temperature
        terms.append(scores.logsumexp(0) - scores[0])
    return values(torch.stack(terms).mean(), model, temperature)


@pytest.mark.parametrize("limit", [1, 5, 17])
@pytest.mark.parametrize("step", [0, 7])
def test_drawn_candidates_equal_those_rows_alone(limit: int, step: int) -> None:
    """Each query against what was drawn and its own target; no other's target, and none that answers it as well."""
    rows = drawn(step, limit)
    assert equal(against_bank(limit, step), by_hand(lambda i: rows - set(ACCEPTED[i])))
    wanted = {target for _, _, target in QUERIES}
    if not wanted <= rows:  # negative control: with the other targets of the batch in sight it is another loss
        assert not equal(against_bank(limit, step), by_hand(lambda i: (rows | wanted) - set(ACCEPTED[i])), 1e-3)


def test_accepted_targets_stay_hidden_among_the_drawn() -> None:
    """Negative control: seen as negatives, they raise the loss."""
    none = [[-1, -1]] * len(QUERIES)
    assert any(drawn(0, 12) & set(rows) for rows in ACCEPTED)
    assert against_bank(12, accepted=none)[0] > against_bank(12)[0] + 1e-3


def test_the_draw_is_the_steps_own() -> None:
    """The same for one step however often it is made, another for another step."""
    assert equal(against_bank(5, 3), against_bank(5, 3), 0)
    assert not equal(against_bank(5, 3), against_bank(5, 4), 1e-3)


@pytest.mark.parametrize("limit", [N, N + 50])
def test_a_limit_beyond_the_bank_is_none(limit: int) -> None:
    """All candidates, in their order: the dense loss."""
    assert equal(against_bank(limit), against_bank(None))
    assert equal(against_bank(None), by_hand(lambda i: set(range(N)) - set(ACCEPTED[i])))
    assert not equal(against_bank(N - 1), against_bank(None), 1e-6)  # negative control


@pytest.mark.parametrize("limit", [None, 9])
def test_similar_candidates_are_left_out_in_stage_2(limit: int | None) -> None:
    """Candidates whose mean vector is nearer to the positive's than the bound, of all or of the drawn."""
    bound = 0.3
    means = F.normalize(F.normalize(Sum(2).targets[:N], dim=-1).mean(1), dim=-1)
    near = [set((means @ means[p] > bound).nonzero()[:, 0].tolist()) - {p} for _, _, p in QUERIES]
    rows = set(range(N)) if limit is None else drawn(0, limit)
    assert any(near[i] & rows - set(ACCEPTED[i]) for i in range(len(QUERIES)))
    assert equal(against_bank(limit, above=bound), by_hand(lambda i: rows - set(ACCEPTED[i]) - near[i]))
    assert against_bank(limit, above=bound)[0] < against_bank(limit)[0] - 1e-4  # negative control


# ---- through the loop

Configure = Callable[..., TrainConfig]


@pytest.fixture
def banks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Bank, dict[str, str]]]]:
    """Each bank that the loop makes, with the images it was asked for."""
    made: list[tuple[Bank, dict[str, str]]] = []
    build = stages.frozen_features

    def spy(config: Any, backbone: Any, images: Any, hashes: dict[str, str]) -> Bank:
        bank = build(config, backbone, images, hashes)
        made.append((bank, hashes))
        return bank

    monkeypatch.setattr(stages, "frozen_features", spy)
    yield made


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that all runs begin with."""
    from spn4cir.checkpoints import save_model

    folder = tmp_path_factory.mktemp("start")
    save_model(folder, build_backbone("clip4cir"), {})
    return folder


def first_loss(folder: Path) -> float:
    return float(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])


PLAIN: dict[tuple[int, int | None], float] = {}
"""First loss of a stage with so many triplets and no option, once it is known."""
SETTINGS: list[tuple[int, int | None, dict[str, Any]]] = [
    (1, None, {"negatives": {"types": list(KINDS)}}),
    (1, None, {"negatives": {"types": ["text"]}, "compute": {"chunk": 3}}),
    (1, None, {"negatives": {"max_similarity": 0.5}}),
    (2, None, {"negatives": {"max_similarity": 0.5}}),
    (2, None, {"bank": {"limit": 3}}),
    (2, 16, {"bank": {"images": "named"}}),
]


@pytest.mark.parametrize(("stage", "annotated", "options"), SETTINGS, ids=[json.dumps(o) for _, _, o in SETTINGS])
def test_options_reach_the_loop(
    stage: int, annotated: int | None, options: dict[str, Any], configure: Configure, start: Path, tmp_path: Path
) -> None:
    """Two steps with each option; the loss is another than without it."""
    common: dict[str, Any] = {"init": str(start), "max_steps": 2, "max_annotated": annotated}
    if (stage, annotated) not in PLAIN:
        plain = train(configure(**common, output=str(tmp_path / "plain")), stage)
        PLAIN[stage, annotated] = first_loss(plain)
    other = train(configure(**common, **options, output=str(tmp_path / "other")), stage)
    assert (other / "result.json").is_file() and abs(first_loss(other) - PLAIN[stage, annotated]) > 1e-3


def test_extra_pictures_join_the_bank(
    configure: Configure, start: Path, toy: Toy, tmp_path: Path, banks: list[tuple[Bank, dict[str, str]]]
) -> None:
    """Behind all others, each once; equal pixels share a row; and the loss rises, as there is more to tell apart."""
    extra = tmp_path / "more"
    for n in range(6):
        draw_picture(extra / "inner" / f"{n}.png", f"extra {n}")
    (extra / "inner" / "copy.png").write_bytes((extra / "inner" / "0.png").read_bytes())
    (extra / "i05.png").write_bytes(toy.image("i05").path.read_bytes())
    common: dict[str, Any] = {"init": str(start), "max_steps": 1}
    plain = train(configure(**common, output=str(tmp_path / "plain")), 2)
    more = train(configure(**common, bank={"extra": str(extra)}, output=str(tmp_path / "with")), 2)
    (before, known), (after, _) = (pair for pair in banks if "i46" not in pair[1])  # which the gallery alone has
    ids = [f"bank.extra:{name}" for name in ("i05.png", *(f"inner/{n}.png" for n in range(6)), "inner/copy.png")]
    assert list(after.rows)[: len(known)] == list(known) and set(list(after.rows)[len(known) :]) == set(ids)
    assert after.total == before.total + 6 == len(set(after.rows.values()))
    assert after.rows[ids[0]] == after.rows["i05"] and after.rows[ids[1]] == after.rows[ids[-1]]
    assert {i: after.rows[i] for i in known} == before.rows
    torch.testing.assert_close(after.target[: before.total], before.target)
    assert first_loss(more) > first_loss(plain) + 1e-3


def test_extra_pictures_keep_their_names_apart(toy: Toy, tmp_path: Path) -> None:
    """An extra picture that is called as one of the dataset is another image, at its own place."""
    draw_picture(tmp_path / "more" / "i01.png", "another")
    known = {*toy.training_images(), *toy.benchmark("val").gallery}
    wider, extra = open_extra_images(toy, str(tmp_path / "more"))
    assert len(extra) == 1 and not known & set(extra)
    assert [wider.image(i).path for i in (*extra, "i01")] == [tmp_path / "more" / "i01.png", toy.image("i01").path]


@pytest.mark.parametrize("what", ["missing", "broken", "empty"])
def test_extra_pictures_that_are_none_are_one_line(
    what: str, configure: Configure, start: Path, tmp_path: Path
) -> None:
    """A missing folder, an empty one, and a file that is no picture: named, before a run folder is there."""
    extra = tmp_path / "more"
    if what != "missing":
        extra.mkdir()
    if what == "broken":
        draw_picture(extra / "a.png", 1)
        (extra / "b.png").write_bytes((extra / "a.png").read_bytes()[:90])
    with pytest.raises(InputError) as told:
        train(configure(init=str(start), bank={"extra": str(extra)}, output=str(tmp_path / "run")), 2)
    assert str(extra / "b.png" if what == "broken" else extra) in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "run").exists() and "--data-root FOLDER" not in str(told.value)
    assert what == "broken" or str(told.value).startswith("bank.extra: ")


def test_several_broken_extra_pictures_can_be_listed(configure: Configure, start: Path, tmp_path: Path) -> None:
    """The command that is named looks at the folder of extra pictures, not at the dataset."""
    (tmp_path / "more").mkdir()
    for name in "ab":
        (tmp_path / "more" / f"{name}.png").write_text("no picture")
    place = re.escape(str(tmp_path / "more"))
    with pytest.raises(InputError, match=f"; see spn4cir-data check --dataset catalogue --data-root {place}"):
        train(configure(init=str(start), bank={"extra": str(tmp_path / "more")}), 2)


def test_a_bank_is_the_same_wherever_its_extra_pictures_lie(toy: Toy, tmp_path: Path) -> None:
    """With or without a slash, moved or not: ids do not say where."""
    draw_picture(tmp_path / "more" / "a.png", 1)
    ids = open_extra_images(toy, str(tmp_path / "more"))[1]
    assert ids == open_extra_images(toy, f"{tmp_path}/more/")[1] == ["bank.extra:a.png"]
    (tmp_path / "more").rename(tmp_path / "moved")
    assert ids == open_extra_images(toy, str(tmp_path / "moved"))[1]


@pytest.mark.parametrize(("stage", "changes", "told"), [
    (2, {"negatives": {"types": ["query"]}}, r"negatives.types \['query'\] is for stage 1"),
    (1, {"bank": {"limit": 3}}, "bank.limit is for stage 2"),
    (1, {"bank": {"extra": "more"}}, "bank.extra is for stage 2"),
    (1, {"compute": {"accumulate": 8}}, "batch_size 8 in 8 parts leaves one triplet"),
])  # fmt: skip
def test_settings_of_the_other_stage_are_refused(
    stage: int, changes: dict[str, Any], told: str, configure: Configure, tmp_path: Path
) -> None:
    """What would be ignored, or train on nothing, is said before anything is read."""
    with pytest.raises(InputError, match=told):
        train(configure(**changes, output=str(tmp_path / "run")), stage)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["text", "reference"])
def test_parts_need_a_query_that_is_a_sum(kind: str, configure: Configure, tmp_path: Path) -> None:
    """The combiner of CLIP4CIR is none: one line that names option and backbone, before a run folder is there."""
    config = configure(
        backbone_options={"fusion": "combiner"}, negatives={"types": ["target", kind]}, output=str(tmp_path / "run")
    )
    with pytest.raises(InputError, match=f"negatives.types: {kind} needs .* clip4cir") as told:
        train(config, 1)
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [
    lambda: NegativesConfig([]), lambda: NegativesConfig(["text", "text"]), lambda: NegativesConfig(["query", "query"]),
    lambda: TrainConfig(negatives=NegativesConfig(max_similarity=1.0)), lambda: TrainConfig(bank=BankConfig(limit=0)),
])  # fmt: skip
def test_settings_that_make_no_sense(wrong: Callable[[], object]) -> None:
    """No type, a type twice, a bound that nothing exceeds, and no candidate at all."""
    with pytest.raises(InputError):
        wrong()
