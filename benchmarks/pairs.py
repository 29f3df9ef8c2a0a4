"""Images and texts of unseen classes by MASLN: which terms of its loss buy what.

``digits`` (the default): both halves of scanned digits are two views of one thing. Training sees 0 to 4, and retrieval
is among 5 to 9 (unseen) and among held-out 0 to 4 (seen). ``emoji``: pictures and names of the embedded emoji, beside
the frozen CLIP. ``terms``: composed retrieval on the emoji, stage 1 with one term more. Rows of one data set have the
same settings, and the last state of each run is measured; linear CCA and frozen features are measured by the same code.

examples:
  python -m benchmarks.pairs                                   # digits in halves, five seeds; minutes
  python -m benchmarks.pairs --data emoji --seeds 0 1 2
  python -m benchmarks.pairs --data terms --seeds 0 1 2        # hours on two cores
  python -m benchmarks.pairs --seeds 0 --epochs 5 --runs runs/try --output try.json
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims import ROOT, spread
from spn4cir.config import TrainConfig, parse
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text

RESULTS = Path(__file__).parent / "results"
CORR, REC, ADV, DIS = "correlation", "reconstruction", "adversary", "classification"
ROWS: dict[str, tuple[str, ...]] = {
    "untrained": (),
    "corr": (CORR,),
    "dis": (DIS,),
    "corr+dis": (CORR, DIS),
    "corr+rec": (CORR, REC),
    "corr+rec+dis": (CORR, REC, DIS),
    "all four": (CORR, REC, DIS, ADV),
}
"""Terms of each row, of weight 1 each."""
COMPOSED_ROWS: dict[str, dict[str, float]] = {"none": {}, CORR: {CORR: 0.1}, ADV: {ADV: 0.1}, DIS: {DIS: 0.1}}
CLAIM = ("corr+rec", "dis", 4.0)  # in mAP points on unseen classes
DIRECTIONS = {"image to text": "image → text", "text to image": "text → image"}
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 150, "width": 16, "hidden": [64], "lr": 1e-3},
    "emoji": {"epochs": 30, "width": 64, "hidden": [256], "lr": 1e-3},
}
Figures = dict[str, float]


def make_digits(folder: Path) -> Path:
    """Write scikit-learn's digits as given features: upper halves, lower halves, and splits by class."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("--data digits needs scikit-learn: pip install 'spn4cir[dev]'") from None
    images, labels = load_digits(return_X_y=True)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    np.save(folder / "images.npy", images[:, :32], allow_pickle=False)
    np.save(folder / "texts.npy", images[:, 32:], allow_pickle=False)
    count = dict.fromkeys(range(10), 0)
    splits = []
    for label in labels.tolist():  # every fifth of a seen class is evaluated
        count[label] += 1
        splits.append("test" if label > 4 or count[label] % 5 == 0 else "train")
    write_text(folder / "labels.txt", "".join(f"{label}\n" for label in labels))
    write_text(folder / "splits.txt", "".join(f"{split}\n" for split in splits))
    return folder


def configure(row: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    """The settings of a run."""
    recipe = parse(TrainConfig, ROOT / "recipes" / "labelled_pairs" / "masln_crossmodal.yaml", [])
    own = SETTINGS[args.data]
    towers = {"image": "given:32", "text": "given:32"} if args.data == "digits" else {}
    return replace(
        recipe, data_root=args.data_root, terms=dict.fromkeys(ROWS[row], 1.0), seed=seed, lr=own["lr"],
        epochs=args.epochs or own["epochs"], schedule="constant", eval_every=0, log_every=100,
        backbone_options={"width": own["width"], "hidden": own["hidden"], **towers},
        output=str(args.runs / args.data / f"seed{seed}" / row.replace(" ", "-")),
    )  # fmt: skip


class Frozen(NamedTuple):
    """Frozen features: (D_v,) by image id, and (D_t,) by text."""

    image: dict[str, Tensor]
    text: dict[str, Tensor]


def stack(vectors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The vectors of these names, (N, D)."""
    return torch.stack([vectors[name] for name in names])


@torch.no_grad()
def read_frozen(dataset: Dataset, args: argparse.Namespace) -> Frozen:
    """Frozen features of all pairs of train and test."""
    from spn4cir.backbones import build_backbone
    from spn4cir.backbones.masln import MASLN
    from spn4cir.images import ImageSource
    from spn4cir.pair_stage import read_texts

    model = build_backbone("masln", **configure("corr", 0, args).backbone_options)
    assert isinstance(model, MASLN)
    source, tests = ImageSource(dataset.image, model.transform), dataset.protocols["test"]
    ids = dict.fromkeys(
        [*dataset.training_images(), *(i for t in tests for i in dataset.benchmark("test", t).image_ids)]
    )
    parts = [list(ids)[n : n + 64] for n in range(0, len(ids), 64)]
    image = torch.cat([model.encode_image(source.stack(part)).reference[:, 0] for part in parts])
    texts = list(dict.fromkeys(dataset.caption(i) for i in ids))
    return Frozen(dict(zip(ids, image, strict=True)), dict(zip(texts, read_texts(model, texts), strict=True)))


@torch.no_grad()
def measure_row(row: str, seed: int, args: argparse.Namespace, dataset: Dataset, given: Frozen) -> dict[str, Figures]:
    """Train a row unless that is done, and measure its last state: ``{protocol: {direction: mAP}}``, in percent.

    Codes are made of frozen features that are read once, as the towers are the same in all rows.
    """
    from spn4cir.backbones import build_backbone
    from spn4cir.backbones.masln import MASLN
    from spn4cir.checkpoints import load_model
    from spn4cir.run import pending
    from spn4cir.train import train

    config = configure(row, seed, args)
    if ROWS[row]:
        if left := pending(config):
            with torch.enable_grad():
                train(left, "crossmodal")
        model = load_model(Path(str(config.output)))
    else:
        torch.manual_seed(seed)
        model = build_backbone("masln", **config.backbone_options)
    assert isinstance(model, MASLN)
    image, text = (
        model.image_encoder(stack(given.image, given.image)),
        model.text_encoder(stack(given.text, given.text)),
    )
    codes = dict(zip(given.image, image, strict=True)), dict(zip(given.text, text, strict=True))
    return measure_vectors(dataset, *codes)


def kind_of(protocol: str) -> str:
    """``unseen`` of ``…/test-unseen``."""
    return protocol.rpartition("-")[2]


def average_precision_of(metrics: Mapping[str, float], tags: Mapping[str, Mapping[str, float]]) -> Figures:
    """mAP by direction and their mean, in percent."""
    name = next(metric for metric in metrics if metric.startswith("mAP@"))
    return {**{short: tags[tag][name] for tag, short in DIRECTIONS.items()}, "mean": metrics[name]}


def measure_vectors(dataset: Dataset, image: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, Figures]:
    """As ``measure_row`` for the vectors (E,) of image ids and of texts, by cosine."""
    from spn4cir.backbone import l2_normalize
    from spn4cir.ranking import rank_queries
    from spn4cir.results import compute_metrics

    found = {}
    for name in dataset.protocols["test"]:
        benchmark = dataset.benchmark("test", name)
        items = [text[benchmark.texts[i]] if i in benchmark.texts else image[i] for i in benchmark.gallery]
        queries = [image[q.reference] if q.reference is not None else text[str(q.text)] for q in benchmark.queries]
        target, query = l2_normalize(torch.stack(items))[:, None], l2_normalize(torch.stack(queries))
        found[kind_of(name)] = average_precision_of(*compute_metrics(benchmark, rank_queries(benchmark, query, target)))
    return found


def baselines(dataset: Dataset, args: argparse.Namespace, given: Frozen) -> dict[str, dict[str, Figures]]:
    """Linear CCA of the frozen features, and of a CLIP those features themselves."""
    from sklearn.cross_decomposition import CCA  # type: ignore[import-untyped]

    components, ids = SETTINGS[args.data]["width"], dataset.training_images()
    cca = CCA(n_components=components, max_iter=2000)
    cca.fit(stack(given.image, ids).numpy(), stack(given.text, map(dataset.caption, ids)).numpy())
    first, second = stack(given.image, given.image), stack(given.text, map(dataset.caption, given.image))
    image, text = (
        torch.from_numpy(np.ascontiguousarray(v)).float() for v in cca.transform(first.numpy(), second.numpy())
    )
    vectors = (
        dict(zip(given.image, image, strict=True)),
        dict(zip(map(dataset.caption, given.image), text, strict=True)),
    )
    found = {f"CCA, {components} components": measure_vectors(dataset, *vectors)}
    return {"CLIP, frozen": measure_vectors(dataset, *given), **found} if args.data == "emoji" else found


def measure_composed(row: str, seed: int, args: argparse.Namespace) -> Figures:
    """Metrics on ``emoji/test`` of composed retrieval's stage 1 with the terms of a row, in percent."""
    from spn4cir.checkpoints import load_model
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource
    from spn4cir.run import pending
    from spn4cir.train import train

    recipe = parse(TrainConfig, ROOT / "recipes" / "emoji" / "clip4cir_stage1.yaml", [])
    output = str(args.runs / "terms" / f"seed{seed}" / row)
    config = replace(recipe, terms=COMPOSED_ROWS[row], seed=seed, output=output, epochs=args.epochs or recipe.epochs)
    if left := pending(config):
        train(left, 1)
    model, dataset = load_model(Path(output)), load_dataset("emoji")
    metrics = evaluate(model, dataset.benchmark("test"), ImageSource(dataset.image, model.transform)).metrics
    return {name: metrics[name] for name in ("R@1", "R@5", "R@10")}


def summarise(seeds: Sequence[Mapping[str, Figures]]) -> dict[str, dict[str, Any]]:
    """``{protocol: {direction: {mean, sd, seeds}}}``."""
    return {
        kind: {way: spread([round(seed[kind][way], 3) for seed in seeds]) for way in seeds[0][kind]}
        for kind in seeds[0]
    }


def check_claim(results: Mapping[str, Any]) -> dict[str, Any]:
    """Whether ``corr+rec`` beats ``dis`` on unseen classes by the margin that was named before."""
    better, other, margin = CLAIM
    means = [results[row]["unseen"]["mean"]["mean"] for row in (better, other)]
    what = f"{better} is above {other} by {margin} points of mAP or more on unseen classes"
    return {"claim": what, "difference": round(means[0] - means[1], 3), "holds": means[0] - means[1] >= margin}


def markdown(results: Mapping[str, Any]) -> str:
    """A table: rows, protocols, means and standard deviations."""
    kinds = list(next(iter(results.values())))
    lines = [
        "| | " + " | ".join(f"{kind}, {way}" for kind in kinds for way in results[next(iter(results))][kind]) + " |"
    ]
    for row, cells in results.items():
        shown = [
            f"{one['mean']:.1f}" + (f" ± {one['sd']:.1f}" if one["sd"] is not None else "")
            for kind in kinds
            for one in cells[kind].values()
        ]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    lines.insert(1, "|---" * (lines[0].count("|") - 1) + "|")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, summarise, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pairs",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=["digits", "emoji", "terms"], default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, help="of each row (default: 150 for digits, 30 for emoji, the recipe's)")
    parser.add_argument("--runs", type=Path, default=Path("runs/pairs"), help="where runs lie; complete ones stay")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/pairs_DATA.json)")
    args = parser.parse_args()

    from spn4cir.datasets import load_dataset
    from spn4cir.results import git_commit

    started, args.data_root = time.time(), None
    report: dict[str, Any] = {
        "what": "mean and standard deviation over seeds, in percent; last state of each run, test split",
        "command": shlex.join(["python", "-m", "benchmarks.pairs", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "written": time.strftime("%Y-%m-%d"),
    }
    if args.data == "terms":
        found = {row: [{"emoji/test": measure_composed(row, s, args)} for s in args.seeds] for row in COMPOSED_ROWS}
        results = {row: summarise(seeds) for row, seeds in found.items()}
    else:
        args.data_root = str(make_digits(args.runs / "digits_data")) if args.data == "digits" else None
        dataset = load_dataset("labelled_pairs", args.data_root)
        given = read_frozen(dataset, args)
        results = {row: summarise([one]) for row, one in baselines(dataset, args, given).items()}
        results |= {row: summarise([measure_row(row, s, args, dataset, given) for s in args.seeds]) for row in ROWS}
        report |= {"settings": SETTINGS[args.data], "terms": {row: list(terms) for row, terms in ROWS.items()}}
        if args.data == "digits":
            report["claim"] = check_claim(results)
    report |= {"minutes": round((time.time() - started) / 60, 1), "results": results}
    output = args.output or RESULTS / f"pairs_{args.data}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(markdown(results))
    print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
