"""How a training step is computed: gradient caching, activation checkpointing, compilation. No result depends on it."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spn4cir.types import Composed, ImageFeatures

T = TypeVar("T")


def gradient_cached(function: Callable[..., T], size: int | None, *rows: Tensor) -> T:
    """What a function gives for all rows, computed some rows at a time, and once more where a gradient asks for it.

    Nothing that happens inside is kept: gradients are exact, and memory is that of one chunk. They meet in one backward
    pass, so processes reduce them once.

    Args:
        function: of tensors whose first dimension is the same; returns a tensor, ``ImageFeatures`` or ``Composed``.
        size: rows at a time; None for all at once, and nothing computed twice.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if size is None or size >= len(rows[0]):
        return function(*rows)
    parts = zip(*(torch.split(part, size) for part in rows), strict=True)
    return cast(T, _joined([checkpoint(function, *part, use_reentrant=False) for part in parts]))


def _joined(parts: Sequence[Any]) -> Any:
    """Tensors, or what is made of tensors, of several chunks → of all."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, Composed):
        return Composed(*(_joined([getattr(part, field.name) for part in parts]) for field in fields(Composed)))
    columns = [_joined(column) for column in zip(*parts, strict=True)]
    return ImageFeatures(*columns) if isinstance(first, ImageFeatures) else tuple(columns)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Layers of a transformer, blocks of a ResNet: modules of one kind in a list or sequence, the outermost ones."""
    found: list[nn.Module] = []
    for holder in module.modules():
        blocks = list(holder.children()) if isinstance(holder, nn.ModuleList | nn.Sequential) else []
        several = len(blocks) > 1 or (isinstance(holder, nn.ModuleList) and blocks)
        alike = len({type(block) for block in blocks}) == 1 and bool(list(blocks[0].parameters()))
        if several and alike and not any(holder is inner for block in found for inner in block.modules()):
            found += blocks
    return found


def checkpoint_blocks(module: nn.Module) -> int:
    """Let the blocks of a model keep no activations but compute them again; returns how many there are."""
    blocks = blocks_of(module)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)


def compile_blocks(module: nn.Module) -> int:
    """Let torch make kernels, for any number of rows, for the blocks that train; returns how many there are."""
    # what is frozen is left as it is: the bank was made with it, to the bit
    blocks = [block for block in blocks_of(module) if any(p.requires_grad for p in block.parameters())]
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
