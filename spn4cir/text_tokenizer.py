"""Tokenizers of transformers, for backbones and for whoever counts what a backbone reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spn4cir.errors import InputError


class PortableTokenizer(NamedTuple):
    """A backbone's tokenizer for programs without torch and this package.

    Attributes:
        tokenizer: a ``tokenizers.Tokenizer`` that pads and truncates as the backbone does.
        columns: name of a tensor of ``Backbone.tokenize`` → column of an encoding: ``ids`` or ``attention_mask``.
    """

    tokenizer: Any
    columns: Mapping[str, str]


def copy_tokenizer(tokenizer: Any) -> Any:
    """Copy the ``tokenizers.Tokenizer`` inside a tokenizer of transformers. Raises ``InputError`` if it has none."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(f"a {type(tokenizer).__name__} has no form that the library tokenizers can read")
    return Tokenizer.from_str(backend.to_str())


def prepend_normalizers(tokenizer: Any, *steps: Any) -> None:
    """Let a ``tokenizers.Tokenizer`` apply normalizers to a text before its own."""
    from tokenizers import normalizers

    own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([*steps, *own])


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
