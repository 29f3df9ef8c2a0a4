"""Embeddings of photographs and of their queries in other styles, as a picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from spn4cir.backbones.freestyle import Freestyle
from spn4cir.dataset import Dataset
from spn4cir.errors import InputError
from spn4cir.images import ImageSource


def draw_embeddings(models: Mapping[str, Freestyle], dataset: Dataset, picture: Path, photos: int = 40) -> None:
    """Photographs and their queries by t-SNE, coloured by style and by content, one row for each model."""
    try:
        import matplotlib
        from sklearn.manifold import TSNE  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("the picture needs matplotlib and scikit-learn: pip install 'spn4cir[dev]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = next(iter(models.values())).style["names"]
    queries = [q for q in dataset.benchmark("test").queries if q.reference is not None and q.text is None]
    chosen = list(dict.fromkeys(q.targets[0] for q in queries))[:photos]
    items = [(i, 0, n) for n, i in enumerate(chosen)]
    items += [
        (str(q.reference), names.index(q.tags[0]), chosen.index(q.targets[0]))
        for q in queries
        if q.targets[0] in chosen
    ]
    styles, contents = np.array([s for _, s, _ in items]), np.array([c for _, _, c in items])
    figure, axes = pyplot.subplots(len(models), 2, figsize=(9, 4.2 * len(models)), layout="constrained", squeeze=False)
    for (title, model), (left, right) in zip(models.items(), axes, strict=True):
        with torch.no_grad():
            features = model.encode_image(ImageSource(dataset.image, model.transform).stack([i for i, _, _ in items]))
            queried = model.compose_image(features)
        vectors = torch.where(torch.from_numpy(styles)[:, None] == 0, features.target[:, 0], queried).numpy()
        places = TSNE(2, metric="cosine", init="random", perplexity=15, random_state=0).fit_transform(vectors)
        for n, (name, color) in enumerate(zip(names, ("#000000", "#0072b2", "#d55e00", "#009e73"), strict=False)):
            left.scatter(*places[styles == n].T, s=14, color=color, label=name)
        right.scatter(*places.T, s=14, c=contents, cmap="hsv")
        left.set_title(f"{title}: by style", fontsize=11)
        right.set_title(f"{title}: by photograph", fontsize=11)
        for one in (left, right):
            one.set_xticks([])
            one.set_yticks([])
    axes[0][0].legend(fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
