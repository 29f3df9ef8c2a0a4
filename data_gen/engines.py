"""Engines that answer questions: a model on this machine, or (in ``data_gen.endpoint``) a server."""

import hashlib
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spn4cir.data_gen.ask import Answer, Engine, Question, Try
from spn4cir.data_gen.steps import EMBEDDED, GenerateConfig, digest
from spn4cir.distributed import own_device
from spn4cir.errors import InputError
from spn4cir.files import refuse_special_file
from spn4cir.types import ImageRef

DRAWN = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}  # asked again, greedy would say the same


def engine_of(model: str, endpoint: str | None, config: GenerateConfig, *, images: bool, max_new_tokens: int) -> Engine:
    """The engine of ``model``: ``embedded``, a name or folder of transformers, or a name on the server at ``endpoint``.

    ``images`` says whether the questions have images. Nothing is loaded or sent yet.
    """
    if endpoint is not None:
        from spn4cir.data_gen.endpoint import Endpoint

        return Endpoint(endpoint, model, config, max_new_tokens)
    return Local(model, images=images, batch_size=config.caption_batch_size, max_new_tokens=max_new_tokens)


def weights_digest(folder: Path) -> str | None:
    """A short name for the weights in a model folder, by names, sizes and ends of files; None if it is no folder."""
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(f"{path.name}{path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(path.stat().st_size - (1 << 20), 0))
            total.update(file.read())
    return total.hexdigest()[:16]


class Local(Engine):
    """A language model of transformers on this process's device; one batch is one block. As for ``engine_of``."""

    workers = 2  # one batch is decoded while the model is busy with another

    def __init__(self, model: str, *, images: bool, batch_size: int, max_new_tokens: int):
        self.name, self.images, self.block, self.max_new_tokens = model, images, batch_size, max_new_tokens
        folder = EMBEDDED / "llava" if model == "embedded" else Path(model)
        weights = weights_digest(folder)
        self.source, self.device = str(folder) if weights else model, own_device()
        self.about: dict[str, Any] = {
            "model": folder.name if weights else model,
            "weights": weights,
            "files": digest({}, *sorted([*folder.glob("*.json"), *folder.glob("*.jinja")])) if weights else None,
            "dtype": "float32" if self.device == "cpu" else "half",
            "max_new_tokens": max_new_tokens,
        }
        self._busy, self._preparing = threading.Lock(), threading.Lock()
        self._model: Any = None

    def look(self) -> None:
        """Raises ``InputError`` if there is no such model."""
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise self._unknown(error) from None

    def _unknown(self, error: Exception) -> InputError:
        said = " ".join(str(error).split())[:200]
        hub = "one of the hub (`hf download NAME` fetches it where there is a network)"
        return InputError(f"model {self.name!r} cannot be loaded: name a folder that holds one, or {hub}; {said}")

    def _load(self) -> None:
        """Load the model once. Raises ``InputError`` for one that cannot do what is asked."""
        if self._model is not None:
            return
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        kind = AutoModelForImageTextToText if self.images else AutoModelForCausalLM
        try:
            self._processor: Any = (AutoProcessor if self.images else AutoTokenizer).from_pretrained(self.source)
            model, info = kind.from_pretrained(self.source, dtype=self._dtype(), output_loading_info=True)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
            raise self._unknown(error) from None
        if info["missing_keys"]:
            raise InputError(f"model {self.name!r} lacks weights, such as {sorted(info['missing_keys'])[0]}")
        self._tokenizer: Any = getattr(self._processor, "tokenizer", self._processor)
        if not (getattr(self._processor, "chat_template", None) or self._tokenizer.chat_template):
            raise InputError(f"model {self.name!r} has no chat template: take one that was trained to answer")
        self._tokenizer.padding_side = "left"  # answers must follow their prompts directly
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._model = model.to(self.device).eval()

    def _dtype(self) -> Any:
        """Half precision on a CUDA device, in the kind that the model was trained in; single on a CPU."""
        import torch
        from transformers import AutoConfig

        if self.device == "cpu":
            return torch.float32
        trained = AutoConfig.from_pretrained(self.source).dtype
        brain = trained == torch.bfloat16 and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if brain else torch.float16

    def lengths(self, questions: Sequence[Question]) -> list[int] | None:
        """Areas of images, if larger ones make more tokens; else letters of the prompts, if they vary."""
        from PIL import Image

        with self._preparing:
            self._load()
            sizes = ((64, 64), (512, 512), (2048, 512)) if self.images else ()
            tokens = {self._process(questions[:1], [Image.new("RGB", s)])["input_ids"].shape[1] for s in sizes}
        if len(tokens) > 1:
            return [_area(question.image) for question in questions]
        letters = [sum(len(message["content"]) for message in question.chat) for question in questions]
        return letters if len(set(letters)) > 1 else None

    def _process(self, questions: Sequence[Question], pictures: list[Any]) -> Any:
        """Chats → what the model takes, padded on the left."""
        chats = [_with_image(q.chat) if self.images else q.chat for q in questions]
        texts = [self._processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        begins = self._tokenizer.bos_token and texts[0].startswith(self._tokenizer.bos_token)
        options = {"return_tensors": "pt", "padding": True, "add_special_tokens": not begins}
        if self.images:
            return self._processor(text=texts, images=[[picture] for picture in pictures], **options)
        return self._processor(texts, **options)

    def answer(self, questions: Sequence[Question], turn: Try) -> list[Answer]:
        """One batch, decoded and prepared in the caller's thread, while the model may be busy with another's."""
        from spn4cir.images import open_image

        pictures = [open_image(question.image) for question in questions if question.image]
        with self._preparing:  # a tokenizer is not made for two threads at once
            self._load()
            inputs = self._process(questions, pictures)
        with self._busy:
            out = self._generate(inputs, _seed(questions, turn) if turn.number else None)  # (B, T)
        with self._preparing:
            texts = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        ends = self._ends()
        cut = [out.shape[1] >= self.max_new_tokens and not ends & set(row) for row in out.tolist()]
        return [Answer(text.strip(), one) for text, one in zip(texts, cut, strict=True)]

    def _generate(self, inputs: Any, seed: int | None) -> Any:
        """(B, T) new tokens; greedy without a seed."""
        import torch

        how = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "pad_token_id": self._tokenizer.pad_token_id}
        how |= {"do_sample": False} if seed is None else DRAWN
        with torch.inference_mode(), torch.random.fork_rng([] if self.device == "cpu" else [self.device]):
            torch.manual_seed(seed or 0)
            try:
                inputs = inputs.to(self.device)
                inputs = {k: v.to(self._model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
                out = self._model.generate(**inputs, **how)
            except torch.OutOfMemoryError:
                told = f"{self.device} has no room for a batch of {self.block}"
                raise InputError(f"{told}: lower caption_batch_size") from None
        return out[:, inputs["input_ids"].shape[1] :].cpu()

    def _ends(self) -> set[int]:
        end = self._model.generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}


def _with_image(chat: list[dict[str, str]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    parts[-1]["content"].insert(0, {"type": "image"})
    return parts


def _area(image: ImageRef | None) -> int:
    """Pixels of an image, from the head of its file; 0 if it cannot be read: decoding it will tell why."""
    from PIL import Image

    from spn4cir.images import read_content

    if image is None:
        return 0
    try:
        if image.path:
            refuse_special_file(image.path)
        with Image.open(image.path or io.BytesIO(read_content(image))) as picture:
            return picture.width * picture.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0


def _seed(questions: Sequence[Question], turn: Try) -> int:
    named = repr((turn.seed, turn.number, [question.key for question in questions]))
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:6], "big")
