"""SPRC as it was published against what is imported: one sample, one head at a time, without padding or masks."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spn4cir.backbones.sprc import SPRC
from spn4cir.checkpoints import load_model
from spn4cir.errors import InputError
from spn4cir.importers import import_published
from spn4cir.in_batch import InBatch
from spn4cir.search import scores_of

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "red", "blue", "longer", "sleeves", "and", "with", "two",
    "dots", "a", "the", "more",
]  # fmt: skip
PATCH, GRID, WIDTH, INNER, BLOCKS = 8, 2, 128, 96, 2
HIDDEN, FEED, LAYERS, QUERIES, EMBED, PLACES = 128, 80, 4, 3, 16, 40
HEAD = 64
TEXTS = ["is red", "", "Longer sleeves; and, with (two) dots.", "the the is  blue " * 11]
TEMPERATURE = 0.2

Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds a tokenizer in BERT's manner, whose words are the above."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return str(folder)


def ids(text: str) -> list[int]:
    """Numbers of a text's words, from the definition: normalised, 50 words at most, cut at 32 with its two ends."""
    plain = "".join(" " if sign in '.!"()*#:;~' else sign for sign in text.lower())
    pieces = re.findall(r"\w+|[^\w\s]", " ".join(plain.split()[:50]))  # BERT parts words from signs
    return [2, *[WORDS.index(word) if word in WORDS else 1 for word in pieces][:30], 3]


def linear(shapes: dict[str, tuple[int, ...]], name: str, out: int, inside: int) -> None:
    shapes |= {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def norm(shapes: dict[str, tuple[int, ...]], name: str, width: int) -> None:
    shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def qformer_shapes(name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.bert.embeddings.word_embeddings.weight": (len(WORDS) + 1, HIDDEN),
        f"{name}.bert.embeddings.position_embeddings.weight": (PLACES, HIDDEN),
    }
    norm(shapes, f"{name}.bert.embeddings.LayerNorm", HIDDEN)
    for n in range(LAYERS):
        layer = f"{name}.bert.encoder.layer.{n}"
        for kind in ("attention", "crossattention") if n % 2 == 0 else ("attention",):
            linear(shapes, f"{layer}.{kind}.self.query", HIDDEN, HIDDEN)
            for part in ("key", "value"):
                linear(shapes, f"{layer}.{kind}.self.{part}", HIDDEN, WIDTH if kind == "crossattention" else HIDDEN)
            linear(shapes, f"{layer}.{kind}.output.dense", HIDDEN, HIDDEN)
            norm(shapes, f"{layer}.{kind}.output.LayerNorm", HIDDEN)
        for which in ("", "_query"):
            linear(shapes, f"{layer}.intermediate{which}.dense", FEED, HIDDEN)
            linear(shapes, f"{layer}.output{which}.dense", HIDDEN, FEED)
            norm(shapes, f"{layer}.output{which}.LayerNorm", HIDDEN)
    linear(shapes, f"{name}.cls.predictions.transform.dense", HIDDEN, HIDDEN)
    norm(shapes, f"{name}.cls.predictions.transform.LayerNorm", HIDDEN)
    linear(shapes, f"{name}.cls.predictions.decoder", len(WORDS) + 1, HIDDEN)
    shapes[f"{name}.cls.predictions.bias"] = (len(WORDS) + 1,)
    return shapes


def published_shapes(stage: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "temp": (), "query_tokens": (1, QUERIES, HIDDEN), "prompt_tokens": (1, QUERIES, HIDDEN),
        "visual_encoder.cls_token": (1, 1, WIDTH), "visual_encoder.pos_embed": (1, GRID**2 + 1, WIDTH),
        "visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for n in range(BLOCKS):
        block = f"visual_encoder.blocks.{n}"
        for part in ("norm1", "norm2"):
            norm(shapes, f"{block}.{part}", WIDTH)
        shapes |= {f"{block}.attn.{part}": (WIDTH,) for part in ("q_bias", "v_bias")}
        shapes[f"{block}.attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        linear(shapes, f"{block}.attn.proj", WIDTH, WIDTH)
        linear(shapes, f"{block}.mlp.fc1", INNER, WIDTH)
        linear(shapes, f"{block}.mlp.fc2", WIDTH, INNER)
    norm(shapes, "ln_vision", WIDTH)
    for name, out in (("vision_proj", EMBED), ("text_proj", EMBED), ("itm_head", 2)):
        linear(shapes, name, out, HIDDEN)
    shapes |= qformer_shapes("Qformer")
    if stage == 2:
        shapes |= qformer_shapes("Qformer_query")
        linear(shapes, "text_proj_q", EMBED, HIDDEN)
    return shapes


def published(stage: int) -> Weights:
    """Random weights under the published names, the vision tower's matrices in half precision as they were."""
    generator = torch.Generator().manual_seed(stage)
    state: Weights = {}
    for name, shape in published_shapes(stage).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name.lower() or name.startswith("ln_"):
            values = values * 0.3 + name.endswith("weight")
        elif len(shape) == 2:
            values = values * (1.5 / math.sqrt(shape[1]))
        elif not name.endswith("_tokens"):
            values = values * 0.3
        matrix = name.startswith("visual_encoder") and len(shape) > 1 and name.endswith("weight")
        state[name] = values.half() if matrix else values
    state["temp"] = torch.tensor(0.0321)
    for name in ("Qformer", "Qformer_query")[:stage]:
        state[f"{name}.bert.embeddings.position_ids"] = torch.arange(PLACES)[None]
    return state


def contained(state: Weights, stage: int) -> dict[str, object]:
    if stage == 1:
        return {"Blip2QformerCirAlignPrompt": state, "epoch": 29}
    return {"epoch": 2, "state_dict": {f"blip_model.{name}": value for name, value in state.items()}}


def imported(folder: Path, content: object, tokenizer: str) -> SPRC:
    """What ``import_published`` wrote, read again."""
    torch.save(content, folder / "published.pt")
    import_published(folder / "published.pt", folder / "imported", "sprc", {"tokenizer": tokenizer})
    backbone = load_model(folder / "imported")
    assert isinstance(backbone, SPRC)
    return backbone


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> dict[int, Path]:
    """The random weights of both stages, imported once."""
    found = {}
    for stage in (1, 2):
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        imported(folder, contained(published(stage), stage), tokenizer)
        found[stage] = folder / "imported"
    return found


def loaded(folder: Path, **changes: object) -> SPRC:
    backbone = load_model(folder, changes)
    assert isinstance(backbone, SPRC)
    return backbone


# The published model, a sample at a time -----------------------------------------------------------------------------


def normed(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(T, D), (S, D) twice → (T, D), one head of 64 after the other."""
    found = []
    for start in range(0, q.shape[1], HEAD):
        part = slice(start, start + HEAD)
        scores = (q[:, part] @ k[:, part].T / math.sqrt(HEAD)).exp()
        found.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(found, dim=1)


def vision(w: Weights, picture: Tensor) -> Tensor:
    """(3, H, W) → (L, D): EVA's blocks without a last norm of their own, then ``ln_vision``."""
    tokens = [w["visual_encoder.cls_token"][0, 0]]
    for row in range(GRID):
        for column in range(GRID):
            patch = picture[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            kernel = w["visual_encoder.patch_embed.proj.weight"]
            tokens.append((kernel * patch).sum((1, 2, 3)) + w["visual_encoder.patch_embed.proj.bias"])
    x = torch.stack(tokens) + w["visual_encoder.pos_embed"][0]
    for n in range(BLOCKS):
        block = f"visual_encoder.blocks.{n}"
        y = normed(w, f"{block}.norm1", x, 1e-6)
        q, k, v = (y @ part.T for part in w[f"{block}.attn.qkv.weight"].split(WIDTH))
        mixed = heads(q + w[f"{block}.attn.q_bias"], k, v + w[f"{block}.attn.v_bias"])
        x = x + dense(w, f"{block}.attn.proj", mixed)
        y = gelu(dense(w, f"{block}.mlp.fc1", normed(w, f"{block}.norm2", x, 1e-6)))
        x = x + dense(w, f"{block}.mlp.fc2", y)
    return normed(w, "ln_vision", x, 1e-5)


def attended(w: Weights, name: str, x: Tensor, others: Tensor) -> Tensor:
    q, k, v = (
        dense(w, f"{name}.self.{part}", y) for part, y in (("query", x), ("key", others), ("value", others))
    )  # fmt: skip
    return normed(w, f"{name}.output.LayerNorm", dense(w, f"{name}.output.dense", heads(q, k, v)) + x, 1e-12)


def fed(w: Weights, layer: str, which: str, x: Tensor) -> Tensor:
    y = dense(w, f"{layer}.output{which}.dense", gelu(dense(w, f"{layer}.intermediate{which}.dense", x)))
    return normed(w, f"{layer}.output{which}.LayerNorm", y + x, 1e-12)


def qformer(w: Weights, name: str, embedded: Tensor, image: Tensor | None = None) -> Tensor:
    """(T, H) → (T, H). Queries have ways of their own only where there is an image."""
    x = normed(w, f"{name}.bert.embeddings.LayerNorm", embedded, 1e-12)
    for n in range(LAYERS):
        layer = f"{name}.bert.encoder.layer.{n}"
        x = attended(w, f"{layer}.attention", x, x)
        if image is None:
            x = fed(w, layer, "", x)
            continue
        query, text = x[:QUERIES], x[QUERIES:]
        if n % 2 == 0:
            query = attended(w, f"{layer}.crossattention", query, image)
        x = torch.cat([fed(w, layer, "_query", query), fed(w, layer, "", text)])
    return x


def l2_normalize(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def words(w: Weights, name: str, text: list[int]) -> Tensor:
    return torch.stack([w[f"{name}.bert.embeddings.word_embeddings.weight"][n] for n in text])


def places(w: Weights, name: str, count: int) -> Tensor:
    return w[f"{name}.bert.embeddings.position_embeddings.weight"][:count]


def target_of(w: Weights, image: Tensor) -> Tensor:
    """PT: (L, D) → (K, E)."""
    return l2_normalize(dense(w, "vision_proj", qformer(w, "Qformer", w["query_tokens"][0], image)))


def fused_of(w: Weights, image: Tensor, text: list[int]) -> Tensor:
    """P1: (L, D) and a text → (K, H)."""
    sentence = words(w, "Qformer", text) + places(w, "Qformer", len(text))
    return qformer(w, "Qformer", torch.cat([w["query_tokens"][0], sentence]), image)[:QUERIES]


def query_of(w: Weights, fused: Tensor, text: list[int]) -> Tensor:
    """P2: (K, H) and the text → (E,), by the copies where there are any."""
    name, last = ("Qformer_query", "text_proj_q") if "text_proj_q.bias" in w else ("Qformer", "text_proj")
    sentence = words(w, name, text) + places(w, name, len(text))
    return l2_normalize(dense(w, last, qformer(w, name, torch.cat([fused, sentence]))[QUERIES]))


def prompted(w: Weights, text: list[int]) -> Tensor:
    """PP: a text behind the prompt → (E,)."""
    tokens = words(w, "Qformer", text)
    tokens = torch.cat([tokens[:1], w["prompt_tokens"][0], tokens[1:]])
    return l2_normalize(dense(w, "text_proj", qformer(w, "Qformer", tokens + places(w, "Qformer", len(tokens)))[0]))


def contrast(queries: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The mean over queries of the cross-entropy of their own target, scored by its nearest vector."""
    total = torch.zeros((), dtype=torch.float64)
    for n, query in enumerate(queries):
        scores = [max((query * vector).sum() for vector in target) / TEMPERATURE for target in targets]
        total = total + torch.log(sum((score - scores[n]).exp() for score in scores))
    return total / len(queries)


def widened(state: Weights, learn: bool = False) -> Weights:
    return {
        name: value.double().requires_grad_(learn) for name, value in state.items() if value.is_floating_point()
    }  # fmt: skip


def pictures() -> Tensor:
    return torch.randn(len(TEXTS), 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(5)).double()


def expected(w: Weights) -> dict[str, Tensor]:
    """All that the published model makes of the pictures and texts, each sample for itself."""
    images, texts = [vision(w, picture) for picture in pictures()], [ids(text) for text in TEXTS]
    fused = [fused_of(w, image, text) for image, text in zip(images, texts, strict=True)]
    return {
        "reference": torch.stack(images),
        "target": torch.stack([target_of(w, image) for image in images]),
        "fused": torch.stack(fused),
        "query": torch.stack([query_of(w, states, text) for states, text in zip(fused, texts, strict=True)]),
        "prompted": torch.stack([prompted(w, text) for text in texts]),
    }


@functools.cache
def expected_of(stage: int) -> dict[str, Tensor]:
    return expected(widened(published(stage)))


def actual(backbone: SPRC) -> dict[str, Tensor]:
    kind = next(backbone.parameters()).dtype
    features = backbone.encode_image(pictures().to(kind))
    tokens = backbone.tokenize(TEXTS)
    composed = backbone.compose(features.reference, tokens)
    found = {"reference": features.reference, "target": features.target, "query": composed.query}
    seen: list[Tensor] = []

    def keep(query: Tensor, target: Tensor) -> Tensor:
        seen.append(query)
        return query.sum()

    backbone.extra_losses(composed, features, keep)  # type: ignore[arg-type]
    return {**found, "fused": composed.states["fused"], "prompted": seen[0]}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((value - wanted[name]).detach().abs().max()) for name, value in found.items()}


# What the tests say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_equals_the_published_model(
    tmp_path: Path, tokenizer: str, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pass from either container: within 1e-5 in float32, within 1e-10 in float64; each name accounted for."""
    state = published(stage)
    backbone = imported(tmp_path, contained(state, stage), tokenizer)
    told = capsys.readouterr().out
    assert "learned temperature 0.0321" in told and "float16 → float32" in told
    assert re.search(r"missing +0\n", told) and re.search(r"unexpected +0\n", told)
    assert backbone.options["separated"] is (stage == 2) and backbone.options["rgb_last"]
    assert backbone.temperature == pytest.approx(0.0321)  # where temperature: null starts
    wanted = expected_of(stage)
    assert max(apart(actual(backbone), wanted).values()) <= 1e-5
    found = apart(actual(backbone.double()), wanted)
    assert found.keys() == wanted.keys() and max(found.values()) <= 1e-10


def test_texts_become_the_published_numbers(folders: dict[int, Path]) -> None:
    """Normalised, cut at 32 and padded to the longest of the batch only."""
    backbone = loaded(folders[1])
    texts = [*TEXTS, 'RED!! "dots" #two ~ the*more:a;(blue)', "more " * 60]
    tokens = backbone.tokenize(texts)
    assert tokens["text"].shape == tokens["mask"].shape == (len(texts), 32)
    for text, row, mask in zip(texts, tokens["text"], tokens["mask"], strict=True):
        wanted = ids(text)
        assert row.tolist() == wanted + [0] * (32 - len(wanted))
        assert mask.tolist() == [1] * len(wanted) + [0] * (32 - len(wanted))
    assert backbone.tokenize(["is red", ""])["text"].tolist() == [[2, 5, 6, 3], [2, 3, 0, 0]]
    assert backbone.tokenize(["a " * 49 + "red blue"])["text"].shape == (1, 32)


def test_padding_to_the_longest_is_padding_to_32(folders: dict[int, Path]) -> None:
    """Columns of padding change nothing but the last bits; unmasked, they change the query."""
    backbone = loaded(folders[1]).double()
    reference = backbone.encode_image(pictures()[:2]).reference
    short = backbone.tokenize(["is red", "a"])
    long = {name: torch.cat([value, value.new_zeros(2, 28)], 1) for name, value in short.items()}
    assert long["text"].shape == (2, 32)
    query = backbone.compose(reference, short).query
    assert float((backbone.compose(reference, long).query - query).detach().abs().max()) <= 1e-12
    long["mask"] = torch.ones_like(long["mask"])
    assert float((backbone.compose(reference, long).query - query).detach().abs().max()) > 1e-3


def gradients_of_the_published(state: Weights, weights: tuple[float, float]) -> tuple[dict[str, float], Weights]:
    """Terms of stage 1, batch = the pictures as targets and each one's neighbour as reference, and their gradients."""
    w = widened(state, learn=True)
    images, texts = [vision(w, picture) for picture in pictures()], [ids(text) for text in TEXTS]
    targets = [target_of(w, image) for image in images]
    fused = [fused_of(w, images[n - 1], text) for n, text in enumerate(texts)]
    queries = [query_of(w, states, text) for states, text in zip(fused, texts, strict=True)]
    prompt = w["prompt_tokens"][0].detach().mean(0)
    align = sum(((states.mean(0) - prompt) ** 2).mean() for states in fused) / len(fused)
    terms = {
        "main": contrast(queries, targets),
        "rtc": weights[0] * contrast([prompted(w, text) for text in texts], targets),
        "align": weights[1] * align,
    }
    sum(terms.values()).backward()
    return {name: float(term.detach()) for name, term in terms.items()}, {name: value.grad for name, value in w.items()}


def name_in_the_file(own: str) -> str:
    """The published name of a parameter of ours, of all but the vision tower below its last norm."""
    for ours, theirs in (
        ("blip2.vision_model.post_layernorm", "ln_vision"), ("blip2.vision_projection", "vision_proj"),
        ("blip2.text_projection", "text_proj"), ("blip2.query_tokens", "query_tokens"),
        ("blip2.embeddings.", "Qformer.bert.embeddings."),
        ("blip2.qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"), ("blip2.qformer", "Qformer.bert"),
        ("attention.attention.", "attention.self."),
    ):  # fmt: skip
        own = own.replace(ours, theirs)
    return own


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, 0.0)])
def test_stage_1_has_the_published_terms_and_gradients(folders: dict[int, Path], weights: tuple[float, float]) -> None:
    """Values and gradients of everything that trains, in float64, without dropout; the tower gets none."""
    state = published(1)
    backbone = loaded(folders[1], rtc=weights[0], align=weights[1]).double()
    features = backbone.encode_image(pictures())
    composed = backbone.compose(features.reference.roll(1, 0), backbone.tokenize(TEXTS))
    against = InBatch(torch.arange(len(TEXTS)), TEMPERATURE)
    terms = {
        "main": against(composed.query, features.target),
        **backbone.extra_losses(composed, features, against),
    }
    sum(terms.values()).backward()
    values, gradients = gradients_of_the_published(state, weights)
    assert terms.keys() == {"main", "rtc", "align"} - ({"align"} if not weights[1] else set())
    assert all(abs(float(term.detach()) - values[name]) <= 1e-10 for name, term in terms.items())
    trained = 0
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            wanted = gradients[name_in_the_file(name)]
            assert parameter.grad is not None, name
            assert float((parameter.grad - wanted).abs().max()) <= 1e-10, name
            trained += 1
        else:
            assert name.startswith("blip2.vision_model.") and parameter.grad is None, name
    towers = [name for name in state if name.startswith("visual_encoder.")]
    ignored = [name for name in state if re.search(r"\.cls\.|itm_head|position_ids|temp", name)]
    assert trained == len(state) - len(towers) - len(ignored)


def test_the_tower_too_can_be_trained(folders: dict[int, Path]) -> None:
    """With ``train_vision`` its gradients are the published model's, the key's bias aside, which was no parameter."""
    state, backbone = published(1), loaded(folders[1], train_vision=True).double()
    backbone.encode_image(pictures()).target[..., 0].sum().backward()
    w = widened(state, learn=True)
    sum(target_of(w, vision(w, picture))[:, 0].sum() for picture in pictures()).backward()
    tower = dict(backbone.named_parameters())
    for n in range(BLOCKS):
        block = tower[f"blip2.vision_model.encoder.layers.{n}.self_attn.qkv.bias"].grad
        assert block is not None
        for part, place in (("q_bias", 0), ("v_bias", 2)):
            wanted = w[f"visual_encoder.blocks.{n}.attn.{part}"].grad
            assert float((block.view(3, -1)[place] - wanted).abs().max()) <= 1e-10
    wanted = w["visual_encoder.patch_embed.proj.weight"].grad
    assert float((tower["blip2.vision_model.embeddings.patch_embedding.weight"].grad - wanted).abs().max()) <= 1e-10


def test_the_nearest_vector_counts(folders: dict[int, Path]) -> None:
    """A score is the largest product of the query with one of the target's vectors, and not their mean."""
    backbone = loaded(folders[1]).double()
    found = {name: value.detach() for name, value in actual(backbone).items()}
    scores = scores_of(found["query"], found["target"])
    for i, query in enumerate(found["query"]):
        for j, target in enumerate(found["target"]):
            assert abs(float(scores[i, j]) - max(float((query * vector).sum()) for vector in target)) <= 1e-12
            assert abs(float(scores[i, j]) - float((query * target.mean(0)).sum())) > 1e-4


# Controls: what would be wrong differs -------------------------------------------------------------------------------


def test_anothers_fused_states_give_another_query(folders: dict[int, Path]) -> None:
    """States fused with another triplet's text, as the published stage 2 fed them, move the query."""
    backbone, w = loaded(folders[2]), widened(published(2))
    image, text, other = vision(w, pictures()[0]), ids(TEXTS[0]), ids(TEXTS[2])
    right, wrong = query_of(w, fused_of(w, image, text), text), query_of(w, fused_of(w, image, other), text)
    found = actual(backbone)["query"][0]
    assert float((found - right).detach().abs().max()) <= 1e-5
    assert float((found - wrong).detach().abs().max()) > 1e-3


def test_the_length_of_the_query_must_be_told(folders: dict[int, Path]) -> None:
    """Left to its default the library demands an image, and with one reads another sentence."""
    backbone = loaded(folders[1])
    tokens = backbone.tokenize(TEXTS)
    reference = backbone.encode_image(pictures().float()).reference
    composed = backbone.compose(reference, tokens)
    blip2, mask = backbone.blip2, composed.states["mask"]
    sentence = blip2.embeddings(input_ids=tokens["text"], query_embeds=composed.states["fused"])
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        blip2.qformer(query_embeds=sentence, attention_mask=mask)
    hidden = blip2.qformer(query_embeds=sentence, attention_mask=mask, encoder_hidden_states=reference)
    other = torch.nn.functional.normalize(blip2.text_projection(hidden.last_hidden_state[:, QUERIES]), dim=-1)
    assert float((other - composed.query).detach().abs().max()) > 1e-3


def test_the_last_norm_has_its_own_eps(folders: dict[int, Path]) -> None:
    """With the library's eps the tower's tokens are others: little, and more than rounding."""
    backbone = loaded(folders[1]).double()
    wanted = expected_of(1)["reference"]
    backbone.blip2.vision_model.post_layernorm.eps = 1e-6
    assert float((backbone.encode_image(pictures()).reference - wanted).detach().abs().max()) > 1e-7


@pytest.mark.parametrize("stage", [1, 2])
def test_every_tensor_counts(folders: dict[int, Path], stage: int) -> None:
    """Outputs depend on all that was imported; a bias of keys alone moves no attention."""
    backbone = loaded(folders[stage]).double().requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    sum(
        (value * torch.randn(value.shape, generator=generator)).sum() for value in actual(backbone).values()
    ).backward()  # fmt: skip
    still = [name for name, p in backbone.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-4]
    keys = [name for name, _ in backbone.named_parameters() if name.endswith("attention.key.bias")]
    assert still == keys


@pytest.mark.parametrize("name", [
    "Qformer.bert.embeddings.LayerNorm.weight", "prompt_tokens", "text_proj_q.bias", "text_proj.bias",
    "Qformer.bert.encoder.layer.3.output.dense.weight", "Qformer.bert.encoder.layer.3.output_query.dense.weight",
    "visual_encoder.blocks.1.attn.v_bias", "Qformer_query.bert.encoder.layer.3.intermediate.dense.bias",
])  # fmt: skip
def test_one_changed_tensor_differs(tmp_path: Path, tokenizer: str, name: str) -> None:
    """Negative control: the same shapes with one tensor turned round give other outputs."""
    state = published(2)
    state[name] = state[name].flip(-1)
    found = actual(imported(tmp_path, contained(state, 2), tokenizer))
    assert max(apart(found, expected_of(2)).values()) > 1e-3


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"visual_encoder.norm.weight": torch.ones(WIDTH)}, "ln_vision.weight is there twice"),
    ({"lm_head.weight": torch.ones(3)}, "1 unexpected, such as lm_head.weight"),
    ({"Qformer.bert.pooler.dense.weight": torch.ones(3)}, "unexpected, such as Qformer.bert.pooler.dense.weight"),
    ({"prompt_tokens": None}, "1 missing, such as prompt_tokens"),
    ({"query_tokens": None}, "cannot be recognised without query_tokens"),
    ({"visual_encoder.pos_embed": None}, "cannot be recognised without"),
    ({"Qformer.bert.encoder.layer.0.crossattention.self.query.bias": None}, "1 missing, such as blip2.qformer"),
    ({"visual_encoder.rel_pos_bias.table": torch.ones(3)}, "1 unexpected, such as blip2.vision_model.rel_pos_bias"),
    ({"Qformer.bert.encoder.layer.3.crossattention.self.query.bias": torch.ones(HIDDEN)}, "no even spacing"),
    ({"temp": torch.ones(2)}, "1 unexpected, such as temp"),
])  # fmt: skip
def test_every_name_is_accounted_for(
    tmp_path: Path, tokenizer: str, change: dict[str, Tensor | None], message: str
) -> None:
    """Unknown names, missing ones, and shapes that make no model are one line."""
    state = {**published(1), **change}
    with pytest.raises(InputError, match=message):
        imported(tmp_path, contained({k: v for k, v in state.items() if v is not None}, 1), tokenizer)


def test_containers_that_are_none(tmp_path: Path, tokenizer: str) -> None:
    state = published(1)
    for content, message in (
        ({"model": state}, "neither Blip2QformerCirAlignPrompt nor state_dict"),
        ({"state_dict": state}, "should begin with blip_model."),
        ({**contained(state, 1), "vocabulary": {}}, "there is 'vocabulary'"),
        (contained({**state, "other": torch.ones(1)}, 2), "1 unexpected, such as other"),
        ({"state_dict": {**contained(state, 2)["state_dict"], "temp": torch.ones(1)}}, "1 unexpected, such as temp"),  # type: ignore[dict-item]
    ):
        with pytest.raises(InputError, match=message):
            imported(tmp_path, content, tokenizer)


def test_the_tokenizer_must_fit(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry more is refused; without a network the line says what to give."""
    state = published(1)
    name = "Qformer.bert.embeddings.word_embeddings.weight"
    state[name] = torch.cat([state[name], state[name][:1]])
    with pytest.raises(InputError, match=f"has {len(WORDS) + 1} entries, and the model has {len(WORDS) + 2}"):
        imported(tmp_path, contained(state, 1), tokenizer)
    torch.save(contained(published(1), 1), tmp_path / "published.pt")
    with pytest.raises(InputError, match=r"tokenizer a folder that holds vocab\.txt of bert-base-uncased"):
        import_published(tmp_path / "published.pt", tmp_path / "other", "sprc", {})
