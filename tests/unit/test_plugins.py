"""A plug-in of each kind is one file and one dictionary line: training, evaluation and the command line know it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plugins.centres import prepare_centres
from plugins.dual import Dual
from plugins.reciprocal import RECIPROCAL
from plugins.sentences import Sentences
from plugins.shapes import NAMES, Shapes

from spn4cir.backbones import BACKBONES, build_backbone
from spn4cir.config import TrainConfig
from spn4cir.config_groups import BankConfig, NegativesConfig
from spn4cir.datasets import DATASETS, load_dataset
from spn4cir.errors import InputError
from spn4cir.evaluate import evaluate
from spn4cir.images import ImageSource
from spn4cir.measures import MEASURES
from spn4cir.results import Result
from spn4cir.stages import STAGES
from spn4cir.train import train
from spn4cir.types import Measure


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The dictionary lines."""
    monkeypatch.setitem(DATASETS, "shapes", Shapes)
    monkeypatch.setitem(DATASETS, "sentences", Sentences)
    monkeypatch.setitem(BACKBONES, "dual", Dual)
    monkeypatch.setitem(STAGES, "centres", prepare_centres)
    monkeypatch.setitem(MEASURES, "mrr", RECIPROCAL)
    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[TrainConfig]:
    yield TrainConfig(
        dataset="shapes", backbone="dual", batch_size=6, epochs=2, log_every=1, output=str(tmp_path / "run")
    )


def look(dataset: str, backbone: str = "dual", *measures: Measure) -> Result:
    found, model = load_dataset(dataset), build_backbone(backbone)
    benchmark = found.benchmark("val")
    benchmark = replace(benchmark, measures=(*benchmark.measures, *measures))
    return evaluate(model, benchmark, ImageSource(found.image, model.transform), top=2)


def by_hand(model: Dual) -> list[torch.Tensor]:
    """The queries of the toy dataset, each alone."""
    images = ImageSource(Shapes().image, model.transform)
    vectors = []
    for query in Shapes().benchmark("val").queries:
        image = torch.zeros(1, 16)
        if query.reference is not None:
            image = model.visual(images(query.reference).mean((1, 2))[None])
        text = model.words(model.tokenize([query.text or ""])["text"]) if query.text is not None else torch.zeros(1, 16)
        vectors.append(torch.nn.functional.normalize(image + text, dim=-1)[0])
    return vectors


def test_a_dataset_with_everything() -> None:
    """Outside references, own candidates, missing parts, several targets, tags: ranks as counted by hand."""
    model, result = Dual(), look("shapes", "dual", Measure("mrr", 10))
    benchmark = Shapes().benchmark("val")
    images = ImageSource(Shapes().image, model.transform)
    target = {i: model.encode_target(images(i)[None])[0, 0] for i in benchmark.gallery}
    for over in ("candidates", "gallery"):
        for n, (query, vector) in enumerate(zip(benchmark.queries, by_hand(model), strict=True)):
            ids = query.candidates if over == "candidates" else benchmark.gallery
            scores = {i: (vector @ target[i]).item() for i in ids if i != query.reference}
            ranked = sorted((i for i in scores if i not in query.targets), key=lambda i: -scores[i])
            for place, wanted in enumerate(query.targets):
                rank = 1 + sum(scores[i] > scores[wanted] for i in ranked)
                assert result.rankings[over].ranks is not None
                assert result.rankings[over].ranks[n, place].tolist() == [rank, rank]
            first = sorted(scores, key=lambda i: -scores[i])[:2]
            assert list(result.rankings[over].top[n]) == first
    assert {*result.metrics} - {"MRR@10", "macro MRR@10"} == {
        "R@1",
        "R@3",
        "mAP@5",
        "mMP@2",
        *(f"macro {n}" for n in ("R@1", "R@3", "mAP@5", "mMP@2")),
    }
    assert {tag: values["queries"] for tag, values in result.tags.items()} == {
        "both": 1,
        "colour": 2,
        "image": 1,
        "text": 1,
    }


def test_a_gallery_of_texts() -> None:
    """Sentences are ranked for a picture."""
    result = look("sentences")
    assert result.protocol == "sentences/val" and result.count == 4
    assert set(result.rankings["gallery"].top[0]) <= {"s0", "s1", "s2", "s3"}


def test_a_backbone_without_text_targets_says_so() -> None:
    """In one line, before anything is ranked."""
    with pytest.raises(InputError, match="clip4cir cannot embed texts as targets"):
        look("sentences", "clip4cir")


def test_a_measure() -> None:
    """It stands among the others, under its own label."""
    result = look("shapes", "dual", Measure("mrr", 10))
    assert 0 < result.metrics["MRR@10"] <= 100
    with pytest.raises(InputError, match="two measures are called MRR@10"):
        look("shapes", "dual", Measure("mrr", 10), Measure("mrr", 10, over="candidates"))


@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_train_on_it(stage: int, settings: TrainConfig, tmp_path: Path) -> None:
    """Triplets of two targets, of text alone, of an image alone and with hard negatives, mixed in each batch."""
    if stage == 2:
        train(replace(settings, output=str(tmp_path / "first")), 1)
        settings.init = str(tmp_path / "first")
    folder = train(settings, stage)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) and all(row["grad_norm"] > 0 for row in rows)
    assert json.loads((folder / "result.json").read_text())["protocol"] == "shapes/val"


@pytest.mark.parametrize("references", ["stored", "recompute"])
def test_stored_and_recomputed_references_agree(references: str, settings: TrainConfig, tmp_path: Path) -> None:
    """Where some queries lack a reference or a text, too."""
    train(replace(settings, output=str(tmp_path / "first"), max_steps=1), 1)
    found = []
    for kind in ("stored", references):
        config = replace(
            settings, init=str(tmp_path / "first"), output=str(tmp_path / f"{kind}{len(found)}"), max_steps=3,
            bank=BankConfig(references=kind),
        )  # fmt: skip
        lines = (train(config, 2) / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_types_that_need_whole_triplets_say_so(settings: TrainConfig) -> None:
    """Before a step is made."""
    with pytest.raises(InputError, match="needs a reference, a text and one target in each triplet"):
        train(replace(settings, negatives=NegativesConfig(["target", "query"])), 1)


def test_an_objective_with_class_centres(settings: TrainConfig) -> None:
    """Its centres train, are saved and resumed."""
    folder = train(replace(settings, batch_size=4, max_steps=3), "centres")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["loss"] < rows[0]["loss"] * 1.5
    from spn4cir.checkpoints import read_tensors

    tensors, _ = read_tensors(folder / "last.safetensors")
    assert tensors["module.candidates.centres"].shape == (2, 2, 16)
    assert any(name.startswith("optimizer.") for name in tensors)


def test_names_are_pictures() -> None:
    """The toy's own ground: bytes, cropped."""
    assert ImageSource(Shapes().image, Dual().transform)(NAMES[0]).shape == (3, 8, 8)
