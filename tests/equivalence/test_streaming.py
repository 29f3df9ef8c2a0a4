"""info_nce in blocks, fused or not, against all scores at once: values and every gradient."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spn4cir import streaming
from spn4cir.losses import Shard, info_nce
from spn4cir.streaming import CandidateMask, Softmax, join, pooled, streaming_softmax

N, E, B, T = 101, 16, 6, 0.07


def l2_normalize(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def candidates_of(k: int) -> Tensor:
    """(N, K, E); 40 and 41 are equal, and 60 is nearly 3."""
    found = l2_normalize(N, k, E, seed=1)
    found[41] = found[40]
    found[60] = F.normalize(found[3] + 0.05 * l2_normalize(k, E, seed=2), dim=-1)
    return found


ONE = torch.tensor([3, 100, 40, 41, 0, 40])
SEVERAL = torch.tensor([[3, 9, -1], [100, -1, -1], [40, 41, 7], [-1, 41, -1], [0, 100, -1], [40, -1, -1]])
IGNORE = torch.tensor([[0, 0, 2, 2, 3, 5], [3, 77, 41, 0, 40, 100]])  # (0, 3) is a positive: it stays


def dense(
    query: Tensor, candidates: Tensor, positives: Tensor, t: Tensor, ignore: Tensor | None, threshold: float | None
) -> Tensor:
    """The formula with all scores in memory, in the type of the query."""
    candidates = candidates.to(query.dtype)
    scores = torch.einsum("be,nke->bnk", query, candidates).amax(2) / t  # (B, N)
    means = F.normalize(candidates.detach().mean(1), dim=-1)
    like = (means @ means.T).tolist()  # (N, N)
    terms = []
    for i, mine in enumerate(positives.view(len(query), -1).tolist()):
        mine = [p for p in mine if p >= 0]
        left_out = set() if ignore is None else {int(j) for a, j in ignore.T if a == i}
        if threshold is not None:
            left_out |= {j for j in range(len(candidates)) if any(like[p][j] > threshold for p in mine)}
        for p in mine:
            summed = [j for j in range(len(candidates)) if j == p or (j not in mine and j not in left_out)]
            terms.append(scores[i, summed].logsumexp(0) - scores[i, p])
    return torch.stack(terms).mean()


def found(loss, query: Tensor, candidates: Tensor, *about: object, learned: bool = False) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The loss, and its gradients by query, temperature, and candidates if they learn."""
    leaves = [query.clone().requires_grad_(), torch.tensor(T, dtype=query.dtype).requires_grad_()]
    if learned:
        leaves.append(candidates.clone().requires_grad_())
    value = loss(leaves[0], leaves[2] if learned else candidates, about[0], leaves[1], *about[1:])
    return [value.detach(), *torch.autograd.grad(value * 3, leaves)]


def near(one: list[Tensor], two: list[Tensor], bound: float) -> bool:
    """Whether each is as near to the other as a share of its norm."""
    assert [part.shape for part in one] == [part.shape for part in two]
    return all(
        float((a.double() - b.double()).norm()) <= bound * float(b.norm()) for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(params=["fused", "fused, heads", "plain"])
def ragged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small blocks of which the last is shorter; each way to compute one. 64 keys are enough for several heads."""
    monkeypatch.setattr(streaming, "NUMBERS", {"cpu": 7 * E})
    monkeypatch.setattr(streaming, "SCORES", {"cpu": 4 * 7 * B})
    if request.param == "plain":
        monkeypatch.setattr(streaming, "FUSED", {})
    if request.param == "fused, heads":
        monkeypatch.setattr(streaming, "FUSED", {"cpu": 3})
        monkeypatch.setattr(streaming, "LEAST", 2)
    streaming.fused.cache_clear()
    yield request.param
    streaming.fused.cache_clear()


CASES = list(itertools.product([1, 3], [ONE, SEVERAL], [None, IGNORE], [None, 0.9], [False, True]))


@pytest.mark.parametrize(("k", "positives", "ignore", "threshold", "learned"), CASES)
def test_blocks_equal_all_at_once(
    k: int, positives: Tensor, ignore: Tensor | None, threshold: float | None, learned: bool, ragged: str
) -> None:
    """One and several positives, pairs and similar candidates left out, frozen candidates or not."""
    query, candidates, about = l2_normalize(B, E), candidates_of(k), (positives, ignore, threshold)
    fast = found(info_nce, query, candidates, *about, learned=learned)
    assert near(fast, found(dense, query, candidates, *about, learned=learned), 1e-12)


def test_each_option_matters() -> None:
    """Negative control: without what is left out, or with another candidate, loss and gradients are others."""
    query, candidates = l2_normalize(B, E), candidates_of(1)
    whole = found(info_nce, query, candidates, ONE, IGNORE, 0.9)
    for other in [(ONE, None, 0.9), (ONE, IGNORE, None), (ONE.roll(1), IGNORE, 0.9)]:
        assert not near(whole, found(info_nce, query, candidates, *other), 1e-6)
    moved = candidates.clone()
    moved[100] *= -1  # of the ragged block
    assert not near(whole, found(info_nce, query, moved, ONE, IGNORE, 0.9), 1e-4)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("kept", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-6), (torch.bfloat16, 2e-6)])
def test_single_precision_is_near_double(k: int, kept: torch.dtype, bound: float, learned: bool, ragged: str) -> None:
    """Whatever candidates are stored in, scores are in single precision: only storing them loses digits."""
    query, candidates = l2_normalize(B, E).float(), candidates_of(k).to(kept)
    about = (SEVERAL, IGNORE, None)
    exact = found(dense, query.double(), candidates.double(), *about, learned=learned)
    fast = found(info_nce, query, candidates, *about, learned=learned)
    assert fast[0].dtype == torch.float32
    assert near(fast[:3], exact[:3], bound)
    assert not near(fast[:3], found(dense, query.double(), candidates_of(k), *about)[:3], bound) or kept.itemsize > 2
    if learned:
        assert fast[3].dtype == kept and near([fast[3]], [exact[3]], max(bound, torch.finfo(kept).eps))


def test_large_scores_lose_no_digits() -> None:
    """Scores in the hundreds that differ by little: a logarithm of their sum would have too few digits."""
    query, candidates = 10 * l2_normalize(B, E).float(), candidates_of(1).float() * 4
    base = candidates[:1].clone()
    candidates = base + 0.01 * candidates  # all alike
    exact = found(dense, query.double(), candidates.double(), ONE, None, None, learned=True)
    fast = found(info_nce, query, candidates, ONE, None, None, learned=True)
    assert exact[0] > 0.1 and float((query @ base[0].T).abs().max()) / T > 300
    assert near(fast, exact, 3e-5)


def test_mixed_precision_ends_where_scores_begin(ragged: str) -> None:
    """Inside autocast nothing is rounded, in the backward pass neither."""
    query, candidates = l2_normalize(B, E).float(), candidates_of(3).float()
    plain = found(info_nce, query, candidates, ONE, None, 0.9, learned=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = found(info_nce, query, candidates, ONE, None, 0.9, learned=True)
    assert all(a.equal(b) for a, b in zip(plain, mixed, strict=True))
    with torch.autocast("cpu", torch.bfloat16):  # negative control: products there are rounded
        assert not near([query @ query.T], [query.double() @ query.double().T], 1e-5)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor holds that is made, but for one with as many as ``spare``, a given one."""

    def __init__(self, spare: int):
        super().__init__()
        self.spare, self.most = spare, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() != self.spare:
                self.most = max(self.most, tensor.numel())
        return made


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("ignore", [None, IGNORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_does_not_grow_with_candidates(
    k: int, ignore: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four times as many candidates no larger tensor is made, forward or backward; all scores would be larger."""
    monkeypatch.setattr(streaming, "NUMBERS", {"cpu": 200 * E})
    monkeypatch.setattr(streaming, "SCORES", {"cpu": 4 * 100 * B})
    streaming.fused("cpu", torch.float32, E)  # is tried on a problem of its own
    most = []
    for count in (1000, 4000):
        query, candidates = l2_normalize(B, E).float().requires_grad_(), l2_normalize(count, k, E).to(dtype)
        with Largest(candidates.numel()) as seen:
            info_nce(query, candidates, ONE, T, ignore).backward()
        most.append(seen.most)
    assert most[0] == most[1] < 4000 * B
    with Largest(candidates.numel()) as seen:  # negative control
        F.cross_entropy((query @ candidates[:, 0].float().T) / T, ONE).backward()
    assert seen.most >= 4000 * B


@pytest.mark.parametrize("width", [16, 32, 64])
def test_layout_in_memory_does_not_matter(width: int, ragged: str) -> None:
    """Queries and candidates whose numbers lie column by column, or between others, as transposing leaves them.

    A fused kernel that takes a query's layout for that of its result gave a right loss and a gradient of noise.
    """
    query, candidates = l2_normalize(4, width).float(), l2_normalize(3000, 1, width, seed=1).float()
    about = (torch.tensor([0, 5, 2999, 17]), None, None)
    plain = found(info_nce, query, candidates, *about)
    columns, between = query.T.contiguous().T, torch.stack([query, -query], 2)[..., 0]
    wide = torch.cat([candidates, candidates], 2)[..., :width]
    turned = candidates.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not columns.is_contiguous() and not between.is_contiguous() and not turned.is_contiguous()
    for strange, others in ((columns, candidates), (between, wide), (columns, turned)):
        leaf = strange.detach().requires_grad_()
        loss = info_nce(leaf, others, about[0], T)
        assert near([loss.detach(), torch.autograd.grad(loss * 3, leaf)[0]], plain[:2], 1e-5)


def test_a_threshold_of_nought_is_one() -> None:
    """Whatever is similar at all is left out."""
    query, candidates = l2_normalize(B, E), candidates_of(1)
    some = found(info_nce, query, candidates, ONE, None, 0.0)
    assert near(some, found(dense, query, candidates, ONE, None, 0.0), 1e-12)
    assert not near(some, found(info_nce, query, candidates, ONE, None, None), 1e-4)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_is_above_nought(temperature: float) -> None:
    with pytest.raises(ValueError, match="a temperature is above 0"):
        info_nce(l2_normalize(B, E), candidates_of(1), ONE, temperature)


def test_nothing_left_is_no_candidate() -> None:
    """A block, or all of them, in which a query has nothing left: no NaN, and the positive alone costs nothing."""
    query, candidates = l2_normalize(2, E), l2_normalize(12, 1, E, seed=1)
    everything = torch.tensor(list(itertools.product([0], range(12)))).T
    loss, by_query, by_temperature = found(
        info_nce, query, candidates, torch.tensor([[3, -1], [4, 5]]), everything, None
    )
    expected = found(dense, query, candidates, torch.tensor([[3, -1], [4, 5]]), everything, None)
    assert near([loss, by_query, by_temperature], expected, 1e-12) and not by_query[0].abs().max() > 1e-14
    none = torch.zeros(2, 0, dtype=torch.long)
    empty = streaming_softmax(query, candidates[:0], CandidateMask(none, none))
    assert empty.top.isneginf().all() and not empty.total.any() and not empty.mean.any()
    whole = streaming_softmax(query, candidates, CandidateMask(none, none))
    for joined in (join(empty, whole), join(whole, empty)):
        assert all(a.equal(b) for a, b in zip(joined, whole, strict=True))
    assert isinstance(join(empty, empty), Softmax) and join(empty, empty).mean.isfinite().all()


def test_a_shard_of_one_process_is_the_whole() -> None:
    """A shard that holds all is the same as its vectors; a positive elsewhere is an error."""
    query, candidates = l2_normalize(B, E), candidates_of(1)
    assert info_nce(query, Shard(candidates), ONE, T) == info_nce(query, candidates, ONE, T)
    with pytest.raises(ValueError, match="row 100, which no candidate has"):
        info_nce(query, Shard(candidates[:100]), ONE, T)


def test_images_of_several_vectors_are_compared_by_their_mean() -> None:
    vectors = l2_normalize(5, 3, E)
    assert torch.allclose(pooled(vectors), F.normalize(vectors.mean(1), dim=-1))
    assert pooled(vectors[:, :1]).equal(vectors[:, 0])


def test_it_is_differentiated_once() -> None:
    """A second derivative is refused, not wrong."""
    query = l2_normalize(B, E).requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(query, candidates_of(1), ONE, T), query, create_graph=True)
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_blocks_from_elsewhere_come_in_order_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where candidates are not on the query's device, the next block is copied while one is in use."""
    rows, asked = torch.arange(10.0).view(10, 1, 1), []
    plain = Tensor.__getitem__
    monkeypatch.setattr(Tensor, "__getitem__", lambda self, key: (asked.append(key), plain(self, key))[1])
    reader = streaming._ahead(rows, [0, 4, 8, 10], torch.device("meta"))
    assert [len(next(reader)) for _ in range(3)] == [4, 4, 2] and next(reader, None) is None
    assert asked == [slice(0, 4), slice(4, 8), slice(8, 10)]
    asked.clear()
    reader = streaming._ahead(rows, [0, 4, 8, 10], torch.device("meta"))
    next(reader)
    next(reader)
    reader.close()
    assert asked[:2] == [slice(0, 4), slice(4, 8)]


# --- which kernel -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    streaming.fused.cache_clear()
    yield monkeypatch
    streaming.fused.cache_clear()


def test_fused_attention_serves_here() -> None:
    """On a CPU, for all widths of the published models; elsewhere it is asked for by name."""
    assert all(streaming.fused("cpu", torch.float32, width) for width in (128, 256, 512, 640, 768))
    assert not streaming.fused("xla", torch.float32, 256)


def test_fused_attention_is_used_where_nothing_is_hidden(kernels: pytest.MonkeyPatch) -> None:
    """Of ragged blocks, those with pairs are computed plainly, the others are not."""
    plain, used = streaming._attention, []
    query, candidates = l2_normalize(B, E), candidates_of(1)
    streaming.fused("cpu", torch.float64, E)
    kernels.setattr(streaming, "SCORES", {"cpu": 10 * B})
    kernels.setattr(streaming, "_attention", lambda q, keys: (used.append(len(keys)), plain(q, keys))[1])
    info_nce(query, candidates, ONE, T, torch.tensor([[0, 1], [55, 99]]))
    assert used == [10] * 5 + [10] * 3 + [1]  # not rows 50 to 59 and 90 to 99


def test_a_wrong_kernel_is_said_and_not_used(kernels: pytest.MonkeyPatch) -> None:
    """A fused kernel whose numbers are off is found on a small problem, and named."""
    plain = streaming._attention
    kernels.setattr(streaming, "_attention", lambda q, keys: plain(q, keys)._replace(mean=plain(q, keys).mean * 1.01))
    with pytest.warns(UserWarning, match="fused attention is wrong on cpu for vectors of 16 torch.float32"):
        assert not streaming.fused("cpu", torch.float32, E)
    assert math.isfinite(float(info_nce(l2_normalize(B, E).float(), candidates_of(1).float(), ONE, T)))


def test_a_missing_kernel_is_not_used(kernels: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Softmax:
        raise RuntimeError("no kernel for this width")

    kernels.setattr(streaming, "_attention", missing)
    assert not streaming.fused("cpu", torch.float32, E)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [64, 256, 512, 640, 768])
def test_blocks_on_a_gpu(width: int) -> None:
    """There too, fused or not, resident or read ahead."""
    query, candidates = l2_normalize(B, width).float(), l2_normalize(5000, 1, width, seed=1).float()
    exact = found(dense, query.double(), candidates.double(), ONE, None, None)
    for place in (candidates.cuda(), candidates):
        leaf = query.cuda().requires_grad_()
        loss = info_nce(leaf, place, ONE.cuda(), T)
        assert near([loss.detach().cpu(), torch.autograd.grad(loss * 3, leaf)[0].cpu()], exact[:2], 1e-4)
