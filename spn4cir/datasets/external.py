"""Datasets that people bring themselves: what is expected where, and where it comes from."""

import os
from dataclasses import dataclass
from pathlib import Path

from spn4cir.errors import InputError


@dataclass(frozen=True)
class External:
    """Files of a dataset below its root, and their source."""

    name: str
    files: tuple[str, ...]
    source: str

    def root(self, given: str | None) -> Path:
        """``given``, else SPN4CIR_DATA/<name>, else data/<name>."""
        return Path(given) if given else Path(os.environ.get("SPN4CIR_DATA", "data")) / self.name

    def refuse(self, given: str | None) -> InputError:
        """One line that says what is missing and where to get it; or that this version cannot read what is there."""
        root = self.root(given)
        missing = [name for name in self.files if not (root / name).exists()]
        if missing:
            return InputError(
                f"{self.name}: {root} lacks {', '.join(missing)}, from {self.source}; this version reads only emoji yet"
            )
        return InputError(f"{self.name}: found in {root}, but this version reads only the embedded dataset emoji yet")


EXTERNAL = {
    "fashioniq": External(
        "fashioniq",
        ("captions/cap.dress.train.json", "image_splits/split.dress.train.json", "images"),
        "github.com/XiaoxiaoGuo/fashion-iq (annotations; its README says how to fetch the images)",
    ),
    "cirr": External(
        "cirr",
        ("cirr/captions/cap.rc2.train.json", "cirr/image_splits/split.rc2.train.json", "train"),
        "github.com/Cuberick-Orion/CIRR (annotations, branch cirr_dataset; images are those of NLVR2, on request)",
    ),
}
