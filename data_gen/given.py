"""Captions that nobody has to make: of a file, or those that came with the dataset."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spn4cir.data_gen.answers import tidy
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import read_json, short


def known_captions(config: GenerateConfig, dataset: Dataset, ids: Iterable[str]) -> dict[str, str]:
    """Image id → caption: all of ``--captions`` if that is set, else those of these images that have one.

    Raises ``InputError`` if the file cannot be read.
    """
    if config.captions:
        return read_captions(dataset.file(config.captions))
    return {image_id: text for image_id in ids if (text := tidy(dataset.caption(image_id)))}


def read_captions(path: Path) -> dict[str, str]:
    """Captions by image id, the last of several, of JSON or JSON lines. Raises ``InputError`` for a damaged file."""
    entries = read_json(path) if path.suffix != ".jsonl" else _lines(path)
    found = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        image_id, text = (entry.get("image_id"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if not isinstance(image_id, str) or not isinstance(text, str):
            raise InputError(f"{path}, entry {number}: expected an image_id and a caption, got {short(entry)}")
        if text := tidy(text):
            found[image_id] = text
    return found


def _lines(path: Path) -> list[Any]:
    """JSON lines that somebody else wrote: the last need not end."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from None
