"""What BLIP and BLIP-2 share: models of transformers by name or folder, and BERT's tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from spn4cir.backbones.shared_weights import READS_WEIGHTS
from spn4cir.errors import InputError
from spn4cir.text_tokenizer import load_tokenizer

M = TypeVar("M", bound=PreTrainedModel)
C = TypeVar("C", bound=PreTrainedConfig)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
BERT = "bert-base-uncased"


def load_settings(kind: type[C], model: str | Path) -> C:
    """The configuration of a folder, or of a name on the hub. Raises ``InputError`` if there is none."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():  # else: defaults
        raise InputError(f"{model} holds no config.json")
    try:
        return cast(C, kind.from_pretrained(model))
    except UNREADABLE as error:
        raise _unreadable(kind.__name__, model, error) from None


def _unreadable(kind: str, model: str | Path, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:200]
    files = "a folder that holds config.json and model.safetensors, or --init FOLDER of spn4cir-import"
    return InputError(f"cannot load {kind} {str(model)!r} (where there is no network, give {files}): {said}")


def load_library(kind: type[M], model: str | Path | None, config: Mapping[str, Any] | None) -> M:
    """Load a model of transformers in float32 and eval mode; where ``READS_WEIGHTS`` is false, with random weights.

    Args:
        model: folder, or name on the hub; None for ``config`` alone, with random weights.
        config: its configuration as a dictionary; None takes that of ``model``.

    Raises ``InputError`` if there is no such model, or if it lacks weights or has others.
    """
    settings = load_settings(kind.config_class, model or "") if config is None else None
    try:
        settings = settings or kind.config_class.from_dict(dict(config or {}))
        if model is None or not READS_WEIGHTS.get():
            return cast(M, kind(settings).eval())
        loaded, report = kind.from_pretrained(model, config=settings, dtype=torch.float32, output_loading_info=True)
    except UNREADABLE as error:
        raise _unreadable(kind.__name__, model or "of that config", error) from None
    for word in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, report[word])):
            raise InputError(f"{model}: {len(found)} {word.replace('_', ' ')} for {kind.__name__}, such as {found[0]}")
    return cast(M, loaded.eval())


def load_bert_tokenizer(source: str | Path, size: int, added: Sequence[str] = ()) -> Any:
    """Load BERT's tokenizer with ``size`` entries; special tokens in ``added`` are appended where they are missing.

    Raises ``InputError`` if there is no such tokenizer, or it has another number of entries than the model.
    """
    advice = f"give as option tokenizer a folder that holds vocab.txt of {BERT}, from huggingface.co/{BERT}"
    tokenizer = load_tokenizer(source, f"where there is no network, {advice}")
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": [word for word in added if word not in known]})
    if len(tokenizer) != size:
        raise InputError(f"tokenizer {str(source)!r} has {len(tokenizer)} entries, and the model has {size}")
    return tokenizer
