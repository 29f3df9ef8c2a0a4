"""Learning-rate schedules: factors of the peak rate at a step, given the steps of the run and of one epoch."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spn4cir.errors import InputError


def constant(step: int, steps: int, epoch: int) -> float:
    """Always 1."""
    return 1.0


def cosine(step: int, steps: int, epoch: int, epochs: float | None = None) -> float:
    """Half a cosine from 1 down to 0 over ``epochs``, or over the run; beyond it goes up again."""
    length = steps if epochs is None else epochs * epoch
    return 0.5 * (1 + math.cos(math.pi * step / max(length, 1)))


def multistep(step: int, steps: int, epoch: int, epochs: Sequence[float] = (), factor: float = 0.1) -> float:
    """1, times ``factor`` from each of the named epochs on."""
    return factor ** sum(step >= at * epoch for at in epochs)


def onecycle(
    step: int, steps: int, epoch: int, epochs: float | None = None, warmup: float = 0.3, start: float = 0.04
) -> float:
    """Along cosines from ``start`` up to 1, and down to a ten-thousandth of ``start``.

    Args:
        epochs: length of the cycle; None is the run's. A longer one is cut off by the end of the run.
        warmup: share of the cycle that goes up.
        start: first factor.

    Source: Smith and Topin, "Super-convergence", 2018, as torch's ``OneCycleLR`` has it.
    """
    length = steps if epochs is None else int(epochs * epoch)
    top, last = warmup * length - 1, length - 1
    rises = step <= top
    low, high = (start, 1.0) if rises else (1.0, start / 1e4)
    share = step / max(top, 1e-9) if rises else min((step - top) / max(last - top, 1e-9), 1.0)
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * share))


SCHEDULES: dict[str, Callable[..., float]] = {f.__name__: f for f in (constant, cosine, multistep, onecycle)}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ``InputError`` for an option that the schedule does not have, or that is no number."""
    known = list(inspect.signature(SCHEDULES[name]).parameters)[3:]
    for option, value in options.items():
        if option not in known:
            raise InputError(f"schedule {name} has no option {option!r}; known: {', '.join(known) or 'none'}")
        numbers = value if isinstance(value, list | tuple) else [value]
        listed = isinstance(value, list | tuple) == (name == "multistep" and option == "epochs")
        if not listed or not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
            raise InputError(f"schedule_options: {option} of {name} cannot be {value!r}")
