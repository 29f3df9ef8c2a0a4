"""Datasets by name. A new one is one file here, one line in ``DATASETS`` and one test."""

from collections.abc import Callable

from spn4cir.datasets.emoji import Emoji
from spn4cir.datasets.external import EXTERNAL
from spn4cir.errors import InputError
from spn4cir.types import Dataset

DATASETS: dict[str, Callable[[str | None], Dataset]] = {"emoji": Emoji}


def load_dataset(name: str, root: str | None = None) -> Dataset:
    """The dataset of that name.

    Raises:
        InputError: for an unknown name, or when its files are not there.
    """
    if name in EXTERNAL:
        raise EXTERNAL[name].refuse(root)
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; known: {', '.join([*DATASETS, *EXTERNAL])}")
    return DATASETS[name](root)
