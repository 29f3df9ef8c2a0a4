"""Backbones by name. A new one is one file here, one line in ``BACKBONES`` and one test."""

import inspect
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from spn4cir.backbone import Backbone
from spn4cir.backbones.blip4cir import BLIP4CIR
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.backbones.embedding import Embedding
from spn4cir.backbones.freestyle import Freestyle
from spn4cir.backbones.masln import MASLN
from spn4cir.backbones.shared_weights import READS_WEIGHTS
from spn4cir.backbones.sprc import SPRC
from spn4cir.backbones.tgcir import TGCIR
from spn4cir.errors import InputError
from spn4cir.images import RgbLastTransform, Transform

BACKBONES: dict[str, type[Backbone]] = {
    "clip4cir": CLIP4CIR, "tgcir": TGCIR, "blip4cir": BLIP4CIR, "sprc": SPRC, "freestyle": Freestyle,
    "embedding": Embedding, "masln": MASLN,
}  # fmt: skip

INSIDE = ("load_weights", "separated")
"""Arguments of ``build_backbone`` that no recipe sets."""


def check_backbone(name: str) -> None:
    """Raises ``InputError`` for an unknown name."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")


def build_backbone(
    name: str, load_weights: bool = True, separated: bool = False, rgb_last: bool = False, **options: Any
) -> Backbone:
    """Build a backbone by name, with its own options. Raises ``InputError`` for an unknown name or option.

    Args:
        name: one of ``BACKBONES``.
        load_weights: False builds the architecture alone, for a checkpoint to fill.
        separated: the text side has copies of what it shared with the image side, as in stage 2.
        rgb_last: an option of all backbones: pictures that are not RGB are padded and resized in their own mode and
            converted last, as the published code does; else transparent parts become white, and all is RGB, first.
        options: arguments of its constructor.
    """
    check_backbone(name)
    if not isinstance(rgb_last, bool):
        raise InputError(f"option rgb_last of backbone {name} cannot be {rgb_last!r}")
    known = get_type_hints(BACKBONES[name].__init__)
    for option, value in options.items():
        if option not in known:
            parameters = ", ".join([*inspect.signature(BACKBONES[name]).parameters, "rgb_last"])
            raise InputError(f"backbone {name} has no option {option!r}; known: {parameters}")
        if not _is_a(value, known[option]):
            raise InputError(f"option {option} of backbone {name} cannot be {value!r}")
    before = READS_WEIGHTS.set(load_weights)
    try:
        backbone = BACKBONES[name](**options)
    finally:
        READS_WEIGHTS.reset(before)
    if rgb_last:
        if not isinstance(backbone.transform, Transform):
            raise InputError(f"backbone {name} has a transform of its own, for which rgb_last says nothing")
        backbone.transform = RgbLastTransform(**vars(backbone.transform))
        backbone.options["rgb_last"] = True
    if separated:
        backbone.untie_text_side()
    return backbone


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value as JSON and YAML give them is of a type, a union or a mapping."""
    if get_args(hint) and get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
