"""Zero-shot on the embedded dataset: generated triplets alone, against no training and few annotated triplets.

Generated triplets come from the training images, or from pictures of another maker (--pictures). Nothing annotated
takes part: no triplet, no pair that matching would leave out, no query that selects. The protocol is that of
``benchmarks.claims``: stage 1 trains until its patience ends, stage 2 goes on for ``STEPS`` steps, both keep the state
that is best on held-out generated triplets, and the test split is read once. Rows with annotated triplets are runs of
that benchmark, and select on ``HELD`` further annotated triplets.

examples:
  python -m benchmarks.zeroshot                     # five seeds, without pictures of another maker
  npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
  python -m benchmarks.zeroshot --pictures package/img/google/64
  python -m benchmarks.zeroshot --seeds 0 --annotated 100 --runs runs/try --output try.json
"""

import argparse
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import claims
from benchmarks.claims import ROOT, Setting
from spn4cir.config import TrainConfig, parse
from spn4cir.datasets.emoji import Emoji
from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text
from spn4cir.types import Triplet

RESULT = Path(__file__).parent / "results" / "zeroshot.json"
STAGES = ("stage1", "negatives")
"""What the claims call stage 1, and stage 2 with nothing more than the triplets of stage 1."""
ROWS = {
    "none": "embedded weights, no training",
    "generated 1": "generated triplets, stage 1",
    "generated 2": "generated triplets, stage 1 → stage 2",
    "pictures 1": "generated triplets of another maker's pictures, stage 1",
    "pictures 2": "generated triplets of another maker's pictures, stage 1 → stage 2",
    "annotated 100 1": "100 annotated triplets, stage 1",
    "annotated 100 2": "100 annotated triplets, stage 1 → stage 2",
    "annotated 300 1": "300 annotated triplets, stage 1",
    "annotated 300 2": "300 annotated triplets, stage 1 → stage 2",
}
COLUMNS = {"none": "no training", "annotated 100 1": "100 annotated", "annotated 300 1": "300 annotated"}


class ZeroShot(Setting):
    """The runs of one file of generated triplets and one seed."""

    def __init__(self, seed: int, generated: Path, folder: Path):
        super().__init__(0, seed, str(generated), folder)
        self.folder = folder / f"seed{seed}"

    def recipe(self, stage: int, name: str, positives: bool, **changes: Any) -> TrainConfig:
        """The zero-shot recipe of a stage under the protocol; ``positives`` mean nothing here."""
        recipe = parse(TrainConfig, ROOT / "recipes" / "emoji" / f"{self.backbone}_zeroshot_stage{stage}.yaml", [])
        config = replace(
            recipe, generated=self.generated, seed=self.seed, select_by=["R@1", "R@5"], epochs=10_000,
            output=str(self.folder / name), **changes,
        )  # fmt: skip
        return replace(config, eval_every=claims.often(config))

    def settings(self, row: str) -> dict[str, Any]:
        """Those of the recipes."""
        return {}


class Unannotated(Emoji):
    """The embedded images without their annotated triplets, which matching would leave out."""

    has_triplets = False

    def read_triplets(self) -> list[Triplet]:
        """No triplet."""
        return []


def code_points(name: str) -> str:
    """The code points of the emoji that a file is named by, without what makers write in different ways.

    Left away are leading zeros, the prefix ``emoji_u`` and the variation selector FE0F, which says to show a picture.
    Raises ``InputError`` for any other name.

    Example:
        >>> code_points("0023-FE0F-20e3.png"), code_points("emoji_u1f468_200d_2695.png")
        ('23-20e3', '1f468-200d-2695')
    """
    stem = Path(name).stem.lower().removeprefix("emoji_u")
    if not re.fullmatch(r"[0-9a-f]{2,6}([-_][0-9a-f]{2,6})*", stem):
        raise InputError(f"--pictures: {name} is not named by its code points, so targets cannot be left out")
    return "-".join(part.lstrip("0") for part in re.split("[-_]", stem) if part != "fe0f")


def split_pictures(names: list[str], dataset: Emoji) -> tuple[list[str], list[str]]:
    """Split pictures into those to train on, and those whose emoji is a target of val or test."""
    training = set(dataset.training_images())
    targets = {code_points(i) for i in dataset.benchmark("val").gallery if i not in training}
    kept: list[str] = []
    left_out: list[str] = []
    for name in names:
        (left_out if code_points(name) in targets else kept).append(name)
    return kept, left_out


def generate(folder: Path) -> Path:
    """Make triplets of the training images, as the preset of the embedded dataset says; returns their file."""
    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.steps import GenerateConfig

    preset = ROOT / "recipes" / "triplets" / "emoji.yaml"
    make_triplets(parse(GenerateConfig, preset, ["--output", str(folder)]), Unannotated())
    return folder / "triplets.json"


def generate_from_pictures(pictures: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    """Make triplets of another maker's pictures, without those of targets; returns their file, and counts."""
    from spn4cir.data_gen.make_triplets import make_triplets
    from spn4cir.data_gen.sample_images import SampleConfig, sample_images
    from spn4cir.data_gen.steps import GenerateConfig
    from spn4cir.datasets import load_dataset
    from spn4cir.datasets.pictures import walk

    if not pictures.is_dir():
        raise InputError(f"--pictures {pictures} is no folder")
    kept, left_out = split_pictures(walk(pictures).ids, Emoji())
    if not kept:
        raise InputError(f"--pictures {pictures} holds no picture to train on")
    listed, sample = folder / "pictures.txt", folder / "sample"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(listed, "".join(f"{name}\n" for name in kept))
    sample_images(SampleConfig(folder=str(pictures), list=str(listed), images=len(kept), output=str(sample)))
    options = ["--dataset", "catalogue", "--data-root", str(sample), "--output", str(folder / "triplets")]
    config = parse(GenerateConfig, ROOT / "recipes" / "triplets" / "emoji.yaml", options)
    make_triplets(config, load_dataset("catalogue", str(sample)))
    return folder / "triplets" / "triplets.json", {"pictures": len(kept), "left out as targets": len(left_out)}


def main() -> None:
    """Generate, train, evaluate, summarise, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zeroshot",
        description=(__doc__ or "").partition("examples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    pictures = (
        "pictures of another maker, named by code points: img/google/64 of the npm package emoji-datasource-google"
    )
    parser.add_argument("--pictures", type=Path, help=pictures)
    parser.add_argument("--annotated", type=int, nargs="*", default=[100, 300], choices=(100, 300))
    parser.add_argument("--claims", type=Path, default=Path("runs/claims"), help="where runs of benchmarks.claims lie")
    parser.add_argument("--train-only", action="store_true", help="train, and leave the test split unread")
    parser.add_argument("--runs", type=Path, default=Path("runs/zeroshot"), help="where runs lie; complete ones stay")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()

    from spn4cir.results import git_commit

    counts = dict[str, int]()
    files = {"generated": generate(args.runs / "generated")}
    if args.pictures:
        files["pictures"], counts = generate_from_pictures(args.pictures, args.runs / "pictures")
    settings: dict[str, list[Setting]] = {
        source: [ZeroShot(seed, file, args.runs / source) for seed in args.seeds] for source, file in files.items()
    }
    for count in args.annotated:
        settings[f"annotated {count}"] = [Setting(count, seed, "", args.claims) for seed in args.seeds]
    runs = {
        f"{source} {stage}": [setting.train(row) for setting in seeds]
        for source, seeds in settings.items()
        for stage, row in enumerate(STAGES, 1)
    }
    if args.train_only:
        return
    found = {"none": [claims.measure(None, splits=["test"])] * len(args.seeds)}
    found |= {row: [claims.measure(run, splits=["test"]) for run in folders] for row, folders in runs.items()}
    compared = {row: [other for other in found if other.startswith(("generated", "pictures"))] for row in COLUMNS}
    part = {"test": claims.summarise(found, "test"), "differences": claims.differences(found, "test", compared)}
    report = {
        "what": "emoji/test in percent, mean and standard deviation over seeds; differences in points with 95 % "
        "intervals, paired by seed and query; best state of each run on held-out triplets",
        "command": shlex.join(["python", "-m", "benchmarks.zeroshot", *sys.argv[1:]]),
        "protocol": claims.PROTOCOL,
        "triplets": {name: len(json.loads(file.read_text())) for name, file in files.items()},
        "pictures of another maker": counts,
        "rows": ROWS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git": git_commit(),
        "results": part,
        "runs": {name: {s.seed: claims.endings(s, STAGES) for s in seeds} for name, seeds in settings.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    print(claims.markdown(part, ROWS, COLUMNS))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_command(main)
