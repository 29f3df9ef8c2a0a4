"""Trained models for others: ONNX, sentence-transformers, the Hugging Face hub."""

import importlib.util
from typing import Any

from spn4cir.errors import InputError


def require_packages(*names: str) -> None:
    """Raises ``InputError`` if an optional package is missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise InputError(f"the package {missing[0]} is missing: pip install 'spn4cir[export]'")


def refuse_vectors(backbone: Any) -> None:
    """Raises ``InputError`` for a backbone that reads given features instead of pictures."""
    from spn4cir.images import takes_vectors

    if takes_vectors(backbone.transform):
        raise InputError(f"backbone {backbone.name} reads given features, and an export is of pictures")
