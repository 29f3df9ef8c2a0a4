"""The skip list: images that a person leaves out since they are missing or broken, honoured by everything."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spn4cir.errors import InputError
from spn4cir.files import read_json, write_text
from spn4cir.types import Benchmark, Check, Dataset, ImageRole, Query, Triplet

NAME = "skip_list.json"


def read_skip_list(root: Path | None) -> dict[str, str]:
    """Image id → reason, from a dataset's root; empty if there is no list."""
    path = root and root / NAME
    if path is None or not path.is_file():
        return {}
    listed = read_json(path)
    if not isinstance(listed, dict) or not all(isinstance(reason, str) for reason in listed.values()):
        raise InputError(f"{path}: expected an object of image ids and reasons")
    return listed


def write_skip_list(root: Path, reasons: Mapping[str, str]) -> Path:
    """Write the list into a dataset's root."""
    write_text(root / NAME, json.dumps(dict(sorted(reasons.items())), indent=0) + "\n")
    return root / NAME


class Skipping(Dataset):
    """A dataset without the images of its skip list. Where a benchmark is touched, its id ends in ``+skip``.

    Args:
        whole: the dataset.
        reasons: image id → reason.
    """

    def __init__(self, whole: Dataset, reasons: Mapping[str, str]):
        self.whole, self.reasons = whole, dict(reasons)
        self.root, self.skipped, self.annotated = whole.root, frozenset(reasons), whole.annotated
        self.name, self.protocols = whole.name, whole.protocols  # type: ignore[misc]

    def path(self, image_id: str) -> Path:
        """The picture of an image."""
        return self.whole.path(image_id)

    def file(self, name: str) -> Path:
        """A file that a person names."""
        return self.whole.file(name)

    def label(self, image_id: str) -> str:
        """What to show a person for an image."""
        return self.whole.label(image_id)

    def category(self, image_id: str) -> str:
        """What kind of thing an image shows."""
        return self.whole.category(image_id)

    def caption(self, image_id: str) -> str:
        """A description that came with an image."""
        return self.whole.caption(image_id)

    def training_images(self) -> list[str]:
        """Without skipped ones."""
        return [i for i in self.whole.training_images() if i not in self.skipped]

    def triplets(self) -> list[Triplet]:
        """Without those that name a skipped image."""
        return [t for t in self.whole.triplets() if not {t.reference, t.target} & self.skipped]

    def benchmark(self, split: str, protocol: str | None = None) -> Benchmark:
        """Galleries without skipped images; queries whose reference or all of whose targets are skipped go too."""
        plain = protocol.removesuffix("+skip") if protocol else None
        whole = self.whole.benchmark(split, plain)
        if not self.skipped & set(whole.gallery):
            return whole
        queries = tuple(query for asked in whole.queries if (query := self._query(asked)) is not None)
        return replace(
            whole,
            name=f"{whole.name}+skip",
            gallery=self._kept(whole.gallery),
            group_gallery={group: self._kept(ids) for group, ids in whole.group_gallery.items()},
            queries=queries,
        )

    def _kept(self, ids: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(i for i in ids if i not in self.skipped)

    def _query(self, query: Query) -> Query | None:
        targets = self._kept(query.targets)
        if query.reference in self.skipped or (query.targets and not targets):
            return None
        return replace(query, targets=targets, subset=self._kept(query.subset))

    def notes(self) -> list[str]:
        """What the skip list leaves out."""
        kinds = ", ".join(f"{count} {reason}" for reason, count in Counter(self.reasons.values()).most_common())
        return [
            *self.whole.notes(),
            f"{self.name}: {self.root and self.root / NAME} leaves out {len(self.reasons)} images ({kinds})",
        ]

    def checks(self) -> list[Check]:
        """Those of the whole dataset, and the skip list."""
        return [*self.whole.checks(), Check.listed("images on the skip list", self.reasons, expected=None)]

    def image_roles(self) -> list[ImageRole]:
        """Those of the whole dataset, skipped images included."""
        return self.whole.image_roles()

    def write_submission(
        self, folder: Path, ranked: Mapping[str, Sequence[str]], within: Mapping[str, Sequence[str]]
    ) -> list[Path]:
        """As the whole dataset does: every query must be answered, skipped images or not."""
        return self.whole.write_submission(folder, ranked, within)

    def check_submission(self, path: Path) -> str:
        """As the whole dataset does."""
        return self.whole.check_submission(path)
