"""TG-CIR: image and text as twelve tokens each, mixed token by token; a teacher that sees the target helps."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone, l2_normalize, to_float32
from spn4cir.backbones.shared_clip import has_openai_text, has_openai_vision, load_clip, portable_clip_tokenizer
from spn4cir.distributed import gather_with_gradient
from spn4cir.errors import InputError
from spn4cir.in_batch import InBatch
from spn4cir.search import scores_of
from spn4cir.text_tokenizer import PortableTokenizer
from spn4cir.types import Composed, ImageFeatures, Tokens

GLOBALS, LOCALS = 4, 8
"""Tokens made of the pooled vector, and tokens gathered from all positions: P and Q of the paper."""


class TGCIR(Backbone):
    """``q = normalise(mean over tokens of a · reference + (1 - a) · text)``, a one gate per token.

    L = 12 tokens of D = E, CLIP's embedding width; K = 1: the target is the normalised mean of its tokens. Image and
    text share token learner and masks until ``untie_text_side``, in stage 2, gives the text its own. All positions
    of a text count, padding too. There is no dropout, and the whole model stays in eval mode.

    Args:
        model, pretrained: as ``shared_clip.load_clip`` takes them; a model with a ViT and OpenAI's layout.
        ortho, ckd, kl: weights of stage 1's terms.
        kl_temperature: what similarities are divided by in the term ``kl``.

    Raises ``InputError`` if open_clip knows no such model, tag or file, or the model is built in another way.

    Source: Wen et al., "Target-Guided Composed Image Retrieval", ACM MM 2023.
    """

    name = "tgcir"
    clip: Any  # a model of open_clip, which has no types
    text_learner: nn.Linear | None
    text_masks: nn.Parameter | None

    def __init__(
        self,
        model: str = "embedded",
        pretrained: str | None = None,
        ortho: float = 0.1,
        ckd: float = 10.0,
        kl: float = 0.5,
        kl_temperature: float = 0.1,
    ):
        super().__init__()
        if not kl_temperature > 0 or min(ortho, ckd, kl) < 0:
            given = f"got {kl_temperature}, {ortho}, {ckd}, {kl}"
            raise InputError(f"kl_temperature is to be above 0, and ortho, ckd and kl 0 or more; {given}")
        self.options = {"model": model, "pretrained": pretrained, "ortho": ortho, "ckd": ckd, "kl": kl}
        self.options |= {"kl_temperature": kl_temperature, "separated": False}
        self.clip, self._tokenizer, self.transform = load_clip(
            model, pretrained, pad_ratio=None, embedded="clip_transformer"
        )
        _check_layout(self.clip, model)
        width = self.clip.text_projection.shape[1]  # E
        self.image_fc = nn.Linear(self.clip.visual.proj.shape[0], width)
        self.text_fc = nn.Linear(self.clip.text_projection.shape[0], width)
        self.learner = nn.Linear(width, LOCALS)
        self.masks = nn.Parameter(_initial_masks(width))
        self.register_module("text_learner", None)
        self.register_parameter("text_masks", None)
        self.gate, self.teacher_remain, self.teacher_replace = (_gate(width) for _ in range(3))
        self.local_weight = nn.Parameter(torch.ones(GLOBALS + LOCALS))
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"text": (B, context)}``; what is longer than the context is cut."""
        return {"text": self._tokenizer(list(texts))}

    def portable_tokenizer(self) -> PortableTokenizer:
        """That of CLIP."""
        return PortableTokenizer(portable_clip_tokenizer(self._tokenizer), {"text": "ids"})

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 12, E), target (B, 1, E) of unit norm."""
        found = self.clip.visual.forward_intermediates(pixels, indices=1, output_fmt="NLC", output_extra_tokens=True)
        last = (found["image_intermediates_prefix"][0], found["image_intermediates"][0])
        x = torch.cat(last, 1)  # (B, 1 + patches, width), before the last norm
        tokens = _tokens(found["image_features"], self.image_fc(x), self.learner, self.masks)  # (B, 12, E)
        return ImageFeatures(tokens, l2_normalize(tokens.mean(1, keepdim=True)))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, 12, E) and texts → queries (B, E); states: both sides' tokens, and the gate (B, 12, 1)."""
        reference, text = to_float32(reference), to_float32(self._encode_text(tokens["text"]))  # (B, 12, E) each
        gate = to_float32(self.gate(torch.cat([reference, text], -1)))  # (B, 12, 1)
        fused = gate * reference + (1 - gate) * text  # (B, 12, E)
        states = {"reference": reference, "text": text, "gate": gate}
        return Composed(l2_normalize(fused.mean(1)), states)

    def _encode_text(self, text: Tensor) -> Tensor:
        """(B, context) → tokens (B, 12, E). All positions are computed, as those of padding are averaged too."""
        clip = self.clip
        x = clip.token_embedding(text) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))  # (B, context, width)
        pooled = text_global_pool(x, text, clip.text_pool_type, eos_token_id=clip.text_eos_id) @ clip.text_projection
        learner = self.learner if self.text_learner is None else self.text_learner
        masks = self.masks if self.text_masks is None else self.text_masks
        return _tokens(pooled, self.text_fc(x), learner, masks)

    def extra_losses(self, composed: Composed, targets: ImageFeatures, contrast: InBatch) -> dict[str, Tensor]:
        """The teacher's own two terms, orthogonal tokens, and what the student learns from the teacher.

        The teacher knows the target, whose tokens, unlike those of reference and text, also learn from it. Its scores
        are sums of weighted cosines over tokens; those that ``kl`` learns from are cosines.
        """
        reference, text, gate = (composed.states[name] for name in ("reference", "text", "gate"))
        target = to_float32(targets.reference)  # (B, 12, E)
        remain = to_float32(self.teacher_remain(torch.cat([reference.detach(), target], -1)))  # (B, 12, 1)
        replace = to_float32(self.teacher_replace(torch.cat([text.detach(), target], -1)))  # (B, 12, 1)
        query = self._flat(remain * reference.detach() + replace * text.detach())  # (B, 12·E)
        wanted = self._flat(target)  # (B, 12·E)
        distilled = F.mse_loss(gate, remain.detach()) + F.mse_loss(1 - gate, replace.detach())
        orthogonal = torch.stack([_off_orthogonal(tokens) for tokens in (reference, target, text)]).mean()
        return {
            "tea_rank": contrast(query, wanted[:, None]),
            "tea_mask": F.mse_loss(remain + replace, torch.ones_like(remain)),
            "ortho": self.options["ortho"] * orthogonal,
            "ckd": self.options["ckd"] * distilled,
            "kl": self.options["kl"] * self._divergence(composed.query, targets.target, wanted.detach()),
        }

    def _flat(self, tokens: Tensor) -> Tensor:
        """(B, 12, E) → (B, 12·E): each token of unit norm, times its weight."""
        return (F.normalize(tokens, dim=-1) * self.local_weight[:, None]).flatten(1)

    def _divergence(self, query: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
        """KL of query-target scores (B, N) from those of targets (B, 12·E) among themselves; mean over queries."""
        wanted = F.normalize(wanted, dim=-1)
        temperature = self.options["kl_temperature"]
        teacher = scores_of(wanted, gather_with_gradient(wanted)[:, None]) / temperature  # (B, N)
        student = scores_of(query, gather_with_gradient(target)) / temperature  # (B, N)
        return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The visual tower, its linear layer, and the token learner and masks that the text shared."""
        return [self.clip.visual, self.image_fc, self.learner, self.masks]

    def frozen_beside(self) -> list[nn.Module | nn.Parameter]:
        """The teacher."""
        return [self.teacher_remain, self.teacher_replace, self.local_weight]

    def untie_text_side(self) -> None:
        """Give the text its own token learner and masks, equal to the shared ones at first."""
        if self.text_learner is None:
            self.text_learner = copy.deepcopy(self.learner)
            self.text_masks = copy.deepcopy(self.masks)
        self.options["separated"] = True

    def train(self, mode: bool = True) -> "TGCIR":
        """Stays in eval mode, as published: nothing in it has another mode."""
        nn.Module.train(self, False)
        return self


def _gate(width: int) -> nn.Sequential:
    """Two tokens side by side (…, 2·E) → how much of one is taken, (…, 1)."""
    return nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())


def _initial_masks(width: int) -> Tensor:
    """(P, E): 0.1, but for a block of ones on a share of the columns, another one in each row."""
    masks, block = torch.full((GLOBALS, width), 0.1), width // GLOBALS
    for row in range(GLOBALS):
        masks[row, row * block : (row + 1) * block] = 1
    return masks


def _tokens(pooled: Tensor, positions: Tensor, learner: nn.Module, masks: Tensor) -> Tensor:
    """A pooled vector (B, E) and all positions (B, T, E) → tokens (B, P + Q, E)."""
    overall = pooled[:, None] * masks.relu()  # (B, P, E)
    weights = learner(positions).sigmoid()  # (B, T, Q)
    local = torch.einsum("bte,btq->bqe", positions, weights) / positions.shape[1]  # (B, Q, E)
    return torch.cat([to_float32(overall), to_float32(local)], 1)


def _off_orthogonal(tokens: Tensor) -> Tensor:
    """Mean squared distance of the tokens' cosines (B, 12, 12) from the identity."""
    tokens = F.normalize(tokens, dim=-1)
    with torch.autocast(tokens.device.type, enabled=False):
        cosines = tokens @ tokens.transpose(1, 2)  # (B, 12, 12)
    return F.mse_loss(cosines, torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand_as(cosines))


def _check_layout(clip: nn.Module, model: str) -> None:
    """Raises ``InputError`` for a CLIP whose positions are not what the tokens are made of."""
    vision = has_openai_vision(clip)
    if not (vision and has_openai_text(clip)):
        needs = "tgcir needs a CLIP with a vision transformer in OpenAI's layout"
        advice = "take ViT-B-16-quickgelu, ViT-B-32-quickgelu or ViT-L-14-quickgelu"
        raise InputError(f"{needs}, and the {'text' if vision else 'image'} tower of {model!r} is another: {advice}")
