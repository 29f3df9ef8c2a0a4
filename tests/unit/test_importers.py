"""Published checkpoints: what is read, what is refused, and what is said about it."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from spn4cir import importers
from spn4cir.backbones import BACKBONES
from spn4cir.backbones.clip4cir import CLIP4CIR
from spn4cir.backbones.shared_clip import EMBEDDED
from spn4cir.checkpoints import load_model, save_model
from spn4cir.cli import import_command
from spn4cir.errors import InputError
from spn4cir.importers import import_published
from spn4cir.importers.clip_weights import convert_clip_weights
from spn4cir.importers.openai_clip import OPENAI

Refuses = Callable[..., str]
TRANSFORMER = f"local-dir:{EMBEDDED / 'clip_transformer'}"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """OpenAI's names with the embedded model's values."""
    return dict(CLIP4CIR(TRANSFORMER).clip.state_dict())


@pytest.fixture
def refuses(tmp_path: Path) -> Refuses:
    """Import something that must fail in one line and leave nothing behind; returns that line."""

    def call(content: object, **options: str) -> str:
        path = tmp_path / "published.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as raised:
            import_published(path, tmp_path / "deep" / "output", "clip4cir", {"model": TRANSFORMER, **options})
        assert sorted(tmp_path.rglob("*")) == before
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        return str(raised.value)

    return call


def saved(content: object, path: Path, zipped: bool = True) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.unlink()
    return content


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_an_imported_model_is_the_same(tmp_path: Path, weights: dict[str, Tensor], zipped: bool) -> None:
    """From either format of torch.save; the note says from what it was made."""
    path, output = tmp_path / "published.pt", tmp_path / "runs" / "imported"
    path.write_bytes(saved({"epoch": 7, "CLIP": weights}, path, zipped))
    import_published(path, output, "clip4cir", {"model": TRANSFORMER})
    assert sorted(p.name for p in output.iterdir()) == ["model.json", "model.safetensors"]
    assert sorted(p.name for p in output.parent.iterdir()) == ["imported"]
    found = load_model(output).state_dict()
    assert found.keys() == {f"clip.{name}" for name in weights}
    assert all(torch.equal(found[f"clip.{name}"], value) for name, value in weights.items())
    note = json.loads((output / "model.json").read_text())
    assert note["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert note["imported_from"] == "published.pt" and note["container"].startswith("CLIP")


def test_what_an_evaluation_says_of_it(
    tmp_path: Path, toy, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    """The folder that the command names as next is what spn4cir-eval reads: the figures are the model's own."""
    from spn4cir.eval_cli import evaluate_command

    torch.save({"CLIP": weights}, tmp_path / "published.pt")
    output = str(tmp_path / "imported")
    arguments = ["spn4cir-import", "--backbone", "clip4cir", str(tmp_path / "published.pt"), "--output", output]
    monkeypatch.setattr(sys, "argv", [*arguments, "--model", TRANSFORMER])
    import_command()
    said = capfd.readouterr().out
    assert f"spn4cir-eval --run {output}" in said and f"--init {output}" in said
    metrics, own = [], tmp_path / "own"
    save_model(own, CLIP4CIR(TRANSFORMER), {})
    for run in (str(own), output):
        monkeypatch.setattr(
            sys,
            "argv",
            ["spn4cir-eval", "--dataset", "toy", "--data-root", str(toy.folder), "--json", "-", "--run", run],
        )
        evaluate_command()
        metrics.append(json.loads(capfd.readouterr().out)["metrics"])
    assert metrics[0] == metrics[1]


def test_a_flipped_byte_is_found(tmp_path: Path, weights: dict[str, Tensor], refuses: Refuses) -> None:
    """What is mapped into memory is not checked by torch, so the archive's own sums are."""
    content = bytearray(saved({"CLIP": weights}, tmp_path / "whole.pt"))
    content[len(content) // 2] ^= 0xFF
    assert "is damaged in" in refuses(bytes(content))


def test_the_activation_of_openai_is_not_given_away(refuses: Refuses, weights: dict[str, Tensor]) -> None:
    """Shapes do not tell a plain name from that with quickgelu."""
    assert "the model is ViT-B-32-quickgelu" in refuses({"CLIP": weights}, model="ViT-B-32")


def test_leftovers_are_ignored_with_a_reason(
    tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """What continuing a training needs, and the three numbers of OpenAI's archives."""
    numbers = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(24), "vocab_size": torch.tensor(9)}
    content = {"epoch": 3, "CLIP": weights | numbers, "optimizer_state_dict": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "published.pt")
    import_published(tmp_path / "published.pt", tmp_path / "out", "clip4cir", {"model": TRANSFORMER})
    out = capsys.readouterr().out
    assert "progress of its training: epoch, optimizer_state_dict" in out
    assert "3  a number beside the weights of OpenAI's archives: clip.input_resolution, " in out
    assert ["matched", str(len(weights))] in [line.split() for line in out.splitlines()]


def test_an_empty_folder_is_filled(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """An output that is there but empty is as good as a new one."""
    (tmp_path / "out").mkdir()
    torch.save({"CLIP": weights}, tmp_path / "published.pt")
    import_published(tmp_path / "published.pt", tmp_path / "out", "clip4cir", {"model": TRANSFORMER})
    load_model(tmp_path / "out")


# --- what is refused -------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(refuses: Refuses, tmp_path: Path, weights: dict[str, Tensor], zipped: bool) -> None:
    """A file that holds more than tensors is refused before anything of it runs."""
    content = saved({"CLIP": weights, "epoch": Trap(tmp_path / "trapped")}, tmp_path / "x", zipped)
    assert "is refused: it holds more than tensors" in refuses(content)
    assert not (tmp_path / "trapped").exists()


def test_a_module_is_refused_by_its_name(refuses: Refuses) -> None:
    """A pickled module, as some authors publish, and what to do about it."""
    line = refuses(nn.Linear(2, 2))
    assert "torch.nn.modules.linear.Linear" in line and "save its state_dict()" in line


@pytest.mark.filterwarnings("ignore")
def test_a_script_archive_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    """OpenAI's own files hold code."""
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x"))
    assert "is refused: it holds more than tensors" in refuses((tmp_path / "x").read_bytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'version https"),
        (b"PK\x03\x04 and no more", "is cut off"),
        (b"\x80\x02 nonsense", "is refused"),
        (b"\x80\x02", "cannot be read as a file of torch.save"),
        (torch.zeros(3), "holds Tensor, not a dictionary"),
        ({}, "neither CLIP nor state_dict nor Combiner is an entry of it; found nothing"),
        ({"PIC2WORD": {}, "epoch": 1}, "found 'PIC2WORD', 'epoch'"),
        ({"CLIP": 3}, "CLIP is int, not a dictionary of named tensors"),
        ({"CLIP": {}}, "CLIP is empty, not a dictionary of named tensors"),
        ({"CLIP": {"visual.proj": 3}}, "clip.visual.proj is int, not a tensor"),
        ({"CLIP": {}, "Combiner": {}}, "beside CLIP there is 'Combiner'"),
        ({"state_dict": {"blip.temp": torch.zeros(1)}}, "should begin with clip., not as in blip.temp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_named(refuses: Refuses, content: object, words: str) -> None:
    """Each says what is there instead of weights."""
    assert words in refuses(content)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_cut_file_is_named(
    refuses: Refuses, tmp_path: Path, weights: dict[str, Tensor], zipped: bool, keep: float
) -> None:
    """A download that stopped."""
    content = saved({"CLIP": weights}, tmp_path / "x", zipped)
    assert "cut off" in refuses(content[: int(keep * len(content))])


@pytest.mark.parametrize("what", ["missing", "unexpected", "of another shape"])
@pytest.mark.parametrize("container", ["CLIP", "state_dict"])
def test_what_does_not_fit_is_an_error(
    refuses: Refuses, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str], what: str, container: str
) -> None:
    """One name too few, too many or of another shape: it is named in the account and in the error."""
    changed, key = dict(weights), "visual.proj"
    if what == "missing":
        del changed[key]
    elif what == "unexpected":
        key = "visual.extra"
        changed[key] = torch.zeros(1)
    else:
        changed[key] = changed[key][:, 1:]
    if container == "state_dict":
        changed = {f"clip.{name}": value for name, value in changed.items()}
    assert f"1 {what}, such as clip.{key}" in refuses({container: changed})
    told = next(line for line in capsys.readouterr().out.splitlines() if what in line)
    assert told.split(what)[1].split()[:2] == ["1", f"clip.{key}"]


def test_a_name_without_prefix_is_unexpected(refuses: Refuses, weights: dict[str, Tensor]) -> None:
    """Nothing in SPN's container is passed over."""
    state = {f"clip.{name}": value for name, value in weights.items()}
    assert "1 unexpected, such as tau" in refuses({"state_dict": state | {"tau": torch.zeros(1)}})


def test_many_names_are_counted(
    refuses: Refuses, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten names are shown, the rest is a number."""
    assert "13 unexpected" in refuses({"CLIP": weights | {f"visual.x{n:02}": torch.zeros(1) for n in range(13)}})
    out = capsys.readouterr().out
    assert "clip.visual.x04, and 8 more" in out and "x10" not in out


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(refuses: Refuses, weights: dict[str, Tensor], bad: float) -> None:
    """A half-precision overflow would spoil every vector."""
    broken = weights["ln_final.bias"].clone()
    broken[3] = bad
    assert "clip.ln_final.bias holds values that are not finite" in refuses(
        {"CLIP": weights | {"ln_final.bias": broken}}
    )


@pytest.mark.parametrize(("kind", "words"), [
    ("full", "is not empty"), ("file", "there is a file in its way"), ("below", "there is a file in its way"),
])  # fmt: skip
def test_nothing_is_overwritten(tmp_path: Path, weights: dict[str, Tensor], kind: str, words: str) -> None:
    """The place is looked at before the file is read."""
    output = tmp_path / "out"
    if kind == "full":
        output.mkdir()
    kept = output / "mine.txt" if kind == "full" else output
    kept.write_text("mine")
    with pytest.raises(InputError, match=words):
        import_published(tmp_path / "none.pt", output / "deep" if kind == "below" else output, "clip4cir", {})
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Half a model is in the side folder, which goes."""
    whole = importers.save_model

    def fail(folder: Path, *rest: Any) -> None:
        whole(folder, *rest)
        raise error

    monkeypatch.setattr(importers, "save_model", fail)
    torch.save({"CLIP": weights}, tmp_path / "published.pt")
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        import_published(tmp_path / "published.pt", tmp_path / "out", "clip4cir", {"model": TRANSFORMER})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["published.pt"]


def test_a_backbone_without_importer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone of which no weights were published; and every importer is that of a backbone."""
    assert importers.IMPORTERS.keys() <= BACKBONES.keys()
    monkeypatch.setitem(BACKBONES, "plain", CLIP4CIR)
    with pytest.raises(InputError, match="backbone plain has no importer of published weights; known: clip4cir, "):
        import_published(tmp_path / "published.pt", tmp_path / "out", "plain", {})


# --- which architecture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPENAI)
def test_models_of_openai_are_recognised(name: str) -> None:
    """From shapes alone; the model of the published checkpoints has the known number of parameters."""
    with torch.device("meta"):
        model: nn.Module = open_clip.model.CLIP(**open_clip.get_model_config(name))
    state = model.state_dict()
    published = convert_clip_weights({"CLIP": state}, {})
    assert published.options == {"model": name, "pretrained": None, "rgb_last": True}
    if name.startswith("RN50x4"):
        assert sum(p.numel() for p in model.parameters()) == 178_300_601
    prefixed = {f"clip.{key}": value for key, value in state.items()}
    assert convert_clip_weights({"state_dict": prefixed, "epoch": 1}, {}).options["model"] == name


def test_other_dimensions_are_told(refuses: Refuses, weights: dict[str, Tensor]) -> None:
    """No model of OpenAI: what was found, and how to name it."""
    line = refuses({"CLIP": weights}, model="")
    assert "no model of OpenAI has embed_dim 128, image image_size 64, image layers 6" in line
    assert "text vocab_size" in line and "--model local-dir:FOLDER" in line


@pytest.mark.parametrize("key", ["visual.conv1.weight", "text_projection", "positional_embedding"])
def test_an_architecture_needs_its_shapes(refuses: Refuses, weights: dict[str, Tensor], key: str) -> None:
    """Without a tensor that tells a dimension, or with one that has none, --model is needed."""
    assert "cannot be recognised" in refuses({"CLIP": weights | {key: torch.tensor(1.0)}}, model="")
    del (rest := dict(weights))[key]
    assert f"cannot be recognised without '{key}'" in refuses({"CLIP": rest}, model="")


def test_a_stated_model_is_taken_as_it_is(tmp_path: Path, refuses: Refuses, weights: dict[str, Tensor]) -> None:
    """Whatever the shapes say: what does not fit it is named, and an unknown one is an error of its own."""
    vocabulary = weights["token_embedding.weight"][:-1]
    line = refuses({"CLIP": weights | {"token_embedding.weight": vocabulary}}, model=TRANSFORMER)
    assert "1 of another shape, such as clip.token_embedding.weight" in line
    with pytest.raises(InputError, match="no-such-model"):
        import_published(tmp_path / "published.pt", tmp_path / "out", "clip4cir", {"model": "no-such-model"})
