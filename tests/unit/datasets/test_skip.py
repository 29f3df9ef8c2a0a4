"""The skip list: what it leaves out of training and of evaluations, and that it says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from spn4cir.config import TrainConfig
from spn4cir.data import hash_pixels, load_data
from spn4cir.dataset import Dataset
from spn4cir.dataset_check import examine
from spn4cir.datasets import load_dataset
from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.fashioniq import FashionIQ
from spn4cir.datasets.generated import with_images
from spn4cir.datasets.skip import NAME, read_skip_list, skip_notes, write_skip_list
from spn4cir.errors import InputError
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures


class Known(Dataset):
    """Six images, three triplets, three queries."""

    name = "known"
    protocols: ClassVar = {"val": ("known/val", "known/other")}

    def find_image(self, image_id: str) -> ImageRef:
        return ImageRef(Path(image_id))

    def list_training_images(self) -> list[str]:
        return ["a", "b", "c"]

    def read_triplets(self) -> list[Triplet]:
        return [Triplet("a", ("b",), ("x",)), Triplet("b", ("c",), ("x",)), Triplet("c", ("a",), ("x",))]

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        queries = (
            Query("d", "x", ("e", "f"), ("g",), ("d", "e", "f")),
            Query("e", "x", ("f",), ("g",), ("d", "e", "f")),
            Query("f", "x", ("d",), ("h",), ("d", "f")),
        )
        measures = recall_measures(1, over="candidates")
        return Benchmark(self.choose_protocol(split, protocol), ("d", "e", "f"), queries, True, measures, macro=("g",))


def without(*skipped: str) -> Known:
    dataset = Known()
    dataset.skip_reasons = dict.fromkeys(skipped, "missing")
    return dataset


def test_training_without_skipped_images() -> None:
    """Triplets that name one go, and the image itself."""
    dataset = without("b")
    assert dataset.triplets() == [Triplet("c", ("a",), ("x",))]
    assert dataset.training_images() == ["a", "c"]
    assert dataset.read_triplets() == Known().triplets() and dataset.list_training_images() == ["a", "b", "c"]
    assert dataset.image("b").path == Path("b")  # by which it can be looked at again
    assert Known().skip_reasons == {} == Dataset.skip_reasons  # no list of one dataset is another's


def test_a_benchmark_without_skipped_images() -> None:
    """Galleries, subsets and targets shrink; a query without reference or without any target goes; the id tells."""
    benchmark = without("f").benchmark("val")
    assert benchmark.name == "known/val+skip" and benchmark.gallery == ("d", "e")
    assert benchmark.queries == (Query("d", "x", ("e",), ("g",), ("d", "e")),)
    assert benchmark == replace(
        Known().benchmark("val"), name=benchmark.name, gallery=("d", "e"), queries=benchmark.queries, skipped=1
    )


def test_extra_images_beside_it() -> None:
    """They are for training alone, with a check of their own; skipped ones go; the dataset itself stays as it was."""
    dataset = without("b", "y")
    wider = with_images(dataset, {i: ImageRef(Path("other") / i) for i in ("x", "y")}, "look at others")
    assert wider.training_images() == ["a", "c", "x"] and dataset.training_images() == ["a", "c"]
    assert wider.triplets() == dataset.triplets() and wider.benchmark("val") == dataset.benchmark("val")
    assert wider.image("x").path == Path("other/x") and wider.image("a").path == Path("a")
    assert (wider.check_command("x"), wider.check_command("a")) == (
        "look at others", "spn4cir-data check --dataset known",
    )  # fmt: skip
    more = with_images(wider, {"z": ImageRef(Path("z"))})
    assert more.training_images() == ["a", "c", "x", "z"] and more.check_command("z") == "look at others"
    assert not dataset.extra_images and wider.extra_images.keys() == {"x", "y"}


def test_a_benchmark_that_is_not_touched_keeps_its_id() -> None:
    """Its numbers are those of everybody."""
    assert without("a").benchmark("val") == Known().benchmark("val")


@pytest.mark.parametrize("protocol", ["known/other", "known/other+skip"])
def test_a_protocol_by_either_id(protocol: str) -> None:
    """The id that a result bears can be asked for again."""
    assert without("f").benchmark("val", protocol).name == "known/other+skip"


def test_unknown_protocols_stay_unknown() -> None:
    """As of the whole dataset."""
    with pytest.raises(InputError, match="known: known/val, known/other"):
        without("f").benchmark("val", "known/nothing")


def test_hidden_targets_stay_hidden(cirr: Path) -> None:
    """A query of test1 has no target, which is no reason to drop it."""
    write_skip_list(cirr, {"test1-53-0-img1": "missing", "test1-0-0-img0": "missing"})
    benchmark, whole = load_dataset("cirr", str(cirr)).benchmark("test1"), CIRR(str(cirr)).benchmark("test1")
    assert benchmark.name == "cirr/test1+skip" and len(benchmark.gallery) == len(whole.gallery) - 2
    assert {q.name for q in whole.queries} - {q.name for q in benchmark.queries} == {
        q.name for q in whole.queries if q.reference in ("test1-53-0-img1", "test1-0-0-img0")
    }


def test_files(tmp_path: Path) -> None:
    """What is written is read, sorted; nothing there is nothing skipped."""
    assert read_skip_list(None) == read_skip_list(tmp_path) == {}
    path = write_skip_list(tmp_path, {"b": "missing", "a": "truncated"})
    assert path == tmp_path / NAME and list(json.loads(path.read_text())) == ["a", "b"]
    assert read_skip_list(tmp_path) == {"a": "truncated", "b": "missing"}
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("text", ["[]", '["a"]', '{"a": 3}', '{"a": null}', "{", "", '{"a": "x", "a": "y"}'])
def test_damaged_lists_are_named(fashioniq: Path, text: str) -> None:
    """Nothing is silently taken for an empty list."""
    (fashioniq / NAME).write_text(text)
    with pytest.raises(InputError, match=NAME) as error:
        load_dataset("fashioniq", str(fashioniq))
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """Named in one line, and nothing is left."""
    (tmp_path / NAME).mkdir()
    with pytest.raises(InputError, match=f"{NAME} cannot be written"):
        write_skip_list(tmp_path, {"a": "missing"})
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_an_empty_list_is_none(fashioniq: Path) -> None:
    """The dataset is whole, ids of protocols included, and nothing is said."""
    write_skip_list(fashioniq, {})
    dataset, whole = load_dataset("fashioniq", str(fashioniq)), FashionIQ(str(fashioniq))
    assert dataset.benchmark("val") == whole.benchmark("val") and dataset.triplets() == whole.triplets()
    assert not skip_notes(dataset)


def test_training_honours_it_and_says_so(fashioniq: Path) -> None:
    """Missing pictures of triplets, gallery and generated triplets: training reads none of them."""
    write_skip_list(fashioniq, {"BDTR00005": "missing", "BSVA00002": "truncated", "BTTR00013": "missing"})
    for image_id in "BDTR00005", "BSVA00002", "BTTR00013":
        (fashioniq / "images" / f"{image_id}.png").unlink()
    entries = [
        {"candidate": "BDTR00005", "target": "BDTR00001", "captions": ["x"]},
        {"candidate": "BDTR00002", "target": "BDTR00001", "captions": ["x"]},
    ]
    (fashioniq / "made.json").write_text(json.dumps(entries))
    config = TrainConfig(dataset="fashioniq", data_root=str(fashioniq), generated="made.json")
    said = list[str]()
    data = load_data(config, said.append)
    judge, images = data.selection, data.candidate_images(config)
    assert judge.name == "fashioniq/original+skip" and "BSVA00002" not in judge.gallery and len(judge.queries) < 24
    assert judge.skipped == 1 and not any("BSVA00002" in query.candidates for query in judge.queries)
    assert not {"BDTR00005", "BTTR00013"} & {*images, *(i for t in data.triplets for i in t.image_ids)}
    assert len([t for t in data.triplets if t.generated]) == 1
    assert hash_pixels(data.dataset, [*images, *judge.gallery], said.append, show=False)
    assert f"fashioniq: {fashioniq / NAME} leaves out 3 images (2 missing, 1 truncated)" in said
    assert any(line.endswith("made.json: 1 triplets of skipped images are left out") for line in said)


def test_without_it_training_stops_at_the_picture(fashioniq: Path) -> None:
    """Negative control: the missing picture is named."""
    (fashioniq / "images" / "BDTR00005.png").unlink()
    dataset = load_dataset("fashioniq", str(fashioniq))
    with pytest.raises(InputError, match=r"BDTR00005\.png is missing"):
        hash_pixels(dataset, dataset.training_images(), print, show=False)


def test_submissions_are_those_of_the_whole(cirr: Path) -> None:
    """The server asks for every query, skipped or not."""
    write_skip_list(cirr, {"test1-0-0-img0": "missing"})
    dataset, whole = load_dataset("cirr", str(cirr)), CIRR(str(cirr))
    benchmark = whole.benchmark("test1")
    ranked = {q.name: [i for i in benchmark.gallery if i != q.reference] for q in benchmark.queries}
    within = {q.name: [i for i in q.candidates if i != q.reference] for q in benchmark.queries}
    paths = dataset.write_submission(cirr / "out", ranked, within)
    assert [dataset.check_submission(p) for p in paths] == [whole.check_submission(p) for p in paths]


def test_what_is_listed_is_reported(fashioniq: Path) -> None:
    """The doctor's look at the annotations counts the entries, and roles stay whole."""
    write_skip_list(fashioniq, {"BDTR00005": "missing"})
    dataset = load_dataset("fashioniq", str(fashioniq))
    listed = next(c for c in examine(dataset).checks if c.what == "images on the skip list")
    assert (listed.found, listed.examples, listed.level) == (1, ("BDTR00005",), "note")
    assert "BDTR00005" in dataset.image_roles()[0].image_ids
