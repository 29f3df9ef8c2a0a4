"""The guard counts what each backbone's own ``tokenize`` would read, before it cuts."""

import random
from pathlib import Path

import open_clip
import pytest
from tiny_backbones import EMBEDDED, tiny_backbone

from spn4cir.data_gen.texts import TokenCounter
from spn4cir.errors import InputError

WORDS = ["red", "apple", "cat's", "3", "firefighter", "medium-light", "Größe", "日本", "“quoted”", "a&b", "&amp;", "🙂"]
PLAIN = ["red", "apple", "dog", "firefighter", "medium", "on", "grass"]


def texts(words: list[str], most: int) -> list[str]:
    """Texts of every length, drawn by seed."""
    draw = random.Random(1)
    return ["", "  two   spaces ", *(" ".join(draw.choices(words, k=n)) for n in range(1, most))]


@pytest.mark.parametrize(("name", "model"), [("clip", "ViT-L-14"), ("embedded", f"local-dir:{EMBEDDED / 'clip'}")])
def test_clip(name: str, model: str) -> None:
    """As many tokens as open_clip's own tokenizer makes where it has room, for whatever letters."""
    found = texts(WORDS, 40)
    room = open_clip.get_tokenizer(model)(found, context_length=400)
    own = room != 0 if name == "clip" else room != room[0, -1]  # the padding
    assert TokenCounter(name)(found) == own.sum(1).tolist()
    assert TokenCounter(name)([]) == []


def test_the_embedded_clip_cuts_what_is_counted_as_longer(tmp_path: Path) -> None:
    """Texts that fit into its context end with the mark that they end with anywhere; longer ones lose words."""
    backbone = tiny_backbone("clip4cir", tmp_path)
    limit = backbone.tokenize([""])["text"].shape[1]
    found = texts(PLAIN, 40)
    for text, count in zip(found, TokenCounter("embedded")(found), strict=True):
        cut = backbone.tokenize([text])["text"].tolist() == backbone.tokenize([text + " grass"])["text"].tolist()
        assert cut == (count >= limit)  # one that just fits has no room for a word more


def test_blip(tmp_path: Path) -> None:
    """BERT's tokenizer, by folder: what is counted is what BLIP reads, up to its bound."""
    backbone = tiny_backbone("blip4cir", tmp_path)
    found = texts(WORDS[:8], 290)
    counts = TokenCounter(str(EMBEDDED / "blip"))(found)
    limit = max(int(backbone.tokenize([text])["mask"].sum()) for text in found)
    assert min(counts) < limit < max(counts)
    assert [int(backbone.tokenize([text])["mask"].sum()) for text in found] == [min(n, limit) for n in counts]


def test_sprc(tmp_path: Path) -> None:
    """SPRC reads 32 tokens of a text without most punctuation: never more than are counted, so what fits is not cut."""
    backbone = tiny_backbone("sprc", tmp_path)
    count = TokenCounter(str(EMBEDDED / "blip2"))
    plain = texts(PLAIN, 70)
    read = [int(backbone.tokenize([text])["mask"].sum()) for text in plain]
    assert max(count(plain)) > 50 and read == [min(n, 32) for n in count(plain)]
    stopped = [" ".join(f"{word}." for word in text.split()) for text in plain[2:]]
    fewer = [int(backbone.tokenize([text])["mask"].sum()) for text in stopped]
    assert all(n <= m for n, m in zip(fewer, count(stopped), strict=True)) and fewer != count(stopped)


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    """A folder with ``vocab.txt`` is BERT's tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert TokenCounter(str(tmp_path))(["red cats", "red", ""]) == [5, 3, 2]


def test_no_such_tokenizer(tmp_path: Path) -> None:
    """One line that names it."""
    with pytest.raises(
        InputError, match=r"cannot load tokenizer .*nowhere.* \(give clip, embedded, or a folder"
    ) as caught:
        TokenCounter(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
