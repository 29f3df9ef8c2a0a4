"""Commands: thin, with heavy imports inside the functions so that ``--help`` is instant."""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from spn4cir.config import TrainConfig
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text


class Parser(argparse.ArgumentParser):
    """Shows examples as they are written, and says what is wrong in one line."""

    def __init__(self, prog: str, description: str = "", epilog: str = "", **rest: Any):
        super().__init__(prog, None, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter, **rest)

    def error(self, message: str) -> NoReturn:
        """Raise ``InputError`` instead of printing the usage."""
        raise InputError(f"{message} (see {self.prog} --help)")


def check_output(option: str, output: str | Path | None) -> None:
    """Raises ``InputError`` before any work if a file cannot be written there."""
    path = Path(output or "-")
    if str(path) == "-":
        return
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: give a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} is missing")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: the folder {path.parent} is read-only")


def report_stream(output: str | None) -> TextIO:
    """The stream for what a person reads: standard error if ``--json -`` writes to standard output."""
    return sys.stderr if output == "-" else sys.stdout


def write_json(output: str | None, value: Any) -> None:
    """Write JSON where ``--json`` says: a file, standard output, or nowhere."""
    text = json.dumps(value, indent=1) + "\n"
    if output == "-":
        print(text, end="")
    elif output:
        write_text(Path(output), text)


def _data() -> None:
    parser = Parser(
        "spn4cir-data",
        "Look after a dataset's files.",
        "examples:\n  spn4cir-data check --dataset cirr\n"
        "  spn4cir-data check --dataset fashioniq --data-root FOLDER --write-skip-list --json report.json\n"
        "  spn4cir-data deduplicate --dataset fashioniq\n"
        "  spn4cir-data validate-submission submission/recall_submission.json",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    check = commands.add_parser("check", help="what is there, what is broken, and whether training can run")
    check.add_argument("--json", metavar="FILE", help="write the whole report as JSON; - for standard output")
    check.add_argument("--write-skip-list", action="store_true", help="leave missing and broken images out from now on")
    same = commands.add_parser("deduplicate", help="write which images have equal pixels, as optimized_images.json")
    same.add_argument("--output", type=Path, help="file (default: optimized_images.json in the dataset's folder)")
    what = "let the same picture at another size or quality be one image too"
    same.add_argument("--near-duplicates", action="store_true", help=what)
    valid = commands.add_parser("validate-submission", help="check a file for CIRR's evaluation server, offline")
    valid.add_argument("files", type=Path, nargs="+", metavar="FILE")
    valid.add_argument("--dataset", default="cirr", help="whose queries it answers (default: cirr)")
    for command, run in ((check, _check), (same, _deduplicate), (valid, _validate)):
        command.set_defaults(run=run, workers=None)
        if command is not valid:
            command.add_argument("--dataset", default=TrainConfig.dataset, help=f"default: {TrainConfig.dataset}")
            command.add_argument("--workers", type=int, help="images decoded at once (default: one per core)")
        command.add_argument("--data-root", help="where the dataset's files lie")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be at least 1, got {args.workers}")
    args.run(args)


data_command = partial(run_command, _data)


def _check(args: argparse.Namespace) -> None:
    check_output("--json", args.json)
    from spn4cir.dataset_check import examine, skip_list, table
    from spn4cir.datasets import load_dataset
    from spn4cir.datasets.skip import NAME, read_skip_list, write_skip_list

    dataset = load_dataset(args.dataset, args.data_root)
    if args.write_skip_list:
        if dataset.root is None:
            raise InputError(f"{dataset.name} is embedded: it needs no skip list")
        check_output("--write-skip-list", dataset.root / NAME)
    report = examine(dataset, _pixel_cache(dataset.name), args.workers)
    shown = report_stream(args.json)
    if args.write_skip_list and dataset.root:
        reasons = skip_list(report, read_skip_list(dataset.root))
        path = write_skip_list(dataset.root, reasons)
        report = examine(load_dataset(args.dataset, args.data_root), before=report)
        print(f"{path}: {len(reasons)} images to leave out\n", file=shown)
    print(table(report), file=shown)
    write_json(args.json, report.as_json())
    if not report.can_train:
        raise SystemExit(1)


def _deduplicate(args: argparse.Namespace) -> None:
    from spn4cir.datasets import load_dataset
    from spn4cir.identity import (
        PUBLISHED_CLASSES,
        canonical_ids,
        group_near_duplicates,
        inspect_images,
        write_optimized,
    )

    dataset = load_dataset(args.dataset, args.data_root)
    out = args.output or (dataset.root / PUBLISHED_CLASSES if dataset.root else None)
    if out is None:
        raise InputError(f"{dataset.name} is embedded: give --output FILE")
    check_output("--output", out)
    dataset.read_triplets()  # raises what is wrong with them, where a list of roles only leaves them out
    named = [image_id for image_id in dataset.image_roles()[0].image_ids if image_id not in dataset.skip_reasons]
    if not named:
        raise InputError(f"{dataset.name}: there are no training triplets that name an image")
    paths = {image_id: dataset.image(image_id) for image_id in named}
    found = inspect_images(paths, _pixel_cache(dataset.name), args.workers)
    if broken := [image_id for image_id, image in found.items() if image.problem]:
        what = f"{len(broken)} images are missing or broken, such as {paths[broken[0]]}"
        raise InputError(f"{what}: see {dataset.check_command(broken[0])}")
    equal = canonical_ids({image_id: image.pixels for image_id, image in found.items()})
    canonical = group_near_duplicates(found) if args.near_duplicates else equal
    write_optimized(out, canonical, paths)
    print(f"{len(canonical)} images, {len(set(canonical.values()))} unique → {out}")


def _validate(args: argparse.Namespace) -> None:
    from spn4cir.datasets import load_dataset

    dataset, faults = load_dataset(args.dataset, args.data_root), []
    for path in args.files:
        try:
            print(dataset.check_submission(path))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\nerror: ".join(faults))


def _pixel_cache(name: str) -> Path:
    """Pixels seen before, shared with training."""
    from spn4cir.checkpoints import runs_root

    return runs_root() / "pixels" / f"{name}.jsonl"


def _import() -> None:
    parser = Parser(
        "spn4cir-import",
        "Convert published weights into a folder for --run and --init. Prints what became of every name in the file; "
        "anything unexplained is an error, and nothing that a file holds is run.",
        "examples:\n  spn4cir-import --backbone clip4cir fiq_stage1.pt --output runs/imported/fiq_stage1\n"
        "  spn4cir-import --backbone clip4cir tiny.pt --model local-dir:FOLDER --output runs/imported/tiny\n"
        "  spn4cir-import --backbone clip4cir combiner.pt --base runs/imported/fiq_stage1 --output runs/imported/fiq\n"
        "  spn4cir-import --backbone blip4cir best.pt --tokenizer FOLDER --output runs/imported/fiq_blip",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="weights as they are published, a file of torch.save")
    add("--backbone", required=True, help="whose weights they are")
    add("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--model", help="architecture inside the backbone (default: recognised by the shapes)")
    add("--tokenizer", metavar="FOLDER", help="folder or name of the tokenizer, where one is needed (default: BERT's)")
    add("--base", type=Path, metavar="FOLDER", help="for a file that holds a part of a model: where the rest lies")
    args = parser.parse_args()

    from spn4cir.importers import import_published

    stated = {key: value for key in ("model", "tokenizer") if (value := getattr(args, key))}
    import_published(args.file, args.output, args.backbone, stated, args.base)
    print(f"written to {args.output}\nnext: spn4cir-eval --run {args.output}")
    print(f"      spn4cir-train --stage 2 --dataset DATASET --init {args.output}")


import_command = partial(run_command, _import)
