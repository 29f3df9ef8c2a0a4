"""Engines by the scheme of their address, for more vectors than one machine holds, and exports of an index to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from spn4cir.errors import InputError
from spn4cir.index.exporting import Exported
from spn4cir.index.searchable import SearchableIndex
from spn4cir.model import Model


def open_engine(address: str, model: Model | None) -> SearchableIndex | None:
    """The index that an engine holds at an address, such as ``qdrant://HOST:PORT/COLLECTION``; None for a path.

    Raises:
        InputError: for an address of an unknown engine, or if the engine is down, holds no such index, or holds one of
            another model.
    """
    scheme = _read_scheme(address)
    return ENGINES[scheme](address, model) if scheme else None


def export_index(path: Path, to: str, address: str) -> Exported:
    """Copy an index to an engine or to plain files; a later export of the same index copies what has changed.

    Args:
        path: folder of the index.
        to: ``npy`` or ``qdrant``.
        address: a folder; or for ``qdrant`` also ``qdrant://HOST:PORT/COLLECTION``.

    Raises:
        InputError: if there is no index, or the address is wrong, cannot be reached or holds something else.
    """
    if to not in EXPORTERS:
        raise InputError(f"an index is exported to {' or '.join(EXPORTERS)}, not to {to!r}")
    return EXPORTERS[to](path, address)


def _read_scheme(address: str) -> str:
    """The scheme of an engine's address; empty for a path."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme in ENGINES:
        return scheme
    if rest.startswith("//") and re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
        raise InputError(f"{address}: there is no engine {scheme!r}; known: {', '.join(ENGINES)}")
    return ""


def _open_qdrant(address: str, model: Model | None) -> SearchableIndex:
    from spn4cir.index.qdrant import open_index

    return open_index(address, model)


def _export_qdrant(path: Path, address: str) -> Exported:
    from spn4cir.index.qdrant import export_qdrant, open_collection

    return export_qdrant(path, open_collection(address if _read_scheme(address) else f"qdrant:{address}"))


def _export_npy(path: Path, address: str) -> Exported:
    from spn4cir.index.npy import export_npy

    return export_npy(path, Path(address))


ENGINES: dict[str, Callable[[str, Model | None], SearchableIndex]] = {
    "qdrant": _open_qdrant,
    "qdrant+https": _open_qdrant,
}
EXPORTERS: dict[str, Callable[[Path, str], Exported]] = {"npy": _export_npy, "qdrant": _export_qdrant}
