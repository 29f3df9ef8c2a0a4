"""Runs on disk: one native format, written to the side and renamed; nothing is pickled.

A run folder holds ``config.yaml``, ``model.json`` (backbone and options), ``model.safetensors`` (best weights),
``last.safetensors`` (weights, optimiser and progress, to resume from), ``metrics.jsonl``, ``made_from.json`` (the
catalogue, for a dataset of one's own), and ``result.json`` once it is complete.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.backbones.shared_towers import TOWERS, Tower
from spn4cir.backbones.shared_weights import READS_WEIGHTS
from spn4cir.dataset import Dataset
from spn4cir.distributed import gather_shares, process_rank, world_size
from spn4cir.errors import InputError
from spn4cir.files import replaced, write_text
from spn4cir.provenance import describe_others, folder_of, read_provenance


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON note, the whole file or none of it."""
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with replaced(path) as beside:
        save_file(whole, beside, {"about": json.dumps(about)})
        beside.chmod(0o644)  # as other files are


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``write_tensors`` wrote. Raises ``InputError`` if the file is missing or broken."""
    note = read_note(path)  # raises
    return load_file(path), note


def read_note(path: Path) -> dict[str, Any]:
    """The JSON note of ``write_tensors`` alone. Raises ``InputError`` if the file is missing or broken."""
    try:
        with safe_open(path, "pt") as file:
            return cast(dict[str, Any], json.loads((file.metadata() or {}).get("about", "{}")))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {error}") from None


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which names of two state dicts do not fit together, under the word for how."""
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    return {"missing": missing, "unexpected": unexpected, "of another shape": sorted(wrong)}


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load weights; every key must be accounted for. Raises ``InputError`` that names what is not."""
    parts = differences(module.state_dict(), state)
    if report := "; ".join(f"{len(keys)} {what}, such as {keys[0]}" for what, keys in parts.items() if keys):
        raise InputError(f"{source} does not fit this model: {report}")
    module.load_state_dict(state)


def save_model(folder: Path, backbone: Backbone, about: dict[str, Any]) -> None:
    """Write a backbone so that ``load_model`` rebuilds it without any other file."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {} if backbone.temperature is None else {"temperature": backbone.temperature}
    note = {"format": 1, "backbone": backbone.name, "options": backbone.options, **held, **about}
    write_text(folder / "model.json", json.dumps(note, indent=1) + "\n")
    backbone.save_assets(folder)
    write_tensors(folder / "model.safetensors", backbone.state_dict(), note)


def read_model(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and options of the backbone in a run or checkpoint folder. Raises ``InputError`` if it is incomplete."""
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no model: {name} is missing")
    try:
        note = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        return str(note["backbone"]), dict(note["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'model.json'} is damaged: {error}") from None


def load_model(folder: Path, changes: Mapping[str, Any] | None = None) -> Backbone:
    """The backbone that ``save_model`` wrote into a folder, on the CPU, in eval mode.

    ``changes`` are options that shall differ from the saved ones; of an option that is a group of settings, those that
    it names. Parameters that only they bring stay as they are initialised, and that is said; a changed tokenizer is
    read from where it says, not from the folder.
    Raises ``InputError`` if the folder holds no complete model, or its weights do not fit.
    """
    (name, saved), changes = read_model(folder), changes or {}
    if saved.get("separated") != changes.get("separated", saved.get("separated")):
        raise InputError("separated is no option to give: stage 2 separates a model itself")
    groups = {key: {**saved[key], **value} for key, value in changes.items() if _are_groups(saved.get(key), value)}
    changes = {**changes, **groups}
    own = {"tokenizer": str(folder / "tokenizer")} if (folder / "tokenizer").is_dir() else {}
    backbone = build_backbone(name, **{**saved, **own, **changes}, load_weights=False)
    if own:
        backbone.options["tokenizer"] = {**saved, **changes}.get("tokenizer")
    state, note = read_tensors(folder / "model.safetensors")
    backbone.temperature = note.get("temperature")
    fresh = backbone.state_dict().keys() - state.keys() if changes else set()
    if fresh:  # what the saved options bring as well is missing
        fresh -= build_backbone(name, **{**saved, **own}, load_weights=False).state_dict().keys()
    if fresh:
        names = ", ".join(sorted(fresh)[:3])
        print(f"{folder} does not hold {names} … ({len(fresh)} names): initialised anew")
        state |= {key: value for key, value in backbone.state_dict().items() if key in fresh}
    load_strictly(backbone, state, folder / "model.safetensors")
    return backbone.eval()


def tower_of_run(folder: str, known: Mapping[str, Any]) -> Tower:
    """The model in a run or checkpoint folder as the tower of another; without weights as it was noted."""
    inner: Any
    if READS_WEIGHTS.get():
        inner = load_model(Path(folder))
        known = {"backbone": inner.name, "options": inner.options}
    else:
        inner = build_backbone(known["backbone"], load_weights=False, **known["options"])
    return Tower(inner, inner.transform, lambda pixels: inner.encode_target(pixels).mean(1), "the target vector", known)


TOWERS["run"] = tower_of_run


def _are_groups(*options: Any) -> bool:
    """Whether options hold several settings each, of which a change may name some."""
    return all(isinstance(option, dict) for option in options)


def runs_root() -> Path:
    """Where runs lie: ``runs`` in the working folder, or SPN4CIR_RUNS."""
    return Path(os.environ.get("SPN4CIR_RUNS", "runs"))


def newest_run(*folders: Path, backbone: str | None = None, stage: int | None = None) -> Path | None:
    """The newest completed run of a backbone (of any for None) in some folders of a dataset or catalogue, or None."""
    named = "*" if stage is None else f"stage{stage}"  # stages that have names call their runs by them
    done = [path for one in folders for path in one.glob(f"{backbone or '*'}/{named}-*/result.json")]
    newest = max(done, key=lambda path: (path.stat().st_mtime_ns, path.parent.name), default=None)
    return newest and newest.parent


def find_newest_run(dataset: Dataset, backbone: str | None, stage: int | None = None) -> Path | None:
    """The newest completed run on these images, or None. Raises ``InputError`` if there are runs on others alone."""
    base, own = runs_root() / dataset.name, dataset.provenance()
    run = newest_run(folder_of(base, own), backbone=backbone, stage=stage)
    if run or own is None:
        return run
    others = describe_others(base, own)
    if old := newest_run(base, backbone=backbone, stage=stage):
        others = "; ".join(filter(None, [others, f"images that {old} does not name"]))
    if others:
        option = "--init FOLDER" if stage else "--run FOLDER, or --run embedded for the untrained weights"
        raise InputError(f"{base} holds no run on {own}, only runs on {others}: train one, or give {option}")
    return None


def check_origin(run: Path, dataset: Dataset, names_run: bool, names_images: bool) -> str:
    """What a person should know of where a run was trained; empty if it was on these images, or on a published dataset.

    Raises ``InputError`` if it was trained on another catalogue, unless a person named both the run and the images; and
    if it does not say on which images, unless a person named the run.
    """
    own, trained = dataset.provenance(), read_provenance(run)
    if own is None or (trained and own.is_same(trained)):
        return ""
    told = (
        f"run {run} was trained on {trained}" if trained else f"run {run} does not say which images it was trained on"
    )
    if not names_run or (trained and not names_images):
        raise InputError(f"{told}; this is {own}: give --run and --data-root to evaluate one on the other")
    return f"{told}; this is {own}"


def save_progress(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Everything that the next step depends on; all processes call it, and the first one writes.

    Random numbers are keyed by step, so none are stored. Parameters of which each process holds a share are written
    whole, with their optimiser states.
    """
    state, shared = optimizer.state_dict(), _shared(module, optimizer)
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for index, values in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    for name in sorted(tensors):
        if _owner(name) in shared and tensors[name].ndim:
            tensors[name] = gather_shares(tensors[name])
    if process_rank() == 0:
        write_tensors(path, tensors, {"progress": progress, "groups": state["param_groups"]})


def load_progress(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put back what ``save_progress`` wrote, of shared parameters this process's share, and return the progress."""
    tensors, about = read_tensors(path)
    shared = _shared(module, optimizer)
    for name, value in tensors.items():
        if (share := shared.get(_owner(name))) and value.ndim:
            tensors[name] = value[share].clone()
    weights = {name.removeprefix("module."): v for name, v in tensors.items() if name.startswith("module.")}
    load_strictly(module, weights, path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
    return cast(dict[str, Any], about["progress"])


def _owner(name: str) -> str:
    """``module.NAME`` of a weight, ``optimizer.NUMBER`` of a state of one."""
    return name if name.startswith("module.") else ".".join(name.split(".")[:2])


def _shared(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, slice]:
    """Rows that this process holds of parameters of which each process has a share, by weight and by state."""
    if world_size() == 1:
        return {}
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    found: dict[str, slice] = {}
    for name, value in module.named_parameters():
        if (first := getattr(value, "first_row", None)) is not None:
            rows = slice(first, first + len(value))
            found |= {f"module.{name}": rows, f"optimizer.{order.index(id(value))}": rows}
    return found
