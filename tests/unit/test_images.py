"""From files to pixels to batches."""

import io
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from spn4cir.bank import Bank
from spn4cir.batches import TripletCollate, TripletRows, TripletSampler, prefetch
from spn4cir.errors import InputError
from spn4cir.images import MEAN, STD, ImageSource, Transform, open_image, pixel_hash, target_pad
from spn4cir.store import StoredRows
from spn4cir.types import Triplet


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def pixels(path: Path) -> list[list[int]]:
    """All pixels of an opened image, row by row."""
    picture = open_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture).reshape(-1, 3).tolist()


# --- opening ---------------------------------------------------------------------------------------------------------


def test_rgba_is_flattened_on_white(tmp_path: Path) -> None:
    """Transparent is white, whatever colour lies under it; opaque stays; half of black on white is grey."""
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 0), (10, 20, 30, 255), (0, 0, 0, 128)])
    assert pixels(saved(tmp_path / "a.png", picture)) == [[255, 255, 255], [10, 20, 30], [127, 127, 127]]


def test_grey_with_alpha_is_flattened_on_white(tmp_path: Path) -> None:
    """LA images too."""
    picture = Image.new("LA", (3, 1))
    picture.putdata([(0, 0), (40, 255), (0, 128)])
    assert pixels(saved(tmp_path / "a.png", picture)) == [[255] * 3, [40] * 3, [127] * 3]


def palette() -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putdata([0, 1])
    return picture


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_palette_with_a_transparent_colour(tmp_path: Path, kind: str) -> None:
    """One transparent palette entry becomes white, the other stays."""
    assert pixels(saved(tmp_path / f"a.{kind}", palette(), transparency=0)) == [[255, 255, 255], [0, 255, 0]]


def test_palette_with_a_table_of_alphas(tmp_path: Path) -> None:
    """A PNG may give each palette entry its own alpha."""
    path = saved(tmp_path / "a.png", palette(), transparency=bytes([0, 255]))
    assert pixels(path) == [[255, 255, 255], [0, 255, 0]]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    """A PNG without alpha may name one colour as transparent."""
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    assert pixels(saved(tmp_path / "a.png", picture, transparency=(1, 2, 3))) == [[255] * 3, [9] * 3]


def test_plain_modes_become_rgb(tmp_path: Path) -> None:
    """Grey and opaque palette images keep their colours."""
    assert pixels(saved(tmp_path / "g.png", Image.new("L", (1, 1), 77))) == [[77] * 3]
    assert pixels(saved(tmp_path / "p.png", palette())) == [[255, 0, 0], [0, 255, 0]]


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A missing file is an InputError with its path."""
    with pytest.raises(InputError, match=r"absent\.png is missing"):
        open_image(tmp_path / "absent.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_broken_file_is_named(tmp_path: Path, kind: str, share: float) -> None:
    """An empty file, a torn header and torn pixels are each an InputError with the path."""
    whole = io.BytesIO()
    noise(40, 40).save(whole, kind)
    path = tmp_path / "broken.img"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    with pytest.raises(InputError, match=r"broken\.img does not decode"):
        open_image(path)


def test_folder_and_text_are_named(tmp_path: Path) -> None:
    """What is no image at all is an InputError too."""
    (tmp_path / "text.png").write_text("no image")
    for path in (tmp_path / "text.png", tmp_path):
        with pytest.raises(InputError, match=path.name):
            open_image(path)


# --- identity --------------------------------------------------------------------------------------------------------


def test_pixel_hash_tells_pixels_and_sizes_apart() -> None:
    """Equal pixels hash equal; one pixel off by one, or the same bytes in another shape, do not."""
    picture = noise(6, 4)
    other = picture.copy()
    red, green, blue = other.getpixel((5, 3))
    other.putpixel((5, 3), (red, green, blue ^ 1))
    reshaped = Image.frombytes("RGB", (4, 6), picture.tobytes())
    assert pixel_hash(picture) == pixel_hash(picture.copy())
    assert len({pixel_hash(p) for p in (picture, other, reshaped)}) == 3


def test_pixel_hash_ignores_the_file_format(tmp_path: Path) -> None:
    """Two lossless files of the same pixels are the same image."""
    picture = noise(5, 5)
    paths = [saved(tmp_path / name, picture) for name in ("a.png", "a.bmp")]
    assert len({pixel_hash(open_image(path)) for path in paths}) == 1


# --- padding and transform -------------------------------------------------------------------------------------------


def padded_size(width: int, height: int, ratio: float = 1.25) -> tuple[int, int]:
    """Size after padding, by the formula of the specification."""
    m = max(width, height)
    if m / min(width, height) < ratio:
        return width, height
    s = m / ratio
    return width + 2 * max(int((s - width) / 2), 0), height + 2 * max(int((s - height) / 2), 0)


def test_target_pad_of_a_tall_image() -> None:
    """100×200: s = 160, so 30 black columns left and right, and no row."""
    picture = noise(100, 200)
    found = np.asarray(target_pad(picture))
    assert found.shape == (200, 160, 3)
    assert np.array_equal(found[:, 30:130], np.asarray(picture))
    assert not found[:, :30].any() and not found[:, 130:].any()


def test_target_pad_of_a_wide_image() -> None:
    """200×100: the same, lying."""
    picture = noise(200, 100)
    found = np.asarray(target_pad(picture))
    assert found.shape == (160, 200, 3)
    assert np.array_equal(found[30:130], np.asarray(picture))
    assert not found[:30].any() and not found[130:].any()


def test_target_pad_leaves_what_is_nearly_square() -> None:
    """100×120 has a ratio of 1.2 and stays the very same object."""
    picture = noise(100, 120)
    assert target_pad(picture) is picture


@pytest.mark.parametrize(("width", "height"), [
    (100, 125), (100, 124), (125, 100), (101, 203), (203, 101), (7, 99), (1, 1), (1, 2), (3, 4), (1, 50), (640, 480),
])  # fmt: skip
def test_target_pad_sizes(width: int, height: int) -> None:
    """Sizes follow the formula at its edges (ratio just 1.25), with odd remainders and for tiny images."""
    assert target_pad(noise(width, height)).size == padded_size(width, height)


def straightforward(picture: Image.Image, size: int, pad: bool) -> np.ndarray:
    """The published pipeline in PIL and numpy: pad, shorter side to ``size``, centre crop, [0, 1], normalise."""
    if pad:
        width, height = padded_size(*picture.size)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        picture = canvas
    w, h = picture.size
    new = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    resized = np.asarray(picture.resize(new, Image.Resampling.BICUBIC))
    top, left = round((resized.shape[0] - size) / 2), round((resized.shape[1] - size) / 2)
    cropped = resized[top : top + size, left : left + size].astype(np.float32) / 255
    return ((cropped - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("width", "height"), [(40, 40), (30, 70), (70, 30), (33, 40), (9, 90), (16, 17)])
def test_transform_equals_the_straightforward_pipeline(width: int, height: int, pad: bool) -> None:
    """Shape and values are those of PIL's own resize, cropped and normalised by hand."""
    picture = noise(width, height)
    found = Transform(24, 1.25 if pad else None)(picture)
    assert found.shape == (3, 24, 24) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), straightforward(picture, 24, pad), rtol=0, atol=1e-5)


def test_transform_without_padding_differs() -> None:
    """The negative control: padding matters for an elongated image."""
    picture = noise(30, 70)
    assert not torch.equal(Transform(24)(picture), Transform(24, None)(picture))


def test_image_source_keeps_only_if_told(tmp_path: Path) -> None:
    """Kept pixels survive the file; not kept, the file is read again."""
    path = saved(tmp_path / "a.png", noise(8, 8))
    kept, fresh = ImageSource(lambda _: path, Transform(8), keep=True), ImageSource(lambda _: path, Transform(8))
    before = kept("a")
    assert torch.equal(before, fresh("a"))
    assert torch.equal(kept.stack(["a", "a"]), torch.stack([before, before]))
    path.unlink()
    assert torch.equal(kept("a"), before)
    with pytest.raises(InputError, match=r"a\.png is missing"):
        fresh("a")


# --- drawing ---------------------------------------------------------------------------------------------------------


def sampler(
    annotated: int = 50, generated: int = 23, batch: int = 12, share: float | None = None, seed: int = 0,
    process: tuple[int, int] = (0, 1),
) -> TripletSampler:  # fmt: skip
    """Items 0, 1, … are annotated, 1000, 1001, … generated."""
    return TripletSampler(range(annotated), range(1000, 1000 + generated), batch, share, seed, process)


@pytest.mark.parametrize("share", [None, 0.25, 0.5])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_batches_of_one(share: float | None, world: int) -> None:
    """The ranks' shares, joined in rank order, are the batches of a single process, and equally large."""
    alone = sampler(share=share)
    ranks = [sampler(share=share, process=(rank, world)) for rank in range(world)]
    for one in (alone, *ranks):
        one.epoch = 3
    parts = list(zip(*ranks, strict=True))
    assert [list(chain.from_iterable(part)) for part in parts] == list(alone)
    assert {len(share_of_rank) for part in parts for share_of_rank in part} == {12 // world}


def test_skip_continues_an_epoch() -> None:
    """With ``skip`` an epoch goes on where it was left, with the same batches."""
    whole, rest = sampler(share=0.5), sampler(share=0.5)
    rest.skip = 3
    assert list(rest) == list(whole)[3:]


def test_keys_name_the_epoch() -> None:
    """Each item comes with its epoch, so that the draw of a text can depend on it."""
    one = sampler()
    one.epoch = 7
    assert {epoch for batch in one for epoch, _ in batch} == {7}


@pytest.mark.parametrize(("share", "generated"), [(0.25, 3), (0.5, 6), (0.75, 9), (0.0, 0), (0.3, 4)])
def test_share_of_generated_rows(share: float, generated: int) -> None:
    """Each batch is full and holds exactly the rounded share of generated rows."""
    for batch in sampler(share=share).batches(0):
        assert len(batch) == 12
        assert sum(item >= 1000 for item in batch) == generated


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_every_annotated_row_once_an_epoch(share: float) -> None:
    """An epoch is one pass over the annotated rows, but for those that do not fill a batch."""
    one = sampler(share=share)
    seen = Counter(item for batch in one.batches(0) for item in batch if item < 1000)
    assert set(seen.values()) == {1}
    assert 50 - len(seen) == 50 % one.from_main
    assert len(one) == len(one.batches(0)) == 50 // one.from_main


def test_generated_rows_are_used_evenly() -> None:
    """Generated rows come round: none is seen a second time before all were seen."""
    seen = Counter(item for batch in sampler(share=0.5).batches(0) for item in batch if item >= 1000)
    assert len(seen) == 23
    assert max(seen.values()) - min(seen.values()) <= 1


def test_without_a_share_the_lists_are_concatenated() -> None:
    """``None`` passes once over both lists, mixed."""
    batches = sampler(share=None).batches(0)
    rows = [item for batch in batches for item in batch]
    assert len(batches) == 73 // 12 and len(rows) == len(set(rows)) == 72
    assert all(any(item < 1000 for item in batch) for batch in batches)
    assert sum(item >= 1000 for item in rows) >= 22


@pytest.mark.parametrize("share", [None, 0.5])
def test_nothing_annotated_passes_over_the_generated(share: float | None) -> None:
    """With no annotated triplet an epoch is a pass over the generated ones."""
    rows = list(chain.from_iterable(sampler(annotated=0, generated=30, share=share).batches(0)))
    assert len(rows) == len(set(rows)) == 24 and min(rows) >= 1000


def test_a_share_of_nothing_generated_is_a_plain_epoch() -> None:
    """A share without generated rows still fills each batch."""
    assert [len(batch) for batch in sampler(generated=0, share=0.5).batches(0)] == [12] * 4


def test_order_is_a_function_of_seed_and_epoch() -> None:
    """Same seed and epoch, same batches; another seed or epoch, others."""
    first = sampler(share=0.5)
    assert first.batches(1) == sampler(share=0.5).batches(1)
    assert first.batches(1) != first.batches(2)
    assert first.batches(1) != sampler(share=0.5, seed=1).batches(1)


def test_batches_that_cannot_be() -> None:
    """A batch that does not divide over processes, or that the triplets do not fill, is an InputError."""
    with pytest.raises(InputError, match="12 does not divide over 5"):
        sampler(process=(0, 5))
    with pytest.raises(InputError, match="do not fill"):
        sampler(annotated=5, generated=0)


def test_a_share_that_rounds_to_the_whole_batch_says_so() -> None:
    """0.99 of 12 leaves no room for an annotated row: the message speaks of the share, or of a larger batch."""
    with pytest.raises(InputError, match=r"generated_share|raise batch_size"):
        sampler(share=0.99)


TRIPLETS = [Triplet(f"r{n}", (f"t{n}",), tuple(f"{n}{letter}" for letter in "abcd")) for n in range(20)]


def test_text_does_not_depend_on_the_order_of_access() -> None:
    """The text of (seed, epoch, item) is the same forwards, backwards and again."""
    keys = [(epoch, item) for epoch in range(3) for item in range(20)]
    rows, again = TripletRows(TRIPLETS, 5), TripletRows(TRIPLETS, 5)
    forwards = {key: rows[key] for key in keys}
    assert {key: again[key] for key in reversed(keys)} == forwards
    assert {key: rows[key] for key in keys} == forwards
    assert all(text in TRIPLETS[item].texts for (_, item), (_, text) in forwards.items())


def test_text_depends_on_seed_epoch_and_item() -> None:
    """All phrasings come up over time, and another seed draws others."""
    rows, other = TripletRows(TRIPLETS, 5), TripletRows(TRIPLETS, 6)
    assert {rows[epoch, 0][1] for epoch in range(40)} == set(TRIPLETS[0].texts)
    assert [rows[0, n][1][-1] for n in range(20)] != [rows[1, n][1][-1] for n in range(20)]
    assert [rows[0, n][1] for n in range(20)] != [other[0, n][1] for n in range(20)]


def collate_items() -> list[tuple[Triplet, str]]:
    triplets = [Triplet("a", ("b",), ("x",)), Triplet("b", ("c",), ("y",)), Triplet("a", ("d",), ("z",))]
    return [(t, t.texts[0]) for t in triplets]


def lengths(texts: object) -> dict[str, torch.Tensor]:
    return {"text": torch.tensor([[ord(text)] for text in texts])}  # type: ignore[attr-defined]


ROWS = {"a": 2, "b": 0, "c": 1, "d": 0}


def bank_of(stored: bool) -> Bank:
    """Three images, whose reference is ten times the row."""
    reference = cast(StoredRows, torch.arange(3.0)[:, None, None] * 10)  # (3, 1, 1)
    return Bank(reference if stored else None, torch.zeros(3, 1, 1), ROWS, "x")


def test_collate_opens_each_image_of_a_batch_once() -> None:
    """Stage 1: unique images in order of appearance, rows point into them."""
    opened = []

    class Source:
        def stack(self, ids: list[str]) -> torch.Tensor:
            opened.extend(ids)
            return torch.stack([torch.full((3, 2, 2), float(ord(i))) for i in ids])

    batch = TripletCollate(lengths, ROWS, images=Source())(collate_items())  # type: ignore[arg-type]
    assert opened == ["a", "b", "c", "d"]
    assert batch.pixels is not None
    assert [chr(int(v)) for v in batch.pixels[batch.reference, 0, 0, 0]] == ["a", "b", "a"]
    assert [chr(int(v)) for v in batch.pixels[batch.target[:, 0], 0, 0, 0]] == ["b", "c", "d"]
    assert batch.identity.tolist() == [[0], [1], [0]] and batch.positives == 1
    assert batch.tokens["text"].tolist() == [[ord("x")], [ord("y")], [ord("z")]]


def test_collate_with_bank_rows_opens_nothing() -> None:
    """Stage 2 with stored references: their features, rows of the bank, no pixels."""
    collate = TripletCollate(lengths, ROWS, None, bank_of(stored=True))  # type: ignore[arg-type]
    batch = collate(collate_items())
    assert batch.pixels is None and batch.features is not None
    references = batch.features.reference[batch.reference]
    assert references.flatten().tolist() == [20, 0, 20] and batch.target.tolist() == [[0], [1], [0]]


def test_collate_without_stored_references_opens_those_alone() -> None:
    """Stage 2 that recomputes: the unique references are decoded, targets are rows of the bank."""
    opened: list[str] = []

    class Source:
        def stack(self, ids: list[str]) -> torch.Tensor:
            opened.extend(ids)
            return torch.zeros(len(ids), 3, 2, 2)

    collate = TripletCollate(lengths, ROWS, Source(), bank_of(stored=False))  # type: ignore[arg-type]
    batch = collate(collate_items())
    assert opened == ["a", "b"] and batch.features is None
    assert (batch.reference.tolist(), batch.target.tolist()) == ([0, 1, 0], [[0], [1], [0]])


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_of_a_batch_have_its_share_of_generated_triplets(processes: int) -> None:
    """All parts of all processes together are the batch; each holds annotated and generated ones alike."""
    samplers = [
        TripletSampler(range(40), range(1000, 1040), 16, 0.5, 3, (rank, processes), parts=4)
        for rank in range(processes)
    ]
    whole = TripletSampler(range(40), range(1000, 1040), 16, 0.5, 3).batches(0)
    lists = [list(sampler) for sampler in samplers]
    assert all(len(found) == 4 * len(whole) for found in lists)
    for n, batch in enumerate(whole):
        parts = [[item for found in lists for _, item in found[4 * n + part]] for part in range(4)]
        assert sorted(item for part in parts for item in part) == sorted(batch)
        assert [sum(item >= 1000 for item in part) for part in parts] == [2] * 4


def test_ahead_gives_the_same_batches_and_errors_and_ends_early() -> None:
    """One is made in advance, in order; an error comes out where it belongs; a reader may stop."""
    made: list[int] = []

    def batches() -> Iterator[int]:
        for n in range(5):
            made.append(n)
            yield n
        raise InputError("the sixth")

    read = []
    with pytest.raises(InputError, match="the sixth"):
        for batch in prefetch(batches()):  # type: ignore[arg-type]
            read.append(batch)
    assert read == made == [0, 1, 2, 3, 4]
    made.clear()
    assert next(iter(prefetch(batches()))) == 0 and len(made) <= 2  # type: ignore[arg-type]


def wrapped(content: bytes) -> bytes:
    """An IPTC record that claims to hold an 8 × 8 picture, and holds that."""

    def field(record: int, name: int, data: bytes) -> bytes:
        size = len(data).to_bytes(2, "big") if len(data) < 100 else bytes([132, 0]) + len(data).to_bytes(4, "big")
        return bytes([0x1C, record, name]) + size + data

    head = field(3, 20, b"\0\0\0\x08") + field(3, 30, b"\0\0\0\x08") + field(3, 60, b"\x01\0")
    return head + field(3, 120, b"\0\0\0\x05") + field(8, 10, content)


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "inside IPTC"])
def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """What a decoder would hand to an interpreter is refused, whatever its name says; the interpreter is not called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'called'}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "EPS")
    (tmp_path / "a.png").write_bytes(wrapped(content.getvalue()) if inside else content.getvalue())
    with pytest.raises(InputError, match=r"a\.png .*PostScript"):
        open_image(tmp_path / "a.png")
    assert not (tmp_path / "called").exists()
    with pytest.raises((OSError, subprocess.CalledProcessError)), Image.open(tmp_path / "a.png") as picture:
        picture.convert("RGB")
    assert (tmp_path / "called").exists()  # which is what would have happened
