"""Terms against loops in float64; gradient reversal; and terms in composed retrieval's stage 1."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Toy
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.terms import (
    TERMS,
    Adversary,
    Classification,
    Correlation,
    Reconstruction,
    TermInput,
    TermSizes,
    WeightedTerms,
    reversal_ramp,
    reverse_gradient,
)
from spn4cir.train import train

B, K, D_A, D_B, C, D_C = 6, 5, 7, 4, 3, 2


def sizes() -> TermSizes:
    torch.manual_seed(1)
    return TermSizes(K, (D_A, D_B), torch.randn(C, D_C, dtype=torch.float64), C)


def batch(progress: float = 1.0) -> TermInput:
    """Codes that take a gradient, in float64."""
    torch.manual_seed(0)
    codes = tuple(torch.randn(B, K, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = torch.randn(B, D_A, dtype=torch.float64), torch.randn(B, D_B, dtype=torch.float64)
    return TermInput((codes[0], codes[1]), torch.tensor([0, 1, 2, 0, 1, 2]), inputs, progress)


def affine(layer: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    weight, bias = (value.detach().numpy() for value in layer.parameters())
    return weight @ x + bias


def mlp(module: torch.nn.Sequential, x: np.ndarray) -> np.ndarray:
    return affine(module[2], np.maximum(affine(module[0], x), 0))


def test_correlation() -> None:
    """Mean over pairs of the squared distance of their codes."""
    given = batch()
    first, second = (code.detach().numpy() for code in given.codes)
    expected = sum(float(((first[i] - second[i]) ** 2).sum()) for i in range(B)) / B
    assert Correlation(sizes())(given).item() == pytest.approx(expected, rel=1e-12)


def reconstruct(term: Reconstruction, given: TermInput, skip: tuple[int, int] | None = None) -> float:
    """The four terms, example by example and one after the other; ``skip`` leaves one (code, decoder) out."""
    assert given.inputs is not None and given.label is not None
    vectors, total = term.class_vectors.numpy(), 0.0  # type: ignore[operator]
    for i in range(B):
        for side in (0, 1):  # of the code
            for kind in (0, 1):  # of what is reconstructed
                if (side, kind) == skip:
                    continue
                code = given.codes[side][i].detach().numpy()
                decoded = mlp(term.decoders[kind], np.concatenate([code, vectors[int(given.label[i])]]))  # type: ignore[arg-type]
                total += float(((given.inputs[kind][i].numpy() - decoded) ** 2).sum())
    return total / B


def test_four_reconstructions() -> None:
    """Both inputs from both codes, each given the class; leaving any one out, or another class, gives another value."""
    term, given = Reconstruction(sizes()).double(), batch()
    value = term(given).item()
    assert value == pytest.approx(reconstruct(term, given), rel=1e-12)
    for side in (0, 1):
        for kind in (0, 1):
            assert value != pytest.approx(reconstruct(term, given, (side, kind)), rel=1e-3)
    assert given.label is not None
    given.label = (given.label + 1) % C
    assert term(given).item() != pytest.approx(value, rel=1e-6)


def test_reconstruction_reaches_both_encoders_and_decoders() -> None:
    """All parameters, and the codes of both sides, have a gradient; embeddings of classes are no parameters."""
    term, given = Reconstruction(sizes()).double(), batch()
    term(given).backward()
    assert all(code.grad is not None and bool(code.grad.abs().sum() > 0) for code in given.codes)
    parameters = dict(term.named_parameters())
    assert len(parameters) == 8 and all(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters.values()
    )


def test_classification() -> None:
    """Cross-entropy of one layer over both codes; rows without a class do not count."""
    term, given = Classification(sizes()).double(), batch()
    assert given.label is not None
    given.label[2] = -1
    losses = []
    for code in given.codes:
        for i in (0, 1, 3, 4, 5):
            logits = affine(term.head, code[i].detach().numpy())
            losses.append(math.log(np.exp(logits).sum()) - logits[int(given.label[i])])
    assert term(given).item() == pytest.approx(float(np.mean(losses)), rel=1e-12)
    given.label[:] = -1
    assert term(given).item() == 0.0


def test_adversary() -> None:
    """Binary cross-entropy of the side over all codes, whatever the progress."""
    term = Adversary(sizes()).double()
    losses = []
    for side, code in enumerate(batch().codes):
        for i in range(B):
            logit = float(mlp(term.discriminator, code[i].detach().numpy())[0])
            losses.append(math.log1p(math.exp(-logit if side else logit)))
    for progress in (0.0, 0.3, 1.0):
        assert term(batch(progress)).item() == pytest.approx(float(np.mean(losses)), rel=1e-12)


def gradients(progress: float | None) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the codes and of the discriminator; None: without any reversal."""
    term, given = Adversary(sizes()).double(), batch(1.0 if progress is None else progress)
    torch.manual_seed(3)
    for parameter in term.parameters():
        torch.nn.init.normal_(parameter)
    if progress is None:
        logits = term.discriminator(torch.cat(given.codes))[:, 0]
        side = torch.arange(2, dtype=torch.float64).repeat_interleave(B)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, side).backward()
    else:
        term(given).backward()
    found = [[p.grad for p in part] for part in (given.codes, term.parameters())]
    assert all(gradient is not None for part in found for gradient in part)
    return found[0], found[1]  # type: ignore[return-value]


@pytest.mark.parametrize("progress", [0.02, 0.3, 1.0])
def test_reversal(progress: float) -> None:
    """Codes get the plain gradient times minus the ramp; the discriminator's own is the plain one, not turned over."""
    plain, own = gradients(None)
    turned, learned = gradients(progress)
    factor = 2 / (1 + math.exp(-10 * progress)) - 1
    assert 0 < factor <= 1 and all(bool(gradient.abs().sum() > 0) for gradient in (*plain, *own))
    assert all(torch.allclose(now, -factor * then, rtol=1e-10) for now, then in zip(turned, plain, strict=True))
    assert all(torch.allclose(now, then, rtol=1e-10) for now, then in zip(learned, own, strict=True))


def test_ramp() -> None:
    """From 0 at the start, through tanh(5 p), to almost 1."""
    assert reversal_ramp(0) == 0 and reversal_ramp(0.1) == pytest.approx(math.tanh(0.5)) and reversal_ramp(1) > 0.999
    x = torch.randn(3, requires_grad=True)
    (2 * reverse_gradient(x, 0.5)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -1.0)) and torch.equal(reverse_gradient(x, 0.5), x)


def test_weights() -> None:
    """The sum of all four by weight; a weight of 0 builds nothing; the log has plain values."""
    weights = {"correlation": 0.5, "reconstruction": 2.0, "adversary": 0.25, "classification": 0.0}
    torch.manual_seed(0)
    whole = WeightedTerms(weights, sizes()).double()
    value = whole(batch())
    parts = {name: whole.terms[name](batch()).item() for name in whole.terms}
    assert parts.keys() == weights.keys() - {"classification"}
    assert value.item() == pytest.approx(sum(weights[name] * part for name, part in parts.items()), rel=1e-12)
    assert whole.statistics() == {f"terms/{name}": pytest.approx(part) for name, part in parts.items()}
    assert set(TERMS) == set(weights)


@pytest.mark.parametrize(("name", "given"), [
    ("reconstruction", TermSizes(K, classes=C)), ("classification", TermSizes(K)), ("nothing", TermSizes(K)),
])  # fmt: skip
def test_what_is_missing_is_named(name: str, given: TermSizes) -> None:
    """A term says which part of the data it lacks; an unknown one, which there are."""
    with pytest.raises(InputError, match=name):
        WeightedTerms({name: 1.0}, given)


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Sorted(Toy):
    """The toy dataset with two categories, and some images without."""

    def category(self, image_id: str) -> str:
        return {"0": "", "1": "odd"}.get(image_id[-1], "even")


def test_terms_in_stage_1(configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's loss is the plain one plus the weighted terms; weights of 0 change no digit of any step."""
    from spn4cir.datasets import DATASETS

    monkeypatch.setitem(DATASETS, Toy.name, Sorted)
    settings = {"log_every": 1, "eval_every": 0, "epochs": 1}
    terms = {"correlation": 0.1, "adversary": 0.2, "classification": 0.3}
    plain = losses(train(configure(**settings), 1))
    silent = losses(train(configure(**settings, terms=dict.fromkeys(terms, 0.0)), 1))
    added = losses(train(configure(**settings, terms=terms), 1))
    assert [row["loss"] for row in plain] == [row["loss"] for row in silent]
    assert [row["grad_norm"] for row in plain] == [row["grad_norm"] for row in silent]
    extra = sum(weight * added[0][f"terms/{name}"] for name, weight in terms.items())
    assert extra > 0.1 and added[0]["loss"] == pytest.approx(plain[0]["loss"] + extra, rel=1e-4)
    assert added[-1]["loss"] != plain[-1]["loss"] and not any("terms" in name for name in plain[0])


def test_correlation_in_stage_1_is_of_query_and_target(
    configure: Callable[..., TrainConfig], backbone: Backbone
) -> None:
    """Its logged value in the first step is the mean squared distance of query and target, 2 − 2 cos."""
    from spn4cir.batches import TripletCollate
    from spn4cir.images import ImageSource

    seen: list[tuple[str, ...]] = []
    whole = TripletCollate.__call__

    def watch(self: TripletCollate, items: list) -> object:  # type: ignore[type-arg]
        seen.append(tuple((t.reference, text, t.targets[0]) for t, text in items))  # type: ignore[arg-type]
        return whole(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TripletCollate, "__call__", watch)
        rows = losses(train(configure(log_every=1, eval_every=0, epochs=1, terms={"correlation": 0.1}), 1))
    dataset = Toy(str(configure().data_root))
    images = ImageSource(dataset.image, backbone.transform)
    references, texts, targets = zip(*seen[0], strict=True)
    with torch.no_grad():
        query = backbone.encode_query(images.stack(references), backbone.tokenize(texts))
        target = backbone.encode_target(images.stack(targets))[:, 0]
    expected = (2 - 2 * (query * target).sum(1)).mean().item()
    assert rows[0]["terms/correlation"] == pytest.approx(expected, rel=1e-3)
    shifted = (2 - 2 * (query * target.roll(1, 0)).sum(1)).mean().item()
    assert rows[0]["terms/correlation"] != pytest.approx(shifted, rel=1e-3)


def test_classification_needs_categories(configure: Callable[..., TrainConfig]) -> None:
    """A dataset without any is named."""
    with pytest.raises(InputError, match="classification needs a category of each image, and toy has none"):
        train(configure(terms={"classification": 0.1}), 1)
