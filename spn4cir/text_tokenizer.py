"""Tokenizers of transformers, for backbones and for whoever counts what a backbone reads."""

from pathlib import Path
from typing import Any

from spn4cir.errors import InputError


def load_tokenizer(source: str | Path, advice: str) -> Any:
    """Load a tokenizer of transformers from a folder, which may hold BERT's ``vocab.txt`` alone, or a name on the hub.

    Raises ``InputError`` with this advice if there is no such tokenizer.
    """
    from transformers import AutoTokenizer, BertTokenizer

    folder = Path(source)
    is_vocabulary = (folder / "vocab.txt").is_file() and not any(folder.glob("tokenizer*.json"))  # nothing says whose
    try:
        return (BertTokenizer if is_vocabulary else AutoTokenizer).from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(f"cannot load tokenizer {str(source)!r} ({advice}): {said}") from None
