"""Datasets by name. A new one is one file here, one line in ``DATASETS`` and one test."""

from collections.abc import Callable

from spn4cir.dataset import Dataset
from spn4cir.datasets.catalogue import Catalogue
from spn4cir.datasets.cirr import CIRR
from spn4cir.datasets.dsr import DSR
from spn4cir.datasets.emoji import Emoji
from spn4cir.datasets.fashioniq import FashionIQ
from spn4cir.datasets.generated import with_images
from spn4cir.datasets.labelled import Labelled
from spn4cir.datasets.labelled_pairs import LabelledPairs
from spn4cir.datasets.pairs import Pairs
from spn4cir.datasets.skip import read_skip_list
from spn4cir.datasets.styles import Styles
from spn4cir.errors import InputError

DATASETS: dict[str, Callable[[str | None], Dataset]] = {
    "emoji": Emoji,
    "fashioniq": FashionIQ,
    "cirr": CIRR,
    "catalogue": Catalogue,
    "pairs": Pairs,
    "styles": Styles,
    "dsr": DSR,
    "labelled": Labelled,
    "labelled_pairs": LabelledPairs,
}


def load_dataset(name: str, root: str | None = None) -> Dataset:
    """The dataset of that name without skipped images. Raises ``InputError`` for an unknown name or missing files."""
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; known: {', '.join(DATASETS)}")
    dataset = DATASETS[name](root)
    dataset.data_root = root
    dataset.skip_reasons = read_skip_list(dataset.root)
    return dataset


def open_extra_images(dataset: Dataset, place: str) -> tuple[Dataset, list[str]]:
    """Add the pictures of a folder or a table to a dataset, as further negatives; return it and the pictures' ids.

    Ids do not say where the pictures lie, so a bank is the same wherever that is. Raises ``InputError`` without any.
    """
    try:
        pictures = load_dataset(Catalogue.name, place)
        images = {f"bank.extra:{image_id}": pictures.image(image_id) for image_id in pictures.training_images()}
    except InputError as error:
        raise InputError(f"bank.extra: {str(error).replace('--data-root', '--bank.extra')}") from None
    return with_images(dataset, images, pictures.check_command("")), list(images)
