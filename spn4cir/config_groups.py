"""Groups of settings of a training run, each a mapping in a recipe."""

import dataclasses
from typing import Any, Literal

from spn4cir.errors import InputError


@dataclasses.dataclass
class BankConfig:
    """What stage 2 scores each query against.

    Args:
        images: "all" training images; those "named" by a triplet; or those that are "targets" of one, where references
            are never ranked, such as drawings.
        extra: a folder or table of further pictures that no triplet names: more negatives.
        limit: candidates drawn anew for each step, at random, beside the targets of its triplets; null for all.
        dtype: how features are stored.
        references: "stored" keeps features of references too, memory-mapped; "recompute" encodes them at each step.
        in_stage1: also read features from the store in stage 1, which then encodes no image; for a backbone whose image
            side does not train there.
    """

    images: Literal["all", "named", "targets"] = "all"
    extra: str | None = None
    limit: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    references: Literal["stored", "recompute"] = "stored"
    in_stage1: bool = False


@dataclasses.dataclass
class NegativesConfig:
    """What counts as a negative.

    Args:
        types: which element of the triplet is replaced to form negatives, in stage 1: [target], or several of target,
            query, text, reference; the loss is their mean. Text and reference need a backbone whose query is a sum.
        max_similarity: candidates more similar to the positive than this (cosine of targets) are treated as false
            negatives and masked; null masks none.
        near_duplicates: treat pictures that show the same at another size or quality as one image, which is never a
            negative of itself; equal pixels always are one image.
        margin: of a triplet loss against one negative drawn from the batch, in the place of InfoNCE, in stage 1; null
            for InfoNCE.
    """

    types: list[Literal["target", "query", "text", "reference"]] = dataclasses.field(default_factory=lambda: ["target"])
    max_similarity: float | None = None
    near_duplicates: bool = False
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and self.types != ["target"]:
            raise InputError(f"negatives.margin draws targets as negatives, and negatives.types is {self.types}")
        if self.margin is not None and self.max_similarity is not None:
            raise InputError("negatives.margin draws one negative of a batch, whatever negatives.max_similarity says")
        if not self.types or len(set(self.types)) < len(self.types):
            raise InputError(f"negatives.types names at least one type, and each once, got {self.types}")


@dataclasses.dataclass
class ComputeConfig:
    """How a step is computed; but for accumulate, and for what dropout draws, the result is the same.

    Args:
        chunk: micro-batch size of gradient caching in stage 1: the gradient is exact, at the price of a second forward
            pass, and memory is that of one chunk; null disables it.
        accumulate: parts of a batch, one after the other; in stage 1 each part has its own candidates only.
        checkpoint: keep no activations inside the blocks of the towers, but compute them again.
        compile: let torch.compile make kernels for the blocks of the towers that train; the first steps are slow.
    """

    chunk: int | None = None
    accumulate: int = 1
    checkpoint: bool = False
    compile: bool = False


@dataclasses.dataclass
class AdamWConfig:
    """Settings of AdamW beside learning rate and weight decay.

    Args:
        beta2: decay of the second moment.
        eps: added to the denominator.
        max_grad_norm: scale the gradient down to this norm where it is larger; null never does.
    """

    beta2: float = 0.999
    eps: float = 1e-7
    max_grad_norm: float | None = None


@dataclasses.dataclass
class ClassesConfig:
    """Learned centres of classes, which stage ``classes`` scores queries against; their scale is 1 / temperature.

    Args:
        margin: of the softmax: arcface, cosface, dynamic, li-arcface, adacos, curricularface or adaface.
        options: its own, such as {margin: 0.5}; spn4cir/margins.py explains them.
        centres: of each class, the nearest of which counts.
        balance: "source" draws as many examples of each source of images in each batch, over and over; null draws
            each example once in an epoch.
    """

    margin: str = "arcface"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    centres: int = 1
    balance: Literal["source"] | None = None
