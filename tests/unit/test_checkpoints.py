"""Weights on disk."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny_backbones import tiny_backbone, tiny_options
from torch import Tensor, nn

from spn4cir import run
from spn4cir.backbones import BACKBONES, build_backbone
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.checkpoints import (
    load_model,
    load_progress,
    load_strictly,
    newest_run,
    read_tensors,
    runs_root,
    save_model,
    save_progress,
    write_tensors,
)
from spn4cir.config import TrainConfig
from spn4cir.errors import InputError
from spn4cir.objective import Objective
from spn4cir.stages import load_backbone, resolve_temperature
from spn4cir.train import train


def test_tensors_come_back(tmp_path: Path) -> None:
    """Every type and shape, scalars, views and shared storage included, with the note."""
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    tensors = {
        "view": base.T, "shared": base, "half": base.half(), "brain": base.bfloat16(), "whole": torch.tensor(7),
        "empty": torch.zeros(0, 3), "parameter": nn.Parameter(base),
    }  # fmt: skip
    write_tensors(tmp_path / "a", tensors, {"step": 3, "name": "ä"})
    found, about = read_tensors(tmp_path / "a")
    assert about == {"step": 3, "name": "ä"}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename, the old tensors are still whole."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {"step": 1})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        write_tensors(path, {"x": torch.zeros(3)}, {"step": 2})
    found, about = read_tensors(path)
    assert torch.equal(found["x"], torch.ones(3)) and about == {"step": 1}
    write_tensors(path, {"x": torch.zeros(3)}, {"step": 2})  # what the crash left beside it is in nobody's way
    assert read_tensors(path)[1] == {"step": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_files_are_named(tmp_path: Path, keep: int) -> None:
    """Empty, cut in the header, cut in the last byte: an InputError with the path."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(30)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.safetensors is not a complete safetensors file"):
        read_tensors(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A missing file is an InputError with the path."""
    with pytest.raises(InputError, match="absent is missing"):
        read_tensors(tmp_path / "absent")


# --- keys ------------------------------------------------------------------------------------------------------------


def change(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if what == "missing":
        del state["bias"]
    if what == "unexpected":
        state["extra"] = torch.zeros(1)
    if what == "of another shape":
        state["weight"] = torch.zeros(2, 3)
    return state


@pytest.mark.parametrize(
    ("what", "key"), [("missing", "bias"), ("unexpected", "extra"), ("of another shape", "weight")]
)
def test_keys_that_do_not_fit_are_named(what: str, key: str) -> None:
    """One of each kind is told by its name and kind, with the file, and nothing is loaded."""
    module = nn.Linear(3, 3)
    before = module.weight.detach().clone()
    state = change({k: torch.full_like(v, 5) for k, v in module.state_dict().items()}, what)
    with pytest.raises(InputError, match=rf"somewhere does not fit this model: 1 {what}, such as {key}"):
        load_strictly(module, state, Path("somewhere"))
    assert torch.equal(module.weight, before)


def test_all_kinds_are_reported_at_once() -> None:
    """One message lists all that is wrong."""
    module = nn.Linear(3, 3)
    state = dict(module.state_dict())
    for what in ("missing", "unexpected", "of another shape"):
        change(state, what)
    with pytest.raises(InputError) as error:
        load_strictly(module, state, Path("x"))
    assert all(word in str(error.value) for word in ("bias", "extra", "weight"))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP4CIR]:
    """A model folder and the backbone in it, its weights moved so that they are not the embedded ones."""
    backbone = build_backbone("clip4cir")
    assert isinstance(backbone, CLIP4CIR)
    with torch.no_grad():
        for number, value in enumerate(backbone.parameters()):
            value += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, backbone, {"stage": 1, "step": 3})
    return folder, backbone


def copied(saved: tuple[Path, CLIP4CIR], folder: Path) -> Path:
    """Its own copy for a test that damages it."""
    for path in saved[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def embeddings(backbone: CLIP4CIR) -> list[Tensor]:
    size = backbone.transform.size  # type: ignore[attr-defined]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = backbone.encode_image(pixels)
        tokens = backbone.tokenize(["in green", "with dark skin tone"])
        return [*features, backbone.compose(features.reference, tokens).query]


def test_loaded_backbone_gives_equal_bits(saved: tuple[Path, CLIP4CIR]) -> None:
    """Saved and loaded, image and query embeddings are equal to the last bit, and not those of the embedded weights."""
    loaded = load_model(saved[0])
    assert isinstance(loaded, CLIP4CIR) and not loaded.training
    assert loaded.options == saved[1].options
    pairs = list(zip(embeddings(loaded), embeddings(saved[1]), strict=True))
    assert len(pairs) == 3 and all(torch.equal(a, b) for a, b in pairs)
    fresh = build_backbone("clip4cir")
    assert isinstance(fresh, CLIP4CIR)
    assert not torch.equal(embeddings(fresh)[2], pairs[0][0])


def test_a_model_is_saved_again_as_it_was(saved: tuple[Path, CLIP4CIR], tmp_path: Path) -> None:
    """Loading and saving changes neither note nor weights."""
    save_model(tmp_path, load_model(saved[0]), {"stage": 1, "step": 3})
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved[0] / name).read_bytes()


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_half_a_model_is_named(saved: tuple[Path, CLIP4CIR], tmp_path: Path, name: str) -> None:
    """A folder without note or weights says which file it lacks."""
    (copied(saved, tmp_path) / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b"3", b"{}", b'{"backbone": "clip4cir"}', b'{"backbone": "clip4cir", "options": "x"}',
    b"\xff\xfe",
])  # fmt: skip
def test_a_damaged_note_is_named(saved: tuple[Path, CLIP4CIR], tmp_path: Path, content: bytes) -> None:
    """Whatever is wrong with model.json, the message names the file."""
    (copied(saved, tmp_path) / "model.json").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(tmp_path)


def test_a_note_of_an_unknown_backbone_or_option(saved: tuple[Path, CLIP4CIR], tmp_path: Path) -> None:
    """A backbone or option that this version does not know is an InputError that names it."""
    path = copied(saved, tmp_path) / "model.json"
    for note, word in (
        ({"backbone": "clip5cir", "options": {}}, "clip5cir"),
        ({"backbone": ["clip6cir"], "options": {}}, "clip6cir"),
        ({"backbone": "clip4cir", "options": {"colour": 1}}, "colour"),
    ):
        path.write_text(json.dumps(note))
        with pytest.raises(InputError, match=word):
            load_model(tmp_path)


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_named(saved: tuple[Path, CLIP4CIR], tmp_path: Path, what: str) -> None:
    """A missing, an unexpected and a misshapen weight are each told by name, with the file."""
    weights, about = read_tensors(copied(saved, tmp_path) / "model.safetensors")
    key = "clip.ln_final.bias"
    assert key in weights
    if what == "unexpected":
        key, weights["clip.extra"] = "clip.extra", torch.zeros(1)
    elif what == "missing":
        del weights[key]
    else:
        weights[key] = torch.zeros(3)
    write_tensors(tmp_path / "model.safetensors", weights, about)
    with pytest.raises(InputError, match=rf"model\.safetensors does not fit.*{what}, such as {key}"):
        load_model(tmp_path)


def test_unknown_option_of_a_backbone() -> None:
    """As build_backbone promises, an unknown option is an InputError that names it."""
    with pytest.raises(InputError, match="colour"):
        build_backbone("clip4cir", colour=1)


# --- progress --------------------------------------------------------------------------------------------------------


def stepped(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    torch.manual_seed(0)
    module = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW([{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias]}], 0.05)

    def step() -> None:
        optimizer.zero_grad()
        module(torch.linspace(-1, 1, 12).view(3, 4)).square().sum().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return module, optimizer, step


def test_progress_continues_to_the_bit(tmp_path: Path) -> None:
    """Weights, moments and step counts come back: three steps more give what nothing interrupted would have."""
    module, optimizer, step = stepped(3)
    save_progress(tmp_path / "last", module, optimizer, {"step": 3, "best": {"score": 0.1}})
    fresh, fresh_optimizer, fresh_step = stepped(0)
    assert load_progress(tmp_path / "last", fresh, fresh_optimizer) == {"step": 3, "best": {"score": 0.1}}
    for _ in range(3):
        step()
        fresh_step()
    assert torch.equal(module.weight, fresh.weight) and torch.equal(module.bias, fresh.bias)


def test_progress_without_moments_differs(tmp_path: Path) -> None:
    """The negative control: weights alone do not continue the same run."""
    module, _, step = stepped(3)
    fresh, _, fresh_step = stepped(0)
    fresh.load_state_dict(module.state_dict())
    step()
    fresh_step()
    assert not torch.equal(module.weight, fresh.weight)


# --- runs ------------------------------------------------------------------------------------------------------------


def run_folder(root: Path, name: str, seconds: int | None) -> Path:
    """A run; completed at that time if one is given."""
    folder = root / "data" / "bone" / name
    folder.mkdir(parents=True)
    (folder / "last.safetensors").touch()
    if seconds is not None:
        (folder / "result.json").write_text("{}")
        os.utime(folder / "result.json", (seconds, seconds))
    return folder


def test_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest completed run of that dataset, backbone and stage; unfinished ones do not count."""
    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path))
    assert newest_run(runs_root() / "data", backbone="bone") is None
    run_folder(tmp_path, "stage1-20260103-000000", None)
    assert newest_run(runs_root() / "data", backbone="bone") is None
    first = run_folder(tmp_path, "stage1-20260101-000000", 200)
    run_folder(tmp_path, "stage1-20260102-000000", 100)
    assert newest_run(runs_root() / "data", backbone="bone") == first
    second = run_folder(tmp_path, "stage2-20260101-000000", 300)
    run_folder(tmp_path, "stage2-20260104-000000", None)
    assert newest_run(runs_root() / "data", backbone="bone") == second
    assert newest_run(runs_root() / "data", backbone="bone", stage=1) == first
    assert newest_run(runs_root() / "data", backbone="bone", stage=2) == second
    assert (
        newest_run(runs_root() / "other", backbone="bone") is None
        and newest_run(runs_root() / "data", backbone="other") is None
    )


def test_newest_run_of_one_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completed at the same instant (a copied folder), the later name counts."""
    monkeypatch.setenv("SPN4CIR_RUNS", str(tmp_path))
    for name in ("stage1-20260102-000000", "stage1-20260101-000000"):
        run_folder(tmp_path, name, 100)
    found = newest_run(runs_root() / "data", backbone="bone")
    assert found is not None and found.name == "stage1-20260102-000000"


# --- changed options --------------------------------------------------------------------------------------------------


class Headed(CLIP4CIR):
    """CLIP4CIR with a layer more, if it is wanted, and a number that weighs nothing."""

    name = "headed"

    def __init__(self, head: int = 0, weight: float = 1.0):
        super().__init__()
        self.options = {"head": head, "weight": weight}
        if head:
            self.head = nn.Linear(2, head)


@pytest.fixture
def headed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one without the layer, whose weights are not the embedded ones."""
    monkeypatch.setitem(BACKBONES, Headed.name, Headed)
    backbone = Headed()
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    save_model(tmp_path / "headed", backbone, {})
    return tmp_path / "headed"


def test_changed_options_hold(headed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is changed holds, in the model that is saved next as well, and the rest is as it was; weights are those of
    the folder."""
    loaded = load_model(headed, {"weight": 0.5})
    assert loaded.options == {"head": 0, "weight": 0.5} and capsys.readouterr().out == ""
    save_model(headed.parent / "again", loaded, {})
    again = load_model(headed.parent / "again")
    assert again.options == loaded.options
    assert all(torch.equal(again.state_dict()[k], v) for k, v in read_tensors(headed / "model.safetensors")[0].items())
    assert not torch.equal(next(again.parameters()), next(Headed().parameters()))  # negative control
    assert load_model(headed).options == {"head": 0, "weight": 1.0}  # the folder itself is left alone


def test_what_an_option_brings_is_new_and_said(headed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its names and how many, and they are as the constructor makes them; all others come from the folder."""
    torch.manual_seed(3)
    loaded = load_model(headed, {"head": 4}).state_dict()
    told = capsys.readouterr().out
    assert "head.bias, head.weight" in told and "(2 names): initialised anew" in told and told.count("\n") == 1
    state = read_tensors(headed / "model.safetensors")[0]
    assert loaded.keys() - state.keys() == {"head.weight", "head.bias"} and loaded["head.weight"].any()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("changes", [None, {}, {"weight": 0.5}, {"head": 4}])
def test_a_change_excuses_nothing_else(headed: Path, changes: dict[str, object] | None) -> None:
    """A weight that the folder should have and has not is an error, whatever else is changed."""
    weights, about = read_tensors(headed / "model.safetensors")
    del weights["clip.ln_final.bias"]
    write_tensors(headed / "model.safetensors", weights, about)
    with pytest.raises(InputError, match=r"1 missing, such as clip\.ln_final\.bias"):
        load_model(headed, changes)


def test_changes_that_cannot_be(headed: Path) -> None:
    """An unknown option, and one that leaves weights over: a line that names it."""
    for changes, told in (({"colour": 1}, "backbone headed has no option 'colour'; known: head, weight"),):
        with pytest.raises(InputError, match=told) as raised:
            load_model(headed, changes)
        assert "\n" not in str(raised.value)
    save_model(headed.parent / "more", load_model(headed, {"head": 4}), {})
    with pytest.raises(InputError, match=r"2 unexpected, such as head\.bias"):
        load_model(headed.parent / "more", {"head": 0})
    with pytest.raises(InputError, match=r"2 of another shape, such as head\.bias"):
        load_model(headed.parent / "more", {"head": 5})


@pytest.mark.parametrize("name", ["blip4cir", "sprc"])
def test_a_tokenizer_comes_with_the_folder(name: str, tmp_path: Path) -> None:
    """Also where the one that it was made with is gone; a copy of the copy names neither; a changed one is taken."""
    own = tmp_path / "words"
    shutil.copytree(tiny_options(name, tmp_path)["tokenizer"], own)
    backbone = tiny_backbone(name, tmp_path, tokenizer=str(own))
    save_model(tmp_path / "one", backbone, {})
    swapped = (own / "tokenizer.json").read_text()
    one, two = (entry for entry in json.loads(swapped)["model"]["vocab"].items() if entry[1] in (43, 44))
    swapped = json.loads(swapped)
    swapped["model"]["vocab"] |= {one[0]: two[1], two[0]: one[1]}
    (own / "tokenizer.json").write_text(json.dumps(swapped))
    texts = [one[0], two[0], "in green"]

    def same(other: object) -> bool:
        found = backbone.tokenize(texts), other.tokenize(texts)  # type: ignore[attr-defined]
        return all(torch.equal(found[0][key], found[1][key]) for key in found[0])

    assert not same(load_model(tmp_path / "one", {"tokenizer": str(own)}))
    shutil.rmtree(own)
    first = load_model(tmp_path / "one")
    assert same(first) and first.options == backbone.options
    save_model(tmp_path / "two", first, {})
    shutil.rmtree(tmp_path / "one")
    assert same(load_model(tmp_path / "two"))
    told = "".join(path.read_text() for path in (tmp_path / "two").rglob("*.json"))
    assert str(own) in told and str(tmp_path / "one") not in told
    shutil.rmtree(tmp_path / "two" / "tokenizer")
    with pytest.raises(InputError, match=r"cannot load tokenizer"):  # negative control
        load_model(tmp_path / "two")


@pytest.mark.parametrize("name", ["tgcir", "blip4cir", "sprc"])  # all options of the other say what its weights are
def test_a_recipe_changes_the_options_of_its_start(name: str, headed: Path, tmp_path: Path) -> None:
    """``init`` with options that differ, equal ones, and an unknown one; the folder of another backbone."""
    start = tiny_backbone(name, tmp_path)
    save_model(tmp_path / "init", start, {})
    option, value = {"tgcir": ("ckd", 2.5), "blip4cir": ("train_vision", False), "sprc": ("align", 0.25)}[name]
    options = {option: value, **{key: start.options[key] for key in list(start.options)[:1]}}
    for stage in (1, 2):
        config = TrainConfig(backbone=name, init=str(tmp_path / "init"), backbone_options=options)
        found = load_backbone(config, stage)
        assert found.options == {**start.options, option: value} != start.options
        state = start.state_dict()
        assert all(torch.equal(state[key], v) for key, v in found.state_dict().items())
    with pytest.raises(InputError, match=f"backbone {name} has no option 'colour'"):
        load_backbone(TrainConfig(backbone=name, init=config.init, backbone_options={"colour": 1}), 1)
    with pytest.raises(InputError, match=rf"holds a headed, and the backbone is {name}: give --backbone headed"):
        load_backbone(TrainConfig(backbone=name, init=str(headed)), 2)


def test_separated_is_not_for_people_to_change(tmp_path: Path) -> None:
    """A stage-1 model whose twins would be random is refused; the same value is no change."""
    save_model(tmp_path / "one", build_backbone("tgcir"), {})
    with pytest.raises(InputError, match="stage 2 separates a model itself"):
        load_model(tmp_path / "one", {"separated": True})
    assert load_model(tmp_path / "one", {"separated": False}).options["separated"] is False


@pytest.mark.parametrize(("held", "given", "wanted"), [
    (0.0321, None, 0.0321), (None, None, 0.07), (0.0321, 0.05, 0.05), (None, 0.05, 0.05),
])  # fmt: skip
def test_null_is_the_temperature_of_the_starting_weights(
    tmp_path: Path, held: float | None, given: float | None, wanted: float
) -> None:
    """A checkpoint that notes one gives it, else 0.07; a number is taken as it stands; what was taken is said."""
    start = build_backbone("blip4cir")
    start.temperature = held
    save_model(tmp_path / "init", start, {})
    config = TrainConfig(backbone="blip4cir", init=str(tmp_path / "init"), temperature=given)
    backbone, said = load_backbone(config, 1), list[str]()
    assert backbone.temperature == held
    resolve_temperature(config, backbone, said.append)
    assert config.temperature == wanted
    source = "of the starting weights" if held else "published start: the weights hold none"
    assert said == ([] if given else [f"temperature {wanted}, {source}"])
    assert Objective(backbone, given).temperature.item() == pytest.approx(wanted)
    saved = dataclasses.asdict(config)
    assert not run.changes(saved, dataclasses.replace(config, temperature=None))  # resumed by a recipe of null
    assert run.changes(saved, dataclasses.replace(config, temperature=0.06)) == [("temperature", wanted, 0.06)]


def test_a_run_states_its_temperature(tmp_path: Path) -> None:
    """The number is in config.yaml, the learned one in the checkpoint, from which a further run starts."""
    start = build_backbone("clip4cir")
    start.temperature = 0.033
    save_model(tmp_path / "init", start, {})
    config = TrainConfig(
        init=str(tmp_path / "init"), temperature=None, learn_temperature=True, max_steps=1, batch_size=8,
        max_annotated=64, output=str(tmp_path / "run"), holdout=0.1,
    )  # fmt: skip
    folder = train(config, 1)
    assert yaml.safe_load((folder / "config.yaml").read_text())["temperature"] == 0.033
    learned = load_model(folder).temperature
    assert learned is not None and learned != 0.033 and abs(learned - 0.033) < 1e-3
