"""Small inputs that people reported, as they lie beside a checkout; elsewhere there are none, and the tests skip."""

import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import pytest

from spn4cir.data_gen.caption import caption_images, check_captioner
from spn4cir.data_gen.deduplicate import deduplicate
from spn4cir.data_gen.given import known_captions
from spn4cir.data_gen.match_pairs import match_pairs
from spn4cir.data_gen.sample_images import SampleConfig, sample_images
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset
from spn4cir.eval_cli import evaluate_command
from spn4cir.files import read_jsonl

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the reported inputs lie beside the checkout")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and no cache of others."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(root: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate the embedded model on own queries."""
    line = ["spn4cir-eval", "--dataset", "catalogue", "--data-root", str(root), "--json", str(kept)]
    monkeypatch.setattr(sys, "argv", line)
    evaluate_command()


def copied(name: str, work: Path) -> Path:
    return Path(shutil.copytree(CASES / name, work / Path(name).name))


def values(root: Path | str) -> dict[str, int]:
    """What the doctor counts, by name."""
    return {check.what: check.count for check in examine(load_dataset("catalogue", str(root))).checks}


def equal(root: Path) -> list[set[str]]:
    """Sets of files whose pictures are the same."""
    found = examine(load_dataset("catalogue", str(root)))
    return [set(group) for group in found.duplicates]


def test_02_pictures_that_cameras_turn(work: Path) -> None:
    root = copied("02_exif", work)
    assert {"stored_sideways.png", "upright.png"} in equal(root)


@pytest.mark.parametrize("case", ["03_grey16", "12_white_on_transparent"])
def test_pictures_that_were_all_of_one_colour(case: str, work: Path) -> None:
    root = copied(case, work)
    shapes = {path.name for path in root.iterdir() if path.stem in ("checker", "gradient", "rings", "stripes", "dots")}
    assert len(shapes) >= 3 and all(len(group & shapes) < 2 for group in equal(root))


def test_06_rows_that_share_a_picture(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same queries find the same, with and without variants."""
    found = []
    for name in ("with_variants", "without"):
        root = copied(f"06_shared_pictures/{name}", work)
        kept = work / f"{name}.json"
        evaluated(root / "products.csv", kept, monkeypatch)
        found.append(json.loads(kept.read_text())["metrics"])
    assert found[0] == found[1]


def test_09_a_quote_in_a_cell(work: Path) -> None:
    root = copied("09_tsv_quotes", work)
    dataset = load_dataset("catalogue", str(root / "products.tsv"))
    assert len(dataset.training_images()) == 24 and any("quote" in note for note in dataset.notes())
    assert all("\n" not in dataset.caption(i) and "5.png" not in dataset.caption(i) for i in dataset.training_images())


@pytest.mark.parametrize(("place", "further"), [
    ("captions5", 96), ("imagefolder_csv", 0), ("imagefolder_jsonl", 0), ("shopify_renamed/products.csv", 0),
    ("title_only", 0),
])  # fmt: skip
def test_10_captions(place: str, further: int, work: Path) -> None:
    root = copied(f"10_lost_captions/{place.partition('/')[0]}", work)
    if place == "title_only":
        place = f"title_only/{next(path.name for path in root.glob('*.csv'))}"
    dataset = load_dataset("catalogue", str(work / place))
    ids = dataset.training_images()
    captions = [text for i in ids for text in dataset.captions(i)]
    assert len(ids) == 24 and all(dataset.captions(i) for i in ids) and len(captions) == 24 + further
    assert not any("<" in text for text in captions)


def test_10_captions_of_shards(work: Path) -> None:
    root = copied("10_lost_captions/wds", work)
    [shard] = root.rglob("*.tar")
    sample_images(SampleConfig(shards=str(shard), output=str(work / "sample")))
    dataset = load_dataset("catalogue", str(work / "sample"))
    assert len(dataset.training_images()) == 24 and all(dataset.captions(i) for i in dataset.training_images())


def test_11_suffixes(work: Path) -> None:
    root = copied("11_suffixes", work)
    dataset = load_dataset("catalogue", str(root))
    files = [path for path in root.rglob("*") if path.is_file()]
    left = len(files) - len(dataset.training_images())
    assert len(dataset.training_images()) > 4
    assert not left or any(f"{left} files are passed over" in note for note in dataset.notes())


def test_13_captions_in_lists(work: Path) -> None:
    root = copied("13_parquet_list", work)
    dataset = load_dataset("catalogue", str(next(root.glob("*.parquet"))))
    assert all(len(dataset.captions(i)) > 1 for i in dataset.training_images())


def test_14_a_pipe(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is never opened: the run ends at once and names it."""
    root = copied("14_pipe", work)
    if not (root / "pipe.png").exists():
        os.mkfifo(root / "pipe.png")
    with pytest.raises(SystemExit):
        evaluated(root / "items.csv", work / "result.json", monkeypatch)
    assert "pipe.png" in capsys.readouterr().err


def test_15_a_broken_picture_without_a_caption(work: Path) -> None:
    """No captioner is wanted, and none is asked."""
    root = copied("15_broken_without_caption", work)
    dataset = load_dataset("catalogue", str(root))
    config = GenerateConfig(output=str(work / "out"), matcher="embedded", window=[1, 5], captioner="nobody/there")
    check_captioner(config, dataset)
    for step in (deduplicate, match_pairs, caption_images):
        step(config, dataset)
    assert {row["model"] for row in read_jsonl(config.file("captions.jsonl"))} == {"given"}


@pytest.mark.parametrize("name", [
    "captions.csv", "coco.json", "dict.json", "file_caption.jsonl", "lavis_int.json", "stem.json",
])  # fmt: skip
def test_16_names_of_captions(name: str, work: Path) -> None:
    root = copied("16_caption_ids", work)
    dataset = load_dataset("catalogue", str(root / "pics"))
    config = GenerateConfig(output=str(work / "out"), captions=str(root / name))
    ids = dataset.training_images()
    check_captioner(config, dataset)
    assert len(ids) == 24 and set(known_captions(config, dataset, ids)) == set(ids)
