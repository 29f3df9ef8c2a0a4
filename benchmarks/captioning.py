"""Captioning in batches against one image at a time, and why the ratio is what it is.

The embedded captioner describes embedded images both ways; the captions must be equal. The time of a caption is the
first pass over image and prompt, and then one step a token. The time of either is a fixed cost, of calls and of
reading the weights, which a batch shares, and a cost of each image, the arithmetic, which it does not: ``finding``
tells them apart from the times of a batch and of one image (T = fixed + batch * each) that ``parts`` holds.

With ``--real-size`` the model has the shape of LLaVA-1.5-7B (CLIP ViT-L/14@336, Llama 7B), random weights in half
precision, random pixels and a fixed number of new tokens: images a second by batch size. torch and transformers are
enough for it.

examples:
  python -m benchmarks.captioning                        # a minute on two cores
  python -m benchmarks.captioning --real-size            # on a CUDA device with 48 GB
  python -m benchmarks.captioning --captioner FOLDER --device cuda
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spn4cir.errors import InputError, run_command
from spn4cir.files import write_text

if TYPE_CHECKING:
    from spn4cir.data_gen.ask import Question
    from spn4cir.data_gen.engines import Local

PROMPT = "please briefly describe the image in 10 words"
BATCHES = (1, 8, 32, 64)
LAYERS, WIDTH = 32, 4096  # of Llama 7B
PATCHES, WORDS = 576, 40  # image tokens of ViT-L/14@336; tokens of a prompt


def clock(device: str) -> float:
    """Seconds, when all that was started on the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(captioner: str, images: int, batch: int, rounds: int) -> dict[str, Any]:
    """Captions of embedded images both ways, in turns.

    Raises:
        AssertionError: if the captions differ.
    """
    from spn4cir.data_gen.ask import Question, Try
    from spn4cir.data_gen.engines import Local
    from spn4cir.datasets.emoji import Emoji

    emoji = Emoji()
    ids = emoji.training_images()
    asked = [Question(i, PROMPT, emoji.image(i)) for i in ids[:: max(1, len(ids) // images)][:images]]
    engine = Local(captioner, images=True, batch_size=batch, max_new_tokens=40)
    ways = {"batched": batch, "one at a time": 1}

    def run(size: int) -> list[str]:
        blocks = [asked[start : start + size] for start in range(0, len(asked), size)]
        return [answer.text for block in blocks for answer in engine.answer(block, Try(0, 0))]

    captions = {way: run(size) for way, size in ways.items()}  # nothing is timed: the first of everything is slow
    same = sum(a == b for a, b in zip(*captions.values(), strict=True))
    exact = engine.device == "cpu"  # in half precision another batch size may round to another word
    assert same == images if exact else same > 0.9 * images, f"{images - same} of {images} captions differ"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in [*ways] * rounds:
        start = clock(engine.device)
        run(ways[way])
        seconds[way].append(clock(engine.device) - start)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {
        "images": images,
        "batch": batch,
        "equal captions": same,
        "seconds": {way: round(taken, 3) for way, taken in medians.items()},
        "images a second": {way: round(images / taken, 1) for way, taken in medians.items()},
        "ratio": round(medians["one at a time"] / medians["batched"], 2),
        "parts": {way: parts(engine, asked[:batch], size) for way, size in ways.items()},
        "captioner": captioner,
        "device": device_name(engine.device),
    }


def parts(engine: "Local", asked: "Sequence[Question]", size: int) -> dict[str, float]:
    """Milliseconds an image: decoding and preparing, the first pass over image and prompt, the steps of one token."""
    from spn4cir.images import open_image

    spent = dict.fromkeys(("prepare", "first pass", "token steps"), 0.0)
    steps = 0
    for start in range(0, len(asked), size):
        block = asked[start : start + size]
        begun = clock(engine.device)
        inputs = engine._process(block, [open_image(q.image) for q in block if q.image])
        prepared = clock(engine.device)
        with first_pass(engine._model, engine.device) as marks:
            out = engine._generate(inputs, None)
        done = clock(engine.device)
        steps += out.shape[1] - 1
        spent["prepare"] += prepared - begun
        spent["first pass"] += marks[0] - prepared
        spent["token steps"] += done - marks[0]
    each = {name: round(1000 * taken / len(asked), 3) for name, taken in spent.items()}
    return {**each, "a token step": round(1000 * spent["token steps"] / max(steps, 1), 3)}


@contextmanager
def first_pass(model: Any, device: str) -> Iterator[list[float]]:
    """The times at which each pass of a model ended; the first is that over image and prompt."""
    marks: list[float] = []
    hook = model.register_forward_hook(lambda *_: marks.append(clock(device)))
    try:
        yield marks
    finally:
        hook.remove()


def random_llava(device: str, dtype: torch.dtype, layers: int = LAYERS, width: int = WIDTH) -> Any:
    """LLaVA-1.5 of random weights, made on the device; 7B unless told otherwise.

    Source: Liu et al., "Improved baselines with visual instruction tuning", CVPR 2024; sizes as in its configuration.
    """
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=min(24, layers), num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=width // 128, max_position_embeddings=4096, head_dim=128,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=PATCHES)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval()


def real_size(device: str, tokens: int, batches: Sequence[int], rounds: int, size: tuple[int, int]) -> dict[str, Any]:
    """Images a second of a model of LLaVA-1.5's shape by batch size, and how long its first pass and a step take."""
    dtype = torch.float16 if device != "cpu" else torch.float32
    layers, width = size
    model = random_llava(device, dtype, layers, width)
    found: dict[str, Any] = {}
    for batch in batches:
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        inputs = made_inputs(batch, device, dtype)
        generate(model, inputs, 2)  # the first of everything is slow
        taken, firsts = [], []
        for _ in range(rounds):
            start = clock(device)
            with first_pass(model, device) as marks:
                out = generate(model, inputs, tokens)
            taken.append(clock(device) - start)
            firsts.append(marks[0] - start)
            assert out.shape[1] - inputs["input_ids"].shape[1] == tokens == len(marks)
        seconds, first = statistics.median(taken), statistics.median(firsts)
        found[str(batch)] = {
            "images a second": round(batch / seconds, 2),
            "seconds": round(seconds, 4),
            "first pass, milliseconds an image": round(1000 * first / batch, 2),
            "token step, milliseconds": round(1000 * (seconds - first) / (tokens - 1), 2),
            "peak GiB": None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }
    smallest, largest = found[str(batches[0])], max(found.values(), key=lambda one: one["images a second"])
    weights = sum(p.numel() for p in model.parameters())
    return {
        "what": f"random weights, {layers} layers of {width}; {PATCHES} image, {WORDS} text, {tokens} new tokens",
        "parameters": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "by batch": found,
        "ratio of the best to the first": round(largest["images a second"] / smallest["images a second"], 2),
        "device": device_name(device),
    }


def made_inputs(batch: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random pixels, and a prompt of random words behind the image's tokens."""
    chance = torch.Generator().manual_seed(0)
    words = torch.randint(3, 31000, (batch, WORDS), generator=chance)
    ids = torch.cat([torch.full((batch, PATCHES), 32000), words], dim=1).to(device)  # (B, 616)
    pixels = torch.randn(batch, 3, 336, 336, generator=chance).to(device, dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Exactly so many new tokens, greedy."""
    with torch.inference_mode():
        out: torch.Tensor = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return out


def device_name(device: str) -> str:
    """What computes: a GPU's name, or the CPU and how many threads of it."""
    return f"CPU, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()


def finding(found: dict[str, Any]) -> str:
    """Why the ratio is what it is, from the parts."""
    alone, together, size = found["parts"]["one at a time"], found["parts"]["batched"], found["batch"]
    gains = {name: alone[name] - together[name] for name in ("prepare", "first pass", "token steps")}
    shares = ", ".join(f"{name} {100 * gain / sum(gains.values()):.0f}%" for name, gain in gains.items())
    told = [f"what a batch of {size} saves falls on: {shares}"]
    for name, one, all_of_them in (
        ("first pass", alone["first pass"], size * together["first pass"]),
        ("token step", alone["a token step"], together["a token step"]),
    ):
        each = (all_of_them - one) / max(size - 1, 1)
        told.append(
            f"a {name} takes {one:.1f} ms for one image and {all_of_them:.1f} for {size}: {one - each:.1f} fixed, "
            f"shared by a batch, and {each:.2f} for each image"
        )
    return "; ".join(told)


def commit() -> str | None:
    """The commit; unknown on a machine that has not all of the project's dependencies."""
    try:
        from spn4cir.results import git_commit
    except ImportError:
        return None
    return git_commit()


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.captioning",
        description=(__doc__ or "").partition("\n\nexamples:")[0],
        epilog="examples:" + (__doc__ or "").partition("examples:")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--captioner", default="embedded", help="embedded, or a name or folder of transformers")
    parser.add_argument("--images", type=int, default=128, help="embedded images (default: 128)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is run (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--real-size", action="store_true", help="a model of LLaVA-1.5-7B's shape and random weights")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of --real-size (default: 1 8 32 64)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of --real-size (default: 24)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of --real-size, to try it without a GPU")
    parser.add_argument("--width", type=int, default=WIDTH, help="of --real-size, a multiple of 128")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    args = parser.parse_args()
    for name in ("images", "batch", "rounds", "layers"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: the folder {args.json.parent} is missing")
    return args


def main() -> None:
    """Measure, print a line for people and one line of JSON."""
    args = arguments()
    if args.device:
        os.environ["ACCELERATE_USE_CPU"] = "1" if args.device == "cpu" else ""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device")
    if args.real_size:
        found = real_size(device, args.new_tokens, args.batches, args.rounds, (args.layers, args.width))
        speeds = {size: one["images a second"] for size, one in found["by batch"].items()}
        told = "; ".join(f"batch {size}: {speed} images a second" for size, speed in speeds.items())
        command = "python -m benchmarks.captioning --real-size"
    else:
        found = measure(args.captioner, args.images, args.batch, args.rounds)
        found["finding"] = finding(found)
        told = (
            f"{found['equal captions']} captions are equal, batches {found['ratio']} times as fast: {found['finding']}"
        )
        command = f"python -m benchmarks.captioning --images {args.images} --batch {args.batch} --rounds {args.rounds}"
    about = {"benchmark": "captioning", "command": command}
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    report = {**about, **found, **machine, "threads": torch.get_num_threads(), "git": commit()}
    print(told)
    print(json.dumps(report))
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
