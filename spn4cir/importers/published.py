"""A published checkpoint in the names of a backbone here, and what every importer needs to read one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from spn4cir.errors import InputError

# beginnings of the names of entries that only resuming a training needs
PROGRESS = ("epoch", "optimizer", "scheduler", "lr_scheduler", "scaler")


class Published(NamedTuple):
    """A published checkpoint in the names of a backbone."""

    options: dict[str, Any]  # what rebuilds the backbone
    state: dict[str, Tensor]  # weights under the names of its ``state_dict``
    ignored: dict[str, str]  # why each other name of the file is not needed
    container: str  # what kind of file it is, in a few words
    lacks: str = ""  # the part that another file holds; empty for a whole model
    temperature: float | None = None  # that its training learned, if the file holds one


def find_state_dict(
    content: Mapping[str, Any], *keys: str, prefix: str = ""
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The first of these entries that a file has, its state dict, and what beside it is ignored, with the reason.

    Raises ``InputError`` if it has none of them or no state dict there, if no name in ``state_dict`` begins with the
    prefix, or if anything beside it is more than the progress of a training.
    """
    key = next((key for key in keys if key in content), None)
    if key is None:
        found = ", ".join(map(repr, list(content)[:5])) or "nothing"
        names = f"neither {' nor '.join(keys)} is" if len(keys) > 1 else f"{keys[0]} is not"
        raise InputError(f"{names} an entry of it; found {found}")
    beside = [name for name in content if name != key]
    if unknown := [name for name in beside if not str(name).startswith(PROGRESS)]:
        raise InputError(f"beside {key} there is {unknown[0]!r}, which is unknown here")
    state = content[key]
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        what = type(state).__name__ if state else "empty"
        raise InputError(f"{key} is {what}, not a dictionary of named tensors")
    if key == "state_dict" and not any(name.startswith(prefix) for name in state):
        raise InputError(f"the names in state_dict should begin with {prefix}, not as in {next(iter(state))}")
    return key, dict(state), dict.fromkeys(beside, "progress of its training")


@contextmanager
def recognising(source: str) -> Iterator[None]:
    """Turn what reading shapes raises into an ``InputError`` that names the missing tensor, or else the source."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"the architecture cannot be recognised without {error.args[0]}") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise InputError(f"the architecture cannot be recognised by {source}") from None


def read_text_config(state: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    """Read from shapes what a configuration states of a BERT, with heads of width 64. Raises ``KeyError``."""
    layers = f"{prefix}encoder.layer."
    words, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": len({name[len(layers) :].split(".")[0] for name in state if name.startswith(layers)}),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state[f"{layers}0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[f"{prefix}embeddings.position_embeddings.weight"].shape[0],
    }


def read_temperature(state: Mapping[str, Any], *names: str) -> tuple[float | None, dict[str, str]]:
    """The learned temperature under the first of these names that the file has, and a reason to ignore each of them.

    Raises ``InputError`` if it is not above 0.
    """
    held = {name: value for name in names if isinstance(value := state.get(name), Tensor) and value.numel() == 1}
    found = {name: float(value) for name, value in held.items()}
    first = next(iter(found), "")
    if first and not 0 < found[first] < float("inf"):
        raise InputError(f"{first}, the temperature, is {found[first]}, no number above 0")
    told = {name: f"learned temperature {number:.4g}, which the checkpoint notes" for name, number in found.items()}
    return found.get(first), told | {name: "temperature of an earlier stage" for name in found if name != first}


# content of a published file, and the options that the user states → the checkpoint in our names; options that are not
# stated are recognised; raises ``InputError`` for a file of another format
Importer = Callable[[Mapping[str, Any], Mapping[str, Any]], Published]
