"""Train the embedded captioner: a tiny LLaVA that names the train images of the ``emoji`` dataset.

It learns from nine tenths of the train images and their Unicode names (val and test targets are never seen), and the
result runs through exactly the code that runs LLaVA-1.5. Writes weights, processor and ``quality.json``::

    python -m benchmarks.embedded.make_llava --epochs 110 --stop-after 80
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.embedded.make_emoji import image_path
from spn4cir.datasets.emoji import FOLDER
from spn4cir.datasets.emoji_names import TONE, load_names
from spn4cir.images import open_image

WEIGHTS = FOLDER.parent / "llava"
SIZE, PATCH, WIDTH, SHIFT = 64, 16, 192, 2
PROMPTS = [
    "please briefly describe the image in {k} words",
    "please briefly describe the picture in {k} words",
    "briefly describe the image in {k} words",
    "describe the image briefly in {k} words",
    "what is in the image? answer in {k} words",
    "name what you see in {k} words",
]
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the names and the prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [f"USER: \n{p.format(k=k)} ASSISTANT: " for p in PROMPTS for k in range(3, 21)]
    tokenizer.train_from_iterator([" " + name for name in names] + prompts * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A tiny LLaVA with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Image processor, tokenizer and chat template of the tiny LLaVA."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def prompt_text(processor: LlavaProcessor, prompt: str) -> str:
    """What a prompt about an image looks like in the chat template."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def training_batch(
    processor: LlavaProcessor, pixels: Tensor, names: list[str], rng: random.Random
) -> dict[str, Tensor]:
    """Prompt and answer joined, right padded, with a loss on the answer only; pixels shifted by up to two pixels."""
    tokenizer = processor.tokenizer
    image_tokens = "<image>" * ((SIZE // PATCH) ** 2)
    rows, labels = [], []
    for name in names:
        prompt = rng.choice(PROMPTS).format(k=rng.randint(3, 20))
        text = prompt_text(processor, prompt).replace("<image>", image_tokens)
        question = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + name, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(question + answer)
        labels.append([-100] * len(question) + answer)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    dx, dy = rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)
    shifted = torch.roll(pixels, (dy, dx), (2, 3))
    return {"input_ids": ids, "attention_mask": mask, "labels": targets, "pixel_values": shifted}


def answer_loss(model: LlavaForConditionalGeneration, labels: Tensor, **inputs: Tensor) -> Tensor:
    """The model's own loss, with the vocabulary's scores computed where there is an answer and nowhere else."""
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    asked = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]), labels[:, 1:][asked])


@torch.no_grad()
def captions(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pixels: Tensor) -> list[str]:
    """Greedy names of a stack of images, by the default prompt."""
    model.eval()
    text = prompt_text(processor, PROMPTS[0].format(k=10)).replace("<image>", "<image>" * ((SIZE // PATCH) ** 2))
    ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    answers = []
    for chunk in pixels.split(128):
        prompt = ids.expand(len(chunk), -1)
        out: Any = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=chunk,
            max_new_tokens=32,
            do_sample=False,
        )
        answers += processor.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def exact(answers: list[str], names: list[str]) -> float:
    """Percentage of answers that are the name, to the letter."""
    return round(100 * sum(a == n for a, n in zip(answers, names, strict=True)) / max(len(names), 1), 2)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=110, help="length of the learning-rate schedule")
    parser.add_argument("--stop-after", type=int, help="stop after so many of these epochs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    all_names = load_names()
    ids = json.loads((FOLDER / "images.json").read_text())["train"]
    held_out = sorted(rng.sample(ids, len(ids) // 10))
    trained = sorted(set(ids) - set(held_out))

    tokenizer = build_tokenizer([all_names[i] for i in trained])
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")

    def pixels_of(images: list[str]) -> Tensor:
        pictures = [open_image(image_path(i)) for i in images]
        values: Tensor = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return values

    pixels, names = pixels_of(trained), [all_names[i] for i in trained]
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    per_epoch = len(trained) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=per_epoch * args.epochs, pct_start=0.05
    )
    started = time.time()
    last = args.stop_after or args.epochs
    for epoch in range(last):
        model.train()
        order = torch.randperm(len(trained))
        total = 0.0
        for step in tqdm(range(per_epoch), desc=f"epoch {epoch + 1}/{last}", mininterval=30):
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = training_batch(processor, pixels[rows], [names[i] for i in rows.tolist()], rng)
            loss = answer_loss(model, **batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / per_epoch:.4f}, {time.time() - started:.0f} s", flush=True)
        if (epoch + 1) % 20 == 0 or epoch + 1 == last:
            sample = rng.sample(range(len(trained)), 256)
            seen = exact(captions(model, processor, pixels[sample]), [names[i] for i in sample])
            unseen = exact(captions(model, processor, pixels_of(held_out)), [all_names[i] for i in held_out])
            print(f"  exact: {seen} on 256 trained, {unseen} held out", flush=True)
            model.half().save_pretrained(args.output)
            model.float()
            processor.save_pretrained(args.output)

    command = f"--epochs {args.epochs} --stop-after {last} --seed {args.seed}"
    write_quality(args.output, command, round((time.time() - started) / 60, 1), trained, held_out, all_names)


def write_quality(
    folder: Path, command: str, minutes: float, trained: list[str], held_out: list[str], names: dict[str, str]
) -> None:
    """Measure the saved model and write quality.json."""
    bases = {TONE.sub("", names[i]) for i in trained}
    combinations = [i for i in held_out if TONE.search(names[i]) and TONE.sub("", names[i]) in bases]
    report = {
        "what": "images whose whole name is generated exactly, in percent; weights in half precision, run in single",
        "command": f"python -m benchmarks.embedded.make_llava {command}",
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "exact_match": {
            "trained": measure(folder, trained, names),
            "held_out": measure(folder, held_out, names),
            "held_out_skin_tones_of_seen_images": measure(folder, combinations, names),
        },
        "held_out_ids": held_out,
    }
    (folder / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["exact_match"], indent=1))


def measure(folder: Path, ids: list[str], names: dict[str, str]) -> dict[str, float]:
    """Exact match of the saved model, loaded again and run in float32."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(folder)
    pictures = [open_image(image_path(i)) for i in ids]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return {"images": len(ids), "percent": exact(captions(model, processor, pixels), [names[i] for i in ids])}


if __name__ == "__main__":
    main()
