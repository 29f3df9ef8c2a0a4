"""One name, one meaning: modules and their public functions and classes, over the whole package."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(p for top in ("spn4cir", "data_gen") for p in (ROOT / top).rglob("*.py") if p.stem != "__init__")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def shared(named: dict[str, set[str]]) -> dict[str, set[str]]:
    return {name: files for name, files in named.items() if len(files) > 1}


def defined_names(text: str) -> set[str]:
    """Public functions and classes at the top level of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(text).body if isinstance(node, kinds) and not node.name.startswith("_")}


def test_module_names_are_unique() -> None:
    """No two modules have the same name, so that an import says which one is meant."""
    modules = defaultdict(set)
    for path in FILES:
        modules[path.stem].add(name_of(path))
    assert len(modules) > 40 and not shared(modules)


def test_public_names_are_unique() -> None:
    """No two modules define a public function or class of one name."""
    names = defaultdict(set)
    for path in FILES:
        for name in defined_names(path.read_text(encoding="utf-8")):
            names[name].add(name_of(path))
    assert len(names) > 300 and not shared(names)


def test_what_counts_as_a_name() -> None:
    """Only what is public and at the top level."""
    text = "def a():\n    def b(): ...\nclass C:\n    def d(self): ...\ndef _e(): ...\nasync def f(): ...\nG = 1\n"
    assert defined_names(text) == {"a", "C", "f"}
