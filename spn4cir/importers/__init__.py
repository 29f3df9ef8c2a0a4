"""Published checkpoints → the native format, without running what is in them and with an account of every name.

A new format is one file here, one line in ``IMPORTERS`` and one test.
"""

import inspect
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.backbones import BACKBONES, build_backbone, check_backbone
from spn4cir.checkpoints import differences, load_strictly, read_model, read_tensors, save_model
from spn4cir.errors import InputError
from spn4cir.files import hash_files
from spn4cir.importers.blip_weights import convert_blip_weights
from spn4cir.importers.clip_weights import convert_clip_weights
from spn4cir.importers.freestyle_weights import convert_freestyle_weights
from spn4cir.importers.published import Importer, Published
from spn4cir.importers.sprc_weights import convert_sprc_weights
from spn4cir.importers.tgcir_weights import convert_tgcir_weights

IMPORTERS: dict[str, Importer] = {
    "clip4cir": convert_clip_weights, "tgcir": convert_tgcir_weights, "blip4cir": convert_blip_weights,
    "sprc": convert_sprc_weights, "freestyle": convert_freestyle_weights,
}  # fmt: skip
SHOWN = 5


def read_published(path: Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, on the CPU, memory-mapped where the file allows.

    Raises ``InputError`` if the file is missing, cut, of another kind, no dictionary, or holds more than tensors.
    """
    if not path.is_file():
        raise InputError(f"{path} is a folder: give the file of weights" if path.is_dir() else f"{path} is missing")
    with path.open("rb") as file:
        start = file.read(24)
    zipped = zipfile.is_zipfile(path)
    if start.startswith(b"PK") and not zipped:
        raise InputError(f"{path} is cut off: download it again")
    if not zipped and not start.startswith(b"\x80"):
        shown = f"it begins with {start!r}" if start else "it is empty"
        raise InputError(f"{path} is no file of torch.save, as weights are published in: {shown}")
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipped else None  # what is mapped into memory is not checked
        with warnings.catch_warnings():  # torch advises to run what we refuse
            warnings.simplefilter("ignore")
            content = {} if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises several kinds
        text = " ".join(str(error).split())
        if "weights_only" in text:
            culprit = re.search(r"GLOBAL ([\w.]+)", text)
            what = f"it holds more than tensors{f' ({culprit[1]})' if culprit else ''}"
            advice = "where you trust it, save its state_dict() with torch.save, as {'state_dict': …}"
            raise InputError(f"{path} is refused: {what}, and reading that would run its code; {advice}") from None
        raise InputError(f"{path} cannot be read as a file of torch.save, it may be cut off: {text[:100]}") from None
    if damaged:
        raise InputError(f"{path} is damaged in {damaged}: download it again")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a dictionary with a state dict")
    return content


def import_published(
    path: Path, output: Path, name: str, options: Mapping[str, Any], base: Path | None = None
) -> Backbone:
    """Convert a published checkpoint, print what became of each name in it, and write what ``load_model`` reads.

    Args:
        path: file of ``torch.save``.
        output: new or empty folder; it is written whole or not at all.
        name: backbone.
        options: what the user states of the backbone's options; the rest is recognised.
        base: checkpoint folder of the same backbone, for what the file lacks where it holds a part of a model.

    Raises ``InputError`` if anything is missing, unexpected, of another shape or not finite.
    """
    check_backbone(name)
    if name not in IMPORTERS:
        raise InputError(f"backbone {name} has no importer of published weights; known: {', '.join(IMPORTERS)}")
    if "tokenizer" in options and "tokenizer" not in inspect.signature(BACKBONES[name]).parameters:
        raise InputError(f"backbone {name} has no option tokenizer: its model has one of its own")
    _check_output(output)
    content = read_published(path)
    try:
        published = IMPORTERS[name](content, options)
        for key, value in published.state.items():
            if not isinstance(value, Tensor):
                raise InputError(f"{key} is {type(value).__name__}, not a tensor")
            if not value.isfinite().all():
                raise InputError(f"{key} holds values that are not finite")
        published = _joined(published, name, base)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    backbone = build_backbone(name, **published.options, load_weights=False)
    backbone.temperature = published.temperature
    print("\n".join([f"{path}: {published.container}", *account(backbone, published)]), flush=True)
    load_strictly(backbone, published.state, path)
    _write(output, backbone, {"imported_from": path.name, "sha256": hash_files(path), "container": published.container})
    return backbone


def _joined(published: Published, name: str, base: Path | None) -> Published:
    if base is None:
        if published.lacks:
            raise InputError(f"{published.lacks} is not in it: give --base FOLDER, an imported or trained {name}")
        return published
    if not published.lacks:
        raise InputError("it holds a whole model, which needs no --base")
    found, options = read_model(base)
    if found != name:
        raise InputError(f"--base {base} holds a {found}, not a {name}")
    rest, _ = read_tensors(base / "model.safetensors")
    container = f"{published.container}; {published.lacks} and all else from {base}"
    return Published(options | published.options, rest | published.state, published.ignored, container)


def account(backbone: Backbone, published: Published) -> list[str]:
    """Lines that say how many names matched, and which did not, became another type, or were ignored."""
    own, state = backbone.state_dict(), published.state
    apart = differences(own, state)
    matched = own.keys() & state.keys() - set(apart["of another shape"])
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in apart["of another shape"]]
    stated = ", ".join(f"{k} {v}" for k, v in published.options.items() if v is not None and type(v) is not dict)
    lines = [f"{backbone.name}, {stated}: {sum(p.numel() for p in backbone.parameters()):,} parameters"]
    lines.append(_line("matched", len(matched)))
    lines += [_line(word, len(keys), keys) for word, keys in {**apart, "of another shape": shapes}.items()]
    lines.append(_line("ignored", len(published.ignored)))
    for reason in dict.fromkeys(published.ignored.values()):
        keys = [key for key, why in published.ignored.items() if why == reason]
        lines.append(f"{'':19}{len(keys):>5}  {reason}: {_some(keys)}")
    kinds = [f"{state[key].dtype} → {own[key].dtype}" for key in matched if state[key].dtype != own[key].dtype]
    lines += [_line("converted", kinds.count(kind), [kind]) for kind in sorted(set(kinds))]
    return [line.replace("torch.", "") for line in lines]


def _line(word: str, count: int, names: Sequence[str] = ()) -> str:
    return f"  {word:<16} {count:>5}  {_some(names)}".rstrip()


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty: give a new folder")
    if not next(place for place in (output, *output.absolute().parents) if place.exists()).is_dir():
        raise InputError(f"{output} cannot be a folder: there is a file in its way")


def _write(output: Path, backbone: Backbone, about: dict[str, Any]) -> None:
    place = output.absolute()  # written whole or not at all: beside its place, then renamed
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".import-", dir=place.parent) as beside:
            save_model(Path(beside) / "model", backbone, about)
            (Path(beside) / "model").replace(place)  # also onto an empty folder
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output} cannot be written: {error}") from None
