"""Photographs drawn in other styles by ``data_gen/stylize.py``."""

from typing import ClassVar

from spn4cir.datasets.style_folders import StyleFolders


class Styles(StyleFolders):
    """A folder that ``data_gen/stylize.py`` has filled: by default data/styles, with the embedded emoji."""

    name = "styles"
    source: ClassVar = "python data_gen/stylize.py, which goes on where it was stopped"
