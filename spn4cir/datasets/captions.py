"""Files of captions beside pictures: tables or JSON, which name pictures by path, file name, stem or number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from spn4cir.datasets.html_text import strip_html
from spn4cir.datasets.roles import ROLES
from spn4cir.datasets.table_settings import TableSettings
from spn4cir.datasets.tables import load_table
from spn4cir.errors import InputError
from spn4cir.files import short

IMAGE_NAMES = (*ROLES["id"], *ROLES["image"])


def load_captions(path: Path, settings: TableSettings | None = None) -> dict[str, tuple[str, ...]]:
    """Return what the file calls an image → all its captions, each on one line.

    Raises ``InputError`` that names the file and the row if it cannot be read, or lacks a column.

    Args:
        path: a table with columns image_id (or image, file_name, …) and caption, or JSON as COCO has it, or a JSON
            object of image → caption or list of captions.
        settings: encoding, strict mode, and columns that were named.
    """
    given = settings or TableSettings()
    how = TableSettings(image=given.image, caption=given.caption, encoding=given.encoding, strict=given.strict)
    table = load_table(path, {"image": IMAGE_NAMES, "caption": ROLES["caption"]}, how)
    image, caption = table.find("image", IMAGE_NAMES, needed=True), table.find("caption", ROLES["caption"], needed=True)
    assert image is not None and caption is not None
    found: dict[str, tuple[str, ...]] = {}
    for row, (name, texts) in enumerate(zip(table.text(image), table.texts(caption), strict=True), 1):
        if not name.strip():
            raise InputError(f"{path}, row {row}, column {image!r}: names no image")
        lines = [line for text in texts if (line := " ".join(strip_html(text).split()))]
        name = name.strip().removeprefix("./")
        found[name] = tuple(dict.fromkeys([*found.get(name, ()), *lines]))
    return {name: texts for name, texts in found.items() if texts}


def match_captions(
    path: Path, captions: Mapping[str, tuple[str, ...]], image_ids: Iterable[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return image id → captions, and names of the file that mean no image.

    A name means the image of that id, else the only one whose path ends in it, with or without its suffix; a number
    also the one whose name without suffix is that number with zeros before it. Raises ``InputError`` for a name that
    may be one of two images.
    """
    ids = dict.fromkeys(image_ids)
    ends: dict[str, list[str]] = {}
    for image_id in ids:
        inner = PurePosixPath(image_id)
        for end in {inner.name, inner.stem, inner.stem.lstrip("0")}:
            ends.setdefault(end, []).append(image_id)
    found, lost = dict[str, tuple[str, ...]](), []
    for name, texts in captions.items():
        meant = name if name in ids else _match(path, name, ends)
        if meant is None:
            lost.append(name)
        else:
            found[meant] = tuple(dict.fromkeys([*found.get(meant, ()), *texts]))
    return found, lost


def _match(path: Path, name: str, ends: Mapping[str, list[str]]) -> str | None:
    inner = PurePosixPath(name)
    candidates = [i for i in ends.get(inner.name, ()) if _is_end(i, name) or inner.name == name]
    exact = [i for i in candidates if _is_end(i, name)]
    candidates = exact or (candidates if name.isdigit() else [])
    if len(candidates) > 1:
        what = f"{short(name)} may be {short(candidates[0])} or {short(candidates[1])}"
        raise InputError(f"{path}: {what}: write the image ids as spn4cir-data shows them")
    return candidates[0] if candidates else None


def _is_end(image_id: str, name: str) -> bool:
    """Whether a path ends in a name, with or without its suffix."""
    return f"/{image_id}".endswith(f"/{name}") or f"/{image_id.rpartition('.')[0]}".endswith(f"/{name}")
