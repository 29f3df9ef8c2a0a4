"""Settings of the four steps, and one run at a time."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spn4cir.backbones import BACKBONES
from spn4cir.config import parse, recipes_folder
from spn4cir.data_gen.steps import GenerateConfig, find_preset
from spn4cir.datasets import DATASETS
from spn4cir.errors import InputError

PRESETS = sorted((recipes_folder() / "triplets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_presets_parse(preset: Path) -> None:
    """Each preset is valid, and is of the dataset and the backbone that its name says."""
    config = parse(GenerateConfig, preset, [])
    dataset, _, backbone = preset.stem.partition("_")
    assert config.dataset == {"outofdomain": "catalogue"}.get(dataset, dataset)
    assert config.backbone == (backbone if backbone in BACKBONES else "clip4cir")


def test_presets_are_chosen_by_dataset_and_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    """All that are named so are found, and printed; a backbone without one of its own takes the dataset's."""

    def found(*argv: str) -> str:
        return find_preset(argv).name

    assert found("--dataset", "fashioniq") == "fashioniq_clip4cir.yaml"
    for dataset, backbone in itertools.product(("fashioniq", "cirr"), ("clip4cir", "tgcir", "blip4cir", "sprc")):
        assert found(f"--dataset={dataset}", "--backbone", backbone) == f"{dataset}_{backbone}.yaml"
    assert found("--dataset", "catalogue", "--backbone", "sprc") == "catalogue.yaml"
    capsys.readouterr()
    assert found() == found("--words", "3") == "emoji.yaml"
    assert capsys.readouterr().out.splitlines() == ["preset: recipes/triplets/emoji.yaml"] * 2


@pytest.mark.parametrize("argv", [["--dataset", "unheard"], ["--dataset", "cirr", "--backbone", "unheard"]])
def test_a_pair_without_a_preset(argv: list[str]) -> None:
    """Another dataset's is never taken: those that exist are listed. A file that is given needs none."""
    told = "there is no preset for dataset .* 'unheard'.*; available: catalogue, cirr_blip4cir"
    with pytest.raises(InputError, match=told if "cirr" in argv else "unknown dataset 'unheard'; known: ") as error:
        find_preset(argv)
    names = [preset.stem for preset in PRESETS] if "cirr" in argv else DATASETS
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)
    find_preset([*argv, "--config", "mine.yaml"])


# what the paper's table says of each set: window, images that act as reference, pairs, words, templates
TABLE = {
    "fashioniq_clip4cir": ([10000, 20000], "annotated", None, 4, ["target"]),
    "cirr_clip4cir": ([10000, 15000], "all", None, 8, ["instead", "unlike"]),
    "fashioniq_tgcir": ([10000, 20000], "annotated", None, 10, ["target"]),
    "cirr_tgcir": ([10000, 15000], "all", None, 10, ["instead", "unlike"]),
    "fashioniq_blip4cir": (None, "annotated", 3000, 10, ["target"]),
    "cirr_blip4cir": (None, "all", None, 10, ["instead", "unlike"]),
    "fashioniq_sprc": (None, "annotated", 6000, 10, ["target"]),
    "cirr_sprc": (None, "annotated", None, 10, ["instead", "unlike"]),
    "fashioniq_zeroshot": (None, "all", None, 5, ["target"]),
    "cirr_zeroshot": (None, "all", None, 10, ["instead", "unlike"]),
    "outofdomain_fashioniq": (None, "all", None, 10, ["target"]),
    "outofdomain_cirr": (None, "all", None, 10, ["instead", "unlike"]),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_those_of_the_paper(name: str) -> None:
    config = parse(GenerateConfig, recipes_folder() / "triplets" / f"{name}.yaml", [])
    found = config.window, config.references, config.pairs, config.words, list(config.templates)
    assert found == TABLE[name] and config.pairs_per_image == 1 and config.seed == 42
    assert config.captioner == "llava-hf/llava-1.5-7b-hf" and config.pool == "all"
    assert config.window is None or config.matcher == "unicom:ViT-L/14"
    assert config.candidates == ("all" if name.startswith("outofdomain") else "named")
    assert config.all_templates == ("unlike" in config.templates)  # both texts of a pair
    assert (config.tokenizer, config.max_tokens) == ("clip", 77)  # of every backbone, whatever it reads


@pytest.mark.parametrize(("key", "value"), [
    ("window", [0, 5]), ("window", [0.5, 3]), ("window", [0, 0]), ("window", [-0.1, 0.5]), ("window", [5, 5]),
    ("window", [5, 1]), ("window", [1]), ("window", [1, 2, 3]), ("words", 0), ("max_new_tokens", 0), ("templates", []),
    ("caption_batch_size", 0), ("pairs_per_image", -1), ("pairs", 0), ("max_caption_count", 0), ("retries", -1),
    ("requests", 0), ("requests_per_minute", 0), ("timeout", 0), ("max_tokens", 0),
])  # fmt: skip
def test_values_that_cannot_be_meant(key: str, value: Any) -> None:
    """Each is refused with its name."""
    with pytest.raises(InputError, match=key):
        GenerateConfig(**{key: value})


@pytest.mark.parametrize("where", ["file", "option"])
def test_unknown_templates(tmp_path: Path, where: str) -> None:
    """A template that is none is refused before anything is captioned, from a file too."""
    path = tmp_path / "c.yaml"
    path.write_text("templates: [differnce]" if where == "file" else "")
    with pytest.raises(InputError, match="templates"):
        parse(GenerateConfig, path, [] if where == "file" else ["--templates", "[differnce]"])


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files go below ``output``, which is made, or below the dataset's folder."""
    config = GenerateConfig(output=str(tmp_path / "new" / "deep"))
    assert config.file("x.jsonl") == tmp_path / "new" / "deep" / "x.jsonl"
    assert (tmp_path / "new" / "deep").is_dir()
    assert GenerateConfig(dataset="d").folder == Path("data/d/generated")


@pytest.mark.parametrize(("window", "fractions"), [
    ([0, 1], True), ([0.5, 1], True), ([0.1, 0.2], True), ([1, 2], False), ([1, 20], False), (None, False),
])  # fmt: skip
def test_fractions_and_ranks(window: list[float] | None, fractions: bool) -> None:
    """Rank 0 is no rank, so [0, 1] is the whole list."""
    assert GenerateConfig(window=window).fractions == fractions


COMMAND = """
import sys, time
from pathlib import Path
from spn4cir.data_gen.steps import run_step

def step(config, dataset):
    print("in", flush=True)
    Path(config.folder / "go").touch()
    while not (config.folder / "stop").exists():
        time.sleep(0.01)

sys.argv = ["x", *sys.argv[1:]]
run_step(step, "Wait.")
"""


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Two runs would write each other's journals; a killed one holds nothing."""
    (tmp_path / "c.py").write_text(COMMAND)
    words = [sys.executable, str(tmp_path / "c.py"), "--dataset", "emoji", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert [first.stdout.readline() for _ in range(2)] == [b"preset: recipes/triplets/emoji.yaml\n", b"in\n"]
        second = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert (
            second.returncode == 2
            and "error: another run works in" in second.stderr
            and "in" not in second.stdout.split()
        )
        first.kill()
    (tmp_path / "out" / "stop").touch()
    assert subprocess.run(words, env=environment, capture_output=True).returncode == 0


def test_options_are_not_abbreviated() -> None:
    """Half a name would be taken by the parser, and not by what chooses the preset."""
    with pytest.raises(InputError, match="--datase"):
        parse(GenerateConfig, recipes_folder() / "triplets" / "emoji.yaml", ["--datase", "fashioniq"])
