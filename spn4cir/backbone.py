"""What a backbone is: two methods to write, two derived, and a promise about its image side."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spn4cir.losses import InBatch
from spn4cir.types import Composed, ImageFeatures, Tokens


def to_float32(x: Tensor) -> Tensor:
    """In float32 or wider, whatever mixed precision made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalize(x: Tensor) -> Tensor:
    """Unit norm along the last dimension, in float32 or wider."""
    return F.normalize(to_float32(x), dim=-1)


def gradient_cached(function: Callable[..., Any], size: int | None, *rows: Tensor) -> Any:
    """What a function gives for all rows, computed some rows at a time, and once more where a gradient asks for it.

    Nothing that happens inside is kept: gradients are exact, and memory is that of one chunk. They meet in one backward
    pass, so processes reduce them once.

    Args:
        function: of tensors whose first dimension is the same; returns a tensor, ``ImageFeatures`` or ``Composed``.
        size: rows at a time; None for all at once, and nothing computed twice.
        rows: the tensors.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    if size is None or size >= len(rows[0]):
        return function(*rows)
    parts = zip(*(torch.split(part, size) for part in rows), strict=True)
    return _joined([checkpoint(function, *part, use_reentrant=False) for part in parts])


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
        names = [field.name for field in fields(Composed)]
        return Composed(*(_joined([getattr(part, name) for part in parts]) for name in names))
    columns = [_joined(column) for column in zip(*parts, strict=True)]
    return ImageFeatures(*columns) if isinstance(first, ImageFeatures) else tuple(columns)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The modules of one kind that follow each other in a list or a sequence, the outermost of nested ones.

    They are the layers of a transformer and the residual blocks of a ResNet, where time and memory go.
    """
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
    """Let torch make kernels for the blocks of a model that train; returns how many there are.

    Blocks of one kind share their kernels, which hold for any number of rows. What is frozen is left as it is: the
    bank was made with it, to the bit.
    """
    blocks = [block for block in blocks_of(module) if any(p.requires_grad for p in block.parameters())]
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)


class Backbone(nn.Module, ABC):
    """A composed retrieval model. Shapes: see ``spn4cir.types``.

    A subclass sets ``name``, ``options`` (what rebuilds it), ``transform`` (RGB image → (3, H, W)) and ``tokenize``
    (B texts → tokens), and writes ``encode_image``, ``compose`` and ``image_side``.
    """

    name: ClassVar[str]
    options: dict[str, Any]
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tokens]
    chunk: int | None = None
    """Images, and texts, in one pass of a training step; None for all."""

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, L, D) and target (B, K, E), the latter of unit norm."""

    @abstractmethod
    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """Reference features (B, L, D) and modification texts → queries (B, E) of unit norm."""

    @abstractmethod
    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """Everything that ``encode_image`` reads."""

    @property
    def query_is_sum(self) -> bool:
        """Whether ``compose`` gives the ``parts`` whose sum the query is."""
        return False

    def frozen_beside(self) -> list[nn.Module | nn.Parameter]:
        """What ``freeze_image_side`` freezes beside the image side: what only stage 1 trains."""
        return []

    def untie_text_side(self) -> None:
        """Give ``compose`` a copy of its own of whatever it shares with ``encode_image`` and goes on training.

        Called before the image side is frozen; a second call changes nothing. What was separated is recorded in
        ``options``, so that a checkpoint rebuilds it.
        """

    def extra_losses(self, composed: Composed, targets: ImageFeatures, contrast: InBatch) -> dict[str, Tensor]:
        """Further terms of a published model's stage 1, each a weighted scalar under its name; they are summed.

        Args:
            composed: what ``compose`` made of this process's batch.
            targets: features of the batch's target images, (B, …).
            contrast: ``contrast(query, target)`` is the loss of queries (B, E) against the targets (B, K, E) of the
                batches of all processes, as in the main term.
        """
        return {}

    def save_assets(self, folder: Path) -> None:
        """Write into a checkpoint's folder what the constructor needs beside weights and ``options``.

        A subfolder ``tokenizer`` is given back as the option of that name.
        """

    def encode_query(self, pixels: Tensor, tokens: Tokens) -> Tensor:
        """Reference images (B, 3, H, W) and texts → queries (B, E)."""
        return self.compose(self.encode_image(pixels).reference, tokens).query

    def encode_target(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, K, E)."""
        return self.encode_image(pixels).target

    def freeze_image_side(self) -> None:
        """From here on ``encode_image`` never moves: no gradient, and eval mode whatever ``train`` says.

        This is what makes a bank of its outputs valid.
        """
        self.untie_text_side()
        self._frozen = True
        for part in (*self.image_side(), *self.frozen_beside()):
            part.requires_grad_(False)
        self.train(self.training)

    @property
    def frozen(self) -> bool:
        """Whether ``freeze_image_side`` was called."""
        return getattr(self, "_frozen", False)

    def train(self, mode: bool = True) -> "Backbone":
        """As in torch, but a module whose parameters are all frozen stays in eval mode, with what is inside it."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                nn.Module.train(module, False)
        return self

    def image_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the image side, by their full names."""
        parts = {id(part) for part in self.image_side()}
        state = {
            f"{prefix}.{name}": value
            for prefix, module in self.named_modules()
            if id(module) in parts
            for name, value in module.state_dict().items()
        }
        state |= {name: value.detach() for name, value in self.named_parameters() if id(value) in parts}
        return dict(sorted(state.items()))
