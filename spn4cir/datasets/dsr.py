"""DSR: 10,000 photographs with freehand sketches, cartoons, low resolution and captions.

Source: Li et al., "FreestyleRet: Retrieving Images from Style-Diversified Queries", ECCV 2024. Its licence is unclear:
the repository says CC-BY-NC-4.0, the page of the data Apache-2.0.
"""

from typing import ClassVar

from spn4cir.datasets.style_folders import StyleFolders


class DSR(StyleFolders):
    """The published data, unpacked: by default in data/dsr. A twentieth of its 8,000 training photographs is val."""

    name = "dsr"
    as_published = True
    aliases: ClassVar = ("DSR", "FreeStyleRet-DSR")
    published: ClassVar = {"train": 7600, "val": 400, "test": 2000}
    source: ClassVar = (
        "the zip Curise/FreeStyleRet-DSR on Hugging Face (licence unclear: the repository says CC-BY-NC-4.0, the page "
        "Apache-2.0)"
    )
