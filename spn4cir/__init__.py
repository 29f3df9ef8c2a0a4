"""spn4cir: composed image retrieval by scaling positives and negatives.

Example:
    >>> import spn4cir
    >>> model = spn4cir.load("embedded")
    >>> model.embed_queries(texts=["a red heart"]).shape
    torch.Size([1, 128])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spn4cir.errors import InputError as InputError
    from spn4cir.index.local import Index as Index
    from spn4cir.index.searchable import Hit as Hit
    from spn4cir.model import Model as Model
    from spn4cir.model import load as load
    from spn4cir.types import Benchmark as Benchmark
    from spn4cir.types import Query as Query
    from spn4cir.types import Triplet as Triplet

__version__ = "0.1.0"
_HOMES = {
    "load": "model",
    "Model": "model",
    "Index": "index.local",
    "Hit": "index.searchable",
    "Triplet": "types",
    "Query": "types",
    "Benchmark": "types",
    "InputError": "errors",
}
__all__ = ["Benchmark", "Hit", "Index", "InputError", "Model", "Query", "Triplet", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import spn4cir`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spn4cir' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"spn4cir.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
