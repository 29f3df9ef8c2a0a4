"""CIRR: real-life photographs from NLVR2, one caption for each pair, and groups of six similar images.

Source: Liu et al., "Image retrieval on real-life images with pre-trained vision-and-language models", ICCV 2021.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import ClassVar

from spn4cir.dataset import Check, Dataset, ImageRole, Level
from spn4cir.datasets.reading import PLAIN, Entry, attempt, find_root, inner_path, list_pictures, read_entries, readable
from spn4cir.datasets.submission import check_submission, write_submission
from spn4cir.errors import InputError
from spn4cir.files import read_json
from spn4cir.types import Benchmark, ImageRef, Query, Triplet, recall_measures

SPLITS = ("train", "val", "test1")
ANNOTATIONS = ("cirr/captions", "captions")
BASES = ("", "img_raw", "images")  # where the image tree may stand
TREE = tuple(f"{base}/{part}".lstrip("/") for base in BASES for part in ("train", "dev", "test1"))
ALIASES = ("cirr_dataset", "CIRR")
SOURCE = "github.com/Cuberick-Orion/CIRR (annotations, branch cirr_dataset; its README says how to get NLVR2's images)"
EXPECTED = f"captions/, image_splits/ and the pictures in train/, dev/ and test1/ or in img_raw/, from {SOURCE}"
PUBLISHED_TRIPLETS = {"train": 28225, "val": 4181, "test1": 4148}
PUBLISHED_IMAGES = {"train": 16939, "val": 2297, "test1": 2315}
GROUP = 6  # images of a subset, reference included


class CIRR(Dataset):
    """``cirr/captions/cap.rc2.{split}.json``, ``cirr/image_splits/split.rc2.{split}.json`` and NLVR2's image tree.

    The two annotation folders may also lie in the root itself, and the image tree in ``img_raw`` or ``images``.

    The root is searched in SPN4CIR_DATA, then in data/cirr, if it is None. Raises ``InputError`` if it is missing.
    """

    name = "cirr"
    as_published = True
    protocols: ClassVar = {"val": ("cirr/val",), "test1": ("cirr/test1",)}

    def __init__(self, root: str | None = None):
        self.root: Path = find_root(self.name, root, ALIASES, (ANNOTATIONS, TREE), EXPECTED)
        self._annotations = self.root / "cirr" if (self.root / "cirr" / "captions").is_dir() else self.root
        self._folders: dict[Path, dict[str, Path]] = {}  # each is listed once

    def _entries(self, split: str) -> list[Entry]:
        return read_entries(self._annotations / "captions" / f"cap.rc2.{split}.json", SOURCE)

    def _split_file(self, split: str) -> Path:
        return self._annotations / "image_splits" / f"split.rc2.{split}.json"

    def _listed(self, split: str) -> dict[str, PurePosixPath]:
        """Images of a split file and their paths below the image tree."""
        path = self._split_file(split)
        listed = read_json(path, SOURCE)
        if not isinstance(listed, dict):
            raise InputError(f"{path}: expected an object of image names and paths")
        if wrong := [image_id for image_id in listed if not PLAIN.fullmatch(image_id)]:
            raise InputError(f"{path}: {wrong[0][:60]!r} is no image id")
        return {image_id: inner_path(path, image_id, value) for image_id, value in listed.items()}

    @cached_property
    def _files(self) -> dict[str, PurePosixPath]:
        """Paths of all images of the split files that can be read."""
        listed = [readable(partial(self._listed, split)) or {} for split in SPLITS]
        return {image_id: path for paths in listed for image_id, path in paths.items()}

    def find_image(self, image_id: str) -> ImageRef:
        """The picture of an image; where it should lie, if it is missing."""
        if image_id not in self._files:
            raise InputError(f"{self.name}: unknown image id {image_id!r}")
        if not any((self.root / name).is_dir() for name in TREE):
            raise InputError(f"{self.name}: {self.root} holds no pictures: expected there {EXPECTED}")
        inner = self._files[image_id]
        places = [self.root / base / inner.parent for base in BASES]
        for place in places:
            if place not in self._folders:
                self._folders[place] = list_pictures(place)
            if inner.stem in self._folders[place]:
                return ImageRef(self._folders[place][inner.stem])
        return ImageRef(next((place for place in places if place.is_dir()), places[0]) / inner.name)

    def file(self, name: str) -> Path:
        """A file that a person names: as it stands, or below the root or the folder of the annotations."""
        path = super().file(name)
        return path if path.is_file() else self._annotations / name

    def list_training_images(self) -> list[str]:
        """All images of the train split file."""
        return list(self._listed("train"))

    def read_triplets(self) -> list[Triplet]:
        """Annotated triplets with a caption, in file order."""
        listed, place = self._listed("train"), self._split_file("train")
        triplets = []
        for entry in self._entries("train"):
            reference, target = (entry.image_id(key, listed, place) for key in ("reference", "target_hard"))
            if text := entry.text("caption").strip():
                triplets.append(Triplet(reference, (target,), (text,)))
        return triplets

    def notes(self) -> list[str]:
        """How many training triplets have no caption; nothing where there are no training triplets."""
        entries = readable(partial(self._entries, "train")) or []
        bare = sum(not entry.text("caption").strip() for entry in entries)
        return [f"{self.name}: {bare} training triplets without a caption are left out"] if bare else []

    def read_benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """``cirr/val``, or ``cirr/test1``, whose targets only the evaluation server knows."""
        chosen = self.choose_protocol(split, protocol)
        listed, place = self._listed(split), self._split_file(split)
        queries: dict[str, Query] = {}
        for entry in self._entries(split):
            name = str(entry.number("pairid"))
            if name in queries:
                raise entry.error("pairid", f"{name} occurs twice")
            targets = (entry.image_id("target_hard", listed, place),) if split != "test1" else ()
            reference = entry.image_id("reference", listed, place)
            members = tuple(entry.entry("img_set").image_ids("members", listed, place))
            if reference in targets:
                raise entry.error("target_hard", "is the reference, which is not ranked")
            if len(set(members)) != GROUP:
                raise entry.error("img_set", f"expected {GROUP} different members, got {len(set(members))}")
            if lost := [image_id for image_id in (reference, *targets) if image_id not in members]:
                raise entry.error("img_set", f"its members lack {lost[0]!r}")
            queries[name] = Query(reference, entry.text("caption"), targets, (), members, name)
        measures = recall_measures(1, 5, 10, 50, primary=(5,)) + recall_measures(1, 2, 3, primary=(1,), over="subset")
        return Benchmark(chosen, tuple(listed), tuple(queries.values()), exclude_reference=True, measures=measures)

    def triplet_entry(self, triplet: Triplet, place: Callable[[str], str] = str) -> dict[str, object]:
        """With the fields of CIRR's own annotations."""
        entry = {"pairid": 0, "reference": triplet.reference, "target_hard": triplet.targets[0]}
        return {**entry, "caption": list(triplet.texts), "img_set": {"members": [""]}}

    def write_submission(
        self, folder: Path, ranked: Mapping[str, Sequence[str]], within: Mapping[str, Sequence[str]]
    ) -> list[Path]:
        """The two files that the evaluation server takes, checked after they are written."""
        return write_submission(folder, ranked, within, self.read_benchmark("test1"))

    def check_submission(self, path: Path) -> str:
        """One line on a sound submission file."""
        return check_submission(path, self.read_benchmark("test1"))

    def image_roles(self) -> list[ImageRole]:
        """What training triplets name, what val and test1 rank, and the rest; what cannot be read is left out."""
        listed = {split: list(readable(partial(self._listed, split)) or {}) for split in SPLITS}
        named = dict.fromkeys(i for triplet in (readable(self.read_triplets) or []) for i in triplet.image_ids)
        return [
            ImageRole("named by training triplets", list(named), True),
            ImageRole("val gallery", listed["val"], True),
            ImageRole("other images of train", [i for i in listed["train"] if i not in named], False),
            ImageRole("test1 gallery", listed["test1"], False),
        ]

    def checks(self) -> list[Check]:
        """Counts by split, ids that no split lists, subsets of the wrong size, reference equal to target."""
        checks: list[Check] = []
        everything: set[str] = set()
        rows: dict[str, list[Entry]] = {}
        for split in SPLITS:
            needed = split != "test1"
            if (ids := attempt(checks, f"{split}: split file", needed, partial(self._listed, split))) is not None:
                everything |= ids.keys()
                checks.append(Check.counted(f"{split}: images listed", len(ids), PUBLISHED_IMAGES[split]))
            if (entries := attempt(checks, f"{split}: captions", needed, partial(self._entries, split))) is not None:
                rows[split] = entries
                checks.append(Check.counted(f"{split}: triplets", len(entries), PUBLISHED_TRIPLETS[split]))
        for split, entries in rows.items():
            faults = partial(_faults, entries, split, everything)
            checks += attempt(checks, f"{split}: captions", split != "test1", faults) or []
        return checks


def _faults(entries: Sequence[Entry], split: str, listed: set[str]) -> list[Check]:
    fields = ("reference",) if split == "test1" else ("reference", "target_hard")
    rows: list[tuple[str, list[str], list[str]]] = []  # place, reference and target, members of the subset
    for entry in entries:
        members = entry.entry("img_set").texts("members") if "img_set" in entry else []
        rows.append((f"entry {entry.where}", [entry.image_id(field) for field in fields], members))
    lost = [f"{place}: {i}" for place, pair, members in rows for i in (*pair, *members) if i not in listed]
    pairs = Counter(entry.number("pairid") for entry in entries)
    wrong = [f"{place}: {len({*m})} members" for place, _, m in rows if {len(m), len({*m})} != {GROUP}]
    outside = [f"{place}: {i}" for place, pair, members in rows for i in pair if i not in members]
    same = [place for place, pair, _ in rows if len(set(pair)) < len(pair)]
    empty = [f"entry {entry.where}" for entry in entries if not entry.text("caption").strip()]
    answered: Level = "note" if split == "test1" else "problem"
    ranked: Level = "problem" if split == "val" else "note"

    return [
        Check.listed(f"{split}: ids in captions that no split lists", lost, answered),
        Check.listed(f"{split}: pair ids that occur twice", [str(n) for n, count in pairs.items() if count > 1]),
        Check.listed(f"{split}: subsets without {GROUP} different members", wrong),
        Check.listed(f"{split}: references or targets outside their subset", outside, ranked),
        Check.listed(f"{split}: reference equal to target", same),
        Check.listed(f"{split}: empty captions", empty),
    ]
