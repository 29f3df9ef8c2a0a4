"""Step 2: caption each unique image with a multimodal LLM.

examples:
  python data_gen/caption.py --dataset emoji
  python data_gen/caption.py --dataset emoji --captioner llava-hf/llava-1.5-7b-hf --words 8
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.deduplicate import canonical_images
from data_gen.files import Appender, digest, is_done, mark_done, read_jsonl, weights_digest, write_jsonl
from data_gen.settings import GenerateConfig, command
from spn4cir.errors import InputError
from spn4cir.types import Dataset

if TYPE_CHECKING:
    from PIL import Image

EMBEDDED = Path(__file__).parent.parent / "spn4cir" / "embedded" / "llava"


class Captioner:
    """A multimodal LLM of transformers that answers one prompt about an image.

    Args:
        model: ``embedded``, a hub name or a folder.
        prompt: the question.
        max_new_tokens: bound of an answer.

    Raises:
        InputError: if there is no such model.
    """

    def __init__(self, model: str, prompt: str, max_new_tokens: int):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        name = str(EMBEDDED) if model == "embedded" else model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        try:
            self.processor: Any = AutoProcessor.from_pretrained(name)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"captioner {model!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self.processor.tokenizer.padding_side = "left"  # answers must follow their prompts directly
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        self.text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        self.max_new_tokens = max_new_tokens

    def __call__(self, pictures: "list[Image.Image]") -> list[str]:
        """B RGB images → B captions; greedy, so the same images give the same captions."""
        import torch

        inputs = self.processor(text=[self.text] * len(pictures), images=pictures, return_tensors="pt", padding=True)
        inputs = inputs.to(self.device, dtype=self.model.dtype)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answers = out[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in self.processor.batch_decode(answers, skip_special_tokens=True)]


def caption(config: GenerateConfig, dataset: Dataset) -> None:
    """Write captions.jsonl: one row per unique image. A batch is the unit of commit; a killed run goes on after it."""
    from tqdm import tqdm

    from spn4cir.images import open_image

    out, ids = config.file("captions.jsonl"), canonical_images(config)
    prompt = config.prompt.replace("{words}", str(config.words))
    settings = {"captioner": config.captioner, "prompt": prompt, "max_new_tokens": config.max_new_tokens}
    weights = weights_digest(EMBEDDED if config.captioner == "embedded" else Path(config.captioner))
    made_by = digest({"step": "caption", "weights": weights, **settings}, config.file("images.jsonl"))
    if is_done(out, made_by):
        print(f"caption: {out} is done")
        return
    partial = config.file(f"captions.{made_by}.partial.jsonl")
    known = {row["image_id"]: row["caption"] for row in read_jsonl(partial)} if partial.is_file() else {}
    captioner, file = Captioner(config.captioner, prompt, config.max_new_tokens), Appender(partial)
    bar = tqdm(total=len(ids), desc="caption", unit="image")
    for start in range(0, len(ids), config.caption_batch_size):
        batch = ids[start : start + config.caption_batch_size]
        if known.keys() >= set(batch):
            bar.update(len(batch))
            continue  # a torn batch is done again as a whole: bits may depend on what is captioned together
        answers = captioner([open_image(dataset.path(i)) for i in batch])
        known |= dict(zip(batch, answers, strict=True))
        file.add({"image_id": i, "caption": text} for i, text in zip(batch, answers, strict=True))
        bar.update(len(batch))
    bar.close()
    file.close()
    empty = [i for i in ids if not known[i].strip()]
    write_jsonl(out, ({"image_id": i, "caption": known[i], "made_by": made_by} for i in ids if known[i].strip()))
    mark_done(out, made_by, **settings, captions=len(ids) - len(empty), empty=empty)
    partial.unlink()
    print(f"caption: {len(ids) - len(empty)} captions, {len(empty)} empty → {out}")


if __name__ == "__main__":
    command(caption, __doc__)
