"""FashionIQ and CIRR through the entry points, on small trees in their own layouts, two steps each."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import stated
from safetensors.torch import load_file

from spn4cir import batches, stages, train
from spn4cir.backbones import build_backbone
from spn4cir.batches import TripletCollate, TripletRows
from spn4cir.checkpoints import save_model
from spn4cir.cli import data_command
from spn4cir.config import training_command
from spn4cir.datasets.submission import LIMIT
from spn4cir.eval_cli import evaluate_command
from spn4cir.types import Triplet

ROOT = Path(__file__).parents[2]
COMMANDS = {"spn4cir-eval": evaluate_command, "spn4cir-data": data_command}
STAGES = {1: "recipes/stage1.py", 2: "recipes/stage2.py"}
EVAL, DATA, MAKE = "spn4cir-eval", "spn4cir-data", "data_gen/make_triplets.py"
FEW = ("--max-steps", 2, "--batch-size", 8, "--workers", 0, "--mixed-precision", "no")
SMALL = ("--backbone-options", "{model: embedded}")
FASHIONIQ = ("fashioniq/original", "fashioniq/original-noref", "fashioniq/val-union", "fashioniq/val-union-ref")
Call = Callable[..., tuple[str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run an entry point in this process; returns what it wrote to standard output and to standard error."""

    def run(program: str, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capfd.readouterr()
        if program in COMMANDS:
            COMMANDS[program]()
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        return capfd.readouterr()

    return run


@pytest.fixture
def refused(call: Call, capfd: pytest.CaptureFixture[str], tmp_path: Path, runs: Path) -> Callable[..., str]:
    """Run an entry point that must fail in one line and leave no file, but for the cache of pixels; that line."""

    def files() -> dict[Path, bytes]:
        found = (p for p in tmp_path.rglob("*") if p.is_file() and runs / "pixels" not in p.parents)
        return {path: path.read_bytes() for path in found}

    def run(program: str, *arguments: object) -> str:
        before = files()
        with pytest.raises(SystemExit) as stopped:
            call(program, *arguments)
        out, err = capfd.readouterr()
        lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip("\x1b[A ") and "%|" not in line]
        assert stopped.value.code == 2 and len(lines) == 1, (out, err)
        assert not out or re.fullmatch(r"(recipe|preset:) \S+\n", out), out
        assert files() == before, "something was left behind"
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder to start stage 2 from."""
    save_model(tmp_path / "model", build_backbone("clip4cir"), {})
    return tmp_path / "model"


def small(said: dict[str, Any]) -> dict[str, Any]:
    """Options of a published model for the embedded one in its place: what weighs its losses stays."""
    return {key: value for key, value in said.items() if key not in ("pretrained", "tokenizer")} | {"model": "embedded"}


def recipe(
    dataset: str, stage: int, root: Path, *options: object, generated: bool = False, backbone: str = "clip4cir"
) -> tuple[object, ...]:
    """Arguments of ``call`` that run a recipe in two steps."""
    path = ROOT / "recipes" / dataset / f"{backbone}_stage{stage}{'_generated' * generated}.yaml"
    given: tuple[object, ...] = ("--config", path, "--data-root", root, *FEW)
    if stage == 1:
        given += ("--backbone-options", json.dumps(small(yaml.safe_load(path.read_text())["backbone_options"])))
    return (STAGES[stage], *given, *options)


def result_of(runs: Path, dataset: str, pattern: str = "stage*", backbone: str = "clip4cir") -> dict[str, Any]:
    """The result of the newest run."""
    found = sorted(runs.glob(f"{dataset}/{backbone}/{pattern}/result.json"), key=lambda path: path.stat().st_mtime_ns)
    result: dict[str, Any] = json.loads(found[-1].read_text())
    return {**result, "run": found[-1].parent}


def change(path: Path, alter: Callable[[Any], Any]) -> None:
    """Alter a JSON file in place."""
    value = json.loads(path.read_text())
    alter(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Triplet]:
    """The triplets that a training reads, filled while it runs."""
    seen: list[Triplet] = []

    class Recorded(TripletRows):
        def __init__(self, triplets: Any, seed: int):
            super().__init__(triplets, seed)
            seen[:] = triplets

    monkeypatch.setattr(batches, "TripletRows", Recorded)
    return seen


# --- recipes ---------------------------------------------------------------------------------------------------------


def generated_file(dataset: str, root: Path, backbone: str = "clip4cir") -> None:
    """Eight generated triplets in the published shape, where the backbone's recipe looks for them."""
    paths = (ROOT / "recipes" / dataset / f"{backbone}_stage2{end}.yaml" for end in ("_generated", ""))
    said = yaml.safe_load(next(path for path in paths if path.is_file()).read_text())
    if dataset == "fashioniq":
        ids = [f"BDTR{n:05d}" for n in range(14)]
        rows = [{"target": ids[n + 1], "candidate": ids[n], "captions": [f"a dress of {n} dots"]} for n in range(8)]
        path = root / said["generated"]
    else:
        ids = [f"train-{n}-0-img{n % 2}" for n in range(18)]
        rows = [
            {"pairid": 0, "reference": ids[n], "target_hard": ids[n + 1], "caption": [f"{n} dots", "dots"],
             "img_set": {"members": [""]}} for n in range(8)
        ]  # fmt: skip
        path = root / "cirr" / said["generated"]
    rows = [{**row, "caption1": "a picture", "caption2": "dots"} for row in rows]
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize("backbone", ["clip4cir", "tgcir", "blip4cir", "sprc"])
@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_all_recipes_run(
    call: Call, request: pytest.FixtureRequest, runs: Path, trained: list[Triplet], dataset: str, backbone: str
) -> None:
    """Both stages with and without generated positives, as published; stage 2 goes on from stage 1; the id is saved."""
    root = request.getfixturevalue(dataset)
    generated_file(dataset, root, backbone)
    annotated, rows = {"fashioniq": 36, "cirr": 18}[dataset], [(1, False), (2, False), (2, True)]
    protocol = {"fashioniq": f"fashioniq/original{'-noref' * (backbone == 'clip4cir')}", "cirr": "cirr/val"}[dataset]
    for stage, generated in (*rows, (1, True)) if backbone == "clip4cir" else rows:
        arguments = recipe(dataset, stage, root, generated=generated, backbone=backbone)
        out, _ = call(*arguments)
        found = result_of(runs, dataset, f"stage{stage}-*", backbone)
        assert found["protocol"] == found["selected_on"] == protocol and found["steps"] == 2
        assert f"protocol {protocol}" in out and "selected on what it reports" in out
        assert sum(t.generated for t in trained) == 8 * generated
        assert len(trained) == annotated + 8 * generated
        wanted = yaml.safe_load(Path(str(arguments[2])).read_text())
        weights = small(wanted.pop("backbone_options", {}))
        wanted |= {"batch_size": 8, "workers": 0, "mixed_precision": "no", "data_root": str(root)}
        if wanted["temperature"] is None:  # the embedded weights hold none
            wanted["temperature"] = 0.07
            assert "temperature 0.07, published start: the weights hold none" in out
        said = yaml.safe_load((found["run"] / "config.yaml").read_text())
        assert stated(said, wanted) == wanted
        options = json.loads((found["run"] / "model.json").read_text())["options"]
        assert {key: options[key] for key in weights} == weights
        if stage == 1:
            named = f" --dataset {dataset}" + f" --backbone {backbone}" * (backbone != "clip4cir")
            assert f"next: {training_command(2)}{named} --data-root {root} --init {found['run']}" in out
        else:
            assert Path(said["init"]).name.startswith("stage1-")
        assert {"R@10", "R@50", "Rmean"} <= set(found["metrics"])
        assert dataset != "cirr" or {"R@1", "R@5", "Rs@1", "Rs@2", "Rs@3"} <= set(found["metrics"])


@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_zero_shot_trains_on_generated_triplets_alone(
    call: Call, request: pytest.FixtureRequest, runs: Path, trained: list[Triplet], dataset: str
) -> None:
    """Both stages see no annotated triplet, and the bank holds the images of generated ones."""
    root = request.getfixturevalue(dataset)
    generated_file(dataset, root, "clip4cir_zeroshot")
    for stage in (1, 2):
        out, _ = call(*recipe(dataset, stage, root, backbone="clip4cir_zeroshot"), "--batch-size", 4)
        assert len(trained) == 8 and all(t.generated for t in trained)
        found = result_of(runs, dataset, f"stage{stage}-*")
        assert found["steps"] == 2 and found["protocol"] == found["selected_on"]
        if stage == 1:  # what it says comes next is the zero-shot recipe, and sees no other triplet
            following = next(line for line in out.splitlines() if line.startswith("next: "))
            assert f"--config recipes/{dataset}/clip4cir_zeroshot_stage2.yaml" in following
            assert "--max-annotated 0 --generated captions/" in following
    named = {i for t in trained for i in t.image_ids}
    banks = {json.loads(path.read_text())["rows"] for path in runs.glob("banks/*/store.json")}
    assert len(named) == 9 and 9 in banks and len(banks) == 2  # the other one is the gallery's


@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_the_combiner_follows_a_first_stage(
    call: Call, request: pytest.FixtureRequest, runs: Path, dataset: str
) -> None:
    """Its recipe goes on from a run of stage 1, whose CLIP stays as it is."""
    root, path = request.getfixturevalue(dataset), ROOT / "recipes" / dataset / "clip4cir_combiner.yaml"
    call(*recipe(dataset, 1, root))
    first = result_of(runs, dataset)["run"]
    options = json.dumps(small(yaml.safe_load(path.read_text())["backbone_options"]))
    given = ("--config", path, "--data-root", root, *FEW, "--backbone-options", options, "--init", first)
    out, _ = call(STAGES[1], *given)
    found = result_of(runs, dataset)
    assert found["run"] != first and found["steps"] == 2 and "initialised anew" in out
    assert found["protocol"] == {"fashioniq": "fashioniq/original", "cirr": "cirr/val"}[dataset]
    before, after = (load_file(run / "model.safetensors") for run in (first, found["run"]))
    assert before.keys() < after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_fp16_needs_a_gpu(refused: Callable[..., str], fashioniq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would train in float32 on a CPU and say nothing."""
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    monkeypatch.setattr(train, "Accelerator", lambda **_: alone)
    line = refused(*recipe("fashioniq", 1, fashioniq, "--mixed-precision", "fp16"))
    assert "mixed_precision fp16 needs a GPU" in line and "--mixed-precision no" in line


# --- selection -------------------------------------------------------------------------------------------------------


def test_what_is_put_aside_is_not_trained_on(
    call: Call, fashioniq: Path, runs: Path, model: Path, trained: list[Triplet]
) -> None:
    """The run says on what it was selected; stage and seed do not move the set; the protocol is still reported."""
    call(*recipe("fashioniq", 2, fashioniq, "--init", model))
    everything, kept = list(trained), []
    for stage, seed in ((1, 42), (2, 42), (2, 7)):
        init = ("--init", model) if stage == 2 else ()
        out, _ = call(*recipe("fashioniq", stage, fashioniq, "--holdout", 0.1, "--seed", seed, *init))
        found = result_of(runs, "fashioniq", f"stage{stage}-*")
        assert found["selected_on"] == "fashioniq/holdout-0.1" and found["protocol"] == "fashioniq/original-noref"
        assert "the best on fashioniq/holdout-0.1, held-out training triplets" in out
        kept.append(list(trained))
    aside = [t for t in everything if t not in kept[0]]
    assert 1 <= len(aside) <= 9 and len(kept[0]) == len(everything) - len(aside)  # about a tenth of 36
    assert kept[0] == kept[1] == kept[2]
    call(*recipe("fashioniq", 2, fashioniq, "--holdout", 0.5, "--init", model))
    assert 9 < len(trained) < 27  # negative control: another fraction, another set
    assert result_of(runs, "fashioniq")["selected_on"] == "fashioniq/holdout-0.5"
    call(*recipe("fashioniq", 1, fashioniq, "--holdout", 0.5, "--max-annotated", 30))
    first = everything[:30]
    assert trained and all(t in first for t in trained) and len(trained) < 30  # fewer triplets, the same sides
    assert not [t for t in aside if t in trained]


def test_an_unknown_metric_is_named(refused: Callable[..., str], cirr: Path) -> None:
    """Before anything is read but annotations."""
    line = refused(*recipe("cirr", 1, cirr, "--select-by", "[R@1, Rs@9]"))
    assert line.startswith("select_by: cirr/val has no metric 'Rs@9'; known: R@1, R@5") and "Rs@3" in line


def test_what_is_put_aside_has_no_subsets(call: Call, cirr: Path, runs: Path) -> None:
    """A recipe that selects by Rs@k goes on with the metrics that are there, says so, and hands the holdout on."""
    out, _ = call(*recipe("cirr", 1, cirr, "--holdout", 0.1))
    assert "cirr/holdout-0.1 has no Rs@1, Rs@2, Rs@3: selected by R@1, R@5, R@10, R@50" in out
    assert "--holdout 0.1 --init" in out
    assert result_of(runs, "cirr")["selected_on"] == "cirr/holdout-0.1"


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(call: Call, *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(EVAL, "--json", "-", *arguments)[0])
    return found


def test_every_protocol_can_be_asked_for(call: Call, fashioniq: Path, tmp_path: Path) -> None:
    """Each id is in its result; categories are tags; the ablation comes along; results of one id are combined."""
    data = ("--dataset", "fashioniq", "--data-root", fashioniq)
    results = {name: evaluated(call, *data, "--protocol", name) for name in FASHIONIQ}
    for name, result in results.items():
        assert result["protocol"] == name and set(result["tags"]) == {"dress", "shirt", "toptee"}
    assert len({result["data"] for result in results.values()}) == len(FASHIONIQ)
    metrics = [result["metrics"]["R@10"] for result in results.values()]
    assert metrics[0] <= metrics[1] <= metrics[2] and metrics[0] < metrics[2]  # each ranks fewer images than the last
    default = evaluated(call, *data, "--ablate")
    assert default["protocol"] == "fashioniq/original" and default["metrics"] == results[FASHIONIQ[0]]["metrics"]
    assert set(default["ablation"]) == {"image only", "text only", "late fusion", "composed"}
    for name in ("a", "b", "c"):
        result = results[FASHIONIQ[name == "c"]]
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    out, _ = call(EVAL, "--combine", tmp_path / "a.json", tmp_path / "b.json")
    assert "protocol fashioniq/original, 2 results" in out and f"{metrics[0]:8.2f} ± 0.00" in out
    with pytest.raises(SystemExit):
        call(EVAL, "--combine", tmp_path / "a.json", tmp_path / "c.json")


def test_a_run_brings_its_protocol_and_its_data(call: Call, fashioniq: Path, runs: Path) -> None:
    """Without other options a run is evaluated as it was trained for; an option wins."""
    call(*recipe("fashioniq", 1, fashioniq))
    run = result_of(runs, "fashioniq")
    result = evaluated(call, "--run", run["run"])
    assert result["protocol"] == "fashioniq/original-noref" and result["data"] == run["data"]
    assert result["metrics"] == pytest.approx(run["metrics"])
    assert evaluated(call, "--run", run["run"], "--protocol", "fashioniq/original")["protocol"] == "fashioniq/original"
    newest = evaluated(call, "--dataset", "fashioniq")  # the same run, found by itself
    assert newest["protocol"] == "fashioniq/original-noref" and newest["metrics"] == result["metrics"]


def test_damaged_results_and_runs_are_named(refused: Callable[..., str], tmp_path: Path, model: Path) -> None:
    """What is combined must be results of the same metrics; a run's settings must be settings."""
    whole = {"protocol": "x/val", "data": "0", "metrics": {"R@1": 1.0}}
    paths = [tmp_path / f"{n}.json" for n in range(2)]
    paths[0].write_text(json.dumps(whole))
    for other in ({"R@5": 1.0}, {"R@1": "many"}, [1.0], None):
        paths[1].write_text(json.dumps({**whole, "metrics": other}))
        assert "metrics" in refused(EVAL, "--combine", *paths) or "no result" in refused(EVAL, "--combine", *paths)
    for text in ("a: [", "- a", "sed: 3"):
        (model / "config.yaml").write_text(text)
        assert str(model / "config.yaml") in refused(EVAL, "--run", model)


def test_a_combination_is_written(call: Call, tmp_path: Path) -> None:
    """As JSON, where --json says."""
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"protocol": "x/val", "data": "0", "metrics": {"R@1": 4.0}}))
    call(EVAL, "--combine", path, path, "--json", tmp_path / "both.json")
    found = json.loads((tmp_path / "both.json").read_text())
    assert found["metrics"] == {"R@1": {"mean": 4.0, "deviation": 0.0}} and found["results"] == 2


def test_an_unknown_protocol_is_named(refused: Callable[..., str], fashioniq: Path, cirr: Path) -> None:
    """In training and in evaluation, with those that are known."""
    for command in ((EVAL, "--dataset", "fashioniq", "--data-root", fashioniq), recipe("fashioniq", 1, fashioniq)):
        line = refused(*command, "--protocol", "fashioniq/orginal")
        assert "'fashioniq/orginal'" in line and ", ".join(FASHIONIQ) in line
    assert "known: val, test1" in refused(EVAL, "--dataset", "cirr", "--data-root", cirr, "--split", "test")


def test_a_submission_for_the_server(call: Call, refused: Callable[..., str], cirr: Path, tmp_path: Path) -> None:
    """Without a folder one line; with one, two files that are sound, small enough, and refused once damaged."""
    data = ("--dataset", "cirr", "--data-root", cirr)
    assert "targets are not public: give --submission" in refused(EVAL, *data, "--split", "test1")
    assert "cirr/val is none" in refused(EVAL, *data, "--submission", tmp_path / "val")
    out, _ = call(EVAL, *data, "--split", "test1", "--submission", tmp_path / "sent")
    files = sorted((tmp_path / "sent").iterdir())
    assert [path.name for path in files] == ["recall_submission.json", "recall_subset_submission.json"]
    assert all(f"{path}: a sound" in out and path.stat().st_size < LIMIT for path in files)
    captions = json.loads((cirr / "cirr" / "captions" / "cap.rc2.test1.json").read_text())
    for path, metric, length in zip(files, ("recall", "recall_subset"), (50, 3), strict=True):
        content = json.loads(path.read_text())
        assert (content.pop("version"), content.pop("metric")) == ("rc2", metric)
        assert set(content) == {str(row["pairid"]) for row in captions}
        for row in captions:
            ranked = content[str(row["pairid"])]
            assert len(set(ranked)) == length and row["reference"] not in ranked
            assert metric == "recall" or set(ranked) < set(row["img_set"]["members"])
    out, _ = call(DATA, "validate-submission", "--data-root", cirr, *files)
    assert out.count("a sound") == 2
    change(files[1], lambda content: content["12003"].pop())
    line = refused(DATA, "validate-submission", "--data-root", cirr, *files[1:])
    assert line == f"{files[1]}, entry '12003': expected 3 images, got 2"


# --- what is left out, what is equal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_a_skip_list_is_honoured(
    call: Call,
    refused: Callable[..., str],
    request: pytest.FixtureRequest,
    runs: Path,
    trained: list[Triplet],
    dataset: str,
) -> None:
    """Missing images stop training until the doctor has listed them; then it is said what is left out."""
    root = request.getfixturevalue(dataset)
    lost = {"fashioniq": ("BSTR00005", "BSVA00006"), "cirr": ("train-1-0-img1", "dev-2-0-img0")}[dataset]
    paths = [next(root.rglob(f"{image_id}.png")) for image_id in lost]
    for path in paths:
        path.unlink()
    assert f"{paths[0]} is missing" in refused(*recipe(dataset, 1, root))
    assert f"{paths[1]} is missing" in refused(EVAL, "--dataset", dataset, "--data-root", root)
    out, _ = call(DATA, "check", "--dataset", dataset, "--data-root", root, "--write-skip-list")
    assert "skip_list.json: 2 images to leave out" in out and "training can run" in out
    out, _ = call(*recipe(dataset, 1, root))
    found = result_of(runs, dataset)
    note = f"{root / 'skip_list.json'} leaves out 2 images (2 missing)"
    assert note in out and found["protocol"].endswith("+skip") and found["selected_on"] == found["protocol"]
    assert trained and not any({*t.image_ids} & set(lost) for t in trained)
    out, err = call(EVAL, "--run", found["run"], "--json", "-")
    assert json.loads(out)["protocol"] == found["protocol"] and json.loads(out)["data"] == found["data"] and note in err
    if dataset == "cirr":
        call(EVAL, "--dataset", "cirr", "--data-root", root, "--split", "test1", "--submission", runs / "sent")  # whole


def test_published_classes_share_a_row(
    call: Call, fashioniq: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one class in optimized_images.json are one candidate, and no negatives of each other."""
    seen: dict[str, Any] = {}

    class Recorded(TripletCollate):
        def __init__(self, *given: Any):
            super().__init__(*given)
            assert self.bank is not None
            seen.update(rows=self.bank.rows, identity=self.identity)

    monkeypatch.setattr(stages, "TripletCollate", Recorded)
    names = [f"BDTR{n:05d}" for n in range(5, 13)]
    call(*recipe("fashioniq", 2, fashioniq, "--init", model))
    assert len({seen["rows"][name] for name in names}) == len({seen["identity"][name] for name in names}) == 8
    classes = {name: max(0, n - 1) for n, name in enumerate(names)}  # the second is a copy of the first
    firsts = [names[0], *names[2:]]
    listed = [firsts, [f"images/{name}.png" for name in firsts], classes]
    (fashioniq / "optimized_images.json").write_text(json.dumps(listed))
    out, _ = call(*recipe("fashioniq", 2, fashioniq, "--init", model))
    assert f"{fashioniq / 'optimized_images.json'} says which images are equal" in out
    for numbers in (seen["rows"], seen["identity"]):
        assert numbers[names[0]] == numbers[names[1]] and len({numbers[name] for name in names}) == 7


# --- bad input -------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def entry(number: int, key: str, value: object = None) -> Callable[[Path], None]:
    """Damage of one field of one entry; without a value the field is taken away."""
    return lambda path: change(
        path, lambda rows: rows[number].pop(key) if value is None else rows[number].update({key: value})
    )


def without(image_id: str) -> Callable[[Path], None]:
    return lambda path: change(path, lambda ids: ids.pop(image_id) if isinstance(ids, dict) else ids.remove(image_id))


FQ = "captions/cap.{}.json"
CR = "cirr/captions/cap.rc2.{}.json"
DAMAGE = [
    ("fashioniq", FQ.format("dress.train"), cut, "not valid JSON, or cut short"),
    ("fashioniq", FQ.format("shirt.train"), entry(3, "target"), "entry 3, field 'target': is missing"),
    ("fashioniq", FQ.format("toptee.val"), entry(2, "candidate"), "entry 2, field 'candidate': is missing"),
    ("fashioniq", FQ.format("dress.train"), entry(1, "captions", "is red"), "entry 1, field 'captions': expected"),
    ("fashioniq", FQ.format("dress.train"), entry(1, "captions", ["red"]), "'captions': expected 2 captions"),
    ("fashioniq", FQ.format("dress.train"), entry(0, "candidate", "../../x"), "'candidate': \"../../x\" is no"),
    ("fashioniq", "image_splits/split.dress.val.json", without("BDVA00005"), "'target': 'BDVA00005' is not in"),
    ("fashioniq", "images/BTTR00004.png", cut, "does not decode"),
    ("fashioniq", "images/BTVA00009.png", Path.unlink, "is missing"),
    ("fashioniq", "optimized_images.json", lambda path: path.write_text('[["a"], ["b"], {"a": 1}]'), "class id 1"),
    ("cirr", CR.format("val"), cut, "not valid JSON, or cut short"),
    ("cirr", CR.format("train"), entry(5, "target_hard"), "entry 5, field 'target_hard': is missing"),
    ("cirr", CR.format("val"), entry(5, "img_set", {"members": 3}), "'img_set', field 'members': expected"),
    ("cirr", CR.format("train"), entry(4, "caption", 5), "entry 4, field 'caption': expected a text, got 5"),
    ("cirr", CR.format("train"), entry(4, "reference", "../../x"), "'reference': \"../../x\" is no"),
    ("cirr", CR.format("val"), entry(1, "target_hard", "dev-2-0-img0"), "entry 1, field 'img_set': its members lack"),
    ("cirr", "cirr/image_splits/split.rc2.val.json", without("dev-3-0-img1"), "\"dev-3-0-img1\" is not in"),
    ("cirr", "train/7/train-4-0-img0.png", cut, "does not decode"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "name", "damage", "words"), DAMAGE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_damage_is_found_before_training(
    refused: Callable[..., str], request: pytest.FixtureRequest, dataset: str, name: str, damage: Any, words: str
) -> None:
    """One line with the file, the entry and the field; nothing is written."""
    root = request.getfixturevalue(dataset)
    damage(root / name)
    line = refused(*recipe(dataset, 1, root))
    assert words in line
    assert str(root / name) in line


@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_a_generated_file_with_an_unknown_image(
    refused: Callable[..., str], request: pytest.FixtureRequest, model: Path, dataset: str
) -> None:
    """A missing file, and one that names an image of val, are told apart."""
    root = request.getfixturevalue(dataset)
    name = {"fashioniq": "captions/cap.extend_clip.train.json", "cirr": "cirr/captions/cap.rc2.train.extend_clip.json"}[
        dataset
    ]
    again = recipe(dataset, 2, root, "--init", model, generated=True)
    assert refused(*again).startswith(f"generated triplets {root / name} are missing")
    generated_file(dataset, root)
    key, stranger = {"fashioniq": ("target", "BDVA00003"), "cirr": ("target_hard", "dev-3-0-img1")}[dataset]
    entry(6, key, stranger)(root / name)
    assert refused(*again) == f"{root / name}, entry 6, field '{key}': '{stranger}' is no training image"


@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_no_data_says_where_to_get_it(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: str
) -> None:
    """Whatever command comes first: what is expected where, and from which source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPN4CIR_DATA", raising=False)
    source = {"fashioniq": "github.com/XiaoxiaoGuo/fashion-iq", "cirr": "github.com/Cuberick-Orion/CIRR"}[dataset]
    config = ROOT / "recipes" / dataset / "clip4cir_stage1.yaml"
    commands = ((MAKE, "--dataset", dataset), (EVAL, "--dataset", dataset), (DATA, "check", "--dataset", dataset))
    for command in (*commands, (STAGES[1], "--config", config, *FEW, *SMALL)):
        line = refused(*command)
        assert line.startswith(f"{dataset}: data/{dataset} does not hold the dataset: expected there captions/")
        assert "image_splits/" in line and source in line


# --- generated triplets ----------------------------------------------------------------------------------------------


def test_triplets_of_cirr_are_made_and_trained_on(
    call: Call, cirr: Path, model: Path, tmp_path: Path, trained: list[Triplet]
) -> None:
    """The published shape, over training images only, which stage 2 then reads."""
    made = ("--window", "[1, 5]", "--pairs-per-image", 2, "--matcher", "embedded", "--captioner", "embedded")
    out, _ = call(MAKE, "--dataset", "cirr", "--data-root", cirr, *made, "--output", tmp_path / "made")
    file = tmp_path / "made" / "triplets.json"
    assert f"recipes/cirr/clip4cir_stage2_generated.yaml --data-root {cirr} --generated {file}" in out
    rows = json.loads(file.read_text())
    keys = {"pairid", "reference", "target_hard", "caption", "img_set", "caption1", "caption2"}
    assert rows and all(set(row) == keys and row["pairid"] == 0 for row in rows)
    for row in rows:
        before, after = row["caption1"], row["caption2"]
        assert row["caption"] == [f"{after} instead of {before}", f"Unlike {before}, I want {after}"]
    call(*recipe("cirr", 2, cirr, "--init", model, "--generated", file, generated=True))
    found = {(t.reference, t.targets[0], t.texts) for t in trained if t.generated}
    assert found == {(row["reference"], row["target_hard"], tuple(row["caption"])) for row in rows}
