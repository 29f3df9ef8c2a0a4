"""Engines by the scheme of their address, for more vectors than one machine holds."""

from __future__ import annotations

from spn4cir.index.searchable import SearchableIndex
from spn4cir.model import Model


def open_engine(address: str, model: Model | None) -> SearchableIndex | None:
    """The index that an engine holds at an address; None for anything but such an address."""
    return None
