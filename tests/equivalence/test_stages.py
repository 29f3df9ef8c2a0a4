"""Stage 2 is stage 1 with another source of features; and its image side stands still."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spn4cir import bank as banks
from spn4cir.backbones import build_backbone
from spn4cir.checkpoints import load_model, save_model
from spn4cir.images import ImageSource, TripletCollate, open_image, pixel_hash
from spn4cir.objective import Objective
from spn4cir.train import train

ITEMS = list(range(1, 7))  # their six images: each once a reference, once a target


def loss_and_gradients(objective: Objective, batch) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    loss = objective(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None for g in gradients.values())
    return {"loss": loss.detach(), **gradients}


def stage1_and_stage2(toy, root: Path, more: list[str]) -> list[dict[str, Tensor]]:  # type: ignore[no-untyped-def]
    """The same batch through both stages; ``more`` are images that only the bank has."""
    ring = [f"i{n:02d}" for n in ITEMS]
    items = [
        (type(toy.triplets()[0])(ring[n], ring[(n + 1) % len(ring)], ("x",)), f"make it {n} times red")
        for n in range(len(ring))
    ]
    ids = ring + more
    hashes = {i: pixel_hash(open_image(toy.path(i))) for i in ids}
    results = []
    for stage in (1, 2):
        backbone = build_backbone("clip4cir")
        backbone.freeze_image_side()
        images = ImageSource(toy.path, backbone.transform)
        bank = banks.load_or_build(backbone, images, {i: hashes[i] for i in ids}, root) if stage == 2 else None
        identity = banks.assign_rows({i: hashes[i] for i in ids})
        batch = TripletCollate(backbone.tokenize, identity, images, bank and bank.rows, bank and bank.references)(items)
        assert (batch.pixels is None) == (stage == 2)
        results.append(loss_and_gradients(Objective(backbone, 0.1, learn_temperature=True, bank=bank), batch))
    return results


def test_stage_2_with_a_bank_of_the_batch_is_stage_1(toy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Loss and every gradient agree, the temperature's included, where the bank is exactly the batch's targets."""
    one, two = stage1_and_stage2(toy, tmp_path, [])
    assert one.keys() == two.keys() and len(one) > 40
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_one_more_image_in_the_bank_is_one_more_negative(toy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Negative control: a single further candidate raises the loss and moves the gradients."""
    one, two = stage1_and_stage2(toy, tmp_path, ["i30"])
    assert two["loss"] > one["loss"] + 1e-3
    assert all((one[name] - two[name]).abs().max() > 1e-6 for name in one)


def moved(before, after, pixels: Tensor) -> tuple[bool, bool, bool]:  # type: ignore[no-untyped-def]
    """Whether the image side's weights, what encode_image gives, and the text side's weights differ."""
    sides = before.image_state(), after.image_state()
    assert sides[0].keys() == sides[1].keys()
    with torch.no_grad():
        features = zip(before.encode_image(pixels), after.encode_image(pixels), strict=True)
        given = any(not torch.equal(a, b) for a, b in features)
    states = before.state_dict(), after.state_dict()
    text = any(not torch.equal(states[0][name], states[1][name]) for name in states[0].keys() - sides[0].keys())
    return any(not torch.equal(sides[0][name], sides[1][name]) for name in sides[0]), given, text


@pytest.mark.parametrize(("stage", "expected"), [(2, (False, False, True)), (1, (True, True, True))])
def test_stage_2_leaves_encode_image_bit_identical(  # type: ignore[no-untyped-def]
    stage: int, expected: tuple[bool, bool, bool], toy, configure, backbone, tmp_path: Path
) -> None:
    """After training, images encode to the same bits while the text side moved; stage 1 is the negative control."""
    save_model(tmp_path / "init", backbone, {})
    run = train(configure(init=str(tmp_path / "init"), max_steps=4, eval_every=0), stage)
    pixels = ImageSource(toy.path, backbone.transform).stack(toy.training_images()[:8])
    assert moved(backbone, load_model(run), pixels) == expected


def test_a_bank_needs_a_frozen_image_side(toy, backbone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What still trains is refused, by the bank and by the objective."""
    images = ImageSource(toy.path, backbone.transform)
    with pytest.raises(ValueError, match="freeze_image_side"):
        banks.load_or_build(backbone, images, {"i00": "x"}, tmp_path)
    bank = banks.Bank(None, torch.zeros(1, 1, 4), {"i00": 0}, "x")
    with pytest.raises(ValueError, match="frozen"):
        Objective(backbone, 0.1, bank=bank)
