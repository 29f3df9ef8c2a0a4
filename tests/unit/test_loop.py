"""The loop: what it logs, how it limits a gradient, where it stops, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_pre_hook

from spn4cir import bank as banks
from spn4cir.backbone import Backbone
from spn4cir.batches import TripletBatch
from spn4cir.checkpoints import save_model
from spn4cir.config import TrainConfig
from spn4cir.config_groups import AdamWConfig, ComputeConfig
from spn4cir.errors import InputError
from spn4cir.objective import BankCandidates, Objective
from spn4cir.train import schedule, train

Configure = Callable[..., TrainConfig]
KEYS = {"step", "epoch", "loss", "lr", "grad_norm", "temperature", "masked", "items_per_second", "peak_memory_mb"}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def start(tmp_path: Path, backbone: Backbone) -> str:
    """A checkpoint to start from."""
    save_model(tmp_path / "start", backbone, {})
    return str(tmp_path / "start")


# --- the log


@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (1, 2), (2, 1)])
def test_lines_of_the_log(
    stage: int, accumulate: int, configure: Configure, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step, and where a state is saved: means and last values of what a line for each step says."""
    sent: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: sent.append((step, values)))
    compute = ComputeConfig(accumulate=accumulate)
    each, found = (
        rows(train(configure(init=start, log_every=every, eval_every=0, compute=compute), stage)) for every in (1, 2)
    )
    assert [row["step"] for row in each] == list(range(1, 11)) and [row["step"] for row in found] == [2, 4, 5, 6, 8, 10]
    assert all(row.keys() == KEYS for row in found[:-1]) and found[-1].keys() > KEYS | {"R@1"}
    assert sent == [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in [*each, *found]]
    config, before = configure(), 0
    for row in found:
        part, last = each[before : row["step"]], each[row["step"] - 1]
        assert row["loss"] == pytest.approx(sum(one["loss"] for one in part) / len(part), rel=1e-6)
        assert [row[name] for name in ("grad_norm", "temperature", "masked", "epoch")] == [
            last[name] for name in ("grad_norm", "temperature", "masked", "epoch")
        ]
        assert row["lr"] == config.lr * schedule(config, row["step"] - 1, 10, 5)
        assert row["items_per_second"] > 0 and row["peak_memory_mb"] > 10
        before = row["step"]
    assert len({row["temperature"] for row in each}) > 1 and len({row["grad_norm"] for row in each}) == 10


def test_the_share_of_masked_candidates(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stage 1: pairs of triplets that share a target, of all pairs of two; counted one by one."""
    batches: list[TripletBatch] = []
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: (batches.append(batch), forward(self, batch))[1])
    shares = [row["masked"] for row in rows(train(configure(log_every=1, eval_every=0), 1))]
    expected = []
    for batch in batches:
        numbers = batch.identity[:, 0].tolist()
        pairs = [a == b for n, a in enumerate(numbers) for m, b in enumerate(numbers) if n != m]
        expected.append(sum(pairs) / len(pairs))
    assert shares == pytest.approx(expected) and max(shares) > 0


# --- the limit


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_is_scaled_down_to_the_limit(accumulate: int, configure: Configure) -> None:
    """What the optimiser gets has at most this norm; the log says the norm before; without a limit both are one."""
    applied: list[float] = []

    def seen(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        applied.append(float(torch.cat([grad.flatten().double() for grad in grads]).norm()))

    def norms(limit: float | None) -> list[float]:
        applied.clear()
        config = configure(
            log_every=1,
            eval_every=0,
            adamw=AdamWConfig(max_grad_norm=limit),
            compute=ComputeConfig(accumulate=accumulate),
        )
        return [row["grad_norm"] for row in rows(train(config, 1))]

    hook = register_optimizer_step_pre_hook(seen)
    try:
        free = norms(None)
        assert applied == pytest.approx(free, rel=1e-4)
        limit = sorted(free)[5]
        found = norms(limit)
        assert applied == pytest.approx([min(norm, limit) for norm in found], rel=1e-4)
        assert min(found) < limit < max(found)
    finally:
        hook.remove()


# --- a step that is not finite


@pytest.mark.parametrize(("stage", "kind", "accumulate"), [
    (1, "loss", 1), (2, "gradient", 1), (1, "gradient", 2), (2, "loss", 2),
])  # fmt: skip
def test_a_step_that_is_not_finite(
    stage: int, kind: str, accumulate: int, configure: Configure, start: str, tmp_path: Path
) -> None:
    """Right before a save: it stops there and names the triplets; the run can be resumed from the state before."""
    folder, seen = tmp_path / "run", list[TripletBatch]()
    settings = {"init": start, "log_every": 1, "save_every": 3, "compute": ComputeConfig(accumulate=accumulate)}
    before: dict[str, bytes] = {}
    forward = Objective.forward

    def broken(self: Objective, batch: TripletBatch) -> torch.Tensor:
        loss = forward(self, batch)
        if batch.step != 8:
            return loss
        seen.append(batch)
        before.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return loss * math.nan if kind == "loss" else loss + (self.temperature * 0).sqrt()  # of an endless slope

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(Objective, "forward", broken)
        train(configure(output=str(folder), **settings), stage)
    said = str(error.value)
    assert said.startswith("step 9: loss") and "not finite" in said and "\n" not in said
    assert all(name in said for name in seen[-1].triplets[:3]) and seen[-1].triplets[0].startswith(("i", "twin"))
    assert len(seen[-1]) == 8 // accumulate and f"and {len(seen[-1]) - 3} more" in said
    assert len(seen) == (1 if kind == "loss" else accumulate)  # a loss is seen at once, a gradient once it is whole
    assert f"{folder / 'last.safetensors'} keeps the last saved state" in said
    assert before.pop("run.lock") == b"" and before.keys() > {"last.safetensors", "model.safetensors", "metrics.jsonl"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = configure(resume=str(folder), **settings)
    again.output = str(folder)
    train(again, stage)
    whole = train(configure(output=str(tmp_path / "whole"), **settings), stage)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole)]
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_first_step_that_is_not_finite(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing was saved before it, and nothing is by it."""
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: forward(self, batch) / 0)
    with pytest.raises(
        InputError, match=r"step 1: loss and gradient norm inf, nan: not finite.*no state was saved yet"
    ):
        train(configure(output=str(tmp_path / "run")), 1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "metrics.jsonl"]


# --- a bank and an image side that moves


def test_weights_that_are_not_finite_are_not_saved(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was finite may still leave such weights: the state before it stays."""
    config = configure(save_every=2, eval_every=0, max_steps=4)
    after_step, steps = Objective.after_step, [0]

    def broken(objective: Objective) -> None:
        after_step(objective)
        steps[0] += 1
        if steps[0] == 4:
            next(p for p in objective.parameters() if p.requires_grad).data.view(-1)[0] = math.inf

    monkeypatch.setattr(Objective, "after_step", broken)
    with pytest.raises(
        InputError, match=r"step 4: weights are not finite: lower lr, .*last\.safetensors keeps the last"
    ):
        train(config, 1)


def test_embeddings_that_are_not_finite_are_said_in_a_line(configure: Configure, tmp_path: Path) -> None:
    """Weights so large that their products are not: nothing is saved."""
    with pytest.raises(InputError, match=r"clip4cir: embeddings of toy/val are not finite: lower lr"):
        train(configure(lr=1e38, max_steps=1), 1)
    assert not list(tmp_path.rglob("last.safetensors")) and not list(tmp_path.rglob("model.safetensors"))


def test_a_bank_needs_a_frozen_image_side(backbone: Backbone) -> None:
    """Else it would be stale after one step."""
    bank = BankCandidates(banks.Bank(None, torch.zeros(3, 1, 128), {}, "x"))
    with pytest.raises(ValueError, match="a bank needs a frozen image side"):
        Objective(backbone, 0.1, candidates=bank)
    backbone.freeze_image_side()
    assert Objective(backbone, 0.1, candidates=bank).candidates is bank


def test_training_stops_where_nothing_is_frozen(
    configure: Configure, start: str, monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    """Before a step is made, whether the bank is refused or the objective that is to use it."""
    freeze, load = Backbone.freeze_image_side, banks.load_or_build
    monkeypatch.setattr(Backbone, "freeze_image_side", lambda self: None)
    with pytest.raises(ValueError, match="would be stale"):
        train(configure(init=start), 2)

    def build(backbone: Backbone, *rest: Any) -> banks.Bank:
        freeze(backbone)
        bank = load(backbone, *rest)
        backbone._frozen = False
        return bank

    monkeypatch.setattr(banks, "load_or_build", build)
    with pytest.raises(ValueError, match="a bank needs a frozen image side"):
        train(configure(init=start), 2)
    assert not list(runs.rglob("metrics.jsonl"))


# --- patience


@pytest.mark.parametrize(("scores", "patience", "evaluated", "best"), [
    ([1, 3, 2, 2, 9], 2, 4, 2),  # two in a row without a better one
    ([1, 3, 3, 4, 1, 9], 2, 6, 6),  # an equal score is no better one; the count begins anew with each better one
    ([1, 0, 0, 0, 2, 0], None, 6, 5),
])  # fmt: skip
def test_patience(
    scores: list[float], patience: int | None, evaluated: int, best: int, configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The run ends after that many evaluations in a row without a better score, and keeps the best state."""
    given = iter(scores)
    monkeypatch.setattr("spn4cir.train.selection_score", lambda metrics, names: next(given))
    folder = train(configure(epochs=6, patience=patience), 1)
    result = json.loads((folder / "result.json").read_text())
    steps = rows(folder)[-1]["step"] // rows(folder)[-1]["epoch"]
    assert (result["steps"], result["best_step"]) == (evaluated * steps, best * steps)
    assert result["stopped_by"] == ("patience" if evaluated < 6 else "the end of its epochs or max_steps")


def test_patience_is_counted_on_after_a_resume(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed after its last evaluation trains no further step."""
    given = iter([3, 2, 1])
    monkeypatch.setattr("spn4cir.train.selection_score", lambda metrics, names: next(given))
    config = configure(epochs=6, patience=2)
    folder = train(config, 1)
    (folder / "result.json").unlink()
    again = configure(epochs=6, patience=2, output=None, resume=str(folder))
    before = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    train(again, 1)
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["stopped_by"]) == (before, "patience")


def test_patience_needs_evaluations() -> None:
    with pytest.raises(InputError, match="patience counts evaluations"):
        TrainConfig(patience=2, eval_every=0)
