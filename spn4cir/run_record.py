"""What a run folder records for others: settings without the folders of this machine, and results."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.files import read_json, read_jsonl

PATH_SETTINGS = ("data_root", "generated", "init", "output", "resume", "extra")
"""Settings whose value is a path, whatever it looks like."""
SOURCES = ("model", "image", "text", "pretrained", "tokenizer", "prompts")
"""Options of backbones whose value is a path, a name on the hub, or a word."""
HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
FILE_NAMES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".jsonl", ".txt", ".csv", ".yaml", ".npy")
PATH_START = re.compile(r"[/\\]|[A-Za-z]:[/\\]|~[^/\\]*[/\\]|\.{1,2}[/\\]")


def strip_places(value: Any, name: str = "") -> Any:
    """Return a setting of that name without the folders of this machine: of each path its last name.

    Example:
        >>> strip_places({"generated": "../alice/made.json", "model": "hf-hub:owner/name"})
        {'generated': 'made.json', 'model': 'hf-hub:owner/name'}
    """
    if isinstance(value, Mapping):
        return {key: strip_places(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strip_places(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    schemes = re.match(r"([\w.-]{2,}:)*", value)
    start = schemes.end() if schemes else 0  # such as open_clip:local-dir:
    place = value[start:]
    if not _is_path(name, value[:start], place):
        return value
    return value[:start] + re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def _is_path(name: str, schemes: str, place: str) -> bool:
    if name in PATH_SETTINGS or schemes.endswith(("local-dir:", "run:")) or PATH_START.match(place):
        return True
    if name not in SOURCES or schemes.endswith("hf-hub:"):
        return False
    return not HUB_NAME.fullmatch(place) or place.endswith(FILE_NAMES) or os.path.exists(place)  # noqa: PTH110 - long names are no error


def read_run_settings(folder: Path) -> dict[str, Any]:
    """All settings of ``config.yaml``, completed by the defaults; {} for a folder without them.

    Raises ``InputError`` if the file is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"config file {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"config file {path} must hold keys and values")
    return {**dataclasses.asdict(TrainConfig()), **content}


def read_run_result(folder: Path) -> dict[str, Any]:
    """The content of ``result.json``, checked; {} for a folder without it. Raises ``InputError`` if it is damaged."""
    path = folder / "result.json"
    if not path.is_file():
        return {}
    result = read_json(path)
    if not isinstance(result, dict):
        raise InputError(f"{path} is damaged: expected an object")
    _check_evaluation(path, result)
    counts = result.get("triplets", {})
    names = ("annotated", "generated")
    if not isinstance(counts, dict) or (counts and any(not isinstance(counts.get(name), int) for name in names)):
        raise InputError(f"{path} is damaged: triplets must hold the numbers annotated and generated")
    return result


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Results that ``spn4cir-eval --json`` wrote into a folder, by file name. Raises ``InputError`` for a damaged file.

    Other JSON files are passed over.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name in ("model.json", "result.json", "made_from.json") or not path.is_file():
            continue
        content = read_json(path)
        if isinstance(content, dict) and {"protocol", "metrics"} <= content.keys():
            _check_evaluation(path, content)
            found.append(content)
    return found


def has_several_evaluations(folder: Path, result: Mapping[str, Any]) -> bool:
    """Whether the weights of a run are the best of several evaluations."""
    if result.get("best_step") != result.get("steps"):
        return True
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    return sum(bool(row.keys() & result["metrics"].keys()) for row in rows) > 1


def _check_evaluation(path: Path, content: Mapping[str, Any]) -> None:
    metrics = content.get("metrics")
    if not isinstance(content.get("protocol"), str):
        raise InputError(f"{path} is damaged: protocol must be a text")
    if not isinstance(metrics, dict) or not metrics:
        raise InputError(f"{path} is damaged: metrics must hold names and numbers")
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path} is damaged: the metric {name} must be a number")
