"""Frozen vision towers: few images in one pass, so that memory does not grow with the batch."""

from collections.abc import Callable

import torch
from torch import Tensor

IMAGES_IN_ONE_PASS = 64
"""BLIP's attention takes 16 MB for each, and the Combiner's batches are of thousands."""


def encode_images(encode: Callable[[Tensor], Tensor], pixels: Tensor, trains: bool) -> Tensor:
    """Encode a batch, ``IMAGES_IN_ONE_PASS`` images at a time, or all at once by a tower that trains."""
    parts = [pixels] if trains or torch.compiler.is_compiling() else torch.split(pixels, IMAGES_IN_ONE_PASS)
    return torch.cat([encode(part) for part in parts])
