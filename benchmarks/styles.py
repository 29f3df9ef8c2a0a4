"""Photographs by queries of any style: what prompts made of the style buy, on photographs that ``stylize`` has drawn.

Rows train on the same frozen CLIP, for as many steps, at settings that were chosen on val; each keeps its best state on
val, and the test split is read once. ``static`` prompts ignore the style and have as many parameters as those that do
not (VPT). Stage 2 goes on from ``both, norms``.

examples:
  python data_gen/stylize.py && python -m benchmarks.styles        # the embedded emoji, three seeds; an hour
  python -m benchmarks.styles --crops PHOTOS --output photos.json  # crops of the photographs in a folder
  python -m benchmarks.styles --seeds 0 --epochs 1 --runs runs/try --output try.json
  python -m benchmarks.styles --tune                               # scores on val by learning rate
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.catalogues import cut_squares
from benchmarks.claims import ROOT, spread
from benchmarks.styles_plot import draw_embeddings
from spn4cir.backbones.freestyle import Freestyle
from spn4cir.backbones.shared_style import StyleSpace
from spn4cir.config import TrainConfig, parse
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.intervals import paired_bootstrap

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("CLIP, frozen", {"place": "none", "trains": "norms"}),
    "static": ("static prompts (VPT)", {"prompts": "static", "trains": "prompts"}),
    "shallow": ("style prompts, shallow", {"place": "shallow", "trains": "prompts"}),
    "deep": ("style prompts, deep", {"place": "deep", "trains": "prompts"}),
    "both": ("style prompts, both", {"trains": "prompts"}),
    "norms": ("LayerNorms alone", {"place": "none", "trains": "norms"}),
    "static+norms": ("static prompts and LayerNorms", {"prompts": "static", "trains": "norms"}),
    "both+norms": ("style prompts, both, and LayerNorms", {"trains": "norms"}),
    "stage2": ("… and then stage 2", {"trains": "norms"}),
}
PAIRS = (("both", "static"), ("both+norms", "static+norms"), ("both+norms", "norms"), ("both+norms", "frozen"),
         ("stage2", "both+norms"))  # fmt: skip
"""Rows that are compared, with intervals."""
RATES = {"static": 0.3, "shallow": 1e-2, "deep": 1e-2, "both": 1e-2, "norms": 3e-2, "static+norms": 3e-2,
         "both+norms": 3e-2}  # fmt: skip
"""Learning rate of stage 1, chosen by ``--tune``; ``shallow`` and ``deep`` have that of ``both``."""
TUNED = ("both", "static", "both+norms", "static+norms")
CANDIDATES = {"prompts": (3e-3, 1e-2, 3e-2, 0.1, 0.3), "norms": (3e-3, 1e-2, 3e-2)}
CROPS, SIDE = 80, 64  # of each photograph, so that test holds about 120 of fifteen; and their side in pixels
Hits = dict[str, Any]


def train_row(row: str, seed: int, args: argparse.Namespace, rate: float | None = None) -> Path | None:
    """Train a row, at another learning rate than its own if one is given, unless it is complete; None for the frozen
    model."""
    from spn4cir.run import pending
    from spn4cir.train import train

    if row == "frozen":
        return None
    stage = 2 if row == "stage2" else 1
    init = train_row("both+norms", seed, args) if stage == 2 else None
    recipe = parse(TrainConfig, ROOT / "recipes" / "styles" / f"freestyle_stage{stage}.yaml", [])
    options, name = ROWS[row][1], row if rate is None else f"{row}-{rate:g}"
    config = replace(
        recipe, data_root=args.data_root, backbone_options=options, seed=seed, epochs=args.epochs,
        lr=recipe.lr if stage == 2 else rate or RATES[row],
        output=str(args.runs / f"seed{seed}" / name), init=None if init is None else str(init),
    )  # fmt: skip
    if left := pending(config):
        train(left, stage)
    return Path(str(config.output))


def tune(args: argparse.Namespace) -> None:
    """Print the mean of R@1 and R@5 on val by row and learning rate."""
    for row in [row for row in TUNED if row in args.rows]:
        for rate in CANDIDATES[ROWS[row][1]["trains"]]:
            run = train_row(row, args.seeds[0], args, rate)
            assert run is not None
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            best = max(((one["R@1"] + one["R@5"]) / 2, one["step"]) for one in lines if "R@1" in one)
            print(f"{row} at {rate:g}: {best[0]:.2f} after {best[1]} steps", flush=True)


def load_row(run: Path | None) -> Freestyle:
    """The model of a run; the frozen one for None."""
    from spn4cir.backbones import build_backbone
    from spn4cir.checkpoints import load_model

    model = load_model(run) if run else build_backbone("freestyle", **ROWS["frozen"][1])
    assert isinstance(model, Freestyle)
    return model


def measure(run: Path | None, dataset: Dataset, split: str = "test") -> Hits:
    """Hits of each query at 1 and at 5 in percent, composed and by late fusion of its parts, and the queries' tags."""
    from spn4cir.evaluate import COMPOSED, IMAGE_ONLY, TEXT_ONLY, encode_benchmark
    from spn4cir.images import ImageSource
    from spn4cir.measures import recall
    from spn4cir.ranking import rank_fused, rank_queries

    kept = run and run / "measured.json"
    if kept and kept.is_file():
        saved: Hits = json.loads(kept.read_text())
        return saved
    model, benchmark = load_row(run), dataset.benchmark(split)
    images = ImageSource(dataset.image, model.transform)
    encoded = encode_benchmark(model, benchmark, images, modes=(COMPOSED, IMAGE_ONLY, TEXT_ONLY))
    fused = rank_fused(benchmark, encoded.queries[IMAGE_ONLY], encoded.queries[TEXT_ONLY], encoded.target)
    ranks = {"composed": rank_queries(benchmark, encoded.queries[COMPOSED], encoded.target), "late fusion": fused}
    found: Hits = {
        way: {f"R@{k}": (100 * recall(one["gallery"], k)).tolist() for k in (1, 5)} for way, one in ranks.items()
    }
    found["tags"] = [query.tags[0] for query in benchmark.queries]
    if kept:
        write_text(kept, json.dumps(found))
    return found


def table(found: Mapping[str, Sequence[Hits]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """``{row: {tag: {metric: {mean, sd, seeds}}}}``; joint queries also by late fusion, and the mean over images."""
    rows: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row, seeds in found.items():
        tags = np.array(seeds[0]["tags"])
        kinds = {tag: ("composed", tags == tag) for tag in dict.fromkeys(seeds[0]["tags"])}
        kinds |= {f"{tag}, late fusion": ("late fusion", at) for tag, (_, at) in kinds.items() if "+" in tag}
        kinds["images, mean"] = ("composed", np.isin(tags, [t for t in kinds if "+" not in t and t != "text"]))
        rows[row] = {
            tag: {m: spread([round(float(np.mean(np.array(s[way][m])[at])), 4) for s in seeds]) for m in ("R@1", "R@5")}
            for tag, (way, at) in kinds.items()
        }
    return rows


def differences(found: Mapping[str, Sequence[Hits]]) -> dict[str, dict[str, list[float]]]:
    """``{"row - other": {tag: [points of R@1, low, high]}}``, 95 %, paired by seed and query."""
    rows: dict[str, dict[str, list[float]]] = {}
    for row, other in PAIRS:
        if row in found and other in found:
            tags = np.array(found[row][0]["tags"])
            is_image = np.array(["+" not in tag and tag != "text" for tag in tags])
            parts = {tag: tags == tag for tag in dict.fromkeys(tags.tolist())} | {"images, mean": is_image}
            hits = [np.array([seed["composed"]["R@1"] for seed in found[name]]) for name in (row, other)]
            rows[f"{row} - {other}"] = {
                tag: [round(x, 2) for x in paired_bootstrap(hits[0][:, at], hits[1][:, at])]
                for tag, at in parts.items()
            }
    return rows


def joint_differences(found: Mapping[str, Sequence[Hits]], dataset: Dataset) -> dict[str, dict[str, list[float]]]:
    """``{"row: joint - part": {joint tag: [points of R@1, low, high]}}``, paired by seed and photograph."""
    queries = dataset.benchmark("test").queries
    place = {(query.tags[0], query.targets[0]): n for n, query in enumerate(queries)}
    joint = [tag for tag in dict.fromkeys(query.tags[0] for query in queries) if "+" in tag]
    rows: dict[str, dict[str, list[float]]] = {}
    for row, seeds in found.items():
        hits = np.array([seed["composed"]["R@1"] for seed in seeds])
        for part in ("image", "text"):
            cells = rows[f"{row}: joint - {part}"] = {}
            for tag in joint:
                alone = tag.partition(" + ")[0 if part == "image" else 2]
                photos = [i for t, i in place if t == tag and (alone, i) in place]
                if photos:
                    both, one = (hits[:, [place[t, i] for i in photos]] for t in (tag, alone))
                    cells[tag] = [round(x, 2) for x in paired_bootstrap(both, one)]
    return rows


@torch.no_grad()
def style_accuracy(model: Freestyle, dataset: Dataset) -> dict[str, float]:
    """Share of test pictures whose nearest centre is that of their style, in percent, by how style vectors are made.

    Centres are means of training pictures; the trained model's style space is the first row.
    """
    from spn4cir.images import ImageSource

    images = ImageSource(dataset.image, model.transform)
    names = model.style["names"]

    def grams(pairs: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        parts = [model._grams(images.stack([i for i, _ in pairs[n : n + 64]])) for n in range(0, len(pairs), 64)]
        return torch.cat(parts), torch.tensor([label for _, label in pairs])

    triplets = [t for t in dataset.triplets() if t.reference is not None and not t.texts]
    triplets = [triplets[n] for n in np.random.default_rng(0).permutation(len(triplets))[:900]]
    train = [(str(t.reference), names.index(t.label)) for t in triplets]
    train += [(photo, 0) for photo in dict.fromkeys(t.targets[0] for t in triplets)]
    queries = [q for q in dataset.benchmark("test").queries if q.reference is not None and q.text is None]
    test = [(str(q.reference), names.index(q.tags[0])) for q in queries]
    test += [(i, 0) for i in dataset.benchmark("test").gallery]
    (fit, labels), (seen, truth) = grams(train), grams(test)

    def accuracy(fit: Tensor, seen: Tensor) -> float:
        centres = torch.stack([fit[labels == n].mean(0) for n in range(len(names))])
        cosines = torch.nn.functional.cosine_similarity(seen[:, None], centres, dim=2)
        return round(100 * (cosines.argmax(1) == truth).float().mean().item(), 2)

    def purity(seed: int) -> float:
        """Of clusters that nobody named: the share of test pictures of the style that most in their cluster have."""
        space = StyleSpace(fit.shape[1], len(names), model.style["width"], model.style["temperature"])
        space.fit(fit, None, seed)
        cluster = space.weights(space(seen)).argmax(1)
        most = [torch.bincount(truth[cluster == n], minlength=1).max().item() for n in range(len(names))]
        return 100 * sum(most) / len(truth)

    space = model.style_space
    own = space.weights(space(seen)).argmax(1) == truth
    return {
        "style space of the model": round(100 * own.float().mean().item(), 2),
        "whitened logarithms": accuracy(space(fit), space(seen)),
        "logarithms, not whitened": accuracy(fit - fit.mean(0), seen - fit.mean(0)),
        "logarithms, neither centred nor whitened": accuracy(fit, seen),
        "Gram matrices themselves": accuracy(fit.exp(), seen.exp()),
        "clusters without labels, purity": round(float(np.mean([purity(seed) for seed in range(3)])), 2),
    }


@torch.no_grad()
def cost(model: Freestyle, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds for a query image, beside the frozen tower on the same pictures, and parameters."""
    pixels = torch.rand(16, 3, *[model.transform.size] * 2)  # type: ignore[attr-defined]
    found: dict[str, float] = {}
    steps = {
        "frozen tower": lambda: model.clip.encode_image(pixels),
        "style vector": lambda: model.style_space(model._grams(pixels)),
        "whole query": lambda: model.compose_image(model.encode_image(pixels)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):  # in turn, so that all meet the same noise
        for name, step in steps.items():
            started = time.perf_counter()
            step()  # type: ignore[no-untyped-call]
            times[name].append(1000 * (time.perf_counter() - started) / len(pixels))
    found |= {f"{name}, ms an image": round(float(np.median(values)), 3) for name, values in times.items()}
    found["parameters of CLIP"] = sum(p.numel() for p in model.clip.parameters())
    found["parameters that train"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["numbers of filters and style space"] = sum(
        value.numel() for part in (model.filters, model.style_space) for value in part.state_dict().values()
    )
    return found


def make_crops(photos: Path, folder: Path) -> None:
    """Crops of a folder's photographs, ``CROPS`` of each, half its shorter side wide, at places drawn by a seed."""
    crops = {f"{path.stem}-{number:02d}.png": crop for path, number, crop in cut_squares(photos, CROPS, SIDE)}
    if not crops:
        raise InputError(f"--crops {photos} holds no picture")
    folder.mkdir(parents=True, exist_ok=True)
    for name, crop in crops.items():
        crop.save(folder / name)


def markdown(rows: Mapping[str, Any], compared: Mapping[str, Any]) -> str:
    """R@1 / R@5 by row and kind of query, then differences of R@1."""
    kinds = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for row, cells in rows.items():
        shown = [f"{cells[kind]['R@1']['mean']:.1f} / {cells[kind]['R@5']['mean']:.1f}" for kind in kinds]
        lines.append(f"| {ROWS[row][0]} | " + " | ".join(shown) + " |")
    for name, cells in compared.items():
        shown = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*cells[kind]) if kind in cells else "" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, summarise, draw, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.styles",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="default: all")
    parser.add_argument("--data-root", help="folder that data_gen/stylize.py has filled (default: data/styles)")
    parser.add_argument("--crops", type=Path, help="folder of photographs whose crops are drawn and used instead")
    parser.add_argument("--epochs", type=int, default=4, help="of each row (default: 4)")
    parser.add_argument("--tune", action="store_true", help="scores on val by learning rate, first seed, no test split")
    parser.add_argument("--train-only", action="store_true", help="train, and leave the test split unread")
    parser.add_argument("--runs", type=Path, default=Path("runs/styles"), help="where runs lie; complete ones stay")
    parser.add_argument("--output", type=Path, default=RESULTS / "styles.json", help="JSON file")
    parser.add_argument("--picture", type=Path, help="also draw embeddings before and after training")
    args = parser.parse_args()

    from spn4cir.data_gen.stylize import StylizeConfig, stylize
    from spn4cir.datasets import load_dataset
    from spn4cir.results import git_commit

    if args.crops:
        args.data_root = str(args.runs / "styles")
        make_crops(args.crops, args.runs / "crops")
        stylize(StylizeConfig(folder=str(args.runs / "crops"), output=args.data_root))
    if args.tune:
        tune(args)
        return
    dataset = load_dataset("styles", args.data_root)
    runs = {row: [train_row(row, seed, args) for seed in args.seeds] for row in args.rows}
    if args.train_only:
        return
    found = {row: [measure(run, dataset) for run in folders] for row, folders in runs.items()}
    rows, compared, joint = table(found), differences(found), joint_differences(found, dataset)
    last = [run for folders in runs.values() for run in folders if run][-1:]
    report: dict[str, Any] = {
        "what": "test photographs of the dataset styles, in percent, mean and standard deviation over seeds; "
        "differences of R@1 in points with 95 % intervals, paired by seed and query; best state of each run on val",
        "command": shlex.join(["python", "-m", "benchmarks.styles", *sys.argv[1:]]),
        "photographs": {split: len(dataset.benchmark(split).gallery) for split in ("val", "test")},
        "rows": {row: ROWS[row][0] for row in found},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "written": time.strftime("%Y-%m-%d"),
        "results": rows,
        "differences": compared,
        "joint queries against their parts": joint,
    }
    if last:
        model = load_row(last[0])
        report |= {"style accuracy": style_accuracy(model, dataset), "cost": cost(model)}
        if args.picture:
            draw_embeddings({"frozen": load_row(None), "trained": model}, dataset, args.picture)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    print(markdown(rows, {**compared, **joint}))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_command(main)
