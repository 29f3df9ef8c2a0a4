"""The skip list: images that a person leaves out since they are missing or broken, honoured by everything."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import read_json, write_text

NAME = "skip_list.json"


def read_skip_list(root: Path | None) -> dict[str, str]:
    """Image id → reason, from a dataset's root; empty if there is no list."""
    path = root and root / NAME
    if path is None or not path.is_file():
        return {}
    listed = read_json(path)
    if not isinstance(listed, dict) or not all(isinstance(reason, str) for reason in listed.values()):
        raise InputError(f"{path}: expected an object of image ids and reasons")
    return listed


def write_skip_list(root: Path, reasons: Mapping[str, str]) -> Path:
    """Write the list into a dataset's root."""
    write_text(root / NAME, json.dumps(dict(sorted(reasons.items())), indent=0) + "\n")
    return root / NAME


def skip_notes(dataset: Dataset) -> list[str]:
    """One line on what the skip list leaves out; none without a list."""
    if not dataset.skip_reasons:
        return []
    kinds = ", ".join(f"{count} {reason}" for reason, count in Counter(dataset.skip_reasons.values()).most_common())
    path = dataset.root and dataset.root / NAME
    return [f"{dataset.name}: {path} leaves out {len(dataset.skip_reasons)} images ({kinds})"]
