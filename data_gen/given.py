"""Captions that nobody has to make: of a file, or those that came with the dataset."""

from collections.abc import Iterable, Sequence

from spn4cir.data_gen.answers import tidy
from spn4cir.data_gen.steps import GenerateConfig
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.files import short


def known_captions(config: GenerateConfig, dataset: Dataset, ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Image id → captions, each on one line, of those of these images that have any: in ``--captions`` if that is set.

    Raises ``InputError`` if the file cannot be read.
    """
    if config.captions:
        from spn4cir.datasets.captions import load_captions, match_captions
        from spn4cir.datasets.table_settings import split_place

        name, settings = split_place(config.captions)
        path = dataset.file(name)
        found, _ = match_captions(path, load_captions(path, settings), ids)
    else:
        found = {image_id: dataset.captions(image_id) for image_id in ids}
    tidied = {image_id: tuple(filter(None, map(tidy, texts))) for image_id, texts in found.items()}
    return {image_id: texts for image_id, texts in tidied.items() if texts}


def check_known(config: GenerateConfig, dataset: Dataset, ids: Sequence[str], known: Iterable[str]) -> None:
    """Raise ``InputError`` for an image that ``--captions`` lacks, if it should describe all."""
    if config.captions and config.without_caption == "ask":
        there = set(known)
        if missing := [i for i in ids if i not in there]:
            such = f"{len(missing)} of {len(ids)} images, the first being {short(missing[0])}"
            advice = "add them, leave --captions out, or give --without-caption skip"
            raise InputError(f"{config.captions} lacks captions of {such}: {advice}")
