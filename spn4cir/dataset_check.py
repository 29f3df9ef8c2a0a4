"""A report on the files of a dataset: what is missing, what is broken, and whether training can run."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from spn4cir.dataset import Check, Dataset, ImageRole, Level
from spn4cir.datasets.reading import attempt
from spn4cir.errors import InputError
from spn4cir.identity import (
    PUBLISHED_CLASSES,
    Inspected,
    canonical_ids,
    group_near_duplicates,
    inspect_images,
    read_optimized,
)
from spn4cir.types import ImageRef

PROBLEMS = ("missing", "truncated", "unreadable")
EXTREME = 10  # of a picture that is so many times longer than wide, little is left to see
HUGE = 50_000_000  # pixels, which take seconds and 150 MB to decode
WIDEST = 80  # letters of the first column; a longer note reaches beyond it
SHOWN = 3  # examples of a check in the terminal


@dataclass
class Report:
    """What was found.

    Args:
        broken: images and what is wrong with them.
        duplicates: classes of equal images.
        near_duplicates: classes of the same picture at another size or quality, each by the first of its equal ones.
        has_triplets: whether triplets come with the dataset; else training needs generated ones.
    """

    dataset: str
    root: str
    checks: list[Check] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)
    near_duplicates: list[list[str]] = field(default_factory=list)
    found: dict[str, Inspected] = field(default_factory=dict, repr=False)
    has_triplets: bool = True

    @property
    def can_train(self) -> bool:
        """Whether nothing stands in the way of training."""
        return not any(check.level == "problem" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything but the look at single images, for machines."""
        values = asdict(replace(self, found={}))
        inner = {"found", "has_triplets"}
        return {"can_train": self.can_train, **{name: values[name] for name in values if name not in inner}}


def examine(
    dataset: Dataset, cache: Path | None = None, workers: int | None = None, before: Report | None = None
) -> Report:
    """Look at annotations and at every image, each decoded once; images on the skip list count as left out.

    ``cache`` and ``workers`` are those of ``inspect_images``; a report ``before`` on the same images saves a look.
    """
    report = Report(dataset.name, str(dataset.root or "embedded"), dataset.checks())
    report.has_triplets = dataset.has_triplets
    roles = dataset.image_roles()
    ids = list(dict.fromkeys(i for role in roles for i in role.image_ids))
    if dataset.skip_reasons:
        report.checks.append(Check.listed("images on the skip list", dataset.skip_reasons, expected=None))
    try:
        images = {image_id: dataset.image(image_id) for image_id in ids}
    except InputError as error:  # no picture at all, or an id that no split lists
        report.checks.append(Check("images", 0, len(ids), "problem", (str(error),)))
        return report
    found = report.found = before.found if before else inspect_images(images, cache, workers)
    report.broken = {i: image.problem for i, image in found.items() if image.problem}
    for role in roles:
        report.checks += _of_role(role, found, images, dataset.skip_reasons)
    if report.can_train:
        report.checks += _usable(dataset)
    if mended := [i for i in sorted(dataset.skip_reasons) if i in found and not found[i].problem]:
        report.checks.append(Check.listed("images on the skip list that decode", mended))
    distinct = {one.pixels for i, one in found.items() if not one.problem and i not in dataset.skip_reasons}
    if not dataset.has_triplets and len(distinct) < 2:
        report.checks.append(Check("different images to make triplets of", len(distinct), 2, "problem"))
    report.duplicates, checks = _equal(dataset, roles, found)
    report.checks += checks
    report.near_duplicates, checks = _similar(found)
    report.checks += checks + _odd(found)
    return report


def _usable(dataset: Dataset) -> list[Check]:
    """What still stands in the way where each file on its own is sound, such as an id that only another split lists."""
    faults: list[Check] = []
    triplets = attempt(faults, "training triplets", True, dataset.triplets)
    for split, name in ((split, name) for split, names in dataset.protocols.items() for name in names):
        level: Level = "problem" if split == "val" else "note"
        benchmark = attempt(faults, f"queries of {name}", split == "val", partial(dataset.benchmark, split, name))
        if benchmark is not None and (not benchmark.queries or benchmark.missing_tags):
            examples = tuple(f"none of {tag}" for tag in benchmark.missing_tags)
            faults.append(Check(f"queries of {name} that are left", len(benchmark.queries), None, level, examples))
    if triplets is not None and not triplets:
        level = "problem" if dataset.has_triplets else "fact"
        faults.append(Check("triplets that are left to train on", 0, level=level))
    return faults


def _of_role(
    role: ImageRole, found: Mapping[str, Inspected], images: Mapping[str, ImageRef], skipped: Collection[str]
) -> list[Check]:
    broken = {i: found[i].problem for i in role.image_ids if found[i].problem}
    checks = [Check(f"{role.name}: images that decode", len(role.image_ids) - len(broken), len(role.image_ids))]
    for problem in PROBLEMS:
        if ids := [i for i, what in broken.items() if what == problem]:
            is_skipped = set(ids) <= set(skipped)
            level: Level = "problem" if role.needed and not is_skipped else "note"
            more = " (on the skip list)" if is_skipped else ""
            examples = [f"{images[i]}" + (f": {found[i].detail}" if problem != "missing" else "") for i in ids]
            checks.append(Check.listed(f"{role.name}: {problem}{more}", examples, level))
    return checks


def _equal(
    dataset: Dataset, roles: list[ImageRole], found: Mapping[str, Inspected]
) -> tuple[list[list[str]], list[Check]]:
    """Classes of images with equal pixels, and what is to be known about them."""
    hashes = {i: image.pixels for i, image in found.items() if not image.problem}
    canonical = canonical_ids(hashes)
    classes: dict[str, list[str]] = {}
    for image_id, first in canonical.items():
        classes.setdefault(first, []).append(image_id)
    several = [ids for ids in classes.values() if len(ids) > 1]
    copies = len(canonical) - len(classes)
    examples = tuple(" = ".join(ids[:4]) for ids in several)
    checks = [Check("images that are a copy of another", copies, None, "note" if copies else "fact", examples)]
    own = set(roles[0].image_ids)
    pixels = {hashes[i] for i in own if i in hashes}
    for role in (role for role in roles[1:] if role.needed):
        if leak := [i for i in role.image_ids if i not in own and hashes.get(i) in pixels]:
            checks.append(Check.listed(f"{role.name}: copies of images {roles[0].name}", leak))
    path = dataset.root / PUBLISHED_CLASSES if dataset.root else None
    if path and path.is_file():
        listed = attempt(checks, PUBLISHED_CLASSES, True, partial(read_optimized, path))
        if listed is None:
            return several, checks
        similar = group_near_duplicates(found)  # spn4cir-data deduplicate --near-duplicates makes classes of them
        wrong = [i for i, first in listed.items() if hashes.get(i) != hashes.get(first)]
        wrong = [i for i in wrong if i not in similar or similar[i] != similar.get(listed[i])]
        apart = [i for i, first in canonical.items() if {i, first} <= listed.keys() and listed[i] != listed[first]]
        what = f"{PUBLISHED_CLASSES}: images whose class disagrees with their pixels"
        checks.append(Check.listed(what, wrong + apart))
    return several, checks


def _similar(found: Mapping[str, Inspected]) -> tuple[list[list[str]], list[Check]]:
    """Classes of different pixels that show the same picture, and how many images are one too many by that."""
    equal = canonical_ids({i: image.pixels for i, image in found.items() if not image.problem})
    classes: dict[str, list[str]] = {}
    for image_id, first in group_near_duplicates({i: found[i] for i in dict.fromkeys(equal.values())}).items():
        classes.setdefault(first, []).append(image_id)
    several = [ids for ids in classes.values() if len(ids) > 1]
    what = "images that are nearly a copy of another (other size or quality)"
    copies, examples = sum(map(len, several)) - len(several), tuple(" ≈ ".join(ids[:4]) for ids in several)
    return several, [Check(what, copies, None, "note" if copies else "fact", examples)]


def _odd(found: Mapping[str, Inspected]) -> list[Check]:
    """Pictures of which a model sees little, or that are slow to read."""
    sizes = {i: image.size for i, image in found.items() if not image.problem}
    shown = {i: f"{i}: {w:,} × {h:,}" for i, (w, h) in sizes.items()}
    long = [shown[i] for i, size in sizes.items() if max(size) > EXTREME * min(size)]
    huge = [shown[i] for i, (w, h) in sizes.items() if w * h > HUGE]
    return [
        Check.listed("pictures of one colour", [i for i in sizes if found[i].is_plain], expected=None),
        Check.listed(f"pictures more than {EXTREME} times as long as wide, or as wide as high", long, expected=None),
        Check.listed(f"pictures of more than {HUGE // 10**6} million pixels", huge, expected=None),
    ]


def skip_list(report: Report, before: Mapping[str, str]) -> dict[str, str]:
    """What to leave out, given the list so far: image id → reason. Raises ``InputError`` if that would be everything.

    Images that were broken and decode now come back; those with another reason stay, as a person left them out.
    """
    if len(report.broken) == len(report.found):
        raise InputError(f"{report.dataset}: no picture in {report.root} decodes: a skip list would leave nothing")
    return {i: reason for i, reason in before.items() if reason not in PROBLEMS} | report.broken


def table(report: Report) -> str:
    """The report for the terminal: problems and notes with a few examples each."""
    width = min(max(len(check.what) for check in report.checks), WIDEST)
    lines = [f"{report.dataset} in {report.root}", "", f"{'':{width}}{'found':>8}{'expected':>10}"]
    for check in report.checks:
        expected = "" if check.expected is None else f"{check.expected:,}"
        mark = "" if check.level == "fact" else f"  {check.level}"
        lines.append(f"{check.what:{width}}{check.found:8,}{expected:>10}{mark}")
        if check.level != "fact":
            lines += [f"    {example}" for example in check.examples[:SHOWN]]
            if len(check.examples) > SHOWN:
                lines.append(f"    … {len(check.examples) - SHOWN:,} more")
    levels = Counter(check.level for check in report.checks)
    verdict = "training can run" if report.can_train else "training cannot run"
    if report.can_train and not report.has_triplets:
        verdict += " once spn4cir-triplets has made triplets" + ", which leaves broken images out" * bool(report.broken)
    if any(problem in check.what for check in report.checks if check.level == "problem" for problem in PROBLEMS):
        verdict += "; --write-skip-list leaves missing and broken images out"
    return "\n".join([*lines, "", f"problems: {levels['problem']}, notes: {levels['note']}; {verdict}"])
