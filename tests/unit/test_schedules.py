"""Schedules against torch's, step by step."""

import pytest
import torch
from torch.optim import lr_scheduler

from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.schedules import SCHEDULES
from spn4cir.train import schedule

STEPS, EPOCH = 60, 10


def torch_factors(make) -> list[float]:  # type: ignore[no-untyped-def]
    """Learning rates of a scheduler of torch over a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "options", "make"), [
    ("cosine", {}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    ("cosine", {"epochs": 2}, lambda o: lr_scheduler.CosineAnnealingLR(o, 2 * EPOCH)),
    ("multistep", {"epochs": [1, 3], "factor": 0.1}, lambda o: lr_scheduler.MultiStepLR(o, [EPOCH, 3 * EPOCH], 0.1)),
    ("onecycle", {}, lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=STEPS + 1)),
    ("onecycle", {"epochs": 8, "warmup": 0.1, "start": 0.01},
     lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=8 * EPOCH, pct_start=0.1, div_factor=100)),
])  # fmt: skip
def test_equal_to_torch(name: str, options: dict, make) -> None:  # type: ignore[type-arg, no-untyped-def]
    """Each factor of a run, also where the schedule is shorter or longer than the run."""
    steps = STEPS + 1 if (name, options) == ("onecycle", {}) else STEPS
    ours = [SCHEDULES[name](step, steps, EPOCH, **options) for step in range(STEPS)]
    assert ours == pytest.approx(torch_factors(make), abs=1e-9)
    assert max(ours) - min(ours) > 0.1  # it moves at all


def test_warm_up_comes_before() -> None:
    """A straight line up, then the schedule over the rest; constant stays at 1."""
    config = TrainConfig(schedule="cosine", warmup_steps=4)
    found = [schedule(config, step, 14, 7) for step in range(14)]
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4:] == pytest.approx([SCHEDULES["cosine"](step, 10, 7) for step in range(10)])
    assert {SCHEDULES["constant"](step, 14, 7) for step in range(14)} == {1.0}


@pytest.mark.parametrize(("name", "options", "told"), [
    ("constant", {"epochs": 3}, "has no option 'epochs'"),
    ("multistep", {"epochs": 3}, "epochs of multistep cannot be 3"),
    ("cosine", {"epochs": [3]}, r"cannot be \[3\]"),
    ("onecycle", {"start": "low"}, "cannot be 'low'"),
    ("onecycle", {"begin": 1}, "known: epochs, warmup, start"),
    ("onecycle", {"epochs": float("inf")}, "epochs of onecycle cannot be inf"),
    ("cosine", {"epochs": float("nan")}, "epochs of cosine cannot be nan"),
    ("cosine", {"epochs": True}, "cannot be True"),
    ("cosine", {"epochs": None}, "cannot be None"),
    ("multistep", {"epochs": [1, -2]}, r"cannot be \[1, -2\]"),
])  # fmt: skip
def test_wrong_options(name: str, options: dict, told: str) -> None:  # type: ignore[type-arg]
    """One line that says which, before anything runs."""
    with pytest.raises(InputError, match=told):
        TrainConfig(schedule=name, schedule_options=options)  # type: ignore[arg-type]
