"""Backbones by name. A new one is one file here, one line in ``BACKBONES`` and one test."""

import inspect
from typing import Any

from spn4cir.backbone import Backbone
from spn4cir.backbones.blip4cir import BLIP4CIR
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.backbones.sprc import SPRC
from spn4cir.backbones.tgcir import TGCIR
from spn4cir.errors import InputError

BACKBONES: dict[str, type[Backbone]] = {"clip4cir": CLIP4CIR, "tgcir": TGCIR, "blip4cir": BLIP4CIR, "sprc": SPRC}


def check_backbone(name: str) -> None:
    """Raises ``InputError`` for an unknown name."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")


def build_backbone(name: str, **options: Any) -> Backbone:
    """A backbone by name, with its own options.

    Raises:
        InputError: for an unknown name or option.
    """
    check_backbone(name)
    known = inspect.signature(BACKBONES[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(f"backbone {name} has no option {unknown[0]!r}; known: {', '.join(known)}")
    return BACKBONES[name](**options)
