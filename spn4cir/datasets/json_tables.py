"""JSON files of images and captions as rows: COCO's, a list of objects, an object by image, or one object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spn4cir.datasets.text_tables import find_encoding, open_bytes
from spn4cir.errors import InputError
from spn4cir.files import Row, parse_row, short

SHAPES = "images and annotations (COCO), a list of objects, an object of image and caption, or an object a line"


def read_json_rows(path: Path, encoding: str | None = None) -> list[Row]:
    """Return the rows of a JSON or JSONL file. Raises ``InputError`` if it is neither, or of another shape."""
    found = find_encoding(path, encoding)
    with open_bytes(path) as file:
        text = file.read().decode(found, "strict")
    text = text.removeprefix("\ufeff")
    if ".jsonl" in "".join(path.suffixes).lower():
        return list(_lines(path, text))
    try:
        content = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return list(_lines(path, text))
        raise InputError(f"{path} is not valid JSON, or cut short: {error}") from None
    except RecursionError:
        raise InputError(f"{path} is not valid JSON, or cut short: it is nested too deeply") from None
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return list(_coco_rows(path, content))
    if isinstance(content, dict) and "image_id" not in content and "caption" not in content:
        return [{"image": image, "caption": caption} for image, caption in content.items()]
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, entry {number}: expected {SHAPES}, got {short(row)}")
    return rows


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield parse_row(path, number, line)
            except RecursionError:
                raise InputError(f"{path}, line {number}: it is nested too deeply") from None


def _coco_rows(path: Path, content: Row) -> Iterator[Row]:
    """A row for each image with all its captions, or the sentences of Karpathy's splits."""
    captions: dict[Any, list[str]] = {}
    annotations = content.get("annotations", [])
    for number, one in enumerate(annotations if isinstance(annotations, list) else [annotations], 1):
        if not isinstance(one, dict) or not isinstance(one.get("image_id"), str | int):
            raise InputError(f"{path}, annotation {number}: expected an object with an image_id, got {short(one)}")
        if isinstance(one.get("caption"), str):
            captions.setdefault(one["image_id"], []).append(one["caption"])
    for number, image in enumerate(content["images"], 1):
        name = (image.get("file_name") or image.get("filename")) if isinstance(image, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{path}, image {number}: expected an object with a file_name, got {short(image)}")
        sentences = image.get("sentences")
        raw = [s["raw"] for s in sentences if isinstance(s, dict) and "raw" in s] if isinstance(sentences, list) else []
        number_of = image.get("id")
        own = captions.pop(number_of, []) if isinstance(number_of, str | int) else []
        yield {"image": name, "caption": [*own, *raw], "number": number_of}
    if captions:
        lost = next(iter(captions))
        raise InputError(f"{path}: {len(captions)} image_id of annotations name no image, such as {short(lost)}")
