"""Margin softmax against loops over queries and classes in float64: values, and gradients of queries and centres."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spn4cir import streaming
from spn4cir.losses import info_nce
from spn4cir.margins import MARGINS, AdaCos, AdaFace, ArcFace, CosFace, CurricularFace, DynamicArcFace, LiArcFace

B, C, E = 7, 11, 5
COUNTS = [3, 50, 7, 7, 100, 3, 20, 9, 60, 31, 4]
Logits = Callable[[list[Tensor], int, int], list[Tensor]]


def arc(c: Tensor, m: float) -> Tensor:
    return torch.cos(torch.acos(c) + m) if c > math.cos(math.pi - m) else c - m * math.sin(math.pi - m)


def naive(head: ArcFace, cosines: list[list[Tensor]], label: list[int], norms: Tensor) -> Tensor:
    """Mean cross-entropy of the published formulas, logit by logit."""
    s = float(head.scale)
    t = None
    if isinstance(head, AdaCos):
        s = math.sqrt(2) * math.log(C - 1)
        sums = (
            sum(
                math.exp(s * float(c))
                for row, y in zip(cosines, label, strict=True)
                for j, c in enumerate(row)
                if j != y
            )
            / B
        )
        angles = sorted(math.acos(float(row[y])) for row, y in zip(cosines, label, strict=True))
        s = math.log(sums) / math.cos(min(math.pi / 4, angles[(B - 1) // 2]))
    if isinstance(head, CurricularFace):
        t = 0.01 * sum(float(row[y]) for row, y in zip(cosines, label, strict=True)) / B
    z = norms.clamp(1e-3, 100)
    terms = []
    for n, (row, y) in enumerate(zip(cosines, label, strict=True)):
        logits = list(row)
        c = row[y]
        if isinstance(head, CosFace):
            logits[y] = c - head.margin
        elif isinstance(head, DynamicArcFace):
            low, high = min(COUNTS), max(COUNTS)
            m = 0.2 + 0.5 * 0.3 * (1 + math.cos(math.pi * (COUNTS[y] - low) / (high - low)))
            logits[y] = arc(c, m)
        elif isinstance(head, LiArcFace):
            logits = [(math.pi - 2 * torch.acos(one)) / math.pi for one in row]
            logits[y] = (math.pi - 2 * (torch.acos(c) + head.margin)) / math.pi
        elif isinstance(head, AdaCos):
            pass
        elif isinstance(head, AdaFace):
            hat = float((0.333 * (z[n] - z.mean()) / (z.std() + 1e-3)).clamp(-1, 1))
            angle = (torch.acos(c) - head.margin * hat).clamp(1e-3, math.pi - 1e-3)
            logits[y] = torch.cos(angle) - (head.margin + head.margin * hat)
        else:
            logits[y] = arc(c, head.margin)
            if isinstance(head, CurricularFace):
                assert t is not None
                bound = math.cos(math.acos(float(c)) + head.margin)
                logits = [
                    one if j == y or float(one) <= bound else row[j] * (t + row[j]) for j, one in enumerate(logits)
                ]
        scaled = torch.stack([s * one for one in logits])
        terms.append(scaled.logsumexp(0) - scaled[y])
    return torch.stack(terms).mean()


def build(name: str) -> ArcFace:
    head = MARGINS[name](COUNTS) if name == "dynamic" else MARGINS[name](C) if name == "adacos" else MARGINS[name](20.0)  # type: ignore[arg-type]
    return head.double()


def inputs(k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, some near their class and one opposite to it; centres; labels."""
    chance = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(C, k, E, generator=chance).double(), dim=-1)
    label = torch.tensor([0, 4, 4, 7, 10, 2, 5])
    raw = torch.randn(B, E, generator=chance).double() * torch.linspace(1, 30, B).double()[:, None]
    raw[1] = 3 * centres[4, 0] + 0.3 * raw[1] / raw[1].norm()
    raw[3] = -2 * centres[7, 0] + 0.2 * raw[3] / raw[3].norm()
    return raw, F.normalize(raw, dim=-1).requires_grad_(), centres.requires_grad_(), label


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MARGINS)
def test_heads_equal_their_formulas(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block and in ragged ones; the buffers' state is that of one step."""
    raw, query, centres, label = inputs(k)
    cosines = [[max((query[b] @ centres[j, n] for n in range(k)), key=Tensor.item) for j in range(C)] for b in range(B)]
    expected = naive(build(name), cosines, label.tolist(), raw.norm(dim=1))
    slow = torch.autograd.grad(expected, (query, centres))
    for scores in (2**20, 3 * B * k):
        monkeypatch.setitem(streaming.SCORES, "cpu", scores * (4 if k > 1 else 1))
        head = build(name)
        head.observe(query, raw.norm(dim=1), centres, label)
        found = info_nce(query, centres, label, 1 / head.scale, margin=head)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        for one, other in zip(torch.autograd.grad(found, (query, centres)), slow, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    plain = info_nce(query, centres, label, 1 / float(head.scale))  # negative control
    assert name == "adacos" or abs(float(plain) - float(expected)) > 0.01


@pytest.mark.parametrize("name", ["arcface", "cosface", "adaface"])
def test_no_margin_is_the_plain_loss(name: str) -> None:
    """Margin 0 and K = 1: the scaled cosine softmax, which is ``info_nce``, and torch's cross-entropy."""
    raw, query, centres, label = inputs(1)
    head = MARGINS[name](20.0, 0.0).double()
    head.observe(query, raw.norm(dim=1), centres, label)
    found = info_nce(query, centres, label, 1 / head.scale, margin=head)
    torch.testing.assert_close(found, info_nce(query, centres, label, 1 / 20), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, F.cross_entropy(20 * query @ centres[:, 0].T, label), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_at_the_ends(name: str, sign: int) -> None:
    """A query on its centre, or opposite to it, in float32: finite and not large after normalisation."""
    raw = torch.randn(B, E, generator=torch.Generator().manual_seed(0))
    label = torch.arange(B)
    raw[0] = sign * 2.0
    raw = raw.requires_grad_()
    query = F.normalize(raw, dim=-1)
    centres = torch.cat([sign * query.detach()[:1], F.normalize(torch.randn(C - 1, E), dim=-1)])[
        :, None
    ].requires_grad_()
    head = build(name).float()
    head.observe(query, raw.norm(dim=1), centres, label)
    loss = info_nce(query, centres, label, 1 / head.scale, margin=head)
    loss.backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None and raw.grad.isfinite().all() and raw.grad.norm() < 1e3


def test_margins_follow_the_classes() -> None:
    """Permuted classes permute the dynamic margins; the rarest has the largest."""
    order = torch.randperm(C, generator=torch.Generator().manual_seed(0))
    head, other = DynamicArcFace(COUNTS), DynamicArcFace([COUNTS[n] for n in order])
    assert torch.equal(other.margins, head.margins[order])
    assert head.margins[0] == pytest.approx(0.5) and head.margins[4] == pytest.approx(0.2)


def test_a_batch_of_one_image() -> None:
    """AdaFace's deviation stays as it was, where there is none; AdaCos keeps a scale that does not turn the loss."""
    head = AdaFace()
    head.observe(
        F.normalize(torch.ones(1, 4)), torch.tensor([3.0]), F.normalize(torch.rand(3, 1, 4)), torch.tensor([0])
    )
    assert head.mean == 3 and head.deviation == 100
    head, query = AdaCos(3), F.normalize(torch.tensor([[1.0, 0.0]])).expand(4, 2)
    centres = F.normalize(torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[-1.0, 0.1]]]), dim=-1)
    for _ in range(6):
        head.observe(query, torch.ones(4), centres, torch.zeros(4, dtype=torch.long))
        assert head.scale >= 1


def test_state_is_saved() -> None:
    """Scale, hardness, mean and deviation go on where they were."""
    raw, query, centres, label = inputs(1)
    for name in ("adacos", "curricularface", "adaface"):
        head, again = build(name), build(name)
        head.observe(query, raw.norm(dim=1), centres, label)
        assert any(not torch.equal(a, b) for a, b in zip(head.buffers(), again.buffers(), strict=True))
        again.load_state_dict(head.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(head.buffers(), again.buffers(), strict=True))


def test_what_a_margin_does_not_take() -> None:
    _, query, centres, label = inputs(1)
    with pytest.raises(ValueError, match="one positive for each query"):
        info_nce(query, centres, torch.stack([label, label], 1), 0.1, margin=ArcFace())
    with pytest.raises(ValueError, match="does not learn"):
        info_nce(query, centres, label, torch.tensor(0.1, requires_grad=True), margin=ArcFace())
