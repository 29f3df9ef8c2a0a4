"""MASLN: codes of images and texts, given features, towers that stay frozen, and no label where codes are made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.backbones.masln import FEATURES, MASLN
from spn4cir.checkpoints import load_model
from spn4cir.config import TrainConfig
from spn4cir.datasets.labelled_pairs import LabelledPairs
from spn4cir.errors import InputError
from spn4cir.evaluate import encode_benchmark, evaluate
from spn4cir.images import ImageSource
from spn4cir.pair_stage import check_pairs
from spn4cir.stages import check_stage1, check_stage2
from spn4cir.train import train

GIVEN = {"image": "given:32", "text": "given:32", "width": 16, "hidden": [64]}


def build(**options: Any) -> MASLN:
    torch.manual_seed(0)
    model = build_backbone("masln", **options)
    assert isinstance(model, MASLN)
    return model


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Upper and lower halves of scikit-learn's digits: 0 to 4 train, 5 to 9 are unseen."""
    from benchmarks.pairs import make_digits

    return make_digits(tmp_path / "digits")


def digits_config(folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "dataset": "labelled_pairs", "data_root": str(folder), "backbone": "masln", "backbone_options": GIVEN,
        "terms": {"correlation": 1.0, "reconstruction": 1.0}, "batch_size": 64, "epochs": 40, "lr": 1e-3,
        "eval_every": 0, "log_every": 50, "seed": 0,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def test_embedded_towers() -> None:
    """Codes have unit norm; a pair's query is the sum of both; texts are gallery items; the towers are frozen."""
    model = build(width=8)
    pixels = torch.stack([model.transform(Image.new("RGB", (64, 64), color)) for color in ("red", "blue")])
    tokens = model.tokenize(["a red square", "a blue square"])
    features = model.encode_image(pixels)
    assert features.reference.shape == (2, 1, model.image_width) and features.target.shape == (2, 1, 8)
    image, text = model.compose_image(features), model.compose_text(tokens).query
    assert torch.equal(features.target[:, 0], image) and torch.equal(model.encode_text_target(tokens)[:, 0], text)
    both = model.compose(features.reference, tokens)
    assert torch.allclose(both.query, torch.nn.functional.normalize(image + text, dim=1))
    for codes in (image, text, both.query):
        assert torch.allclose(codes.norm(dim=1), torch.ones(2))
    trains = {name.partition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trains == {"image_encoder", "text_encoder"}
    read = {FEATURES: model.read_text(tokens)}
    assert torch.equal(model.compose_text(read).query, text)  # as training reads cached features


def test_given_features() -> None:
    """Vectors and numbers as text pass unchanged to the encoders; another number of them is refused by name."""
    model = build(image="given:4", text="given:3", width=2, hidden=[])
    vectors = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(model.encode_image(vectors).reference[:, 0], vectors)
    tokens = model.tokenize(["0.1 -2 3e2", ""])
    assert tokens["text"].tolist() == [[pytest.approx(0.1), -2, 300], [0, 0, 0]]
    for text in ("1 2", "1 2 x", "1 2 nan"):
        with pytest.raises(InputError, match="given:3"):
            model.tokenize([text])


@pytest.mark.parametrize(("options", "message"), [
    ({"image": "given:0"}, "given:4096"),
    ({"image": "nothing"}, "image tower 'nothing' is unknown; known: embedded"),
    ({"text": "timm:resnet18"}, "text tower 'timm:resnet18' is unknown"),
    ({"width": 0}, "width 0"),
    ({"hidden": [8, 0]}, "hidden"),
])  # fmt: skip
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    """One line that names the option."""
    with pytest.raises(InputError, match=message):
        build(**options)


def encode_test(model: MASLN, folder: Path) -> tuple[Tensor, Tensor]:
    """Gallery and queries of test-unseen, in the order of the pairs."""
    dataset = LabelledPairs(str(folder))
    benchmark = dataset.benchmark("test", "labelled_pairs/test-generalised")
    encoded = encode_benchmark(model, benchmark, ImageSource(dataset.image, model.transform))
    row = {item: n for n, item in enumerate(benchmark.gallery)}
    order = sorted(row, key=lambda item: (item in benchmark.texts, int(item.removeprefix("text of "))))
    references = {q.reference: n for n, q in enumerate(benchmark.queries) if q.reference is not None}
    asked = sorted(references, key=int)
    return encoded.target[[row[item] for item in order]], encoded.queries["composed"][[references[i] for i in asked]]


def test_no_label_is_read_where_codes_are_made(digits: Path) -> None:
    """With unseen classes' labels shuffled among their pairs, embeddings are the same, and mAP is not.

    Negative control: other features give other embeddings.
    """
    model = build(**GIVEN)
    dataset = LabelledPairs(str(digits))
    scores = [evaluate(model, dataset.benchmark("test"), ImageSource(dataset.image, model.transform)).metrics]
    before = encode_test(model, digits)
    labels = np.array((digits / "labels.txt").read_text().split())
    unseen = np.flatnonzero(labels > "4")
    labels[unseen] = np.random.default_rng(0).permutation(labels[unseen])
    (digits / "labels.txt").write_text("\n".join(labels))
    dataset = LabelledPairs(str(digits))
    scores.append(evaluate(model, dataset.benchmark("test"), ImageSource(dataset.image, model.transform)).metrics)
    name = next(iter(scores[0]))
    assert scores[0][name] != pytest.approx(scores[1][name], abs=0.5)
    assert all(
        torch.allclose(now, then, atol=1e-6) for now, then in zip(encode_test(model, digits), before, strict=True)
    )
    images = np.load(digits / "images.npy", allow_pickle=False)
    np.save(digits / "images.npy", images[::-1].copy(), allow_pickle=False)
    assert not torch.allclose(encode_test(model, digits)[0], before[0], atol=1e-3)


def test_training_on_halves_of_digits(digits: Path) -> None:
    """Correlation and reconstruction find more of both than untrained encoders; the log has each term's value."""
    folder = train(digits_config(digits), "crossmodal")
    model, untrained = load_model(folder), build(**GIVEN)
    dataset = LabelledPairs(str(digits))
    images = ImageSource(dataset.image, untrained.transform)
    for kind, gain in (("unseen", 2.0), ("seen", 15.0)):
        benchmark = dataset.benchmark("test", f"labelled_pairs/test-{kind}")
        before, after = (evaluate(one, benchmark, images).metrics for one in (untrained, model))
        name = next(metric for metric in before if metric.startswith("mAP"))
        assert after[name] > before[name] + gain, kind
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > 5 and all('"terms/correlation"' in line and '"terms/reconstruction"' in line for line in lines)
    assert not any('"terms/adversary"' in line for line in lines)


def test_a_resumed_run_ends_where_a_whole_one_does(digits: Path, tmp_path: Path) -> None:
    """All four terms: weights of the encoders are equal to the bit, so the ramp and the heads went on as well."""
    terms = dict.fromkeys(("correlation", "reconstruction", "adversary", "classification"), 1.0)
    config = digits_config(digits, terms=terms, epochs=4)
    whole = train(replace(config, output=str(tmp_path / "whole")), "crossmodal")
    from spn4cir import train as trainer  # a stop after two epochs

    stops = iter([False])
    save = trainer.Run.save

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.folder.name == "cut" and next(stops, True) is False:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Run, "save", stop)
        train(replace(config, output=str(tmp_path / "cut")), "crossmodal")
    resumed = train(replace(config, output=str(tmp_path / "cut"), resume=str(tmp_path / "cut")), "crossmodal")
    states = [load_model(folder).state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("stage", "changes", "message"), [
    ("crossmodal", {"terms": {}}, "needs one with a weight above 0"),
    ("crossmodal", {"terms": {"correlation": 0.0}}, "needs one with a weight above 0"),
    ("crossmodal", {"terms": {"corelation": 1.0}}, "no 'corelation'; known: correlation, reconstruction"),
    ("crossmodal", {"terms": {"correlation": -1.0}}, "0 or more"),
    ("crossmodal", {"terms": {"correlation": 1.0}, "holdout": 0.1}, "holdout is for other stages"),
    (1, {"terms": {"reconstruction": 1.0}}, "not for stage 1"),
    (1, {"terms": {"correlation": 1.0}, "bank": {"in_stage1": True}}, "in_stage1"),
    (2, {"terms": {"correlation": 1.0}}, "not for stage 2"),
])  # fmt: skip
def test_settings_that_are_refused(stage: Any, changes: dict[str, Any], message: str) -> None:
    """Before anything is read."""
    check = {"crossmodal": check_pairs, 1: check_stage1, 2: check_stage2}[stage]
    check(TrainConfig(terms={"correlation": 1.0}) if stage == "crossmodal" else TrainConfig())
    with pytest.raises(InputError, match=message):
        check(TrainConfig(**changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"backbone": "clip4cir", "backbone_options": {}}, "give --backbone masln"),
    ({"dataset": "emoji", "data_root": None}, "has no label"),
    ({"backbone_options": {**GIVEN, "image": "given:30"}}, "features of 32 numbers, and the model reads 30"),
    ({"backbone_options": {**GIVEN, "text": "embedded"}}, "vectors of 32 given features, and the model reads words"),
])  # fmt: skip
def test_what_does_not_fit_the_stage(digits: Path, changes: dict[str, Any], message: str) -> None:
    """A backbone or dataset of another stage, or another length, is named in one line."""
    with pytest.raises(InputError, match=message):
        train(digits_config(digits, **changes), "crossmodal")


def test_vectors_of_classes_that_lack_one(digits: Path) -> None:
    """Given class embeddings must have a row for each seen class; then they are used."""
    np.save(digits / "class_vectors.npy", np.eye(10)[:5], allow_pickle=False)
    (digits / "classes.txt").write_text("\n".join(map(str, range(5))))
    assert train(digits_config(digits, epochs=1), "crossmodal").is_dir()
    np.save(digits / "class_vectors.npy", np.eye(10)[:4], allow_pickle=False)
    (digits / "classes.txt").write_text("\n".join(map(str, range(4))))
    with pytest.raises(InputError, match="no row for class '4'"):
        train(digits_config(digits, epochs=1), "crossmodal")
