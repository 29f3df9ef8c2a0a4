"""What BLIP and BLIP-2 share: library models by name or folder, BERT's tokenizer, published names of its tower."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spn4cir.errors import InputError

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
    return InputError(
        f"cannot load {kind} {str(model)!r} (where there is no network, give a folder that holds config.json and "
        f"model.safetensors, or --init FOLDER of spn4cir-import): {said}"
    )


def load_library(kind: type[M], model: str | Path, config: Mapping[str, Any] | None, load_weights: bool) -> M:
    """A model of transformers in float32 and eval mode.

    Args:
        kind: its class.
        model: folder, or name on the hub; not read where ``config`` is given and no weights are wanted.
        config: its configuration as a dictionary; None takes that of ``model``.
        load_weights: False gives random weights.

    Raises:
        InputError: if there is no such model, or if it lacks weights or has others.
    """
    settings = None if config else load_settings(kind.config_class, model)
    try:
        settings = settings or kind.config_class.from_dict(dict(config or {}))
        if not load_weights:
            return cast(M, kind(settings).eval())
        loaded, report = kind.from_pretrained(model, config=settings, dtype=torch.float32, output_loading_info=True)
    except UNREADABLE as error:
        raise _unreadable(kind.__name__, model, error) from None
    for word in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, report[word])):
            raise InputError(f"{model}: {len(found)} {word.replace('_', ' ')} for {kind.__name__}, such as {found[0]}")
    return cast(M, loaded.eval())


def load_tokenizer(source: str | Path, size: int, added: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with ``size`` entries; special tokens in ``added`` are appended where they are missing.

    A folder may hold ``vocab.txt`` alone.

    Raises:
        InputError: if there is no such tokenizer, or it has another number of entries than the model.
    """
    folder = Path(source)
    bare = (folder / "vocab.txt").is_file() and not any(folder.glob("tokenizer*.json"))  # nothing says whose
    try:
        tokenizer = (BertTokenizer if bare else AutoTokenizer).from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(
            f"cannot load tokenizer {str(source)!r} (where there is no network, give as option tokenizer a folder that "
            f"holds vocab.txt of {BERT}, from huggingface.co/{BERT}): {said}"
        ) from None
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": [word for word in added if word not in known]})
    if len(tokenizer) != size:
        raise InputError(f"tokenizer {str(source)!r} has {len(tokenizer)} entries, and the model has {size}")
    return tokenizer
