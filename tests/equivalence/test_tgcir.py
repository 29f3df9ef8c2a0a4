"""TG-CIR against its formulas written out with loops: values and gradients, in one process and in two."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tgcir_script
import torch
from openai_clip import SIZE, VISION, write_config
from tgcir_script import losses_and_gradients
from tgcir_written_out import WrittenOut, in_our_names
from torch import Tensor

from spn4cir.backbones import build_backbone
from spn4cir.backbones.tgcir import TGCIR
from spn4cir.checkpoints import read_tensors
from spn4cir.in_batch import InBatch
from spn4cir.types import ImageFeatures

TEXTS = ["is red", "has longer sleeves and a flower on the left", "", "blue"]
SAME = torch.tensor([0, 1, 0, 2])  # rows 0 and 2 have the same target
TERMS = ["stu_rank", "tea_rank", "tea_mask", "ortho", "ckd", "kl"]
WEIGHTS = {"stu_rank": 1.0, "tea_rank": 1.0, "tea_mask": 1.0, "ortho": 0.7, "ckd": 3.0, "kl": 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny CLIP in open_clip's words."""
    return write_config(tmp_path_factory.mktemp("tiny") / "model", VISION)


def ours(folder: str, model: WrittenOut, twins: bool = False) -> TGCIR:
    options = {name: WEIGHTS[name] for name in ("ortho", "ckd", "kl")}
    backbone = build_backbone("tgcir", model=folder, separated=twins, kl_temperature=0.3, load_weights=False, **options)
    assert isinstance(backbone, TGCIR)
    backbone.load_state_dict(in_our_names(model.state_dict()))
    return backbone


@pytest.fixture(scope="module")
def pair(folder: str) -> tuple[TGCIR, WrittenOut]:
    """Both models with the same weights, in float64."""
    model = WrittenOut()
    return ours(folder, model).double(), model.double()


def pictures(seed: int) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, SIZE, SIZE, generator=dice, dtype=torch.float64, requires_grad=True)


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


# --- formulas, values ------------------------------------------------------------------------------------------------


def test_tokens_query_and_target(pair: tuple[TGCIR, WrittenOut]) -> None:
    """Twelve tokens of each side, the gate, the mixed query, the target."""
    backbone, model = pair
    tokens, pixels = backbone.tokenize(TEXTS), pictures(1)
    features, reference, text = backbone.encode_image(pixels), model.image(pixels), model.text(tokens["text"])
    assert features.reference.shape == (4, 12, 24) and apart(features.reference, reference) <= 1e-10
    assert features.target.shape == (4, 1, 24) and apart(features.target[:, 0], model.target(reference)) <= 1e-10
    composed, (query, gate) = backbone.compose(features.reference, tokens), model.query(reference, text)
    assert apart(composed.query, query) <= 1e-10
    assert apart(composed.states["text"], text) <= 1e-10 and apart(composed.states["gate"][..., 0], gate) <= 1e-10
    assert float(gate.detach().std()) > 0.01  # a gate that never moves would compare nothing


def test_positions_of_padding_count(pair: tuple[TGCIR, WrittenOut]) -> None:
    """Negative control: without what comes after the end, local tokens of every text differ; global ones do not."""
    backbone, model = pair
    tokens = backbone.tokenize(TEXTS)
    found, short = backbone._encode_text(tokens["text"]), model.text(tokens["text"], padding=False)
    assert apart(found[:, :4], short[:, :4]) <= 1e-10
    assert float((found - short).detach()[:, 4:].abs().amax((1, 2)).min()) > 1e-3


def test_masks_are_cut_at_zero(pair: tuple[TGCIR, WrittenOut]) -> None:
    """Some random masks are negative, and what they cover of the global tokens is zero."""
    backbone, _ = pair
    covered = backbone.masks < 0
    tokens = backbone.encode_image(pictures(1)).reference[:, :4]
    assert 0.2 < float(covered.float().mean()) < 0.8
    assert not tokens[:, covered].any() and tokens[:, ~covered].all()


# --- loss terms, values and gradients --------------------------------------------------------------------------------


def our_terms(backbone: TGCIR, leaves: list[Tensor]) -> dict[str, Tensor]:
    reference, target, temperature = leaves
    features, targets = backbone.encode_image(reference), backbone.encode_image(target)
    composed = backbone.compose(features.reference, backbone.tokenize(TEXTS))
    contrast = InBatch(SAME, temperature)
    return {
        "stu_rank": contrast(composed.query, targets.target),
        **backbone.extra_losses(composed, targets, contrast),
    }


def their_terms(model: WrittenOut, tokens: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    reference, target, temperature = leaves
    terms = model.losses(model.image(reference), model.text(tokens), model.image(target), SAME, temperature)
    return {name: WEIGHTS[name] * term for name, term in terms.items()}


@pytest.fixture(scope="module")
def both(pair: tuple[TGCIR, WrittenOut]) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each term and of the total: value and all gradients, ours and from the formulas."""
    backbone, model = pair
    leaves = [pictures(1), pictures(2), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)]
    own, other = our_terms(backbone, leaves), their_terms(model, backbone.tokenize(TEXTS)["text"], leaves)
    assert list(own) == list(other) == TERMS
    own["total"], other["total"] = sum(own.values()), sum(other.values())
    named = {n: p for n, p in model.named_parameters() if n not in ("loss_T", "backbone.clip.logit_scale")}
    mine = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    return {
        term: (gradients(own[term], mine, leaves), gradients(other[term], named, leaves, in_our_names)) for term in own
    }


def gradients(
    term: Tensor, named: dict[str, Tensor], leaves: list[Tensor], rename: Callable[..., Any] = dict
) -> dict[str, Tensor]:
    """The term itself, and its gradient by each parameter and each of the inputs."""
    found = torch.autograd.grad(term, [*named.values(), *leaves], retain_graph=True, materialize_grads=True)
    inputs = dict(zip(("input.reference", "input.target", "input.temperature"), found[len(named) :], strict=True))
    return {"value": term.detach(), **rename(dict(zip(named, found[: len(named)], strict=True))), **inputs}


@pytest.mark.parametrize("term", [*TERMS, "total"])
def test_values_and_gradients_of_each_term(both: dict[str, Any], term: str) -> None:
    """Every term, weighted, and the total: the number, and its gradient by each parameter, pixel and temperature."""
    own, other = both[term]
    assert own.keys() == other.keys() and len(own) > 60
    for name in own:
        torch.testing.assert_close(own[name], other[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert abs(float(own["value"])) > 1e-3


def test_what_is_detached(both: dict[str, Any]) -> None:
    """The teacher teaches neither reference nor text; the student teaches no teacher; the pull has both its ends."""
    moved = {term: {name for name, g in both[term][0].items() if name != "value" and g.any()} for term in both}
    for term in ("tea_rank", "tea_mask"):
        assert {"input.target", "teacher_remain.0.weight", "teacher_replace.2.bias"} <= moved[term]
        assert not moved[term] & {"input.reference", "clip.token_embedding.weight", "text_fc.weight", "gate.0.weight"}
    assert {"input.reference", "gate.0.weight", "text_fc.weight"} <= moved["ckd"]
    assert not moved["ckd"] & {"input.target", "teacher_remain.0.weight", "teacher_replace.0.weight"}
    assert {"input.reference", "input.target", "gate.0.weight"} <= moved["kl"] and "local_weight" not in moved["kl"]
    assert "local_weight" in moved["tea_rank"] and "input.temperature" in moved["tea_rank"]
    assert {"input.reference", "input.target", "text_fc.weight"} <= moved["ortho"]


def test_controls_of_the_terms(pair: tuple[TGCIR, WrittenOut]) -> None:
    """Negative controls: cosines in the teacher's scores, equal targets as negatives, or other weights differ."""
    backbone, _ = pair
    with torch.no_grad():
        features, targets = backbone.encode_image(pictures(1)), backbone.encode_image(pictures(2))
        composed = backbone.compose(features.reference, backbone.tokenize(TEXTS))
        right = backbone.extra_losses(composed, targets, InBatch(SAME, 0.4))
        loose = backbone.extra_losses(composed, targets, InBatch(torch.arange(4), 0.4))
        cosine = backbone.extra_losses(composed, targets, InBatch(SAME, 0.4 * float(backbone.local_weight.norm()) ** 2))
        swapped = backbone.extra_losses(
            composed, ImageFeatures(targets.reference.flip(0), targets.target), InBatch(SAME, 0.4)
        )
    assert apart(right["tea_rank"], loose["tea_rank"]) > 1e-3 and right["kl"] == loose["kl"]
    assert apart(right["tea_rank"], cosine["tea_rank"]) > 1e-3
    assert all(apart(right[name], swapped[name]) > 1e-6 for name in ("tea_rank", "tea_mask", "ckd", "kl"))


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes made of its half of the batch."""
    root = tmp_path_factory.mktemp("two")
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, tgcir_script.__file__, str(root), str(rank)], env=paths, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in started:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told.decode()
    return root


def test_two_processes_give_what_one_gives(two: Path) -> None:
    """Each term's mean over processes, and the mean of the total's gradients; a half alone is far off."""
    parts = [read_tensors(two / f"{rank}.safetensors")[0] for rank in range(2)]
    whole, half = losses_and_gradients(slice(0, 8)), losses_and_gradients(slice(0, 4))
    assert whole.keys() == parts[0].keys() and {"tea_rank", "kl", "gradient of gate.0.weight"} <= whole.keys()
    for name in whole:
        assert apart((parts[0][name] + parts[1][name]) / 2, whole[name]) <= 1e-10, name
    for name in ("tea_rank", "kl", "gradient of gate.0.weight", "gradient of image_fc.weight"):
        assert apart(half[name], parts[0][name]) > 1e-4, name
