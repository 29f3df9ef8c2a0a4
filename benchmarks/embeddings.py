"""Embeddings by margin softmax: retrieval of classes never trained on, and what training them costs.

examples:
  python -m benchmarks.embeddings emoji        # all margins and numbers of centres, three seeds; ten minutes
  python -m benchmarks.embeddings digits       # the neck against average pooling; needs scikit-learn
  python -m benchmarks.embeddings probing      # features from the store against encoding in every epoch
  python -m benchmarks.embeddings classes      # a step against 100,000 classes beside dense softmax; and a million
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims import ROOT, spread
from spn4cir.backbones import build_backbone
from spn4cir.backbones.embedding import Embedding
from spn4cir.backbones.shared_towers import TOWERS, Tower
from spn4cir.config import TrainConfig, parse
from spn4cir.config_groups import ClassesConfig
from spn4cir.errors import run_command
from spn4cir.files import write_text
from spn4cir.margins import MARGINS

RESULTS = Path(__file__).parent / "results"
METRICS = ("mMP@5", "R@1")
WIDTH, EPOCHS = 64, 30
CLASSES, CENTRES, BATCH = 100_000, 3, 512
PIXELS = 8  # a side of scikit-learn's digits


def train_or_take(config: TrainConfig) -> Path:
    """Train stage ``classes`` to the end, from wherever it was."""
    from spn4cir.run import pending
    from spn4cir.train import train

    if left := pending(config):
        train(left, "classes")
    return Path(str(config.output))


def score(model: Embedding, dataset: str, root: str | None, split: str = "test") -> dict[str, float]:
    """Metrics of a split, in percent."""
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource

    data = load_dataset(dataset, root)
    result = evaluate(model, data.benchmark(split), ImageSource(data.image, model.transform))
    return {name: result.metrics[name] for name in METRICS}


def load(run: Path) -> Embedding:
    """The model of a run."""
    from spn4cir.checkpoints import load_model

    model = load_model(run)
    assert isinstance(model, Embedding)
    return model


def untrained(**options: Any) -> Embedding:
    """A model whose neck does not train."""
    model = build_backbone("embedding", **options)
    assert isinstance(model, Embedding)
    return model.eval()


def rows_of(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and deviation over seeds by metric."""
    return {name: spread([round(one[name], 4) for one in found]) for name in METRICS}


def emoji(args: argparse.Namespace) -> dict[str, Any]:
    """Concepts of the embedded emoji that no neck was trained on: every margin, one to three centres."""
    rows = {
        "frozen features": rows_of([score(untrained(neck="none"), "labelled", None)]),
        f"average pooling to {WIDTH}": rows_of([score(untrained(neck="pool", width=WIDTH), "labelled", None)]),
    }
    recipe = parse(TrainConfig, ROOT / "recipes" / "labelled" / "embedding_classes.yaml", [])
    for margin in MARGINS:
        for centres in (1, 2, 3):
            runs = []
            for seed in args.seeds:
                output = args.runs / f"{margin}-{centres}-seed{seed}"
                config = replace(
                    recipe, classes=ClassesConfig(margin, {}, centres), seed=seed, epochs=EPOCHS, eval_every=5,
                    backbone_options={"width": WIDTH}, output=str(output),
                )  # fmt: skip
                runs.append(score(load(train_or_take(config)), "labelled", None))
            rows[f"{margin}, K = {centres}"] = rows_of(runs)
    return {"rows": rows, "widths": {"frozen features": untrained(neck="none").features, "others": WIDTH}}


def draw_digits(folder: Path) -> Path:
    """scikit-learn's digits as pictures, and a table that splits the scans of each digit: 60, 10 and 30 %."""
    import csv

    from PIL import Image
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "digits.csv"
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0)).tolist()
    bounds = (0.6 * len(order), 0.7 * len(order))
    with table.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["img_path", "label", "split"])
        for place, number in enumerate(order):
            name = f"{number:04d}.png"
            Image.fromarray((data.images[number] * 15).astype("uint8")).save(folder / name)
            split = "train" if place < bounds[0] else "val" if place < bounds[1] else "test"
            lines.writerow([name, f"digit {data.target[number]}", split])
    return table


def random_features(name: str) -> Tower:
    """A frozen tower with nothing learned: ReLU of as many random products of pixels as the name says."""
    from torchvision.transforms import functional as TF

    chance = torch.Generator().manual_seed(0)
    layer = nn.Linear(PIXELS * PIXELS, int(name))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=chance) / PIXELS)
        layer.bias.copy_(torch.rand(layer.bias.shape, generator=chance) - 0.5)

    def transform(picture: Any) -> Tensor:
        pixels: Tensor = TF.to_tensor(picture.convert("RGB").resize((PIXELS, PIXELS)))
        return pixels

    return Tower(layer, transform, lambda pixels: layer(pixels[:, 0].flatten(1)).relu(), "random features")


def digits(args: argparse.Namespace) -> dict[str, Any]:
    """A frozen tower of random features; the neck of few numbers against average pooling to as many."""
    TOWERS["random"] = lambda name, _: random_features(name)
    table = str(draw_digits(args.runs / "digits"))
    model = "random:1152"  # as wide as the tower that the paper chooses
    rows = {"frozen features": rows_of([score(untrained(model=model, neck="none"), "labelled", table)])}
    for width in (4, 8):
        pooled = untrained(model=model, neck="pool", width=width)
        rows[f"average pooling to {width}"] = rows_of([score(pooled, "labelled", table)])
        for centres in (1, 3):
            runs = []
            for seed in args.seeds:
                config = TrainConfig(
                    dataset="labelled", data_root=table, backbone="embedding", seed=seed, temperature=1 / 30,
                    backbone_options={"model": model, "width": width, "dropout": 0.0}, schedule="cosine",
                    classes=ClassesConfig("arcface", {}, centres), eval_every=10, weight_decay=1e-4, epochs=60,
                    lr=1e-2, output=str(args.runs / f"digits-{width}-{centres}-seed{seed}"),
                )  # fmt: skip
                runs.append(score(load(train_or_take(config)), "labelled", table))
            rows[f"arcface to {width}, K = {centres}"] = rows_of(runs)
    return {"rows": rows}


def probing(args: argparse.Namespace, epochs: int = 10) -> dict[str, Any]:
    """Seconds of so many epochs: stage ``classes`` from an empty store; and a loop that encodes every image anew."""
    from spn4cir.datasets import load_dataset
    from spn4cir.images import ImageSource

    recipe = parse(TrainConfig, ROOT / "recipes" / "labelled" / "embedding_classes.yaml", [])
    os.environ["SPN4CIR_RUNS"] = str(args.runs / f"probing-{time.time_ns()}")
    config = replace(recipe, epochs=epochs, eval_every=0, output=str(args.runs / f"probing-run-{time.time_ns()}"))
    started = time.perf_counter()
    train_or_take(config)
    ours = time.perf_counter() - started

    started = time.perf_counter()
    model, data = untrained(), load_dataset("labelled")
    triplets = data.triplets()
    names = sorted({str(t.label) for t in triplets})
    label = torch.tensor([names.index(str(t.label)) for t in triplets])
    images, ids = ImageSource(data.image, model.transform), [str(t.reference) for t in triplets]
    centres = nn.Parameter(torch.randn(len(names), WIDTH))
    optimizer = torch.optim.AdamW([*model.parameters(), centres], recipe.lr)
    for _ in range(epochs):
        order = torch.randperm(len(ids))
        for rows in torch.split(order, recipe.batch_size):
            found = F.normalize(
                model.project(model.encode_image(images.stack([ids[n] for n in rows])).reference), dim=1
            )
            loss = F.cross_entropy(30 * found @ F.normalize(centres, dim=1).T, label[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    anew = time.perf_counter() - started
    return {
        "epochs": epochs, "images": len(ids), "seconds from the store, its making included": round(ours, 2),
        "seconds, every image encoded in every epoch": round(anew, 2), "ratio": round(anew / ours, 2),
    }  # fmt: skip


def streamed_step(classes: int, centres: int) -> Callable[[], None]:
    """One step of ours: loss, gradients."""
    from spn4cir.losses import info_nce
    from spn4cir.margins import ArcFace

    query, weight = draw(classes, centres), nn.Parameter(torch.randn(classes, centres, WIDTH))
    label, head = torch.randint(classes, (BATCH,)), ArcFace(30.0, 0.5)

    def step() -> None:
        weight.grad = query.grad = None
        unit, held = F.normalize(query, dim=1), F.normalize(weight, dim=2)
        head.observe(unit, query.norm(dim=1), held, label)
        info_nce(unit, held, label, 1 / 30, margin=head).backward()  # type: ignore[no-untyped-call]

    return step


def dense_step(classes: int, centres: int) -> Callable[[], None]:
    """One step of sub-centre ArcFace with all logits in memory."""
    query, weight = draw(classes, centres), nn.Parameter(torch.randn(classes, centres, WIDTH))
    label, rows = torch.randint(classes, (BATCH,)), torch.arange(BATCH)

    def step() -> None:
        weight.grad = query.grad = None
        unit, held = F.normalize(query, dim=1), F.normalize(weight, dim=2)
        cosine = (unit @ held.flatten(0, 1).T).view(BATCH, classes, centres).amax(2)
        angle = cosine[rows, label].clamp(-1 + 1e-7, 1 - 1e-7).acos()
        logits = cosine.index_put((rows, label), (angle + 0.5).cos())
        F.cross_entropy(30 * logits, label).backward()  # type: ignore[no-untyped-call]

    return step


def draw(classes: int, centres: int) -> nn.Parameter:
    """Embeddings (B, E)."""
    torch.manual_seed(classes + centres)
    return nn.Parameter(torch.randn(BATCH, WIDTH))


def measure_step(make: Callable[[int, int], Callable[[], None]], classes: int, centres: int, queue: Any) -> None:
    """Median seconds of five steps and peak memory in MB, in a process of its own."""
    torch.set_num_threads(os.cpu_count() or 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make(classes, centres)
    step()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    queue.put({"seconds": round(statistics.median(times), 3), "MB": round(peak)})


def classes(args: argparse.Namespace) -> dict[str, Any]:
    """A step of loss and gradients; peak memory beyond that of Python and torch, embeddings and centres included."""
    found: dict[str, Any] = {"batch": BATCH, "width": WIDTH}
    cases = [("streamed", streamed_step, CLASSES, CENTRES), ("dense", dense_step, CLASSES, CENTRES)]
    cases += [("streamed", streamed_step, 10 * CLASSES, 1)]
    for name, make, count, centres in cases:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=measure_step, args=(make, count, centres, queue))
        process.start()
        found[f"{name}, {count:,} classes x {centres}"] = queue.get()
        process.join()
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "emoji": emoji, "digits": digits, "probing": probing, "classes": classes,
}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Rows of a table, or the numbers as they are."""
    if "rows" not in found:
        return json.dumps(found, indent=1)
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for row, cells in found["rows"].items():
        shown = [f"{cells[m]['mean']:.1f}" + (f" ± {cells[m]['sd']:.1f}" if cells[m]["sd"] else "") for m in METRICS]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure a part and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embeddings",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/embeddings"), help="where runs lie; complete ones stay")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/embeddings_PART.json)")
    args = parser.parse_args()

    from spn4cir.results import git_commit

    found = PARTS[args.part](args)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.embeddings", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "git": git_commit(),
        "written": time.strftime("%Y-%m-%d"),
    }
    output = args.output or RESULTS / f"embeddings_{args.part}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(about | found, indent=1) + "\n")
    print(markdown(found))
    print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
