"""Shared by all tests: a toy dataset that registers itself, a place for runs, and the small embedded backbone."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from PIL import Image

from spn4cir.config import TrainConfig
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

IDS = [f"i{n:02d}" for n in range(47)]
TWIN = "twin"  # the same pixels as i00, under another id
TRAIN = [TWIN, *IDS[:40]]
COLOURS = ("red", "green", "blue", "yellow", "white")


class Toy(Dataset):
    """48 pictures of coloured blocks, 40 triplets whose 20 targets all occur twice, 20 queries.

    Args:
        root: folder that ``draw`` filled.
    """

    name = "toy"
    protocols: ClassVar = {"val": ("toy/val",), "test": ("toy/test",)}

    def __init__(self, root: str | None = None):
        if root is None:
            raise InputError("toy needs --data-root")
        self.folder = self.root = Path(root)

    @classmethod
    def draw(cls, folder: Path) -> "Toy":
        """Make the pictures, the same ones each time."""
        folder.mkdir(parents=True, exist_ok=True)
        for image_id in (*IDS, TWIN):
            pixels = random.Random("i00" if image_id == TWIN else image_id).randbytes(6 * 6 * 3)
            blocks = Image.frombytes("RGB", (6, 6), pixels).resize((72, 72), Image.Resampling.NEAREST)
            blocks.save(folder / f"{image_id}.png")
        return cls(str(folder))

    def find_image(self, image_id: str) -> ImageRef:
        if image_id not in (*IDS, TWIN):
            raise InputError(f"toy: unknown image id {image_id!r}")
        return ImageRef(self.folder / f"{image_id}.png")

    def list_training_images(self) -> list[str]:
        return list(TRAIN)

    def read_triplets(self) -> list[Triplet]:
        return [
            Triplet(
                TRAIN[n], (TRAIN[(7 * n + 1) % 20],), (f"make it {COLOURS[n % 5]}", f"a {COLOURS[n // 8]} one instead")
            )
            for n in range(40)
        ]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        chosen = self.choose_protocol(split, protocol)
        ids = (*IDS, TWIN)
        queries = tuple(
            Query(ids[n], f"in {COLOURS[n % 5]}", (ids[(5 * n + 3) % 48],), (f"group {n % 2}",), self._subset(ids, n))
            for n in range(20)
        )
        measures = recall_measures(1, 5, 10, primary=(1,)) + recall_measures(1, 2, over="subset")
        return Benchmark(chosen, ids, queries, exclude_reference=True, measures=measures)

    @staticmethod
    def _subset(ids: tuple[str, ...], n: int) -> tuple[str, ...]:
        others = [i for i in ids if i not in (ids[n], ids[(5 * n + 3) % 48])]
        return (ids[n], ids[(5 * n + 3) % 48], *others[n : n + 4])


MIXED = [
    Triplet("i01", ("i02", "i03", "i04"), ("make it red",), negatives=("i10", "i11")),
    Triplet("i05", ("i00",), ("make it blue",)),
    Triplet(None, ("i06", TWIN), ("a green one",)),  # the twin is also the target of the one before
    Triplet("i07", ("i08",), (), negatives=("i02",)),  # its hard negative is a target of the first
    Triplet("i01", ("i09",), ("make it red",)),  # the same query as the first
    Triplet(None, ("i12",), ("a green one",), negatives=("i13", "i06")),  # its negative i06 is a target of the query
    Triplet("i14", ("i15", "i16"), ()),
    Triplet("i17", ("i02",), ("in white",), negatives=("i10", "i18")),
]
"""Several targets, hard negatives, and queries without a reference or a text, on images of the toy dataset."""


def stand_in(image: Callable[[str], ImageRef], kind: type[Dataset] = Dataset) -> Dataset:
    """As much of a dataset as the writing of triplets asks for; entries in the shape of a kind of dataset."""
    entry = kind.triplet_entry
    own = SimpleNamespace(name="x", root=None, image=image, triplet_entry=lambda *given: entry(cast(Any, None), *given))
    return cast(Dataset, own)


def draw_picture(path: Path, seed: object, size: tuple[int, int] = (48, 40)) -> None:
    """A picture of coloured blocks, the same one each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = Image.frombytes("RGB", (6, 6), random.Random(str(seed)).randbytes(6 * 6 * 3))
    blocks.resize(size, Image.Resampling.NEAREST).save(path)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def draw_fashioniq(root: Path) -> Path:
    """A small FashionIQ in its own layout: per category 12 training triplets, 8 val queries, 4 test queries.

    Each split lists 14 images of a category, of which its captions name 13; the first of val is also one of train.
    """
    for category in ("dress", "shirt", "toptee"):
        for split, count in (("train", 12), ("val", 8), ("test", 4)):
            ids = [f"B{category[0].upper()}{split[:2].upper()}{n:05d}" for n in range(14)]
            if split == "val":
                ids[0] = f"B{category[0].upper()}TR00000"
            for image_id in ids:
                draw_picture(root / "images" / f"{image_id}.png", image_id)
            rows = [
                {
                    "candidate": ids[n % 5],
                    "target": ids[n % 8 + 5],
                    "captions": [f"is {COLOURS[n % 5]}.", f"has {n} dots"],
                }
                for n in range(count)
            ]
            if split == "test":
                rows = [{key: row[key] for key in ("candidate", "captions")} for row in rows]
            write_json(root / "captions" / f"cap.{category}.{split}.json", rows)
            write_json(root / "image_splits" / f"split.{category}.{split}.json", ids)
    return root


def draw_cirr(root: Path) -> Path:
    """A small CIRR in its own layout: 18 training and 12 val triplets, 18 test1 queries over 54 images, groups of 6."""
    for split, folder, groups in (("train", "train/7", 3), ("val", "dev", 2), ("test1", "test1", 9)):
        stem = folder.split("/")[0]
        ids = [f"{stem}-{n}-0-img{n % 2}" for n in range(6 * groups + (3 if split == "val" else 0))]
        for image_id in ids:
            draw_picture(root / folder / f"{image_id}.png", image_id)
        rows = []
        for n in range(18 if split != "val" else 12):
            group = n % groups
            members = ids[6 * group : 6 * group + 6]
            row = {
                "pairid": 12000 + n,
                "reference": members[n // groups % 6],
                "target_hard": members[(n // groups + 1) % 6],
                "target_soft": {},
                "caption": f"make it {COLOURS[n % 5]} with {n} dots",
                "img_set": {"id": group, "members": members, "reference_rank": 1, "target_rank": 2},
            }
            if split == "test1":
                del row["target_hard"], row["target_soft"], row["img_set"]["target_rank"]
            rows.append(row)
        write_json(root / "cirr" / "captions" / f"cap.rc2.{split}.json", rows)
        write_json(root / "cirr" / "image_splits" / f"split.rc2.{split}.json", {i: f"./{folder}/{i}.png" for i in ids})
    return root


def toy_config(folder: Path, **changes: object) -> TrainConfig:
    """A run of ten steps, five an epoch, that uses everything whose state a resume must put back."""
    settings: dict[str, object] = {
        "dataset": "toy", "data_root": str(folder), "batch_size": 8, "epochs": 2, "lr": 1e-3, "warmup_steps": 2,
        "schedule": "cosine", "temperature": 0.1, "learn_temperature": True, "keep_pixels": True,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def stated(whole: object, part: object) -> object:
    """Of settings, those that a file states, also inside groups."""
    if isinstance(whole, dict) and isinstance(part, dict) and part.keys() <= whole.keys():
        return {key: stated(whole[key], value) for key, value in part.items()}
    return whole


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs go in tests: never into the checkout."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("SPN4CIR_RUNS", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy dataset, known to the library as ``toy``."""
    from spn4cir.datasets import DATASETS

    monkeypatch.setitem(DATASETS, Toy.name, Toy)
    return Toy.draw(tmp_path / "toy")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both small datasets, drawn once; each test gets a copy."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_fashioniq(folder / "fashioniq")
    draw_cirr(folder / "cirr")
    return folder


@pytest.fixture
def fashioniq(tmp_path: Path, drawn: Path) -> Path:
    """Root of a small FashionIQ on disk."""
    return Path(shutil.copytree(drawn / "fashioniq", tmp_path / "fashioniq"))


@pytest.fixture
def cirr(tmp_path: Path, drawn: Path) -> Path:
    """Root of a small CIRR on disk."""
    return Path(shutil.copytree(drawn / "cirr", tmp_path / "cirr"))


@pytest.fixture
def configure(toy: Toy) -> Callable[..., TrainConfig]:
    """``configure(seed=1, …)``: settings of a small run on the toy dataset."""
    return lambda **changes: toy_config(toy.folder, **changes)


@pytest.fixture
def backbone():  # type: ignore[no-untyped-def]
    """The embedded CLIP, fresh for each test."""
    from spn4cir.backbones import build_backbone

    return build_backbone("clip4cir")
