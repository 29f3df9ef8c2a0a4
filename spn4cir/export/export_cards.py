"""Model cards of exported folders: how each form is used, and the fingerprints of the files that lie there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spn4cir.files import write_text
from spn4cir.model_card import CARD, CardForm, query_arguments, render_card

ONNX_USE = """This needs onnxruntime, tokenizers, Pillow and NumPy, and neither torch nor spn4cir. `FOLDER` is this
folder:

```python
import sys

sys.path.insert(0, "FOLDER")  # it holds search_onnx.py
from search_onnx import OnnxModel

model = OnnxModel("FOLDER")
gallery = model.embed_images(["a.png", "b.png"])  # (2, K, E)
query = model.embed_queries({query})  # (1, E)
scores = (gallery @ query.T).max(1).T  # (1, 2)
```"""
SENTENCE_TRANSFORMERS_USE = """This needs spn4cir installed beside sentence-transformers; `FOLDER` is this folder:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=True)
gallery = model.encode_document(["a.png", "b.png"])  # (2, E)
query = model.encode_query([{query}])  # (1, E)
scores = model.similarity(query, gallery)  # (1, 2)
```"""


def write_onnx_card(run: Path, folder: Path) -> None:
    """Write the card of a run's ONNX export. Raises ``InputError`` as ``render_card`` does."""
    files = [*sorted(folder.glob("*.onnx*")), *sorted(folder.glob("tokenizer.json"))]
    use = ONNX_USE.replace("{query}", query_arguments(_read_about(run)))
    write_text(folder / CARD, render_card(run, CardForm("onnx", use, files)))


def write_sentence_transformers_card(run: Path, folder: Path) -> None:
    """Write the card of a run's sentence-transformers export. Raises ``InputError`` as ``render_card`` does."""
    arguments = query_arguments(_read_about(run))
    query = '"a red heart"' if arguments.startswith("texts") else '{"image": "a.png", "text": "but in red"}'
    if "," not in arguments and not arguments.startswith("texts"):
        query = '"a.png"'
    form = CardForm(
        "sentence-transformers", SENTENCE_TRANSFORMERS_USE.replace("{query}", query), [folder / "model.safetensors"]
    )
    write_text(folder / CARD, render_card(run, form))


def _read_about(run: Path) -> Mapping[str, Any]:
    """Backbone and stage of a run."""
    return {"stage": None, **json.loads((run / "model.json").read_text(encoding="utf-8"))}
