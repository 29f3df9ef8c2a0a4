"""CLIP4CIR: the query is the sum of what CLIP makes of the reference image and of the text."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbone import Backbone, Published
from spn4cir.errors import InputError
from spn4cir.images import Transform
from spn4cir.types import Composed, ImageFeatures, Tokens

EMBEDDED = Path(__file__).parent.parent / "embedded" / "clip"
OPENAI = (  # quickgelu is what they were trained with: a plain name means another activation, and no shape tells
    "RN50-quickgelu", "RN101-quickgelu", "RN50x4-quickgelu", "RN50x16-quickgelu", "RN50x64-quickgelu",
    "ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu",
)  # fmt: skip
JIT_NUMBERS = ("input_resolution", "context_length", "vocab_size")


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collect open_clip's warnings that there are no weights: no news while a checkpoint is loaded, else an error.

    What it logs about a failed download is dropped: it raises the same.
    """
    texts: list[str] = []

    def pass_on(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "no CLIP weights" in text or text.startswith("No pretrained weights"):
            texts.append(text)
            return False
        return not text.startswith("Failed to download")

    root = logging.getLogger()
    root.addFilter(pass_on)
    try:
        yield texts
    finally:
        root.removeFilter(pass_on)


def _dimensions(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a config of open_clip states, read from shapes; heads are 64 wide in all of OpenAI's models.

    Raises:
        InputError: naming the tensor that would be needed.
    """

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    try:
        vision: dict[str, Any]
        if "visual.proj" in state:
            width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
            size = patch * isqrt(state["visual.positional_embedding"].shape[0] - 1)  # one more for the class
            vision = {"layers": count("visual.transformer.resblocks."), "width": width, "patch_size": patch}
        else:
            width = state["visual.layer1.0.conv1.weight"].shape[0]
            size = 32 * isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1)  # one more for the mean
            vision = {"layers": [count(f"visual.layer{n}.") for n in (1, 2, 3, 4)], "width": width, "patch_size": None}
        context, text_width = state["positional_embedding"].shape
        text = {
            "context_length": context,
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": count("transformer.resblocks."),
        }
        embed_dim = state["text_projection"].shape[1]
    except KeyError as error:
        raise InputError(f"the architecture cannot be recognised without {error}; name it with --model") from None
    except (AttributeError, IndexError, ValueError):
        raise InputError("the architecture cannot be recognised by these shapes; name it with --model") from None
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": size, **vision}, "text_cfg": text}


def recognise(state: Mapping[str, Tensor]) -> str:
    """open_clip's name of the model of OpenAI that has these shapes.

    Raises:
        InputError: with the dimensions found, if it is none of them.
    """
    found = _dimensions(state)
    for name in OPENAI:
        config = open_clip.get_model_config(name)
        if config["embed_dim"] == found["embed_dim"] and all(
            {**config[part], **found[part]} == config[part] for part in ("vision_cfg", "text_cfg")
        ):
            return name
    parts = {"": {"embed_dim": found["embed_dim"]}, "image ": found["vision_cfg"], "text ": found["text_cfg"]}
    told = ", ".join(f"{part}{key} {value}" for part, values in parts.items() for key, value in values.items())
    raise InputError(f"no model of OpenAI has {told}; name it: --model NAME of open_clip, or --model local-dir:FOLDER")


class CLIP4CIR(Backbone):
    """``q = normalise(f_img(reference) + f_txt(text))``, both un-normalised; ``t = normalise(f_img(target))``.

    L = K = 1 and D = E, CLIP's embedding width. The whole model stays in eval mode, so BatchNorm's statistics never
    move. Texts longer than CLIP's context are cut at it.

    Args:
        model: ``embedded`` (the small model that ships), or any model of open_clip by name, such as
            ``RN50x4-quickgelu``, ``ViT-L-14-quickgelu``, ``local-dir:FOLDER`` or ``hf-hub:NAME``.
        pretrained: a tag of open_clip (``openai``) or a weights file; None gives random weights, except where ``model``
            brings its own.
        load_weights: False builds the architecture alone, for a checkpoint to fill.

    Raises:
        InputError: if open_clip knows no such model, tag or file.

    Source: Baldrati et al., "Conditioned and composed image retrieval combining and partially fine-tuning CLIP-based
    features", CVPRW 2022, with the element-wise sum.
    """

    name = "clip4cir"

    def __init__(self, model: str = "embedded", pretrained: str | None = None, load_weights: bool = True):
        super().__init__()
        self.options = {"model": model, "pretrained": pretrained}
        located = f"local-dir:{EMBEDDED}" if model == "embedded" else model
        try:
            with _missing_weights() as missing:
                self.clip = open_clip.create_model(
                    located, pretrained=pretrained, load_weights=load_weights, weights_only=True
                )
                self._tokenizer = open_clip.get_tokenizer(located)
        except (RuntimeError, ValueError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(
                f"clip4cir: cannot load model {model!r}, pretrained {pretrained!r} (where there is no network, give a "
                f"file of weights as pretrained, or --init FOLDER of spn4cir-import): {said}"
            ) from None
        if load_weights and missing and located.startswith("local-dir:"):
            raise InputError(f"clip4cir: {located.removeprefix('local-dir:')} holds a config but no weights")
        for scalar in ("logit_scale", "logit_bias"):  # the loss has its own temperature
            if getattr(self.clip, scalar, None) is not None:
                getattr(self.clip, scalar).requires_grad_(False)
        sample = self._tokenizer(["a"])[0]  # begin, word, end, padding
        self._padding = int(sample[-1])
        size = self.clip.visual.image_size
        mean, std = self.clip.visual.image_mean, self.clip.visual.image_std
        self.transform = Transform(size[0] if isinstance(size, tuple) else size, mean=tuple(mean), std=tuple(std))
        self.eval()

    @classmethod
    def from_published(cls, content: Mapping[str, Any], options: Mapping[str, Any]) -> Published:
        """Weights of the original (entry ``CLIP``, OpenAI's names) or of SPN's stage 2 (``state_dict``, ``clip.``).

        Raises:
            InputError: if it is neither, or if no ``model`` is stated and the shapes are not those of one of OpenAI's.
        """
        if "CLIP" in content:
            state, ignored = Published.entry(content, "CLIP")
            state, container = {f"clip.{name}": value for name, value in state.items()}, "CLIP, OpenAI's names"
        elif "state_dict" in content:
            state, ignored = Published.entry(content, "state_dict")
            container = "state_dict, prefix clip."
            if not any(name.startswith("clip.") for name in state):
                raise InputError(f"the names in state_dict should begin with clip., not as in {next(iter(state))}")
        else:
            found = ", ".join(map(repr, list(content)[:5])) or "nothing"
            raise InputError(f"neither CLIP nor state_dict is an entry of it; found {found}")
        for name in JIT_NUMBERS:
            if state.pop(f"clip.{name}", None) is not None:
                ignored[f"clip.{name}"] = "a number beside the weights of OpenAI's archives"
        named = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
        model = options.get("model") or recognise(named)
        if f"{model}-quickgelu" in OPENAI:
            raise InputError(f"{model} has another activation than OpenAI's weights: the model is {model}-quickgelu")
        return Published({"model": model, "pretrained": None}, state, ignored, container)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """B texts → ``{"text": (B, context)}``; an empty one, which CIRR's test1 has, is a text without words."""
        return {"text": self._tokenizer(list(texts))}

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) → reference (B, 1, E) as CLIP gives it, target (B, 1, E) of unit norm."""
        features = self.clip.encode_image(pixels)  # (B, E)
        return ImageFeatures(features[:, None], F.normalize(features.float(), dim=-1)[:, None])

    def compose(self, reference: Tensor, tokens: Tokens) -> Composed:
        """(B, 1, E) and texts → queries (B, E)."""
        text = self._encode_text(tokens["text"])  # (B, E)
        return Composed(F.normalize(reference[:, 0].float() + text.float(), dim=-1))

    def _encode_text(self, text: Tensor) -> Tensor:
        """(B, context) → (B, E), as open_clip's ``encode_text``, without the columns that are padding in all rows.

        With causal attention no position sees what comes after it, so cutting the tail changes nothing but the time.
        """
        clip = self.clip
        if (
            not isinstance(clip, open_clip.CLIP)
            or clip.attn_mask is None
            or clip.text_pool_type not in ("argmax", "eos")
            or not isinstance(clip.text_projection, Tensor)
        ):
            return clip.encode_text(text)  # type: ignore[no-any-return]
        used = (
            int((text != self._padding).any(0).nonzero().max()) + 2
        )  # one more, as some models pad with the end token
        text = text[:, :used]  # (B, T)
        used = text.shape[1]
        x = clip.token_embedding(text) + clip.positional_embedding[:used]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:used, :used]))  # (B, T, width)
        pooled = text_global_pool(x, text, clip.text_pool_type, eos_token_id=clip.text_eos_id)  # (B, width)
        return pooled @ clip.text_projection  # type: ignore[no-any-return]

    def image_side(self) -> list[nn.Module | nn.Parameter]:
        """The visual tower."""
        return [self.clip.visual]

    def train(self, mode: bool = True) -> "CLIP4CIR":
        """Stays in eval mode: CLIP has no dropout, and its BatchNorm statistics are not to move."""
        nn.Module.train(self, False)
        return self
