"""The command ``spn4cir-eval``."""

import argparse
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from spn4cir.cli import Parser, check_output, report_stream, write_json
from spn4cir.config import TrainConfig, read_settings
from spn4cir.errors import InputError, run_command
from spn4cir.files import read_json, write_text

REPORT_TOP = 6  # first items of each query that the report shows


def _evaluate() -> None:
    parser = Parser(
        "spn4cir-eval",
        "Evaluate the newest run of a dataset, or the embedded weights where there is none.",
        "examples:\n  spn4cir-eval --split val\n  spn4cir-eval --split test --ablate --json result.json\n"
        "  spn4cir-eval --run runs/emoji/clip4cir/stage2-20260101-123000\n"
        "  spn4cir-eval --dataset fashioniq --protocol fashioniq/original-noref\n"
        "  spn4cir-eval --dataset cirr --split test1 --submission submission\n"
        "  spn4cir-eval --split val --report report --compare embedded\n"
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
    add("--csv", metavar="FILE", help="write each metric with its interval: by model, tag and mode; - as of --json")
    add("--compare", metavar="RUN", type=Path, nargs="+", help="further runs, with a test of each difference")
    add("--report", metavar="DIR", help="write a page of figures and pictures, and the data beside")
    add("--report-queries", metavar="N", type=int, help="queries with pictures in each list of it (default: 60)")
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
    for option, given in {"--report": args.report, "--csv": args.csv, "--json": args.json}.items():
        if given == "":
            raise InputError(f"{option} is empty: say where to write")
    if args.csv == "-" == args.json:
        raise InputError("--csv - and --json - both write to standard output: give a file for one of them")
    if args.report_queries is not None and (args.report_queries < 0 or not args.report):
        raise InputError(f"--report-queries must be at least 0 and needs --report DIR, got {args.report_queries}")
    written = {"--ranks": args.ranks, "--top-k": args.top_k, "--csv": args.csv, "--report": args.report}
    others = {**written, "--ablate": args.ablate, "--compare": args.compare}
    _refuse(
        args.submission, {**others, "--json": args.json}, "--submission writes only what the evaluation server takes"
    )
    _refuse(args.combine, others, "--combine averages results that were written before")
    for option, path in {"--json": args.json, **written}.items():
        if option != "--report":
            check_output(option, path)
        if option in ("--ranks", "--top-k") and path and path.suffix not in (".parquet", ".jsonl"):
            raise InputError(f"{option} {path}: one row per query is written as .parquet or .jsonl")
    if args.combine:
        _combine(args.combine, args.json)
    else:
        if args.report:
            args.report = _make_report_folder(Path(args.report))
        _evaluate_run(args)


def _refuse(given: object, others: Mapping[str, object], why: str) -> None:
    """Raises ``InputError`` for options that have no meaning beside a given one."""
    if given and (useless := [option for option, value in others.items() if value]):
        raise InputError(f"{why}: leave out {useless[0]}")


evaluate_command = partial(run_command, _evaluate)


def _evaluate_run(args: argparse.Namespace) -> None:
    from spn4cir.backbones import build_backbone
    from spn4cir.checkpoints import load_model
    from spn4cir.datasets.skip import skip_notes
    from spn4cir.distributed import Processes
    from spn4cir.results import git_commit, metrics_table

    run, of_run, dataset, note = _choose_run(args)
    compared, notes = _compared_runs(args, run, dataset)
    if args.protocol is None and of_run.get("protocol") in dataset.protocols.get(args.split, ()):
        args.protocol = of_run["protocol"]
    args.batch_size = args.batch_size or of_run.get("eval_batch_size") or TrainConfig.eval_batch_size
    benchmark = dataset.benchmark(args.split, args.protocol)
    if not benchmark.has_known_targets and not args.submission:
        raise InputError(f"{benchmark.name}: its targets are not public: give --submission DIR and ask its server")
    if args.submission:
        _check_submission(args.submission, benchmark)
    processes = Processes()
    processes.wait()  # of torchrun or accelerate launch: each encodes and ranks its share
    results = {}
    for label, path in {_label(run): run, **compared}.items():
        backbone = load_model(path) if path else build_backbone(args.backbone or TrainConfig.backbone)
        results[label] = _evaluate_model(args, backbone, dataset, benchmark)
    if not processes.first:
        return
    result = next(iter(results.values()))
    model = f"model {run or 'embedded weights, not trained on any triplet'}"
    if args.submission:
        print(model)
        names = [query.name for query in benchmark.queries]
        lists = [dict(zip(names, result.rankings[over].top, strict=True)) for over in ("gallery", "subset")]
        for path in dataset.write_submission(args.submission, *lists):
            print(dataset.check_submission(path))
        return
    shown = filter(None, [note, *notes, *dataset.notes(), *skip_notes(dataset)])
    print(model, *shown, metrics_table(result), sep="\n", file=_stream(args))
    for path, column in ((args.ranks, "ranks"), (args.top_k, "top")):
        if path:
            result.write_rows(path, column)
    values = result.as_json()
    about = {"protocol": values.pop("protocol"), "run": str(run) if run else None, **values, "git": git_commit()}
    _write_findings(args, dataset, results, about)


def _evaluate_model(args: argparse.Namespace, backbone: Any, dataset: Any, benchmark: Any) -> Any:
    """The ``Result`` of one model, with intervals where targets are public."""
    from spn4cir.data import hash_pixels
    from spn4cir.distributed import own_device
    from spn4cir.evaluate import evaluate
    from spn4cir.images import ImageSource

    backbone.to(own_device())
    images = ImageSource(dataset.image, backbone.transform)
    top = 50 if args.submission else (args.k or 100) if args.top_k else REPORT_TOP if args.report else 0
    ablate = bool(args.ablate or args.report)
    try:
        result = evaluate(backbone, benchmark, images, ablate=ablate, batch_size=args.batch_size, top=top)
    except InputError as error:
        if not str(error).startswith("image "):
            raise
        hash_pixels(dataset, benchmark.image_ids, lambda line: None, show=False)  # raises with all broken images
        raise
    return result.with_intervals()


def _compared_runs(
    args: argparse.Namespace, run: Path | None, dataset: Any
) -> tuple[dict[str, Path | None], list[str]]:
    """The runs of ``--compare`` by name, None for the embedded weights, and notes on where they were trained.

    Raises ``InputError`` before any model is loaded, if one is no run or stands there twice.
    """
    from spn4cir import checkpoints

    found: dict[str, Path | None] = {}
    notes = []
    for path in args.compare or ():
        other = None if str(path) == "embedded" and not path.exists() else path
        if other:
            checkpoints.read_model(other)  # raises if it is no run
            notes.append(checkpoints.check_origin(other, dataset, True, True))
        if _label(other) in (_label(run), *found):
            raise InputError(f"--compare {path} is evaluated already: name each run once")
        found[_label(other)] = other
    return found, notes


def _label(run: Path | None) -> str:
    """What a run is called beside others: the end of its path."""
    return "/".join(run.parts[-3:]) if run else "embedded weights"


def _write_findings(args: argparse.Namespace, dataset: Any, results: dict[str, Any], about: dict[str, Any]) -> None:
    """Print the comparison, and write what ``--json``, ``--csv`` and ``--report`` ask for."""
    from spn4cir.comparison import compare_results, comparison_table

    first, *others = results
    found = compare_results(results[first], {label: results[label] for label in others})
    for label, differences in found.items():
        print(f"\n{comparison_table(label, differences)}", file=_stream(args))
    if results[first].ablation:
        from spn4cir.shortcuts import label_queries, share_labels

        about["modalities"] = share_labels(label_queries(list(results.values())))
        shares = ", ".join(f"{label} {share:.1f} %" for label, share in about["modalities"].items())
        if shares:
            print(f"\nqueries of both parts: {shares}", file=_stream(args))
    if found:
        about["compare"] = [
            {
                "run": label, "metrics": results[label].metrics, "intervals": results[label].intervals,
                "differences": {row.metric: {k: v for k, v in row._asdict().items() if k != "metric"} for row in rows},
            }
            for label, rows in found.items()
        ]  # fmt: skip
    write_json(args.json, about)
    if args.csv or args.report:
        from spn4cir.summary import format_csv, metric_rows

        rows = {label: metric_rows(result) for label, result in results.items()}
        if args.csv == "-":
            print(format_csv(rows), end="")
        elif args.csv:
            write_text(Path(args.csv), format_csv(rows))
        if args.report:
            from spn4cir.report import write_report

            shown = 60 if args.report_queries is None else args.report_queries
            path = write_report(args.report, results, dataset.image, found, dataset.label, shown, rows)
            write_text(args.report / "metrics.csv", format_csv(rows))
            write_json(str(args.report / "result.json"), about)
            print(f"\nreport {path}", file=_stream(args))


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
    _check_folder("--submission", folder)


def _make_report_folder(folder: Path) -> Path:
    """Make the folder of ``--report``. Raises ``InputError`` where it cannot be made, or holds files of others."""
    _check_folder("--report", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = next(folder.iterdir(), None) is None
    except OSError as error:
        raise InputError(f"--report {folder} cannot be made: {error.strerror or error}") from None
    if not is_empty:
        from spn4cir.report import is_report

        if not is_report(folder):
            raise InputError(f"--report {folder} holds files but no report: give a new or empty folder")
    return folder


def _stream(args: argparse.Namespace) -> TextIO:
    """The stream for what a person reads: standard error if ``--json -`` or ``--csv -`` writes to standard output."""
    return report_stream("-" if args.csv == "-" else args.json)


def _check_folder(option: str, folder: Path) -> None:
    """Raises ``InputError`` before any work if a folder cannot be made or written there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder} is a file: give a folder")
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{option} {folder} cannot be made: {there} is no folder, or not writable")
