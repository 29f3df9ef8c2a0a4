"""FreestyleRet: a frozen vision transformer reads a picture of any style by prompt tokens made of its style."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone, l2_normalize, to_float32
from spn4cir.backbones.shared_clip import (
    encode_text,
    has_openai_text,
    has_openai_vision,
    load_clip,
    portable_clip_tokenizer,
)
from spn4cir.backbones.shared_style import StyleFilters, StyleSpace
from spn4cir.backbones.shared_vision import encode_images
from spn4cir.errors import InputError
from spn4cir.text_tokenizer import PortableTokenizer
from spn4cir.types import Composed, ImageFeatures, Tokens

PHOTO = "photo"
"""The style of targets."""
STYLE: dict[str, Any] = {
    "names": [PHOTO, "sketch", "art", "mosaic"], "width": 64, "temperature": 0.1, "rank": 8, "filters": "random",
}  # fmt: skip
PLACES = {"none": (), "shallow": ("shallow",), "deep": ("deep",), "both": ("shallow", "deep")}
TRAINED = ("prompts", "norms", "all")
PROMPTS = ("style", "static", "shared")


class PromptTable(nn.Module):
    """A learned table (R, T, D): its rows mixed by a picture's style are T tokens; or all R·T of them, for any picture.

    Args:
        rows, tokens, width: R, T, D.
        is_static: whether the style is ignored. Both kinds have the same parameters.

    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, for the initial values and the static kind.
    """

    def __init__(self, rows: int, tokens: int, width: int, is_static: bool):
        super().__init__()
        self.is_static = is_static
        bound = (6 / (2 * width)) ** 0.5
        self.weight = nn.Parameter(torch.empty(rows, tokens, width).uniform_(-bound, bound))

    def forward(self, mixture: Tensor) -> Tensor:
        """Weights of the rows (B, R) → tokens (B, T, D), or (B, R·T, D)."""
        if self.is_static:
            return self.weight.flatten(0, 1).expand(mixture.shape[0], -1, -1)
        return torch.einsum("br,rtd->btd", mixture.to(self.weight), self.weight)


class QueryBlock(nn.Module):
    """A block of the transformer with LayerNorms of its own; all else is shared with the block, which stays frozen."""

    def __init__(self, block: Any):
        super().__init__()
        self.ln_1, self.ln_2 = (copy.deepcopy(norm).requires_grad_(True) for norm in (block.ln_1, block.ln_2))
        self._shared: tuple[Any, ...] = (block,)  # a tuple, so that it is no part of this module

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        block = self._shared[0]
        x = x + block.ls_1(block.attention(q_x=self.ln_1(x)))
        return x + block.ls_2(block.mlp(self.ln_2(x)))  # type: ignore[no-any-return]


class Freestyle(Backbone):
    """``q = normalise(v + t)``: v is the image through CLIP's transformer with prompts, t the text, of unit norm each.

    The target is CLIP's own embedding, so the gallery holds photographs as CLIP sees them and never moves (K = 1), but
    for ``prompts: shared``. The reference is the transformer's input, class token and patches (1 + N of D), and the
    style vector in as many further rows as it needs. A query of an image alone is v, of a text alone t.

    Prompts stand behind the class token from a block on. Shallow ones, before the first block, are a table with a row
    for each style, mixed by how near the style's centre is. Deep ones, before the last block, are a table with a row
    for each of the first ``rank`` components of the style vector and one more that always counts.

    Args:
        model, pretrained: as ``shared_clip.load_clip`` takes them; a model with a ViT and OpenAI's layout.
        prompts: ``style``; ``static`` for as many parameters that ignore the style (VPT); or ``shared`` for T static
            tokens at each place, for photographs too, as the published code computes.
        place: where prompts are inserted: ``shallow``, ``deep``, ``both`` or ``none``.
        tokens: T of each table.
        trains: ``prompts`` alone; ``norms`` also trains a copy of the LayerNorms for queries, and those of the text
            encoder; ``all`` also a copy of the whole transformer, and the text encoder.
        style: settings of the style space, completed by ``STYLE``: ``names`` of the styles in the data, targets being
            photographs; ``width``, dimensions of a style vector; ``temperature``, divisor of the cosines between style
            vector and centres; ``rank``, components of the style vector that deep prompts read; ``filters``, as
            ``StyleFilters`` takes them.

    Raises ``InputError`` if open_clip knows no such model, tag or file, or the options fit nothing.

    Source: Li et al., "FreestyleRet: Retrieving Images from Style-Diversified Queries", ECCV 2024. Unlike theirs, style
    vectors are whitened and centres fitted before training; prompts are learned tables; photographs stay as they are.
    """

    name = "freestyle"
    fixed_options = frozenset({"style.names", "style.width", "style.filters"})
    clip: Any  # a model of open_clip, which has no types

    def __init__(
        self,
        model: str = "embedded",
        pretrained: str | None = None,
        prompts: str = "style",
        place: str = "both",
        tokens: int = 4,
        trains: str = "norms",
        style: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.style = complete_style(style or {})
        self.options = {"model": model, "pretrained": pretrained, "prompts": prompts, "place": place, "tokens": tokens}
        self.options |= {"trains": trains, "style": self.style}
        _check_options(self.options)
        found = load_clip(model, pretrained, pad_ratio=None, embedded="clip_transformer")
        self.clip, self._tokenizer, self.transform = found
        self._colours = found[2].mean, found[2].std
        if not (has_openai_vision(self.clip) and has_openai_text(self.clip)):
            advice = "take ViT-B-16-quickgelu, ViT-B-32-quickgelu or ViT-L-14-quickgelu"
            raise InputError(f"freestyle needs a CLIP with a ViT in OpenAI's layout; {model!r} is another: {advice}")
        self._padding = int(self._tokenizer(["a"])[0, -1])
        self.clip.requires_grad_(False)
        self.filters = StyleFilters(self.style["filters"])
        styles, dimensions, temperature = (self.style[name] for name in ("names", "width", "temperature"))
        self.style_space = StyleSpace(self.filters.outputs, len(styles), dimensions, temperature)
        width, is_static = self.clip.visual.proj.shape[0], prompts != "style"
        rows = {"shallow": len(self.style["names"]), "deep": 1 + self.style["rank"]}
        rows = dict.fromkeys(rows, 1) if prompts == "shared" else rows
        self.tables = nn.ModuleDict({p: PromptTable(rows[p], tokens, width, is_static) for p in PLACES[place]})
        self._prepare_query_side(trains)
        self.eval()

    def _prepare_query_side(self, trains: str) -> None:
        """Give queries their own copies of what trains beside the prompts."""
        visual = self.clip.visual
        self.query_blocks: nn.ModuleList | None = None
        self.query_norms: nn.ModuleList | None = None
        self.query_head: nn.Parameter | None = None
        if trains == "all":
            self.query_blocks = copy.deepcopy(visual.transformer.resblocks).requires_grad_(True)
            self.query_head = nn.Parameter(visual.proj.detach().clone())
        if trains == "norms":
            self.query_norms = nn.ModuleList(QueryBlock(block) for block in visual.transformer.resblocks)
        self.query_norm: nn.Module | None = None
        if trains != "prompts":
            self.query_norm = copy.deepcopy(visual.ln_post).requires_grad_(True)
        for name, module in self.clip.named_modules():
            is_trained = trains == "all" or (trains == "norms" and isinstance(module, nn.LayerNorm))
            if is_trained and not name.startswith("visual"):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
        for scalar in ("logit_scale", "logit_bias"):
            if getattr(self.clip, scalar, None) is not None:
                getattr(self.clip, scalar).requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"text": (B, context)}``; what is longer than the context is cut."""
        return {"text": self._tokenizer(list(texts))}

    def portable_tokenizer(self) -> PortableTokenizer:
        """That of CLIP."""
        return PortableTokenizer(portable_clip_tokenizer(self._tokenizer), {"text": "ids"})

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 1 + N + S, D) in float32, target (B, 1, E) of unit norm."""
        visual = self.clip.visual

        def encode(part: Tensor) -> Tensor:
            x = visual._embeds(part)  # (b, 1 + N, D)
            target = visual._pool(visual.transformer(x))[0] @ visual.proj  # (b, E)
            style = self.style_space(self._grams(part))  # (b, d)
            return torch.cat([to_float32(one).flatten(1) for one in (x, style, target)], 1)

        with torch.no_grad():  # none of it trains
            found = encode_images(encode, pixels, False)
        width, embedding = visual.proj.shape
        split = [found.shape[1] - self.style["width"] - embedding, self.style["width"], embedding]
        x, style, target = torch.split(found, split, 1)
        rows = -(-style.shape[1] // width)
        padded = F.pad(style, (0, rows * width - style.shape[1]))
        count = x.shape[0]  # an exported graph takes len() as fixed
        reference = torch.cat([x.view(count, -1, width), padded.view(count, rows, width)], 1)
        if self.is_shared:
            return ImageFeatures(reference, self.embed_prompted(reference)[:, None])
        return ImageFeatures(reference, l2_normalize(target)[:, None])

    def _grams(self, pixels: Tensor) -> Tensor:
        """Pixels as the transform gives them (B, 3, H, W) → logarithms of Gram matrices (B, G), in float32."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in self._colours)
        with torch.autocast(pixels.device.type, enabled=False):
            found: Tensor = self.filters(to_float32(pixels) * std + mean)
        return found

    def _split(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Reference (B, L, D) → transformer's input (B, 1 + N, D) and style vectors (B, d)."""
        width = self.style["width"]
        rows = -(-width // reference.shape[2])
        return reference[:, :-rows], reference[:, -rows:].flatten(1)[:, :width]

    def _mixture(self, place: str, style: Tensor) -> Tensor:
        """Style vectors (B, d) → weights of the rows of a table (B, R)."""
        if place == "shallow":
            return self.style_space.weights(style)
        first = style[:, : self.style["rank"]]
        return torch.cat([torch.ones_like(first[:, :1]), first / first.shape[1] ** 0.5], 1)

    def embed_prompted(self, reference: Tensor) -> Tensor:
        """Reference (B, L, D) → embeddings (B, E) of the images alone, unit norm."""
        x, style = self._split(to_float32(reference))
        visual = self.clip.visual
        own = [blocks for blocks in (self.query_blocks, self.query_norms) if blocks is not None]
        blocks = own[0] if own else visual.transformer.resblocks
        for number, block in enumerate(blocks):
            is_first, is_last = number == 0, number == len(blocks) - 1
            for place, here in (("shallow", is_first), ("deep", is_last)):
                if here and place in self.tables:
                    x = torch.cat([x[:, :1], self.tables[place](self._mixture(place, style)), x[:, 1:]], 1)
            x = block(x)
        head = visual.proj if self.query_head is None else self.query_head
        norm = visual.ln_post if self.query_norm is None else self.query_norm
        return l2_normalize(norm(x[:, 0]) @ head)

    def _embed_text(self, tokens: Tokens) -> Tensor:
        """(B, E), unit norm."""
        return l2_normalize(encode_text(self.clip, tokens["text"], self._padding))

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, L, D) and texts → queries (B, E)."""
        image, text = self.embed_prompted(reference), self._embed_text(tokens)
        return Composed(l2_normalize(image + text), parts=(image, text))

    def compose_image(self, features: ImageFeatures) -> Tensor:
        """The image with its prompts."""
        return self.embed_prompted(features.reference)

    def compose_text(self, tokens: Tokens) -> Composed:
        """The text's own embedding."""
        return Composed(self._embed_text(tokens))

    def encode_text_target(self, tokens: Tokens) -> Tensor:
        """The text's own embedding (B, 1, E); it moves where ``trains`` is not ``prompts``."""
        return self._embed_text(tokens)[:, None]

    @property
    def query_is_sum(self) -> bool:
        """The query is the sum of an embedding of the image and one of the text."""
        return True

    @property
    def statistics_sample(self) -> int:
        """Pictures that the style space is fitted to, until it is."""
        return 0 if bool(self.style_space.is_fitted) else 1024

    def describe_reference(self, reference: Tensor) -> Mapping[str, Tensor]:
        """How near each style's centre is, {name: (B,)}, summing to 1; nothing before the style space is fitted."""
        if not bool(self.style_space.is_fitted):
            return {}
        weights = self.style_space.weights(self._split(to_float32(reference))[1])  # (B, S)
        return dict(zip(self.style["names"], weights.T, strict=True))

    def fit_statistics(self, references: Tensor, labels: Sequence[str | None], targets: Tensor) -> None:
        """Fit the style space to pictures (N, 3, H, W), styles named by label, and to targets, which are photographs.

        Pictures without a label among labelled ones are left out. Without any label the centres are found by k-means,
        and are called ``cluster 1`` and so on.
        Raises ``InputError`` if labels and ``names`` differ.
        """
        styles = self.style["names"]
        device = self.style_space.mean.device
        if any(labels):
            references = references[[number for number, label in enumerate(labels) if label]]
            labels = [label for label in labels if label]
        parts = [*torch.split(references, 32), *torch.split(targets, 32)]
        grams = torch.cat([self._grams(part.to(device)) for part in parts if len(part)])
        if not any(labels):
            self.style_space.fit(grams, None)
            self.style["names"] = [f"cluster {n + 1}" for n in range(len(styles))]
            return
        names = [*map(str, labels), *[PHOTO] * len(targets)]
        if set(names) != set(styles):
            has = f"{', '.join(sorted(set(names)))}: name these, or take more triplets, so that each style occurs"
            raise InputError(
                f"backbone_options.style.names is {', '.join(styles)}, and the references' labels are {has}"
            )
        self.style_space.fit(grams, [styles.index(name) for name in names])

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The visual tower, the filters and the style space; and prompts and norms that photographs share."""
        own = (self.query_blocks, self.query_norms, self.query_norm, self.query_head, self.tables)
        shared = [part for part in own if part is not None] if self.is_shared else []
        return [self.clip.visual, self.filters, self.style_space, *shared]

    @property
    def is_shared(self) -> bool:
        """Whether photographs are embedded with the same prompts as queries."""
        return bool(self.options["prompts"] == "shared")

    def train(self, mode: bool = True) -> "Freestyle":
        """Stays in eval mode: nothing in it has another mode."""
        nn.Module.train(self, False)
        return self


def complete_style(style: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the style space, completed by ``STYLE``. Raises ``InputError`` for what makes no sense."""
    if unknown := [name for name in style if name not in STYLE]:
        raise InputError(f"freestyle: style has no {unknown[0]!r}; known: {', '.join(STYLE)}")
    found = {**STYLE, **style}
    for name, value in found.items():
        kinds = (float, int) if name == "temperature" else type(STYLE[name])
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"freestyle: style.{name} cannot be {value!r}")
    names = found["names"] = list(found["names"])
    if len(set(names)) < len(names) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise InputError(f"freestyle: style.names must be at least two different names, got {names}")
    if found["width"] < 1:
        raise InputError(f"freestyle: style.width must be at least 1, got {found['width']}")
    if not 1 <= found["rank"] <= found["width"]:
        raise InputError(f"freestyle: style.rank must be from 1 to style.width {found['width']}, got {found['rank']}")
    if not found["temperature"] > 0:
        raise InputError(f"freestyle: style.temperature must be above 0, got {found['temperature']}")
    return found


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises ``InputError`` for a value that does not exist, and where nothing would train."""
    for name, known in (("prompts", PROMPTS), ("place", tuple(PLACES)), ("trains", TRAINED)):
        if options[name] not in known:
            raise InputError(f"freestyle: {name} cannot be {options[name]!r}; known: {', '.join(known)}")
    if options["tokens"] < 1:
        raise InputError(f"freestyle: tokens must be at least 1, got {options['tokens']}")
    if options["place"] == "none" and options["trains"] == "prompts":
        raise InputError("freestyle: without prompts, trains: prompts leaves nothing to train")
