"""How long a text is for the backbone that will read it: tokens, begin and end marks included."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from spn4cir.errors import InputError

EMBEDDED = Path(__file__).parent.parent / "spn4cir" / "embedded" / "clip"


class TokenCounter:
    """Counts tokens as a backbone's ``tokenize`` would make them before it cuts.

    Marks count. A backbone that leaves punctuation out of its texts reads fewer tokens than are counted here, never
    more: what fits here is not cut there.

    Args:
        tokenizer: ``clip``, that of OpenAI's CLIP; ``embedded``, that of the embedded CLIP; or one of transformers by
            name or folder, which may hold ``vocab.txt`` alone.

    Raises:
        InputError: if there is no such tokenizer.
    """

    def __init__(self, tokenizer: str):
        self._clean: Any = None
        if tokenizer not in ("clip", "embedded"):
            self._library = _load(tokenizer)
            return
        own = _of_clip(tokenizer)
        self._clean, self._library = own.clean_fn, getattr(own, "tokenizer", None)
        self._tokens_of_word = lru_cache(1 << 20)(lambda word: len(own.encode(word)))

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """Texts → their numbers of tokens."""
        if self._clean:
            texts = [" ".join(text.split()) if _is_plain(text) else self._clean(text) for text in texts]
        if self._library is None:  # no token of CLIP's reaches over a space
            return [2 + sum(self._tokens_of_word(word) for word in text.lower().split()) for text in texts]
        if not texts:
            return []
        found = self._library(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]


@lru_cache(2)
def _of_clip(tokenizer: str) -> Any:
    """open_clip's; the large one takes a second to read."""
    import open_clip

    return open_clip.get_tokenizer("ViT-L-14" if tokenizer == "clip" else f"local-dir:{EMBEDDED}")


def _is_plain(text: str) -> bool:
    """Whether nothing in it can be a broken encoding or an HTML entity, the search for which takes most of the time."""
    return text.isascii() and text.isprintable() and "&" not in text


def _load(source: str) -> Any:
    from transformers import AutoTokenizer, BertTokenizer

    folder = Path(source)
    bare = (folder / "vocab.txt").is_file() and not any(folder.glob("tokenizer*.json"))  # nothing says whose
    try:
        return (BertTokenizer if bare else AutoTokenizer).from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(
            f"tokenizer {source!r} cannot be loaded; give clip, embedded, or a folder of a tokenizer: {said}"
        ) from None
