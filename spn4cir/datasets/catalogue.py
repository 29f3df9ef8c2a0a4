"""A catalogue of one's own: images without any triplet."""

from spn4cir.dataset import ImageRole
from spn4cir.datasets.own import OwnImages
from spn4cir.types import Triplet


class Catalogue(OwnImages):
    """Pictures in a folder, whose ids are their paths below it; or a table of paths or images: see docs/datasets.md.

    In a folder, the first folder of a path is the category, and ``captions.csv`` (or .jsonl; columns image and caption)
    or the first line of ``shoes/a.txt`` beside ``shoes/a.png`` describes a picture. A folder that holds a table called
    ``catalogue`` or ``metadata`` is read by it. Queries, if there are any, are in ``queries.csv``.
    """

    name = "catalogue"
    has_triplets = False

    def image_roles(self) -> list[ImageRole]:
        """As for any dataset; but training does without the broken ones, which no generated triplet names."""
        return [role._replace(needed=number > 0) for number, role in enumerate(super().image_roles())]

    def read_triplets(self) -> list[Triplet]:
        """None: nobody annotated any."""
        return []
