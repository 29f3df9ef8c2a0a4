"""Metrics of FashionIQ and CIRR against plain loops over names, read from the annotation files by themselves.

Features are small whole numbers, so many scores are equal: recall is then what is expected if the target takes each of
its tied places with equal probability.
"""

import itertools
import json
import random
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import COMPOSED, tiny_backbone

from spn4cir.backbone import Backbone
from spn4cir.bank import Bank, load_or_build
from spn4cir.datasets import load_dataset
from spn4cir.datasets.skip import write_skip_list
from spn4cir.errors import InputError
from spn4cir.evaluate import encode_benchmark, evaluate
from spn4cir.images import ImageSource
from spn4cir.ranking import rank_queries
from spn4cir.results import combine, compute_metrics, metrics_table
from spn4cir.types import Benchmark, ImageFeatures, Query, recall_measures

CATEGORIES = ("dress", "shirt", "toptee")
PROTOCOLS = ("fashioniq/original", "fashioniq/original-noref", "fashioniq/val-union", "fashioniq/val-union-ref")
FASHION = [f"B{n:09}" for n in range(170)]
Vector = tuple[int, ...]
Result = tuple[dict[str, float], dict[str, dict[str, float]]]


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations of three categories of unequal size that share images; queries name a part of each gallery."""
    root, draw = tmp_path_factory.mktemp("fashioniq"), random.Random(1)
    for category, (first, last, count) in zip(CATEGORIES, ((0, 60, 40), (50, 120, 31), (110, 170, 53)), strict=True):
        listed = draw.sample(FASHION[first:last], last - first)
        rows = []
        for _ in range(count):
            reference, target = draw.sample(listed[: len(listed) - 4], 2)
            rows.append({"candidate": reference, "target": target, "captions": [f"is {draw.random()}.", "has dots"]})
        write(root / "captions" / f"cap.{category}.val.json", rows)
        write(root / "image_splits" / f"split.{category}.val.json", listed)
    return root


@pytest.fixture(scope="module")
def real_life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations of CIRR: groups of six that overlap, in an order of their own."""
    root, draw = tmp_path_factory.mktemp("cirr"), random.Random(2)
    names = [f"dev-{n}-0-img{n % 2}" for n in range(71)]
    rows = []
    for n in range(90):
        members = draw.sample(names[n % 60 : n % 60 + 11], 6)
        reference, target = draw.sample(members, 2)
        row = {"reference": reference, "target_hard": target, "img_set": {"members": members}}
        rows.append({"pairid": 7 * n, "caption": f"more {n}", **row})
    write(root / "cirr" / "captions" / "cap.rc2.val.json", rows)
    write(root / "cirr" / "image_splits" / "split.rc2.val.json", {i: f"./dev/{i}.png" for i in names})
    return root


def vectors(benchmark: Benchmark, seed: int = 0, width: int = 4) -> tuple[list[Vector], dict[str, Vector]]:
    """Small whole numbers for queries, in order, and for images, those of no gallery included."""
    draw = random.Random(seed)
    names = sorted({*benchmark.gallery, *FASHION})
    return (
        [tuple(draw.choices(range(-2, 3), k=width)) for _ in benchmark.queries],
        {image_id: tuple(draw.choices(range(-2, 3), k=width)) for image_id in names},
    )


def fast(benchmark: Benchmark, queries: Sequence[Vector], images: dict[str, Vector]) -> Result:
    """What the library says."""
    target = torch.tensor([images[i] for i in benchmark.gallery]).float()[:, None]
    return compute_metrics(benchmark, rank_queries(benchmark, torch.tensor(queries).float(), target))


def places(query: Vector, target: str, ranked: Collection[str], images: dict[str, Vector]) -> range:
    """All places that the target may stand on among these names."""

    def score(name: str) -> int:
        return sum(a * b for a, b in zip(query, images[name], strict=True))

    assert target in ranked
    above = sum(score(name) > score(target) for name in ranked)
    equal = sum(score(name) == score(target) for name in ranked)
    return range(above + 1, above + equal + 1)


def recall(found: list[range], k: int) -> float:
    """Percentage: each target counts with the share of its places that are among the first k."""
    return 100 * sum(sum(place <= k for place in one) / len(one) for one in found) / len(found)


def slow_fashioniq(
    root: Path, protocol: str, queries: Sequence[Vector], images: dict[str, Vector], skipped: Collection[str] = ()
) -> Result:
    """By category, straight from the files: gallery, ranking without or with the reference, means over categories."""
    groups: dict[str, dict[str, float]] = {}
    turn = iter(queries)
    for category in CATEGORIES:
        rows = json.loads((root / "captions" / f"cap.{category}.val.json").read_text())
        gallery = json.loads((root / "image_splits" / f"split.{category}.val.json").read_text())
        if protocol in PROTOCOLS[2:]:
            gallery = [i for i in gallery if any(i in (row["candidate"], row["target"]) for row in rows)]
        found = []
        for row in rows:
            if row["candidate"] in skipped or row["target"] in skipped:
                continue
            removed = {*skipped, row["candidate"]} if protocol in PROTOCOLS[1:3] else {*skipped}
            found.append(places(next(turn), row["target"], [i for i in gallery if i not in removed], images))
        tens, fifties = recall(found, 10), recall(found, 50)
        groups[category] = {"R@10": tens, "R@50": fifties, "Rmean": (tens + fifties) / 2, "queries": len(found)}
    assert next(turn, None) is None
    return {name: sum(group[name] for group in groups.values()) / 3 for name in ("R@10", "R@50", "Rmean")}, groups


def slow_cirr(root: Path, queries: Sequence[Vector], images: dict[str, Vector], skipped: Collection[str] = ()) -> Any:
    """Straight from the files: the reference out of everything, then the whole gallery and the group."""
    rows = json.loads((root / "cirr" / "captions" / "cap.rc2.val.json").read_text())
    gallery = list(json.loads((root / "cirr" / "image_splits" / "split.rc2.val.json").read_text()))
    rows = [row for row in rows if not {row["reference"], row["target_hard"]} & set(skipped)]
    found, within = [], []
    for query, row in zip(queries, rows, strict=True):
        for ranked, into in ((gallery, found), (row["img_set"]["members"], within)):
            others = [i for i in ranked if i != row["reference"] and i not in skipped]
            into.append(places(query, row["target_hard"], others, images))
    metrics = {f"R@{k}": recall(found, k) for k in (1, 5, 10, 50)} | {f"Rs@{k}": recall(within, k) for k in (1, 2, 3)}
    return {**metrics, "Rmean": (metrics["R@5"] + metrics["Rs@1"]) / 2}


def same(one: Result, other: Result) -> bool:
    """Whether metrics and groups are equal, all names included."""
    assert one[0].keys() == other[0].keys() and one[1].keys() == other[1].keys()
    groups = all(one[1][name] == pytest.approx(group) for name, group in other[1].items())
    return one[0] == pytest.approx(other[0]) and groups


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fashioniq_equals_loops_over_names(fashion: Path, protocol: str, seed: int) -> None:
    """Metrics, those of each category, and nothing else; other protocols give other numbers."""
    benchmark = load_dataset("fashioniq", str(fashion)).benchmark("val", protocol)
    given = vectors(benchmark, seed)
    found = fast(benchmark, *given)
    assert benchmark.name == protocol and list(found[0]) == ["R@10", "R@50", "Rmean"]
    assert same(found, slow_fashioniq(fashion, protocol, *given))
    for other in set(PROTOCOLS) - {protocol}:  # negative control
        assert not same(found, slow_fashioniq(fashion, other, *given))


def test_a_kept_reference_and_a_pooled_gallery_are_other_protocols(fashion: Path) -> None:
    """Negative controls, with the reference turned into the best image: each flag moves the numbers."""
    benchmark = load_dataset("fashioniq", str(fashion)).benchmark("val", "fashioniq/original")
    queries, images = vectors(benchmark, width=6)
    near = [images[query.reference] for query in benchmark.queries]
    kept, removed = (fast(replace(benchmark, exclude_reference=out), near, images)[0] for out in (False, True))
    assert all(kept[name] < removed[name] for name in ("R@10", "R@50"))
    own = fast(benchmark, queries, images)[0]
    measures = recall_measures(10, 50, primary=(10, 50))
    pooled = fast(replace(benchmark, measures=measures), queries, images)[0]
    assert all(pooled[name] < own[name] for name in ("R@10", "R@50"))


def test_means_over_categories_are_not_means_over_queries(fashion: Path) -> None:
    """Negative control: the categories differ in size, so the two means differ."""
    benchmark = load_dataset("fashioniq", str(fashion)).benchmark("val")
    given = vectors(benchmark)
    over_queries = fast(replace(benchmark, macro=()), *given)[0]
    over_groups = fast(benchmark, *given)[0]
    assert over_queries["R@10"] != pytest.approx(over_groups["R@10"])
    assert over_queries["macro R@10"] == pytest.approx(over_groups["R@10"])


@pytest.mark.parametrize("seed", [0, 1])
def test_cirr_equals_loops_over_names(real_life: Path, seed: int) -> None:
    """Whole gallery and subset, the reference left out of both; kept, or with other subsets, the numbers differ."""
    benchmark = load_dataset("cirr", str(real_life)).benchmark("val")
    given = vectors(benchmark, seed)
    metrics, tags = fast(benchmark, *given)
    assert metrics == pytest.approx(slow_cirr(real_life, *given)) and tags == {}
    kept = fast(replace(benchmark, exclude_reference=False), *given)[0]
    assert kept["R@50"] != pytest.approx(metrics["R@50"]) and kept["Rs@1"] != pytest.approx(metrics["Rs@1"])
    whole = replace(benchmark, queries=tuple(replace(q, candidates=benchmark.gallery) for q in benchmark.queries))
    assert fast(whole, *given)[0]["Rs@1"] == pytest.approx(metrics["R@1"])  # a subset of all is no subset
    assert metrics["Rs@1"] > metrics["R@1"]


def test_a_skip_list_is_the_same_as_files_without_those_images(fashion: Path, real_life: Path) -> None:
    """Galleries, queries and subsets lose the images; the protocol is another one and says so."""
    for name, root in (("fashioniq", fashion), ("cirr", real_life)):
        whole = load_dataset(name, str(root)).benchmark("val")
        skipped = {whole.gallery[0], whole.queries[2].reference, whole.queries[5].targets[0], whole.gallery[-1]}
        path = write_skip_list(root, dict.fromkeys(skipped, "missing"))
        try:
            benchmark = load_dataset(name, str(root)).benchmark("val")
        finally:
            path.unlink()
        assert benchmark.name == f"{whole.name}+skip" and len(benchmark.queries) < len(whole.queries) - 1
        given = vectors(benchmark)
        if name == "cirr":
            assert fast(benchmark, *given)[0] == pytest.approx(slow_cirr(root, *given, skipped))
        else:
            assert same(fast(benchmark, *given), slow_fashioniq(root, whole.name, *given, skipped))


def constant(benchmark: Benchmark) -> dict[str, float]:
    return fast(benchmark, [(1, 2)] * len(benchmark.queries), dict.fromkeys(benchmark.gallery, (3, 1)))[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_constant_model_scores_chance_on_fashioniq(fashion: Path, protocol: str) -> None:
    """The mean over categories of k / ranked images."""
    benchmark = load_dataset("fashioniq", str(fashion)).benchmark("val", protocol)
    own = {tag: query.candidates for query in benchmark.queries for tag in query.tags}
    sizes = [len(own[category]) - (protocol in PROTOCOLS[1:3]) for category in CATEGORIES]
    chance = {f"R@{k}": sum(100 * min(k / size, 1) for size in sizes) / 3 for k in (10, 50)}
    assert len(set(sizes)) > 1
    assert constant(benchmark) == pytest.approx({**chance, "Rmean": sum(chance.values()) / 2})


def test_a_constant_model_scores_chance_on_cirr(real_life: Path) -> None:
    """k of the 70 others, and k of the 5 others of the group."""
    benchmark = load_dataset("cirr", str(real_life)).benchmark("val")
    chance = {f"R@{k}": 100 * k / 70 for k in (1, 5, 10, 50)} | {f"Rs@{k}": 20 * k for k in (1, 2, 3)}
    assert constant(benchmark) == pytest.approx({**chance, "Rmean": (chance["R@5"] + 20) / 2})


def test_only_results_of_one_protocol_on_the_same_data_are_combined(fashioniq: Path, backbone: Any) -> None:
    """Protocols, changed annotations and a skip list are told apart; equal ones give mean and deviation."""

    def result(protocol: str = "fashioniq/original") -> dict[str, Any]:
        dataset = load_dataset("fashioniq", str(fashioniq))
        benchmark = dataset.benchmark("val", protocol)
        return evaluate(backbone, benchmark, ImageSource(dataset.image, backbone.transform)).as_json()

    whole = result()
    captions = fashioniq / "captions" / "cap.shirt.val.json"
    before = captions.read_text()
    captions.write_text(before.replace("has 3 dots", "has 4 dots"))
    changed = result()
    captions.write_text(before)
    write_skip_list(fashioniq, {"BSVA00013": "missing"})
    skipped = result()
    assert whole["protocol"] == changed["protocol"] and skipped["protocol"] == "fashioniq/original+skip"
    others = {"noref": result("fashioniq/original-noref"), "changed": changed, "skipped": skipped}
    for one, other in itertools.combinations([whole, *others.values()], 2):
        word = "data" if one["protocol"] == other["protocol"] else "protocol"
        with pytest.raises(InputError, match=f"of different {word} are never combined"):
            combine([one, other])
    higher = {**whole, "metrics": {name: value + 2 for name, value in whole["metrics"].items()}}
    wanted = {name: (value + 1, 2**0.5) for name, value in whole["metrics"].items()}
    found = combine([whole, higher])
    assert {name: pytest.approx(pair) for name, pair in wanted.items()} == found
    with pytest.raises(InputError, match="no results"):
        combine([])


# --- vectors ----------------------------------------------------------------------------------------------------------

MODES = ("composed", "image only", "text only")


class Held:
    """Notes of how many images references exist at a time, when more are about to be made."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.images = self.most = 0

    def add(self, make: Callable[[], torch.Tensor]) -> None:
        """``make`` gives a block of references, which somebody else keeps."""
        before = sum(len(found) for ref in self.made if (found := ref()) is not None)
        block = make()
        self.made.append(weakref.ref(block))
        self.images, self.most = self.images + len(block), max(self.most, before + len(block))


class Watched(torch.nn.Module):
    """A backbone as ``embed`` sees it, whose references are counted."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.inner, self.held, self.tokenize = backbone, Held(), backbone.tokenize
        self.compose_partial, self.compose_text = backbone.compose_partial, backbone.compose_text
        self.compose_image = backbone.compose_image

    def encode_image(self, pixels: torch.Tensor) -> ImageFeatures:
        made: list[ImageFeatures] = []
        self.held.add(lambda: made.append(self.inner.encode_image(pixels)) or made[0].reference)
        return made.pop()


class WatchedBank(Bank):
    """A bank whose references are counted."""

    def references(self, image_ids: Sequence[str]) -> torch.Tensor:
        made: list[torch.Tensor] = []
        self.held.add(lambda: made.append(Bank.references(self, image_ids)) or made[0])
        return made.pop()


OUTSIDE = {"i14", "i19"}
"""References that the gallery below does not hold."""


def asked_often(toy: Any) -> Benchmark:
    """The toy benchmark, in which one reference has nine queries and another three, and some queries two targets.

    Two references are not in the gallery, four queries have no reference, and four have no text.
    """
    benchmark = toy.benchmark("val")
    gallery = tuple(i for i in benchmark.gallery if i not in OUTSIDE)
    extra = [Query(benchmark.gallery[r], f"now {n} {r}", benchmark.gallery[n : n + 2]) for n in range(9) for r in (7,)]
    extra += [Query(benchmark.gallery[46], f"then {n}", (benchmark.gallery[n],)) for n in range(3)]
    partial = [Query(None, f"without {n}", gallery[n : n + 3]) for n in range(4)]
    partial += [Query(i, None, (gallery[30],)) for i in (*gallery[6:8], "i14", "i46")]
    queries = [replace(query, candidates=()) for query in benchmark.queries]
    queries = [*extra[:5], *partial[:5], *queries, *extra[5:], *partial[5:]]
    return replace(benchmark, gallery=gallery, queries=tuple(queries), measures=recall_measures(1, 5))


@torch.no_grad()
def one_by_one(backbone: Any, benchmark: Benchmark, images: ImageSource) -> dict[str, torch.Tensor]:
    """The straightforward way: everything encoded and kept, then query by query."""
    kept = {i: backbone.encode_image(images(i)[None]) for i in (*benchmark.gallery, *OUTSIDE)}
    found: dict[str, list[torch.Tensor]] = {mode: [] for mode in MODES}
    for query in benchmark.queries:
        made: dict[str, torch.Tensor] = {}
        reference, target = kept[query.reference or benchmark.gallery[0]]
        if query.text is not None:
            tokens = backbone.tokenize([query.text])
            made["composed"] = backbone.compose(reference, tokens).query[0]
            made["text only"] = backbone.compose(reference * 0, tokens).query[0]
            if type(backbone).compose_text is not Backbone.compose_text:
                made["text only"] = backbone.compose_text(tokens).query[0]
        if query.reference is not None:
            mean = sum(target[0, k] for k in range(target.shape[1])) / target.shape[1]
            made["image only"] = mean / mean.norm()
            if type(backbone).compose_image is not Backbone.compose_image:  # its own way
                made["image only"] = backbone.compose_image(ImageFeatures(reference, target))[0]
        if len(made) < 3:  # the query is its one part; without it, nothing
            made["composed"] = made["image only" if query.text is None else "text only"]
        for mode in MODES:
            found[mode].append(made.get(mode, torch.zeros_like(made["composed"])))
    targets = torch.stack([kept[i].target[0] for i in benchmark.gallery])
    return {**{mode: torch.stack(vectors) for mode, vectors in found.items()}, "target": targets}


@pytest.fixture(params=COMPOSED)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    backbone = tiny_backbone(request.param, tmp_path)
    backbone.freeze_image_side()
    return backbone


@pytest.mark.parametrize("stored", [False, True], ids=["encoded", "bank"])
def test_vectors_equal_those_made_one_by_one(toy: Any, model: Any, tmp_path: Path, stored: bool) -> None:
    """Targets and queries of all modes, for blocks of one, ragged ones and one of all; no block outlives its turn.

    Queries without a reference or a text, and references outside the gallery, are among them.
    """
    benchmark, images = asked_often(toy), ImageSource(toy.image, model.transform, keep=True)
    slow, bank = one_by_one(model, benchmark, images), None
    asked = len({query.reference for query in benchmark.queries} - {None})
    if stored:
        hashes = {i: images(i).numpy().tobytes().hex() for i in reversed(benchmark.image_ids)}
        bank = WatchedBank(**vars(load_or_build(model, images, hashes, tmp_path / "banks")))
    for batch_size in (1, 7, 256):
        watched = Watched(model)
        if bank:
            bank.held = Held()
        found = encode_benchmark(watched, benchmark, images, bank, batch_size, MODES)  # type: ignore[arg-type]
        vectors = {**found.queries, "target": found.target}
        for name, value in slow.items():
            torch.testing.assert_close(vectors[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        held = (bank or watched).held
        assert held.most == min(batch_size, asked if bank else 48) and held.images == (asked if bank else 48)
        assert not (bank and watched.held.images)
    assert not torch.allclose(vectors["composed"], slow["composed"].roll(1, 0), atol=1e-3)  # negative control
    assert not torch.allclose(vectors["composed"], vectors["text only"], atol=1e-3)


def test_parts_are_compared_where_there_are_both(toy: Any) -> None:
    """Queries of one part alone are left out of the ablation, which is told by kind."""
    from spn4cir.backbones import build_backbone

    mixed = asked_often(toy)
    tagged = replace(
        mixed,
        queries=tuple(
            replace(q, tags=("text" if q.reference is None else "image" if q.text is None else f"both {n % 2}",))
            for n, q in enumerate(mixed.queries)
        ),
    )
    joint = [q for q in tagged.queries if q.reference is not None and q.text is not None]
    model = build_backbone("clip4cir")
    images = ImageSource(toy.image, model.transform)
    found = evaluate(model, tagged, images, ablate=True)
    alone = evaluate(model, replace(tagged, queries=tuple(joint)), images, ablate=True)
    assert set(found.tags) == {"text", "image", "both 0", "both 1"}
    assert all(found.ablation[mode] == pytest.approx(one) for mode, one in alone.ablation.items())
    assert len(found.ablation) == 4 and alone.ablation["composed"] == alone.metrics
    assert alone.ablation_tags == {} and found.ablation["composed"] != found.metrics
    for mode, by_tag in found.ablation_tags.items():
        assert set(by_tag) == {"both 0", "both 1"} and sum(one["queries"] for one in by_tag.values()) == len(joint)
        assert mode != "composed" or by_tag["both 0"] == found.tags["both 0"]
    table = metrics_table(found)
    assert "\nimage only, queries of both " in table and "\n  both 1: text only " in table
    assert "\nimage only " in metrics_table(alone) and "both 1: " not in metrics_table(alone)
