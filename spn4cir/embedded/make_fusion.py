"""Train the embedded BLIP and BLIP-2 on the train images of the ``emoji`` dataset and their names.

They see images and names, never a triplet, and no val or test target. Writes a folder of transformers (configuration,
tokenizer, half-precision weights) and ``quality.json``::

    python -m spn4cir.embedded.make_fusion --backbone blip4cir --epochs 50
    python -m spn4cir.embedded.make_fusion --backbone sprc --epochs 50
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spn4cir.embedded.make_emoji import HERE as EMOJI
from spn4cir.embedded.make_emoji import load_names

HERE = Path(__file__).parent
WIDTH = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 1500
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 6, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6, "initializer_range": 0.02,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
    "encoder_hidden_size": WIDTH, "max_position_embeddings": 64, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
}  # fmt: skip
FOLDERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "blip4cir": ("blip", ["[DEC]", "[ENC]"], {
        "model_type": "blip", "architectures": ["BlipForImageTextRetrieval"], "image_text_hidden_size": WIDTH,
        "vision_config": VISION, "text_config": TEXT | {"sep_token_id": 3},
    }),
    "sprc": ("blip2", ["[DEC]"], {
        "model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"], "image_text_hidden_size": WIDTH // 2,
        "num_query_tokens": 8, "vision_config": VISION,
        "qformer_config": TEXT | {"cross_attention_frequency": 2, "use_qformer_text_input": True},
    }),
}  # fmt: skip
"""By backbone: its folder, the special tokens that it appends to BERT's, and its configuration."""


def train_names() -> dict[str, str]:
    """Train image → name."""
    names = load_names()
    return {i: names[i] for i in json.loads((EMOJI / "images.json").read_text(encoding="utf-8"))["train"]}


def _wordpiece(vocabulary: list[tuple[str, int]] | None) -> Tokenizer:
    """BERT's way of splitting lower-cased text."""
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary) if vocabulary else None, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def write_folder(backbone: str, names: list[str], output: Path) -> None:
    """Configuration and tokenizer, as ``from_pretrained`` reads them."""
    _, added, config = FOLDERS[backbone]
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _wordpiece(None)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    # each letter also within a word; named in advance, or the trainer would number them by chance, and so break ties
    fixed = [*SPECIAL, *letters, *(f"##{c}" for c in letters if c.isalnum())]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(names, trainer)
    tokenizer = _wordpiece(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    tokenizer.add_special_tokens([*SPECIAL, *added])
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", additional_special_tokens=added, model_max_length=TEXT["max_position_embeddings"],
    ).save_pretrained(output)  # fmt: skip
    text = "text_config" if "text_config" in config else "qformer_config"
    config = config | {text: config[text] | {"vocab_size": tokenizer.get_vocab_size()}}
    if "sep_token_id" in config[text]:
        config[text]["bos_token_id"] = tokenizer.token_to_id("[DEC]")
    (output / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--backbone", choices=sorted(FOLDERS), required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = train_names()
    output = args.output or HERE / FOLDERS[args.backbone][0]
    write_folder(args.backbone, list(names.values()), output)


if __name__ == "__main__":
    main()
