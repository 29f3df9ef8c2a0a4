"""Queries that lack their reference, whose features are then zeros, or their text, which is then empty."""

import pytest
import torch
from tiny_backbones import COMPOSED
from torch import Tensor

from spn4cir.backbone import Backbone
from spn4cir.backbones import build_backbone
from spn4cir.types import ImageFeatures

TEXTS = ["make it red", "a blue one", "", "", "the same, but with two dots and a longer name", ""]
LACKS_REFERENCE = [0, 3, 4]
"""Rows without a reference; the fourth has no text either, and the second, third and sixth have one."""


@pytest.fixture(scope="module", params=COMPOSED)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """The embedded model, in eval mode."""
    return build_backbone(request.param)


@pytest.fixture(scope="module")
def reference(backbone: Backbone) -> Tensor:
    """(B, L, D), zeros where there is none."""
    side = backbone.transform.size  # type: ignore[attr-defined]
    pixels = torch.randn(len(TEXTS), 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone.encode_image(pixels).reference
    features[LACKS_REFERENCE] = 0
    return features


def test_mixed_rows_are_each_alone(backbone: Backbone, reference: Tensor) -> None:
    """Finite and of unit norm, whatever a row lacks, and the same as in a batch of its own."""
    with torch.no_grad():
        queries = backbone.compose(reference, backbone.tokenize(TEXTS)).query
        rows = [(reference[n : n + 1], backbone.tokenize(TEXTS[n : n + 1])) for n in range(len(TEXTS))]
        alone = [backbone.compose(*row).query for row in rows]
    assert queries.isfinite().all() and float((queries.norm(dim=-1) - 1).abs().max()) <= 1e-5
    assert float((queries - torch.cat(alone)).abs().max()) <= 1e-5


def test_the_part_that_is_there_is_read(backbone: Backbone, reference: Tensor) -> None:
    """Negative control: other texts, and other references, give other queries."""
    with torch.no_grad():
        queries = backbone.compose(reference, backbone.tokenize(TEXTS)).query
    apart = torch.pdist(queries[[0, 1, 2, 4, 5]])
    assert float(apart.min()) > 1e-3


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_are_finite(backbone: Backbone, reference: Tensor, mode: str) -> None:
    """Of the weights and of the reference, also with dropout, and of the terms that stage 1 adds."""
    features = reference.clone().requires_grad_()
    backbone.zero_grad()
    composed = backbone.train(mode == "train").compose(features, backbone.tokenize(TEXTS))
    target = torch.randn(len(TEXTS), 1, composed.query.shape[1], generator=torch.Generator().manual_seed(1))

    def contrast(query: Tensor, target: Tensor) -> Tensor:
        return torch.einsum("be,bke->b", query, target).mean()

    terms = backbone.extra_losses(composed, ImageFeatures(torch.ones_like(features), target), contrast)  # type: ignore[arg-type]
    sum([contrast(composed.query, target), *terms.values()]).backward()  # type: ignore[union-attr]
    backbone.eval()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert gradients and features.grad is not None
    broken = [name for name, grad in gradients.items() if not grad.isfinite().all()]
    assert not broken and features.grad.isfinite().all()
