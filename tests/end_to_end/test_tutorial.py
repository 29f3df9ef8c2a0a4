"""The tutorial's own commands, from its own text, on few pictures of the same names and for few steps."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import draw_picture

from spn4cir.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
FEW = ["--epochs", "1", "--max-steps", "2", "--batch-size", "8", "--workers", "0", "--mixed-precision", "no"]
WINDOWS = ("'[1,200]' --pairs-per-image 40", "'[1,19]' --pairs-per-image 18")
FETCHED = ("npm pack --silent famfamfam-silk@1.0.0", "tar xzf famfamfam-silk-1.0.0.tgz")
THINGS = ("basket", "cart", "lorry", "table", "folder", "page", "user", "server")
ACTIONS = ("", "_add", "_delete", "_key")


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of the shell in this process; a program that the tutorial does not have so far is an error."""
    words = shlex.split(line)
    if words[0] == "spn4cir-demo":
        words = [*words, "--help"]  # it would serve for ever
    elif words[0] == "spn4cir-train":
        words = [*words, *FEW]
    elif words[0] == "python":
        words = words[1:]
    program = words[0]
    monkeypatch.setattr(sys, "argv", words)
    if program.startswith("spn4cir-"):
        module, _, function = COMMANDS[program.removeprefix("spn4cir-")].partition(":")
        command = getattr(importlib.import_module(module), function)
        if words[-1] == "--help":
            with pytest.raises(SystemExit, match=r"^0$"):
                command()
        else:
            command()
    else:
        path = Path(program)
        runpy.run_path(str(path if path.exists() else ROOT / path), run_name="__main__")


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """From pictures to a search, each block in its turn; every picture that the page shows is there."""
    monkeypatch.chdir(tmp_path)
    pictures = Path("package", "dist", "png")
    pictures.mkdir(parents=True)
    for number, name in enumerate(f"{thing}{action}.png" for thing in THINGS for action in ACTIONS):
        draw_picture(pictures / name, number)
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    assert [line for line in lines if line.startswith(("npm", "tar"))] == list(FETCHED)
    for kind, block in BLOCKS:
        if kind == "python" and "prepare" not in {path.stem for path in Path().glob("*.py")}:
            Path("prepare.py").write_text(block, encoding="utf-8")
        elif kind == "python":
            exec(compile(block, "tutorial", "exec"), {})
        for line in block.splitlines() if kind == "sh" else ():
            if line not in FETCHED:
                run(line.replace(*WINDOWS), monkeypatch)
    shown = capfd.readouterr().out
    assert "20 known icons, 12 new ones, 27 queries about new ones" in shown
    assert Path("report", "index.html").is_file() and Path("result.png").is_file()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", TUTORIAL):
        assert (ROOT / "docs" / name).is_file(), name
