"""Commands: thin, with heavy imports inside the functions so that ``--help`` is instant."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from spn4cir.config import TrainConfig, parse
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text


def recipe(stage: int, default: Path, text: str | None) -> None:
    """Run a training stage from the command line.

    Args:
        stage: 1 or 2.
        default: YAML file of the recipe that runs without arguments.
        text: what ``--help`` says: a sentence, a blank line, examples.
    """

    def main() -> None:
        config = parse(TrainConfig, default, text=text or "")
        if config.resume:  # a run is continued with its own settings
            saved = Path(config.resume) / "config.yaml"
            if not saved.is_file():
                raise InputError(f"--resume {config.resume} is no run folder: config.yaml is missing")
            config = parse(TrainConfig, saved, text=text or "")
        from spn4cir.train import train

        train(config, stage)

    run_command(main)


def evaluate_command() -> None:
    """``spn4cir-eval``: evaluate a run, or the embedded weights where there is none."""
    run_command(_evaluate)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _evaluate() -> None:
    parser = _Parser(
        prog="spn4cir-eval",
        description="Evaluate the newest run of a dataset, or the embedded weights where there is none.",
        epilog="examples:\n  spn4cir-eval --split val\n  spn4cir-eval --split test --ablate --json result.json\n"
        "  spn4cir-eval --run runs/emoji/clip4cir/stage2-20260101-123000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--split", default="val", help="split of the dataset (default: val)")
    parser.add_argument("--dataset", help=f"default: that of --run, else {TrainConfig.dataset}")
    parser.add_argument("--data-root", help="where its files lie")
    parser.add_argument("--backbone", default="clip4cir", help="whose newest run is meant (default: clip4cir)")
    parser.add_argument("--run", type=Path, help="run or checkpoint folder (default: the newest completed run)")
    parser.add_argument("--ablate", action="store_true", help="also rank by the image alone and by the text alone")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
    parser.add_argument("--batch-size", type=int, default=256, help="images encoded at once (default: 256)")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.json not in (None, "-") and Path(args.json).is_dir():
        raise InputError(f"--json {args.json} is a folder: give a file")
    if args.json not in (None, "-") and not Path(args.json).parent.is_dir():
        raise InputError(f"--json {args.json}: the folder {Path(args.json).parent} is missing")

    from spn4cir import checkpoints
    from spn4cir.backbones import build_backbone
    from spn4cir.datasets import load_dataset
    from spn4cir.evaluate import evaluate, git_commit, table
    from spn4cir.images import ImageSource

    saved = args.run / "config.yaml" if args.run else None
    of_run = yaml.safe_load(saved.read_text(encoding="utf-8"))["dataset"] if saved and saved.is_file() else None
    args.dataset = args.dataset or of_run or TrainConfig.dataset
    dataset = load_dataset(args.dataset, args.data_root)
    benchmark = dataset.benchmark(args.split)
    run = args.run or checkpoints.newest_run(args.dataset, args.backbone)
    backbone = checkpoints.load_model(run) if run else build_backbone(args.backbone)
    device = _device()
    images = ImageSource(dataset.path, backbone.transform)
    result: dict[str, Any] = evaluate(
        backbone.to(device), benchmark, images, ablate=args.ablate, batch_size=args.batch_size
    )
    result = {"protocol": result["protocol"], "run": str(run) if run else None, **result, "git": git_commit()}
    shown = sys.stderr if args.json == "-" else sys.stdout
    print(f"model {run or 'embedded weights, not trained on any triplet'}\n{table(result)}", file=shown)
    if args.json == "-":
        print(json.dumps(result, indent=1))
    elif args.json:
        write_text(Path(args.json), json.dumps(result, indent=1) + "\n")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def import_command() -> None:
    """``spn4cir-import``: convert published weights into a folder that all commands read."""
    run_command(_import)


def _import() -> None:
    parser = _Parser(
        prog="spn4cir-import",
        description="Convert published weights into a folder for --run and --init. Prints what became of every name in "
        "the file; anything unexplained is an error, and nothing that a file holds is run.",
        epilog="examples:\n  spn4cir-import --backbone clip4cir fiq_stage1.pt --output runs/imported/fiq_stage1\n"
        "  spn4cir-import --backbone clip4cir tiny.pt --model local-dir:FOLDER --output runs/imported/tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="weights as they are published, a file of torch.save")
    parser.add_argument("--backbone", required=True, help="whose weights they are")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--model", help="architecture inside the backbone (default: recognised by the shapes)")
    args = parser.parse_args()

    from spn4cir.importers import import_published

    import_published(args.file, args.output, args.backbone, {"model": args.model} if args.model else {})
    print(
        f"written to {args.output}\nnext: spn4cir-eval --run {args.output}\n"
        f"      accelerate launch recipes/stage2.py --init {args.output}"
    )
