"""Files written whole or not at all."""

import os
from pathlib import Path

from spn4cir.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it. Raises ``InputError`` where it cannot be written."""
    beside = path.with_name(path.name + ".tmp")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
