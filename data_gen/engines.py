"""Engines that answer questions: a model on this machine, or (in ``data_gen.endpoint``) a server."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_gen.ask import Answer, Engine, Question, Try
from data_gen.files import digest, weights_digest
from data_gen.settings import GenerateConfig
from spn4cir.errors import InputError

EMBEDDED = Path(__file__).parent.parent / "spn4cir" / "embedded" / "llava"
TEMPERATURE = 0.7  # of an answer that is asked for again: greedy would say the same


def engine_of(
    model: str, endpoint: str | None, config: GenerateConfig, *, images: bool, max_new_tokens: int
) -> Engine:
    """The engine that a configuration means; nothing is loaded or sent yet.

    Args:
        model: ``embedded``, a name or folder of transformers, or the model's name on the server.
        endpoint: address of an OpenAI-compatible server, if it is one.
        config: batch size, and how a server is asked.
        images: whether the questions have images.
        max_new_tokens: bound of an answer.
    """
    if endpoint is not None:
        from data_gen.endpoint import Endpoint

        return Endpoint(endpoint, model, config, max_new_tokens)
    return Local(model, images=images, batch_size=config.caption_batch_size, max_new_tokens=max_new_tokens)


class Local:
    """A language model of transformers on this process's device; one batch is one block.

    Args:
        model: ``embedded``, a hub name or a folder.
        images: whether it looks at images, or only reads.
        batch_size: questions answered at once.
        max_new_tokens: bound of an answer.
    """

    workers = 2  # one batch is decoded while the model is busy with another

    def __init__(self, model: str, *, images: bool, batch_size: int, max_new_tokens: int):
        self.model_name, self.images, self.block = model, images, batch_size
        self.max_new_tokens = max_new_tokens
        self.folder = EMBEDDED if model == "embedded" else Path(model)
        self.device = own_device()
        self.about: dict[str, Any] = {
            "model": model,
            "weights": weights_digest(self.folder),
            "files": digest({}, *sorted([*self.folder.glob("*.json"), *self.folder.glob("*.jinja")])),
            "dtype": "float32" if self.device == "cpu" else "half",
            "max_new_tokens": max_new_tokens,
        }
        self._busy, self._loaded = threading.Lock(), False
