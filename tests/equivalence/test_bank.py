"""A bank row is what the model gives now; a bank that is not whole, or of another model, is never used."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank, fingerprint, load_or_build, stored_parts
from spn4cir.images import ImageSource, open_image, pixel_hash


class Maker:
    """Builds banks of the toy dataset's training images and counts the images that are encoded."""

    def __init__(self, toy, backbone: Backbone, root: Path):  # type: ignore[no-untyped-def]
        self.toy, self.backbone, self.root, self.encoded = toy, backbone, root, 0
        backbone.freeze_image_side()
        self.images, self.ids = ImageSource(toy.path, backbone.transform), toy.training_images()
        self.hashes = {i: pixel_hash(open_image(toy.path(i))) for i in self.ids}
        encode = backbone.encode_image
        backbone.encode_image = lambda pixels: (self._count(len(pixels)), encode(pixels))[1]  # type: ignore[method-assign]

    def _count(self, images: int) -> None:
        self.encoded += images

    def __call__(self, batch_size: int = 256, dtype: str = "float32") -> Bank:
        hashes = {i: self.hashes[i] for i in self.ids}
        return load_or_build(self.backbone, self.images, hashes, self.root, batch_size, stored_parts(dtype))

    def name(self, dtype: str = "float32") -> str:
        return fingerprint(self.backbone, {i: self.hashes[i] for i in self.ids}, stored_parts(dtype))


@pytest.fixture
def make(toy, backbone: Backbone, tmp_path: Path) -> Maker:  # type: ignore[no-untyped-def]
    return Maker(toy, backbone, tmp_path / "banks")


def live(make: Maker, ids: list[str]):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return make.backbone.encode_image(make.images.stack(ids))


def test_rows_equal_live_encoding(make: Maker) -> None:
    """In the same blocks exactly, one image at a time closely; another image's row is far."""
    bank, unique = make(), list(dict.fromkeys(make.hashes.values()))
    first = [next(i for i in make.ids if make.hashes[i] == h) for h in unique]
    features = live(make, first)
    assert torch.equal(bank.reference.whole(), features.reference) and torch.equal(bank.target, features.target)
    for image_id in make.ids[:5]:
        alone, row = live(make, [image_id]), bank.rows[image_id]
        torch.testing.assert_close(bank.reference[[row]], alone.reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bank.target[row], alone.target[0], rtol=1e-5, atol=1e-5)
        assert (bank.target[row - 1] - alone.target[0]).abs().max() > 1e-3  # negative control


def test_block_size_does_not_matter(make: Maker, tmp_path: Path) -> None:
    """Ragged small blocks give the same rows, to rounding."""
    whole, make.root = make(), tmp_path / "other"
    torch.testing.assert_close(make(batch_size=7).target, whole.target, rtol=1e-5, atol=1e-5)


def test_equal_pixels_share_a_row(make: Maker) -> None:
    """A copy under another name is encoded once and is no negative of its original; other images are apart."""
    bank = make()
    assert bank.rows["twin"] == bank.rows["i00"] != bank.rows["i01"]
    assert len(bank.target) == make.encoded == len(make.ids) - 1 == len(set(bank.rows.values()))


def test_a_second_use_reads_the_file(make: Maker) -> None:
    """Nothing but one image is encoded again, to see that it still fits, and the bits are the same."""
    first, encoded = make(), make.encoded
    second = make()
    assert make.encoded == encoded + 1 and torch.equal(first.target, second.target)


def change_weights(make: Maker) -> None:
    with torch.no_grad():
        next(p for p in make.backbone.image_state().values()).flatten()[0].add_(1e-3)


def change_transform(make: Maker) -> None:
    make.backbone.transform = replace(make.backbone.transform, pad_ratio=None)


def change_pixels(make: Maker) -> None:
    make.hashes["i03"] = "0" * 64


def change_order(make: Maker) -> None:
    make.ids = [*make.ids[1:], make.ids[0]]


@pytest.mark.parametrize("change", [change_weights, change_transform, change_pixels, change_order])
def test_what_a_bank_depends_on_names_it(make: Maker, change) -> None:  # type: ignore[no-untyped-def]
    """Image-side weights, preprocessing, pixels and order: a change of any gives another bank."""
    before, _ = make.name(), make()
    change(make)
    encoded = make.encoded
    make()
    assert make.name() != before and make.encoded > encoded


def test_the_text_side_does_not_name_a_bank(make: Maker) -> None:
    """Negative control: text-side weights may move, as they do in stage 2, and the bank stays valid."""
    before = make.name()
    with torch.no_grad():
        make.backbone.clip.positional_embedding.add_(1.0)  # type: ignore[union-attr, operator]
    assert make.name() == before


def test_half_the_storage_is_close(make: Maker) -> None:
    """A float16 bank has its own name, half the bytes and nearly the same rows."""
    wide, narrow = make(), make(dtype="float16")
    assert narrow.fingerprint != wide.fingerprint and narrow.target.dtype == torch.float16
    torch.testing.assert_close(narrow.target.float(), wide.target, rtol=1e-3, atol=1e-4)
    assert not torch.equal(narrow.target.float(), wide.target)  # negative control


def spoil(folder: Path, like: Bank) -> None:
    """What a kill in the middle leaves: arrays of zeros."""
    folder.mkdir(parents=True)
    for part in ("reference", "target"):
        whole = like.target if part == "target" else like.reference.whole()  # type: ignore[union-attr]
        np.save(folder / f"{part}.npy", np.zeros_like(whole.numpy()))


@pytest.mark.parametrize("left", ["folder", "tmp of another process", "tmp of the same process id"])
def test_a_half_written_bank_is_never_used(make: Maker, tmp_path: Path, left: str) -> None:
    """A folder without bank.json, or a temporary one, whoever left it: the bank is built anew and is right."""
    good, make.root = make(), tmp_path / "spoilt"
    suffix = {"folder": "", "tmp of another process": ".1.tmp"}.get(left, f".{os.getpid()}.tmp")
    spoil(make.root / f"{make.name()}{suffix}", good)
    assert torch.equal(make().target, good.target)
    assert json.loads((make.root / make.name() / "bank.json").read_text())["images"] == len(good.target)


def test_an_interrupted_build_leaves_nothing(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while encoding: no folder at all, and the next call builds."""
    monkeypatch.setattr(make, "_count", lambda images: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make()
    assert list(make.root.iterdir()) == []
    monkeypatch.undo()
    assert len(make().target) == 40
