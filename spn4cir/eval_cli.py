"""The command ``spn4cir-eval``."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from spn4cir.cli import Parser, check_output, report_stream, write_json
from spn4cir.config import TrainConfig, read_settings
from spn4cir.errors import InputError, run_command
from spn4cir.files import read_json


def _evaluate() -> None:
    parser = Parser(
        "spn4cir-eval",
        "Evaluate the newest run of a dataset, or the embedded weights where there is none.",
        "examples:\n  spn4cir-eval --split val\n  spn4cir-eval --split test --ablate --json result.json\n"
        "  spn4cir-eval --run runs/emoji/clip4cir/stage2-20260101-123000\n"
        "  spn4cir-eval --dataset fashioniq --protocol fashioniq/original-noref\n"
        "  spn4cir-eval --dataset cirr --split test1 --submission submission\n"
        "  spn4cir-eval --combine seed0.json seed1.json seed2.json",
    )
    add = parser.add_argument
    add("--split", default="val", help="split of the dataset (default: val)")
    add("--protocol", help="id of a protocol of that split (default: the run's, else the dataset's)")
    add("--dataset", help=f"default: that of --run, else {TrainConfig.dataset}")
    add("--data-root", help="where its files lie")
    add("--backbone", help="whose newest run is meant, or whose embedded weights (default: any run's)")
    add("--run", type=Path, help="run or checkpoint folder, or embedded (default: the newest run on these images)")
    add("--ablate", action="store_true", help="also rank by the image alone, by the text alone, and by late fusion")
    add("--json", metavar="FILE", help="write the result as JSON; - for standard output")
    add("--ranks", metavar="FILE", type=Path, help="write the ranks of each query's targets (.parquet, .jsonl)")
    add("--top-k", metavar="FILE", type=Path, help="write the first items of each query, with scores")
    add("--k", type=int, help="number of first items that --top-k writes (default: 100)")
    add("--submission", metavar="DIR", type=Path, help="write what an evaluation server takes instead")
    add("--combine", metavar="FILE", type=Path, nargs="+", help="mean and deviation of JSON results")
    add("--batch-size", type=int, help="images encoded at once (default: the run's, else 256)")
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.k is not None and (args.k < 1 or not args.top_k):
        raise InputError(f"--k must be at least 1 and needs --top-k FILE, got {args.k}")
    others = {"--ranks": args.ranks, "--top-k": args.top_k, "--json": args.json, "--ablate": args.ablate}
    if args.submission and (useless := [option for option, value in others.items() if value]):
        raise InputError(f"--submission writes only what the evaluation server takes: leave out {useless[0]}")
    for option, path in (("--json", args.json), ("--ranks", args.ranks), ("--top-k", args.top_k)):
        check_output(option, path)
        if option != "--json" and path and path.suffix not in (".parquet", ".jsonl"):
            raise InputError(f"{option} {path}: one row per query is written as .parquet or .jsonl")
    if args.combine:
        _combine(args.combine, args.json)
    else:
        _evaluate_run(args)


evaluate_command = partial(run_command, _evaluate)


def _evaluate_run(args: argparse.Namespace) -> None:
    from spn4cir import checkpoints
    from spn4cir.backbones import build_backbone
    from spn4cir.data import hash_pixels
    from spn4cir.datasets.skip import skip_notes
    from spn4cir.distributed import Processes, own_device
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource
    from spn4cir.results import git_commit, metrics_table

    run, of_run, dataset, note = _choose_run(args)
    if args.protocol is None and of_run.get("protocol") in dataset.protocols.get(args.split, ()):
        args.protocol = of_run["protocol"]
    args.batch_size = args.batch_size or of_run.get("eval_batch_size") or TrainConfig.eval_batch_size
    benchmark = dataset.benchmark(args.split, args.protocol)
    if not benchmark.has_known_targets and not args.submission:
        raise InputError(f"{benchmark.name}: its targets are not public: give --submission DIR and ask its server")
    if args.submission:
        _check_submission(args.submission, benchmark)
    backbone = checkpoints.load_model(run) if run else build_backbone(args.backbone or TrainConfig.backbone)
    processes = Processes()
    processes.wait()  # of torchrun or accelerate launch: each encodes and ranks its share
    backbone.to(own_device())
    images = ImageSource(dataset.image, backbone.transform)
    model = f"model {run or 'embedded weights, not trained on any triplet'}"
    top = 50 if args.submission else (args.k or 100) if args.top_k else 0
    try:
        result = evaluate(backbone, benchmark, images, ablate=args.ablate, batch_size=args.batch_size, top=top)
    except InputError as error:
        if not str(error).startswith("image "):
            raise
        hash_pixels(dataset, benchmark.image_ids, lambda line: None, show=False)  # raises with all broken images
        raise
    if not processes.first:
        return
    if args.submission:
        print(model)
        names = [query.name for query in benchmark.queries]
        lists = [dict(zip(names, result.rankings[over].top, strict=True)) for over in ("gallery", "subset")]
        for path in dataset.write_submission(args.submission, *lists):
            print(dataset.check_submission(path))
        return
    notes = filter(None, [note, *dataset.notes(), *skip_notes(dataset)])
    print(model, *notes, metrics_table(result), sep="\n", file=report_stream(args.json))
    for path, column in ((args.ranks, "ranks"), (args.top_k, "top")):
        if path:
            result.write_rows(path, column)
    values = result.as_json()
    about = {"protocol": values.pop("protocol"), "run": str(run) if run else None, **values, "git": git_commit()}
    write_json(args.json, about)


def _choose_run(args: argparse.Namespace) -> tuple[Path | None, dict[str, Any], Any, str]:
    """The run to evaluate, None for the embedded weights; its settings; the dataset; a note on where it was trained.

    Without ``--run`` it is the newest one on these images, or without ``--data-root`` the newest one of the dataset.
    Raises ``InputError`` if there is none on these images, but some on others.
    """
    from spn4cir import checkpoints
    from spn4cir.datasets import load_dataset

    name, run = args.dataset or TrainConfig.dataset, args.run
    is_embedded = str(run) == "embedded" and not run.exists()
    if is_embedded:
        run = None
    elif run is None and args.data_root is None:
        base = checkpoints.runs_root() / name
        run = checkpoints.newest_run(base, *sorted(base.glob("*")), backbone=args.backbone)
    elif run is None:
        run = checkpoints.find_newest_run(load_dataset(name, args.data_root), args.backbone)
    held = checkpoints.read_model(run)[0] if run else None
    if args.run and run and args.backbone not in (None, held):
        raise InputError(f"--run {run} holds a {held}, not a {args.backbone}")
    of_run = read_settings(run / "config.yaml", TrainConfig) if run and (run / "config.yaml").is_file() else {}
    name = args.dataset or of_run.get("dataset") or TrainConfig.dataset
    dataset = load_dataset(name, args.data_root or (of_run.get("data_root") if name == of_run.get("dataset") else None))
    is_known = run and name == of_run.get("dataset")
    note = checkpoints.check_origin(run, dataset, bool(args.run), bool(args.data_root)) if is_known else ""
    return run, of_run, dataset, note


def _combine(paths: list[Path], output: str | None) -> None:
    from spn4cir.results import combine

    results = [read_json(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        metrics = result.get("metrics") if isinstance(result, dict) and {"protocol", "data"} <= result.keys() else None
        if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
            raise InputError(f"--combine {path} is no result of spn4cir-eval --json")
    found = combine(results)
    lines = [f"protocol {results[0]['protocol']}, {len(results)} results, mean ± standard deviation"]
    lines += [f"{name:<12}{mean:8.2f} ± {deviation:.2f}" for name, (mean, deviation) in found.items()]
    print("\n".join(lines), file=report_stream(output))
    summary = {name: {"mean": mean, "deviation": deviation} for name, (mean, deviation) in found.items()}
    about = {"protocol": results[0]["protocol"], "data": results[0]["data"], "results": len(results)}
    write_json(output, {**about, "metrics": summary})


def _check_submission(folder: Path, benchmark: Any) -> None:
    """Raises ``InputError`` before a model is loaded if there is nothing to submit."""
    if benchmark.has_known_targets:
        raise InputError(f"--submission is for a split whose targets are not public, and {benchmark.name} is none")
    if count := benchmark.skipped:
        raise InputError(f"a submission needs every image of {benchmark.name}: {count} are on the skip list")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--submission {folder} is a file: give a folder")
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--submission {folder} cannot be made: {there} is no folder, or not writable")
