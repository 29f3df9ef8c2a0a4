"""Parts of the loop: which parameters learn how fast, and where dropout is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_backbones import COMPOSED, TINY, tiny_backbone

from spn4cir import bank as banks
from spn4cir.backbones import BACKBONES
from spn4cir.batches import TripletBatch
from spn4cir.checkpoints import read_tensors, save_model
from spn4cir.config import TrainConfig
from spn4cir.config_groups import AdamWConfig
from spn4cir.errors import InputError
from spn4cir.objective import BankCandidates, Objective
from spn4cir.stages import load_backbone
from spn4cir.train import parameter_groups, start, train

TEXTS = ["make it red", "a blue one instead", "in green", "less of it"]


def objective(name: str, folder: Path, stage: int = 1) -> Objective:
    """Stage 2's bank holds six random images."""
    backbone, bank = tiny_backbone(name, folder), None
    if stage == 2:
        backbone.freeze_image_side()
        with torch.no_grad():
            target = backbone.encode_image(pixels()).target
        bank = BankCandidates(banks.Bank(None, target, {str(n): n for n in range(6)}, "x"))
    return Objective(backbone, 0.1, learn_temperature=True, candidates=bank)


def pixels() -> torch.Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def batch(whole: Objective) -> TripletBatch:
    rows = torch.arange(4)
    return TripletBatch(whole.backbone.tokenize(TEXTS), rows, rows[:, None] + 2, rows[:, None], pixels=pixels())


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_each_parameter_is_in_one_group(name: str, stage: int, tmp_path: Path) -> None:
    """All that trains and nothing else, once; matrices decay; the first text that a name contains decides its rate."""
    whole = objective(name, tmp_path, stage)
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    scales = {"bias": 0.5, "weight": 0.25, "embeddings": 9.0}
    groups = parameter_groups(whole, TrainConfig(lr_scale=scales if name in ("sprc", "blip4cir") else {"bias": 0.5}))
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    for key, parameter in trained.items():
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0), key
        if name in ("sprc", "blip4cir"):
            wanted = 0.5 if "bias" in key else 0.25 if "weight" in key else 9.0 if "embeddings" in key else 1.0
        else:
            wanted = 0.5 if "bias" in key else 1.0
        assert group["scale"] == wanted, key
    assert {0.5, 1.0} <= {group["scale"] for group in groups}
    assert found[id(whole.temperature)]["weight_decay"] == 0 and found[id(whole.temperature)]["scale"] == 1


def test_without_factors_there_are_two_groups(tmp_path: Path) -> None:
    """Matrices and the rest, both at the full rate."""
    groups = parameter_groups(objective("tgcir", tmp_path), TrainConfig(weight_decay=0.3))
    assert [(group["weight_decay"], group["scale"]) for group in groups] == [(0.3, 1.0), (0.0, 1.0)]


def test_a_parameter_moves_at_its_rate(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """AdamW's first step, without decay, moves every number by the rate (where its gradient is not about nothing)."""
    save_model(tmp_path / "init", tiny_backbone("tgcir", tmp_path), {})
    start = read_tensors(tmp_path / "init" / "model.safetensors")[0]
    steps = {}
    for name, scale in {"plain": {}, "scaled": {"visual": 0.01, "clip": 0.1}}.items():
        config = configure(
            init=str(tmp_path / "init"), backbone="tgcir", output=str(tmp_path / name), max_steps=1, lr=1e-2,
            warmup_steps=0, weight_decay=0.0, adamw=AdamWConfig(eps=1e-12), lr_scale=scale,
        )  # fmt: skip
        after = read_tensors(train(config, 1) / "model.safetensors")[0]
        steps[name] = {key: float((after[key] - start[key]).abs().median()) for key in start}
    whole = {key for key, step in steps["plain"].items() if step > 0}
    assert len(whole) > 20 and {key.split(".")[0] for key in whole} >= {"clip", "image_fc", "gate", "masks"}
    for key in whole:
        factor = 0.01 if "visual" in key else 0.1 if "clip" in key else 1.0
        assert steps["plain"][key] == pytest.approx(1e-2, rel=0.05), key
        assert steps["scaled"][key] == pytest.approx(factor * 1e-2, rel=0.05), key


@pytest.mark.parametrize(("stage", "text"), [(1, "clop"), (2, "visual"), (2, "teacher")])
def test_a_text_that_is_in_no_name_is_said(stage: int, text: str, tmp_path: Path) -> None:
    """One line with the text; in stage 2 what is frozen does not count. What trains is accepted."""
    whole = objective("tgcir", tmp_path, stage)
    with pytest.raises(InputError, match=rf"lr_scale: no parameter that trains has '{text}' in its name") as raised:
        parameter_groups(whole, TrainConfig(lr_scale={"gate": 0.1, text: 0.5}))
    assert "\n" not in str(raised.value)
    assert len(parameter_groups(whole, TrainConfig(lr_scale={"gate": 0.1}))) == 4


# --- dropout ----------------------------------------------------------------------------------------------------------

HAVE_DROPOUT = {
    "clip4cir": False,
    "clip4cir combiner": True,
    "tgcir": False,
    "blip4cir": True,
    "sprc": True,
    "freestyle": False,
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_dropout_moves_the_loss_where_there_is_any(name: str, stage: int, tmp_path: Path) -> None:
    """Switched on, the loss is drawn anew each time, and by the seed; switched off, it is one number."""
    whole = objective(name, tmp_path, stage)

    @torch.no_grad()
    def loss(mode: bool, seed: int) -> float:
        whole.backbone.train(mode)
        torch.manual_seed(seed)
        return float(whole(batch(whole)))

    assert loss(False, 1) == loss(False, 2)
    assert loss(True, 1) == loss(True, 1)
    assert (loss(True, 1) != loss(True, 2)) == (loss(True, 1) != loss(False, 1)) == HAVE_DROPOUT[name]


@pytest.mark.parametrize("name", TINY)
def test_what_is_frozen_has_no_dropout(name: str, tmp_path: Path) -> None:
    """In stage 2, whatever is asked for: images are the same in both modes; queries are not, where there is dropout."""
    whole = objective(name, tmp_path, 2).backbone
    tokens, found = whole.tokenize(TEXTS), []
    with torch.no_grad():
        for mode in (False, True, True):
            whole.train(mode)
            features = whole.encode_image(pixels()[:4])
            found.append([*features, whole.compose(features.reference, tokens).query])
    for other in found[1:]:
        assert [torch.equal(a, b) for a, b in zip(other, found[0], strict=True)] == [
            True, True, not HAVE_DROPOUT[name],
        ]  # fmt: skip
    frozen = [m for m in whole.modules() if (ps := list(m.parameters())) and not any(p.requires_grad for p in ps)]
    assert frozen and not any(inner.training for module in frozen for inner in module.modules())


@pytest.mark.parametrize(
    ("name", "dropout"), [("blip4cir", True), ("blip4cir", False), ("clip4cir", True), ("clip4cir combiner", True)]
)
def test_the_loop_switches_dropout_on_where_it_is_told(  # type: ignore[no-untyped-def]
    name: str, dropout: bool, configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While steps are made, and not in evaluation, nor in the steps of a run that does not want it."""
    save_model(tmp_path / "init", tiny_backbone(name, tmp_path), {})
    modes: dict[str, set[bool]] = {"steps": set(), "evaluation": set()}
    kind = BACKBONES[name.split()[0]]
    compose = kind.compose

    def seen(self: Any, reference: torch.Tensor, tokens: Any) -> Any:
        inside = any(m.training for m in self.modules() if isinstance(m, torch.nn.Dropout))
        modes["steps" if torch.is_grad_enabled() else "evaluation"].add(inside)
        return compose(self, reference, tokens)

    monkeypatch.setattr(kind, "compose", seen)
    train(configure(init=str(tmp_path / "init"), backbone=name.split()[0], dropout=dropout, epochs=2, max_steps=6), 1)
    assert modes == {"steps": {dropout and HAVE_DROPOUT[name]}, "evaluation": {False}}


START = """
from spn4cir.config import TrainConfig
from spn4cir.config_groups import AdamWConfig
from spn4cir.train import start

accelerator = start(TrainConfig())
assert accelerator.gather(__import__("torch").tensor([accelerator.process_index])).tolist() == [0, 1]
print("together")
accelerator.end_training()  # else a process may abort when the other has gone
"""


def test_processes_find_each_other(tmp_path: Path) -> None:
    """Two processes of torchrun are two of a kind, not twice one, with nothing said about the CPU."""
    (tmp_path / "start.py").write_text(START)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {
        "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command.append(str(tmp_path / "start.py"))
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0 and told.stdout.count("together") == 2, told.stderr[-2000:]


def test_processes_that_miss_each_other_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training by themselves would look like training together."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr("spn4cir.train.Accelerator", lambda **_: alone)
    with pytest.raises(InputError, match="2 processes were started, and 1 found"):
        start(TrainConfig())


# --- the start -------------------------------------------------------------------------------------------------------


def test_a_learned_temperature_is_held_within_its_bounds(tmp_path: Path) -> None:
    """A step beyond a bound is taken back, so that it can come back; one that is fixed is left alone."""
    whole = objective("clip4cir", tmp_path)
    for value, held in ((0.001, 0.005), (0.9, 0.5), (0.07, 0.07)):
        whole.temperature.data.fill_(value)
        whole.after_step()
        assert whole.temperature.item() == pytest.approx(held)
        whole.zero_grad()
        whole(batch(whole)).backward()
        assert whole.temperature.grad is not None and whole.temperature.grad.abs() > 0
    fixed = Objective(whole.backbone, 0.9)
    fixed.after_step()
    assert fixed.temperature.item() == pytest.approx(0.9)


@pytest.mark.parametrize("name", COMPOSED)
def test_options_that_name_weights_yield_to_the_start(name: str, tmp_path: Path) -> None:
    """The saved ones hold and stay recorded, and that is said; others hold."""
    save_model(tmp_path / "start", tiny_backbone(name, tmp_path), {})
    told: list[str] = []
    config = TrainConfig(backbone=name, init=str(tmp_path / "start"), backbone_options={"model": "another"})
    found = load_backbone(config, 2, told.append)
    assert (
        found.options["model"] != "another" and len(told) == 1 and "'another' of backbone_options does not" in told[0]
    )
    with pytest.raises(InputError, match="has no option 'colour'"):
        load_backbone(TrainConfig(backbone=name, init=config.init, backbone_options={"colour": 1}), 2)


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("inside", ["load_weights", "separated"])
def test_inner_arguments_are_not_for_recipes(name: str, inside: str) -> None:
    """One line, and no such name among the known ones."""
    with pytest.raises(InputError, match=f"{inside} is not for a recipe to set"):
        load_backbone(TrainConfig(backbone=name, backbone_options={inside: True}), 1)
    with pytest.raises(InputError) as error:
        load_backbone(TrainConfig(backbone=name, backbone_options={"colour": 1}), 1)
    assert inside not in str(error.value)


@pytest.mark.parametrize(("name", "options", "told"), [
    ("sprc", {"rtc": "abc"}, "option rtc of backbone sprc cannot be 'abc'"),
    ("sprc", {"text_length": "x"}, "cannot be 'x'"),
    ("sprc", {"rtc": -1}, "weights of 0 or more"),
    ("sprc", {"model": None, "config": {"qformer": {}}}, "config of sprc lacks 'vision_config'"),
    ("tgcir", {"ckd": -2}, "0 or more"),
    ("tgcir", {"kl": True}, "cannot be True"),
    ("blip4cir", {"config": "abc"}, "cannot be 'abc'"),
    ("clip4cir", {"train_clip": "yes"}, "cannot be 'yes'"),
])  # fmt: skip
def test_an_option_of_a_wrong_kind_is_one_line(name: str, options: dict[str, Any], told: str) -> None:
    """Before anything is built."""
    with pytest.raises(InputError, match=told):
        load_backbone(TrainConfig(backbone=name, backbone_options=options), 1)
