"""The house, checked over the syntax trees of all modules."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spn4cir.backbones import BACKBONES
from spn4cir.datasets import DATASETS
from spn4cir.importers import IMPORTERS

ROOT = Path(__file__).parents[2]
FLOORS: list[set[str]] = [
    {"errors"}, {"distributed", "files", "hidden_characters", "provenance", "schedules", "text_tokenizer", "types"},
    {"compute", "config_groups", "dataset", "intervals", "measures", "store", "streaming", "triplets"},
    {"config", "losses", "query_values", "results", "search", "near_duplicates", "pixels", "selection", "terms"},
    {"images", "in_batch", "margins", "faiss_search", "ranking", "comparison", "run_record"},
    {"identity"}, {"embedded"}, {"datasets"}, {"backbone"}, {"backbones"}, {"checkpoints"}, {"bank", "importers"},
    {"batches", "model", "model_card"}, {"objective", "evaluate", "index", "dataset_check"},
    {"class_objective", "pair_objective", "run"}, {"data"}, {"preparation", "shortcuts", "summary"},
    {"class_stage", "pair_stage"}, {"stages"}, {"train", "report", "export"},
    {"cli", "train_cli", "index_cli", "search_cli", "eval_cli", "app", "export_cli"}, {"app_cli"}, {"__main__"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
LINKED = ("data_gen", "recipes")  # folders at the top that are part of the package through a link
LIBRARY = sorted(path for top in ("spn4cir", "data_gen") for path in (ROOT / top).rglob("*.py"))
SOURCES = sorted([*LIBRARY, *(p for top in ("recipes", "benchmarks") for p in (ROOT / top).rglob("*.py"))])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = ("spn4cir",) if parts[0] in LINKED else ()
    return ".".join((*inside, *parts)).removesuffix(".__init__")


def package_of(module: str) -> str:
    """The top-level folder that a module lies in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "spn4cir" and len(parts) > 1 and parts[1] in LINKED else parts[0]


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            found.add(node.module or "")
            found |= {
                f"{node.module}.{alias.name}" for alias in node.names
            }  # "from spn4cir import bank" names a module
    return found


def room_of(module: str) -> str | None:
    """The room of a module of the library; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "spn4cir" and len(parts) > 1 and parts[1] in LEVEL else None


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """All functions and methods of a file with their dotted names, nested ones included."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, f"{prefix}{child.name}." if named else prefix)

    yield from walk(TREES[path], "")


def public(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public classes, functions and methods: no part of the dotted name starts with an underscore."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                yield f"{prefix}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{node.name}.")

    yield from walk(TREES[path].body, "")


def test_every_room_is_known() -> None:
    """A module that is new in spn4cir has its place in the import order."""
    library = [path.relative_to(ROOT).parts for path in LIBRARY]
    rooms = {parts[1].removesuffix(".py") for parts in library if parts[0] == "spn4cir"}
    assert rooms - {"__init__"} <= LEVEL.keys()


def test_imports_point_one_way() -> None:
    """No room of spn4cir imports a room above its own."""
    wrong = []
    for path in LIBRARY:
        own = room_of(module_of(path))
        for other in sorted({room_of(m) for m in imports_of(path)} - {None, own}) if own else []:
            if LEVEL[other] > LEVEL[own]:
                wrong.append(f"{name_of(path)} imports {other}")
    assert not wrong


def test_rooms_of_one_floor_do_not_import_each_other_in_a_circle() -> None:
    """Rooms that share a floor may lean on each other, but only one way."""
    edges: dict[str, set[str]] = {}
    for path in LIBRARY:
        if own := room_of(module_of(path)):
            edges.setdefault(own, set()).update({r for m in imports_of(path) if (r := room_of(m))} - {own})
    both_ways = [(a, b) for a in edges for b in edges[a] if LEVEL[a] == LEVEL[b] and a in edges.get(b, set())]
    assert not both_ways


@pytest.mark.parametrize(("package", "above"), [
    ("spn4cir", {"data_gen", "recipes", "benchmarks", "tests"}),
    ("data_gen", {"recipes", "benchmarks", "tests"}),
    ("recipes", {"benchmarks", "tests"}),
])  # fmt: skip
def test_packages_point_one_way(package: str, above: set[str]) -> None:
    """spn4cir knows nothing of what is built on it, and so on upwards."""
    wrong = {
        name_of(path): tops
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == package and (tops := {package_of(m) for m in imports_of(path)} & above)
    }
    assert not wrong


@pytest.mark.parametrize("known", [BACKBONES, DATASETS, IMPORTERS], ids=["backbones", "datasets", "importers"])
def test_plugins_do_not_import_each_other(known: dict[str, Any]) -> None:
    """One backbone, dataset or importer never leans on another; only the package's dictionary names them all."""
    names = {kind.__module__ for kind in known.values()}
    package = next(iter(names)).rpartition(".")[0]
    files = [p for p in (ROOT / package.replace(".", "/")).glob("*.py") if p.stem != "__init__"]
    assert len(names) == len(known) <= len(files)
    wrong = {p.name: found for p in files if (found := imports_of(p) & ({*names, package} - {module_of(p)}))}
    assert not wrong


def _defaults(tree: ast.Module) -> set[int]:
    """Ids of literal nodes that are a default: of a dataclass field, or given as ``default=``."""
    found = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "default"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {id(field.value) for field in node.body if isinstance(field, ast.AnnAssign)}
    return found


def test_no_dataset_name_outside_datasets() -> None:
    """Outside datasets/ a dataset's name is written only as the default of a setting or an option."""
    wrong = []
    for path in LIBRARY:
        if room_of(module_of(path)) == "datasets":
            continue
        names = DATASETS.keys() - ({"pairs"} if path.is_relative_to(ROOT / "data_gen") else set())  # pairs of images
        word = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])")
        allowed = _defaults(TREES[path])
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed:
                prose = any(c.isspace() for c in node.value)  # docstrings, help and examples may name one
                if not prose and word.search(node.value):
                    wrong.append(f"{name_of(path)}:{node.lineno}: {node.value!r}")
    assert not wrong


def test_no_backbone_name_outside_backbones() -> None:
    """As for datasets; importers may name it too."""
    wrong = []
    for path in LIBRARY:
        if room_of(module_of(path)) in ("backbones", "importers"):
            continue
        allowed = _defaults(TREES[path])
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed:
                prose = any(c.isspace() for c in node.value)  # docstrings, help and examples may name one
                if not prose and any(name in node.value for name in BACKBONES):
                    wrong.append(f"{name_of(path)}:{node.lineno}: {node.value!r}")
    assert not wrong


def test_no_test_of_a_plugin_name_outside_plugins() -> None:
    """``if backbone == "…"`` or ``if dataset == "…"`` stands nowhere but where the plug-ins live."""
    wrong = []
    for path in LIBRARY:
        if room_of(module_of(path)) in ("datasets", "backbones"):
            continue
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in sides}
                if named & {"backbone", "dataset"} and any(isinstance(n, ast.Constant) and n.value for n in sides):
                    wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_public_things_have_docstrings(path: Path) -> None:
    """Every module that holds code, and every public class, function and method says in a sentence what it is."""
    bare = [f"{name}, line {node.lineno}" for name, node in public(path) if not ast.get_docstring(node)]
    if TREES[path].body and not ast.get_docstring(TREES[path]):
        bare.append("the module")
    assert not bare


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_functions_are_annotated(path: Path) -> None:
    """Every argument and every result of a public function or method has a type."""
    bare = []
    for name, node in public(path):
        if isinstance(node, ast.ClassDef):
            continue
        bare += [
            f"{name}({argument.arg}), line {node.lineno}"
            for argument in arguments(node)
            if argument.annotation is None and argument.arg not in ("self", "cls")
        ]
        if node.returns is None:
            bare.append(f"{name} → ?, line {node.lineno}")
    assert not bare


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path: Path) -> None:
    """Files have at most 350 lines, functions at most 80, constructors at most 7 arguments."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions(path)}
    assert not {name: lines for name, lines in lengths.items() if lines > 80}
    counts = {name: len(arguments(node)) - 1 for name, node in functions(path) if node.name == "__init__"}
    assert not {name: count for name, count in counts.items() if count > 7}


def arguments(node: Function) -> list[ast.arg]:
    """All arguments of a function, self included."""
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument for argument in every if argument is not None]


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module → modules that it imports, for type checking alone included, and packages that are entered on the way."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        named = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (inside & trees.keys()) | ({node.module} if inside - trees.keys() else set())
        own = {module[:n] for n, letter in enumerate(module) if letter == "."}  # is entered before the module
        entered = {name[:n] for name in named for n, letter in enumerate(name) if letter == "."} - own
        graph[module] = (named | entered) & trees.keys() - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a circle: strongly connected components of more than one."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, waiting = set[str](), [start]
        while waiting:
            for other in graph[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        reached[start] = found
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even for type checking, or inside a function."""
    assert not circles(import_graph({module_of(path): tree for path, tree in TREES.items()}))


@pytest.mark.parametrize(("sources", "found"), [
    ({"p": "", "p.a": "from p import b", "p.b": "import p.c", "p.c": ""}, []),
    ({"p": "", "p.a": "from p import b", "p.b": "import p.c", "p.c": "import p.a"}, [["p.a", "p.b", "p.c"]]),
    ({"p": "", "p.a": "def f():\n  import p.b", "p.b": "if TYPE_CHECKING:\n  from p.a import x"}, [["p.a", "p.b"]]),
    ({"p": "", "p.q": "import p.q.x", "p.q.x": "from p.b import y", "p.b": "import p.q.z", "p.q.z": ""},
     [["p.b", "p.q", "p.q.x"]]),
    ({"p": "import p.a", "p.a": "from p import b", "p.b": ""}, []),
    ({"p": "import p.a", "p.a": "from p import value"}, [["p", "p.a"]]),
])  # fmt: skip
def test_circles_are_seen(sources: dict[str, str], found: list[list[str]]) -> None:
    """Of two and of three, through a function, for types alone, through a package's file; and none where none is."""
    assert circles(import_graph({name: ast.parse(text) for name, text in sources.items()})) == found


def loose_calls(tree: ast.Module) -> list[str]:
    """Calls that pickle, or load more than tensors or less than all."""
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        safely = any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
        if called == "torch.save" or (called == "torch.load" and not safely):
            wrong.append(f"line {node.lineno}: {called}")
        for word in node.keywords:
            value = word.value.value if isinstance(word.value, ast.Constant) else None
            loose = word.arg == "strict" and called != "zip"
            if (value is False and (word.arg == "weights_only" or loose)) or (
                value is True and word.arg == "allow_pickle"
            ):
                wrong.append(f"line {node.lineno}: {word.arg}={value}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_pickled_or_loaded_loosely(path: Path) -> None:
    """No pickle, ``torch.load`` only with ``weights_only=True`` written out, no ``strict=False``."""
    pickles = {m.split(".")[0] for m in imports_of(path)} & {"pickle", "cPickle", "dill", "joblib", "shelve"}
    assert not pickles and not loose_calls(TREES[path])


@pytest.mark.parametrize(("call", "wrong"), [
    ("torch.load(f, mmap=True, weights_only=True)", False),
    ("torch.load(f)", True),
    ("torch.load(f, weights_only=safe)", True),
    ("torch.load(f, weights_only=False)", True),
    ("torch.load(f, **options)", True),
    ("torch.save(x, f)", True),
    ("m.load_state_dict(s, strict=False)", True),
    ("numpy.load(f, allow_pickle=True)", True),
])  # fmt: skip
def test_what_counts_as_loose(call: str, wrong: bool) -> None:
    """The rule sees what it forbids, and nothing else."""
    assert bool(loose_calls(ast.parse(call))) == wrong


def test_no_absolute_paths_of_one_machine() -> None:
    """Nothing that ships names a folder of the machine it was written on."""
    place = re.compile(r"(?<![\w.~$}/-])/(root|home|work|tmp)(?![\w-])")
    tops = ("spn4cir", "data_gen", "recipes", "benchmarks", "docs")
    files = [p for top in tops for p in (ROOT / top).rglob("*") if "__pycache__" not in p.parts]
    files += [p for p in ROOT.iterdir() if p.name == "Makefile" or p.suffix in (".toml", ".cfg", ".md")]
    kinds = {".py", ".yaml", ".yml", ".toml", ".cfg", ".md", ".json", ""}
    wrong = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in files
        if path.is_file() and path.suffix in kinds
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if place.search(line)
    ]
    assert not wrong
