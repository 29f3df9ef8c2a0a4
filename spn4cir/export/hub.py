"""Upload a model to the Hugging Face hub, so that ``spn4cir.load("OWNER/NAME")`` reads it."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spn4cir.checkpoints import load_model, read_model, read_note, read_tensors, write_tensors
from spn4cir.errors import InputError
from spn4cir.files import write_text
from spn4cir.model_card import CARD, OWN_PLACES, CardForm, is_generated, render_card, write_use
from spn4cir.run_record import strip_places

OTHERS_LACK = "which others lack: train from weights with a public name"
FOLDER = re.compile(r"(local-dir|timm|transformers):(.+)")


def push_to_hub(folder: Path, name: str, private: bool = False) -> str:
    """Upload what ``spn4cir.load`` reads of a run or checkpoint folder, with its card and settings, in one commit.

    Settings and options go without the folders of this machine. The model is loaded before.

    Args:
        folder: of the run.
        name: hub id ``OWNER/NAME``; the repository is made if it is missing.
        private: whether a repository that is made is private.

    Returns:
        The address of the repository.

    Raises:
        InputError: if the folder holds no model, the model needs a folder of this machine, the name is no hub id, or
            the hub does not take it: offline, without a token, or without the right to write.
    """
    check_hub_id(name)
    _, options = read_model(folder)
    if place := find_local_folder(options):
        raise InputError(f"{folder} names the folder {place}, {OTHERS_LACK}")
    with tempfile.TemporaryDirectory() as place:
        files = _collect_files(folder, Path(place))
        return _commit(files, name, private)


def _collect_files(folder: Path, beside: Path) -> dict[str, Path | bytes]:
    """What is uploaded of a run, by name there; ``beside`` takes a copy without the paths of this machine.

    Raises ``InputError`` if the copy is no model that can be loaded.
    """
    weights = write_for_others(folder, beside)
    files: dict[str, Path | bytes] = {name: beside / name for name in ("model.json", "model.safetensors")}
    files |= {f"tokenizer/{path.name}": path for path in sorted((folder / "tokenizer").glob("*")) if path.is_file()}
    if (folder / "result.json").is_file():
        files["result.json"] = folder / "result.json"
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        if weights != folder / "model.safetensors" and is_generated(text):
            about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            text = render_card(folder, CardForm("spn4cir", write_use({"stage": None, **about}), [weights]))
        files[CARD] = text.encode()
    if (folder / "config.yaml").is_file():
        files["config.yaml"] = _settings_for_others(folder / "config.yaml")
    return files


def write_for_others(folder: Path, beside: Path) -> Path:
    """Write a run's model without the paths of this machine into an empty folder, and load it.

    Returns:
        The weights: those of the run, or a copy where their header holds paths.

    Raises:
        InputError: if the model is damaged, or needs a file of this machine.
    """
    note = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    own = folder / "model.safetensors"
    header = read_note(own)
    stripped, about = strip_places(note), strip_places(header)
    write_text(beside / "model.json", json.dumps(stripped, indent=1) + "\n")
    weights = beside / "model.safetensors"
    if about == header:
        link_file(own, weights)
    else:
        write_tensors(weights, read_tensors(own)[0], about)
    if (folder / "tokenizer").is_dir():
        shutil.copytree(folder / "tokenizer", beside / "tokenizer")
    try:
        load_model(beside)
    except InputError:
        load_model(folder)  # raises if the paths are not the reason
        raise InputError(f"{folder / 'model.json'} names files of this machine, {OTHERS_LACK}") from None
    return own if about == header else weights


def link_file(source: Path, place: Path) -> None:
    """Link a file, or copy it where the system has no links."""
    try:
        place.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, place)


def _commit(files: Mapping[str, Path | bytes], name: str, private: bool) -> str:
    """Make the repository and upload the files. Raises ``InputError`` if the hub does not take them."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        operations = [CommitOperationAdd(file, content) for file, content in files.items()]
        api.create_commit(name, operations, commit_message="Upload by spn4cir-export")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, _unreachable()) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        advice = "needs a network, and a token that may write: hf auth login, or HF_TOKEN"
        raise InputError(f"--push-to-hub {name}: the hub did not take it ({advice}): {said}") from None
    return str(address)


def check_hub_id(name: str) -> None:
    """Raises ``InputError`` if a name is no hub id ``OWNER/NAME``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public in its documentation

    try:
        validate_repo_id(name)
        is_valid = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII))
    except HFValidationError:
        is_valid = False
    if not is_valid:
        rule = "letters, digits, single '-', '.' and '_' inside, 96 characters at most"
        raise InputError(f"--push-to-hub takes OWNER/NAME ({rule}), got {name!r:.120}")


def _unreachable() -> type[Exception]:
    """The base of all errors of the library that the hub's client calls the network by, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def find_local_folder(options: Mapping[str, Any]) -> str | None:
    """A folder of this machine that the architecture is read from, or None."""
    for value in options.values():
        if isinstance(value, str) and (found := FOLDER.search(value)) and Path(found[2]).is_dir():
            return found[2]
    return None


def _settings_for_others(path: Path) -> bytes:
    """The settings of a run as YAML, without what holds for this machine alone."""
    text = path.read_text(encoding="utf-8")
    title = text.splitlines()[0] + "\n" if text.startswith("#") else ""
    held = yaml.safe_load(text)
    kept = {key: strip_places(value, key) for key, value in held.items() if key not in OWN_PLACES}
    return (title + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)).encode()
