"""The wheel, built and installed into a folder of its own, does everything from an empty one, outside any checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from spn4cir.__main__ import COMMANDS
from spn4cir.datasets.emoji import Emoji

ROOT = Path(__file__).parents[2]
SOURCE = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "spn4cir", "data_gen", "recipes")
FEW = ("--max-steps", "2", "--batch-size", "8", "--workers", "0", "--mixed-precision", "no", "--eval-every", "0")
DATA = ("--dataset", "catalogue", "--data-root", "shop")


def run(folder: Path, *command: str | Path, path: Path | None = None) -> str:
    """Run a command in a folder, with nothing but ``path`` to import from beside what is installed; what it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SPN4CIR", "PYTHON"))}
    environment |= {"PYTHONPATH": str(path), "PATH": f"{path}/bin:{environment['PATH']}"} if path else {}
    told = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


def build(source: Path, folder: Path) -> Path:
    """The wheel of a folder or an archive of the source."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(folder.parent, sys.executable, "-m", "pip", "wheel", "-q", *options, "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(folder, sys.executable, "-m", "pip", "install", "-q", *options, "--target", folder, wheel)
    return folder


def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    """All code, recipes and embedded files, as in the checkout; no module beside spn4cir."""
    ours = {".py", ".yaml", ".md", ".json", ".jsonl", ".jinja", ".safetensors", ".typed", ".css", ".js"}
    held = [path for top in ("spn4cir", "data_gen", "recipes") for path in (ROOT / top).rglob("*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in held if path.is_file() and path.suffix in ours}
    wanted = {name if name.startswith("spn4cir/") else f"spn4cir/{name}" for name in wanted}
    assert names(wheel) == wanted and "spn4cir/recipes/emoji/clip4cir_stage1.yaml" in wanted


def test_the_source_archive_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    """Links are resolved in it, so that it needs no checkout either."""
    call = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(source, sys.executable, "-c", call)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert names(build(archive, tmp_path / "again")) == names(wheel)


def test_every_command_has_its_twin(site: Path) -> None:
    """What is installed as ``spn4cir-NAME`` is what ``python -m spn4cir NAME`` runs."""
    (about,) = site.glob("*.dist-info/entry_points.txt")
    assert dict(re.findall(r"spn4cir-(\w+) = (\S+)", about.read_text())) == COMMANDS
    assert {path.name for path in (site / "bin").iterdir()} == {f"spn4cir-{name}" for name in COMMANDS}


def test_from_pictures_to_figures(site: Path, tmp_path: Path) -> None:
    """Triplets, both stages and an evaluation, in small, by console commands and their twins."""
    twin = (sys.executable, "-m", "spn4cir")
    where = "import spn4cir, spn4cir.data_gen as d, spn4cir.config as c; print(d.__file__, c.recipes_folder())"
    assert run(tmp_path, sys.executable, "-c", where, path=site).split() == [
        str(site / "spn4cir" / "data_gen" / "__init__.py"), str(site / "spn4cir" / "recipes"),
    ]  # fmt: skip
    emoji = Emoji()
    for image_id in [i for i in emoji.training_images() if "firefighter" in emoji.label(i)][:16]:
        picture = tmp_path / "shop" / f"{image_id}.png"
        picture.parent.mkdir(exist_ok=True)
        shutil.copy(emoji.image(image_id).source, picture)
    small = ("--captioner", "embedded", "--matcher", "embedded", "--window", "[1, 8]", "--pairs-per-image", "2")
    made = run(tmp_path, "spn4cir-triplets", *DATA, *small, path=site)
    assert "next: " in made
    entries = json.loads(next((tmp_path / "data" / "catalogue").glob("*/generated/triplets.json")).read_text())
    rows = "".join(f'"{e["reference_name"]}","{e["captions"][0]}","{e["target_name"]}"\n' for e in entries[:5])
    (tmp_path / "shop" / "queries.csv").write_text(f"reference,modification,target\n{rows}", encoding="utf-8")
    first = run(tmp_path, *twin, "train", "--stage", "1", *DATA, "--generated", "auto", *FEW, path=site)
    assert first.startswith("recipe recipes/catalogue/clip4cir_stage1.yaml\n") and "saved in runs/" in first
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "spn4cir")
    second = run(tmp_path, *launch, "train", "--stage", "2", *DATA, "--generated", "auto", *FEW, path=site)
    assert "recipe recipes/catalogue/clip4cir_stage2.yaml\n" in second and "saved in runs/" in second
    result = json.loads(run(tmp_path, "spn4cir-eval", "--dataset", "catalogue", "--json", "-", path=site))
    assert result["protocol"] == "catalogue/val" and "/stage2-" in result["run"] and result["metrics"]["R@10"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"shop", "data", "runs"}
