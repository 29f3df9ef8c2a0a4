"""Stage 2 is stage 1 with another source of features; and its image side stands still. For every backbone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import TINY, tiny_backbone
from torch import Tensor

from spn4cir import bank as banks
from spn4cir.backbone import Backbone
from spn4cir.batches import TripletCollate
from spn4cir.checkpoints import load_model, save_model
from spn4cir.data import load_data
from spn4cir.errors import InputError
from spn4cir.images import ImageSource, open_image, pixel_hash
from spn4cir.objective import BankCandidates, Objective
from spn4cir.train import train
from spn4cir.types import Triplet

Found = dict[str, Tensor]
MACHINE = {"items_per_second", "peak_memory_mb"}
"""What the log says about the machine."""
ITEMS = [f"i{n:02d}" for n in range(1, 7)]  # six images: each once a reference, once a target
BATCH = [
    (Triplet(ITEMS[n], (ITEMS[(n + 1) % len(ITEMS)],), ("x",)), f"make it {n} times red") for n in range(len(ITEMS))
]


def loss_and_gradients(objective: Objective, batch: Any) -> Found:
    loss = objective(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None for g in gradients.values())
    return {"loss": loss.detach(), **gradients}  # type: ignore[dict-item]


class Stage:
    """One batch through a stage of a fresh model of that name, whose image side is frozen in both."""

    def __init__(self, name: str, toy: Any, root: Path):
        self.name, self.toy, self.root = name, toy, root

    def __call__(self, more: list[str], *dtype_and_references: Any) -> Found:
        """Stage 1 with neither dtype nor references; ``more`` are images that only the bank has."""
        backbone = tiny_backbone(self.name, self.root)
        backbone.freeze_image_side()
        backbone.extra_losses = lambda *_: {}  # type: ignore[method-assign]
        images, bank = ImageSource(self.toy.image, backbone.transform), None
        hashes = {i: pixel_hash(open_image(self.toy.image(i))) for i in ITEMS + more}
        if dtype_and_references:
            parts = banks.stored_parts(*dtype_and_references)
            bank = banks.load_or_build(backbone, images, hashes, self.root / "banks", parts=parts)
        is_stored = bank is not None and bank.reference is not None
        batch = TripletCollate(backbone.tokenize, banks.assign_rows(hashes), images, bank)(BATCH)
        assert (batch.pixels is None) == is_stored == (batch.features is not None)
        candidates = BankCandidates(bank) if bank else None
        return loss_and_gradients(Objective(backbone, 0.1, learn_temperature=True, candidates=candidates), batch)

    def by_hand(self, more: list[str]) -> Found:
        """Stage 2 as a plain loop over queries and candidates, everything being in memory."""
        backbone = tiny_backbone(self.name, self.root)
        backbone.freeze_image_side()
        images = ImageSource(self.toy.image, backbone.transform)
        with torch.no_grad():
            kept = {i: backbone.encode_image(images(i)[None]) for i in ITEMS + more}
        temperature = torch.nn.Parameter(torch.tensor(0.1))
        terms = []
        for triplet, text in BATCH:
            query = backbone.compose(kept[triplet.reference].reference, backbone.tokenize([text])).query[0]
            scores = {i: max((query @ vector for vector in kept[i].target[0]), key=Tensor.item) for i in kept}
            sums = sum((score / temperature).exp() for score in scores.values())
            terms.append(sums.log() - scores[triplet.targets[0]] / temperature)  # type: ignore[union-attr]
        loss = sum(terms) / len(terms)
        loss.backward()  # type: ignore[union-attr]
        found = {f"backbone.{n}": p.grad for n, p in backbone.named_parameters() if p.requires_grad}
        return {"loss": loss.detach(), "temperature": temperature.grad, **found}  # type: ignore[union-attr, dict-item]


@pytest.fixture(params=TINY)
def stage(request: pytest.FixtureRequest, toy: Any, tmp_path: Path) -> Stage:
    return Stage(request.param, toy, tmp_path)


def apart(one: Found, two: Found) -> float:
    """The largest distance of two of one name, as a share of what is largest in it (or nearly zero everywhere)."""
    assert one.keys() == two.keys() and len(one) > 10
    floor = 1e-3 * max(float(value.abs().max()) for value in one.values())
    return max(float((one[n] - two[n]).abs().max()) / max(float(one[n].abs().max()), floor) for n in one)


def test_stage_2_with_a_bank_of_the_batch_is_stage_1(stage: Stage) -> None:
    """Loss and every gradient agree, the temperature's included, where the bank is exactly the batch's targets."""
    assert apart(stage([]), stage([], "float32")) < 2e-4


def test_one_more_image_in_the_bank_is_one_more_negative(stage: Stage) -> None:
    """Negative control: a single further candidate raises the loss and moves the gradients."""
    one, two = stage([]), stage(["i30"], "float32")
    assert two["loss"] > one["loss"] + 1e-3 and apart(one, two) > 1e-2


def test_all_ways_to_keep_references_are_alike(stage: Stage) -> None:
    """Stored, recomputed, or in memory with loops for the loss; half precision is near, and another number."""
    more = ["i30", "i31", "i00", "twin"]
    stored, recomputed = stage(more, "float32"), stage(more, "float32", False)
    assert apart(stored, recomputed) < 1e-5
    assert apart(stored, stage.by_hand(more[:3])) < 1e-4  # the twin has no row of its own
    assert apart(stored, stage.by_hand(more[:2])) > 1e-2  # negative control
    for half in (stage(more, "float16"), stage(more, "float16", False)):
        assert 1e-4 < apart(stored, half) < 0.02
        assert 0 < abs(float(half["loss"] / stored["loss"]) - 1) < 1e-3


@pytest.fixture
def init(toy: Any, tmp_path: Path) -> Callable[[str], Path]:
    """``init(name)``: a folder with a tiny model of that name."""

    def saved(name: str) -> Path:
        save_model(tmp_path / "init", tiny_backbone(name, tmp_path), {})
        return tmp_path / "init"

    return saved


def moved(before: Backbone, after: Backbone, pixels: Tensor) -> tuple[bool, bool, bool]:
    """Whether the image side's weights, what encode_image gives, and queries of the same references differ."""
    before.freeze_image_side()
    after.freeze_image_side()  # so that both have their copies
    sides = before.image_state(), after.image_state()
    assert sides[0].keys() == sides[1].keys() and before.state_dict().keys() == after.state_dict().keys()
    tokens = before.tokenize(["make it red"] * len(pixels))
    with torch.no_grad():
        features = before.encode_image(pixels), after.encode_image(pixels)
        queries = [model.compose(features[0].reference, tokens).query for model in (before, after)]
    given = any(not torch.equal(a, b) for a, b in zip(*features, strict=True))
    return any(not torch.equal(sides[0][n], sides[1][n]) for n in sides[0]), given, not torch.equal(*queries)


@pytest.mark.parametrize(("number", "expected"), [(2, (False, False, True)), (1, (True, True, True))])
@pytest.mark.parametrize("name", TINY)
def test_stage_2_leaves_encode_image_bit_identical(  # type: ignore[no-untyped-def]
    name: str, number: int, expected: tuple[bool, bool, bool], toy, configure, init
) -> None:
    """After training, dropout and weight decay included, images encode to the same bits while queries moved; stage 1
    is the negative control, but for a backbone whose photographs never move."""
    expected = (False, False, True) if name == "freestyle" else expected
    options = {"backbone": name.split()[0], "dropout": True, "weight_decay": 0.1, "max_steps": 3, "eval_every": 0}
    folder = init(name)
    run = train(configure(init=str(folder), **options), number)
    before = load_model(folder)
    pixels = ImageSource(toy.image, before.transform).stack(toy.training_images())
    assert moved(before, load_model(run), pixels) == expected


@pytest.mark.parametrize("name", ["clip4cir", "sprc"])
def test_the_loop_keeps_references_as_it_is_told(name: str, configure, init, runs: Path) -> None:  # type: ignore[no-untyped-def]
    """Stored or recomputed, a run has the same losses and metrics but for rounding; only one of them fills the disk."""
    folder, found = str(init(name)), {}
    for way, options in {
        "stored": {}, "recomputed": {"bank": {"references": "recompute"}}, "lr": {"lr": 1.1e-3},
    }.items():  # fmt: skip
        output = runs / way
        train(configure(init=folder, backbone=name, output=str(output), max_steps=3, save_every=1, **options), 2)
        found[way] = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        banks_there = {path.parent.name for path in (runs / "banks").rglob("reference.npy")}
        assert len(banks_there) == 2  # of training and of the gallery, since the first run
    assert found["recomputed"] == pytest.approx(found["stored"], rel=2e-5)
    assert found["lr"] != pytest.approx(found["stored"], rel=2e-5)  # negative control
    assert len(found["lr"]) == 3 and math.isfinite(sum(found["lr"]))
    assert len(list((runs / "banks").iterdir())) == 3  # and of targets alone


def test_references_that_are_never_ranked_are_no_candidates(configure, init, runs: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """With ``bank.images: targets`` queries are scored against the targets alone, and still have their references."""
    seen: dict[str, int] = {}
    forward = BankCandidates.forward

    def count(self: BankCandidates, batch: Any) -> Any:
        vectors, positives, ignore = forward(self, batch)
        seen[way] = len(vectors)  # type: ignore[arg-type]
        assert int(positives.max()) < len(vectors)
        return vectors, positives, ignore

    monkeypatch.setattr(BankCandidates, "forward", count)
    for way in ("targets", "named"):
        train(
            configure(
                init=str(init("clip4cir")),
                max_annotated=9,
                batch_size=4,
                max_steps=2,
                output=str(runs / way),
                bank={"images": way},
            ),
            2,
        )
    triplets = configure(max_annotated=9)
    data = load_data(triplets, lambda _: None)
    hashes = {i: pixel_hash(open_image(data.dataset.image(i))) for i in data.candidate_images(triplets)}
    targets = {hashes[i] for t in data.triplets for i in t.targets}
    assert seen["targets"] == len(targets) < seen["named"]


@pytest.mark.parametrize(("dtype", "margin"), [("float32", None), ("float16", None), ("float32", 1.0)])
def test_stage_1_reads_stored_features(dtype: str, margin: float | None, configure, runs: Path) -> None:  # type: ignore[no-untyped-def]
    """Where the image side does not train, losses and metrics are those of encoding each batch, but for rounding."""
    found: dict[str, list[float]] = {}
    rows: dict[str, Any] = {}
    for way, options in {
        "encoded": {}, "stored": {"bank": {"in_stage1": True, "dtype": dtype}}, "lr": {"lr": 1.1e-3},
    }.items():  # fmt: skip
        settings = {"backbone": "blip4cir", "max_steps": 4, "epochs": 9, "eval_every": 1, **options}
        settings["negatives"] = {"margin": margin}
        folder = train(configure(output=str(runs / way), **settings), 1)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[way] = [line["loss"] for line in lines]
        rows[way] = json.loads((folder / "result.json").read_text())["metrics"]
    near = 2e-5 if dtype == "float32" else 2e-2
    assert found["stored"] == pytest.approx(found["encoded"], rel=near)
    assert rows["stored"] == pytest.approx(rows["encoded"], abs=1e-3 if dtype == "float32" else 10)
    assert found["lr"] != pytest.approx(found["encoded"], rel=2e-5)  # negative control


@pytest.mark.parametrize(("options", "told"), [
    ({"backbone": "clip4cir"}, "the image side of clip4cir trains in stage 1"),
    ({"backbone": "blip4cir", "backbone_options": {"train_vision": True}}, "the image side of blip4cir trains"),
    ({"backbone": "blip4cir", "negatives": {"types": ["target", "query"]}}, "needs more of targets than is stored"),
    ({"backbone": "sprc"}, "the image side of sprc trains"),
])  # fmt: skip
def test_stage_1_that_needs_more_than_is_stored(options: dict[str, Any], told: str, configure, runs: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=told):
        train(configure(output=str(runs / "x"), bank={"in_stage1": True}, **options), 1)


def test_images_put_aside_are_not_stored_twice(configure, init, runs: Path) -> None:  # type: ignore[no-untyped-def]
    """What selects is a part of the training images: their bank serves, and gives what encoding them gives."""
    options = {"init": str(init("tgcir")), "backbone": "tgcir", "holdout": 0.1, "max_steps": 2}
    rows = {}
    for way in ("recompute", "stored"):
        folder = train(configure(output=str(runs / way), bank={"references": way}, **options), 2)
        row = json.loads((folder / "metrics.jsonl").read_text())
        rows[way] = {name: value for name, value in row.items() if name not in MACHINE}
        assert len(list((runs / "banks").iterdir())) == (1 if way == "recompute" else 2)
    assert rows["stored"] == pytest.approx(rows["recompute"], rel=1e-4) and "R@10" in rows["stored"]


def test_a_wrong_name_is_said_before_a_bank_is_made(configure, init, runs: Path) -> None:  # type: ignore[no-untyped-def]
    """Rates that no parameter has would else be found out after hours of encoding; right ones pass."""
    config = configure(
        init=str(init("tgcir")), backbone="tgcir", max_steps=1, output=str(runs / "x"), lr_scale={"colour": 0.1}
    )
    with pytest.raises(InputError, match="lr_scale: no parameter that trains has 'colour'"):
        train(config, 2)
    assert not (runs / "banks").exists() and not (runs / "x").exists()
    config.lr_scale = {"temperature": 0.1}
    assert (train(config, 2) / "result.json").is_file()


def test_a_bank_needs_a_frozen_image_side(toy, backbone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What still trains is refused, by the bank and by the objective."""
    images = ImageSource(toy.image, backbone.transform)
    with pytest.raises(ValueError, match="freeze_image_side"):
        banks.load_or_build(backbone, images, {"i00": "x"}, tmp_path)
    bank = banks.Bank(None, torch.zeros(1, 1, 4), {"i00": 0}, "x")
    with pytest.raises(ValueError, match="frozen"):
        Objective(backbone, 0.1, candidates=BankCandidates(bank))


@pytest.mark.parametrize("temperature", [0.004, 0.6])
def test_a_learned_temperature_begins_within_its_bounds(temperature: float, backbone) -> None:  # type: ignore[no-untyped-def]
    """Outside it would be clamped, and get no gradient for ever; one that is fixed may be anything."""
    with pytest.raises(InputError, match=f"got {temperature}"):
        Objective(backbone, temperature, learn_temperature=True)
    assert Objective(backbone, temperature).temperature.item() == pytest.approx(temperature)
