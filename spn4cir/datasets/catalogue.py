"""A catalogue of one's own: images without any triplet."""

from spn4cir.datasets.own import OwnImages
from spn4cir.types import Triplet


class Catalogue(OwnImages):
    """Pictures in a folder, whose ids are their paths below it; or a table of such paths, or of the images themselves.

    In a folder, the first folder of a path is the category, and ``captions.csv`` (or .jsonl; columns image and caption)
    or the first line of ``shoes/a.txt`` beside ``shoes/a.png`` describes a picture. A table (CSV, TSV, JSONL, Parquet,
    tar of the webdataset format, folder of ``save_to_disk``, hub name) has a column image, and may have image_id,
    caption, category, title and a crop box; paths start from its own folder. A folder that holds a table called
    ``catalogue`` or ``metadata`` is read by it. Queries, if there are any, are in ``queries.csv``.
    """

    name = "catalogue"
    has_triplets = False

    def read_triplets(self) -> list[Triplet]:
        """None: nobody annotated any."""
        return []
