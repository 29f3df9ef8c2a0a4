"""TG-CIR written out from its formulas: loops over samples, tokens and positions, with the published names."""

import torch
from openai_clip import EMBED, WIDTH, OpenAI, VisionTransformer, randomise
from torch import Tensor, nn

TOKENS = 12


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(EMBED, 1, 1), nn.Sigmoid())


class Learner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizers = nn.ModuleList(Convolution() for _ in range(8))


class Inside(nn.Module):
    """What the published names call ``backbone``."""

    def __init__(self, twins: bool):
        super().__init__()
        self.clip = OpenAI(VisionTransformer())
        self.image_backbone = self.clip.visual
        self.tokenlearn = Learner()
        self.fc, self.text_fc = nn.Linear(WIDTH, EMBED), nn.Linear(WIDTH, EMBED)
        self.masks = nn.Embedding(4, EMBED)
        if twins:
            self.tokenlearn_text, self.masks_text = Learner(), nn.Embedding(4, EMBED)


def l2_normalize(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


class WrittenOut(nn.Module):
    """All of it, random; ``twins`` as in stage 2."""

    def __init__(self, twins: bool = False):
        super().__init__()
        self.backbone = Inside(twins)
        for name in ("s_remain_map", "t_remain_map", "t_replace_map"):
            setattr(self, name, nn.Sequential(nn.Linear(2 * EMBED, EMBED), nn.ReLU(), nn.Linear(EMBED, 1)))
        self.local_weight = nn.Parameter(torch.empty(TOKENS))
        randomise(self)
        with torch.no_grad():
            self.local_weight.copy_(torch.linspace(0.4, 1.7, TOKENS))
            for mask in (self.s_remain_map, self.t_remain_map, self.t_replace_map):
                mask[2].weight *= 4  # else all are close to a half
        if not twins:
            self.loss_T = nn.Parameter(torch.tensor([10.0]))
        self.eval()

    def tokens(self, pooled: Tensor, positions: Tensor, learner: Learner, masks: Tensor) -> Tensor:
        """A vector (E,) and positions (T, E) → (12, E)."""
        found = [pooled * torch.clamp(masks[p], min=0) for p in range(4)]
        for conv in learner.tokenizers:
            weight, bias = conv.conv[0].weight[0, :, 0], conv.conv[0].bias[0]
            total = torch.zeros_like(pooled)
            for y in positions:
                total = total + y / (1 + torch.exp(-(weight @ y + bias)))
            found.append(total / len(positions))
        return torch.stack(found)

    def image(self, pixels: Tensor) -> Tensor:
        """(B, 12, E)."""
        inside, visual = self.backbone, self.backbone.clip.visual
        x, pooled = visual.positions(pixels), visual(pixels)
        y = x @ inside.fc.weight.T + inside.fc.bias
        return torch.stack(
            [self.tokens(g, own, inside.tokenlearn, inside.masks.weight) for g, own in zip(pooled, y, strict=True)]
        )

    def text(self, tokens: Tensor, padding: bool = True) -> Tensor:
        """(B, 12, E); ``padding`` False leaves out what comes after the end of a text, which is wrong."""
        inside = self.backbone
        learner, masks = getattr(inside, "tokenlearn_text", inside.tokenlearn), getattr(inside, "masks_text", None)
        masks = (inside.masks if masks is None else masks).weight
        x, pooled = inside.clip.text_positions(tokens), inside.clip.text(tokens)
        found = []
        for row in range(len(tokens)):
            used = x[row] if padding else x[row, : int(tokens[row].argmax()) + 1]
            found.append(self.tokens(pooled[row], used @ inside.text_fc.weight.T + inside.text_fc.bias, learner, masks))
        return torch.stack(found)

    def mask(self, name: str, one: Tensor, two: Tensor) -> Tensor:
        """(B, 12, E) twice → (B, 12): one number per token."""
        first, _, second = getattr(self, name)
        rows = []
        for b in range(len(one)):
            row = []
            for token in range(TOKENS):
                hidden = first.weight @ torch.cat([one[b, token], two[b, token]]) + first.bias
                row.append(1 / (1 + torch.exp(-(second.weight @ torch.clamp(hidden, min=0) + second.bias))))
            rows.append(torch.cat(row))
        return torch.stack(rows)

    def query(self, reference: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) and the gate (B, 12)."""
        gate = self.mask("s_remain_map", reference, text)
        queries = []
        for b in range(len(reference)):
            total = sum(gate[b, k] * reference[b, k] + (1 - gate[b, k]) * text[b, k] for k in range(TOKENS))
            queries.append(l2_normalize(total / TOKENS))
        return torch.stack(queries), gate

    def target(self, tokens: Tensor) -> Tensor:
        """(B, 12, E) → (B, E)."""
        return torch.stack([l2_normalize(sum(own) / TOKENS) for own in tokens])

    def flat(self, tokens: Tensor) -> Tensor:
        """(B, 12, E) → (B, 12·E): weighted unit tokens one after another."""
        return torch.stack(
            [torch.cat([self.local_weight[k] * l2_normalize(own[k]) for k in range(TOKENS)]) for own in tokens]
        )

    def losses(self, reference: Tensor, text: Tensor, target: Tensor, same: Tensor, temperature: Tensor) -> dict:
        """Each unweighted term of stage 1, from tokens; ``same`` (B,) is equal for equal targets; kl at 0.3."""
        ref, txt = reference.detach(), text.detach()
        query, gate = self.query(reference, text)
        vectors = self.target(target)
        remain, replace = self.mask("t_remain_map", ref, target), self.mask("t_replace_map", txt, target)
        mixed = torch.stack(
            [
                torch.stack([remain[b, k] * ref[b, k] + replace[b, k] * txt[b, k] for k in range(TOKENS)])
                for b in range(len(ref))
            ]
        )
        composed, wanted = self.flat(mixed), self.flat(target)
        return {
            "stu_rank": contrastive(query, vectors, same, temperature),
            "tea_rank": contrastive(composed, wanted, same, temperature),
            "tea_mask": square(remain + replace, torch.ones_like(remain)),
            "ortho": (orthogonal(reference) + orthogonal(target) + orthogonal(text)) / 3,
            "ckd": square(gate, remain.detach()) + square(1 - gate, replace.detach()),
            "kl": divergence(query, vectors, wanted.detach(), 0.3),
        }


def contrastive(query: Tensor, target: Tensor, same: Tensor, temperature: Tensor) -> Tensor:
    """Mean over rows of -log(e^{s_ii} / sum_j e^{s_ij}), j over i and all targets that are not equal to its own."""
    total = torch.zeros((), dtype=query.dtype)
    for i in range(len(query)):
        others = [j for j in range(len(query)) if j == i or same[j] != same[i]]
        sums = sum(torch.exp((query[i] @ target[j]) / temperature) for j in others)
        total = total - (query[i] @ target[i]) / temperature + torch.log(sums)
    return total / len(query)


def square(one: Tensor, two: Tensor) -> Tensor:
    values = [(a - b) ** 2 for a, b in zip(one.flatten(), two.flatten(), strict=True)]
    return sum(values) / len(values)


def orthogonal(tokens: Tensor) -> Tensor:
    total = torch.zeros((), dtype=tokens.dtype)
    for own in tokens:
        for a in range(TOKENS):
            for b in range(TOKENS):
                total = total + (l2_normalize(own[a]) @ l2_normalize(own[b]) - float(a == b)) ** 2
    return total / (len(tokens) * TOKENS * TOKENS)


def divergence(query: Tensor, target: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Sum over i and j of p_ij log(p_ij / q_ij), over the number of i."""
    total = torch.zeros((), dtype=query.dtype)
    for i in range(len(query)):
        teacher = [torch.exp(l2_normalize(wanted[i]) @ l2_normalize(other) / temperature) for other in wanted]
        student = [torch.exp(query[i] @ other / temperature) for other in target]
        for j in range(len(query)):
            p, q = teacher[j] / sum(teacher), student[j] / sum(student)
            total = total + p * torch.log(p / q)
    return total / len(query)


def our_name(name: str) -> str:
    """A published name in ours, but for the convolutions, which are rows here."""
    pairs = {
        "backbone.clip.": "clip.", "backbone.fc.": "image_fc.", "backbone.text_fc.": "text_fc.",
        "backbone.masks.weight": "masks", "backbone.masks_text.weight": "text_masks", "local_weight": "local_weight",
        "s_remain_map.": "gate.", "t_remain_map.": "teacher_remain.", "t_replace_map.": "teacher_replace.",
    }  # fmt: skip
    old, new = next((old, new) for old, new in pairs.items() if name.startswith(old))
    return new + name.removeprefix(old)


def in_our_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights, or their gradients, as our state dict has them."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if "tokenizers" in name:
            which = "text_learner" if "tokenlearn_text" in name else "learner"
            number, kind = int(name.split(".")[3]), name.rpartition(".")[2]
            rows = found.setdefault(f"{which}.{kind}", torch.zeros(8, *value.shape[1:2], dtype=value.dtype))
            rows[number] = value[0, :, 0] if kind == "weight" else value[0]
        elif name != "loss_T" and not name.startswith("backbone.image_backbone."):
            found[our_name(name)] = value
    return found
