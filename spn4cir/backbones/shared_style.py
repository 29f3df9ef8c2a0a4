"""Style of a picture without its content: Gram matrices of convolutional features, whitened, beside style centres."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spn4cir.backbones.shared_weights import READS_WEIGHTS
from spn4cir.errors import InputError

CHANNELS = (64, 64, 128)
"""Output channels of VGG-19's first three convolutions; the third is its layer conv2_1."""
RANDOM_CHANNELS = (16, 16, 32)
"""Those of random filters, which take a tenth of the time."""
TORCHVISION_KEYS = tuple(f"features.{n}" for n in (0, 2, 5))
STYLE_TRANSFER_KEYS = ("2", "5", "9")  # after a 1 × 1 convolution of colours, "0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOG_FLOOR = 1e-6
"""Added to an entry of a Gram matrix before its logarithm."""
VARIANCE_FLOOR = 1e-3
"""Principal components of less than this part of the first one's variance are left out, as they would blow up noise."""


class StyleFilters(nn.Module):
    """VGG-19 up to relu2_1 with reflection padding, and the logarithm of the Gram matrix of its features.

    Args:
        source: ``random`` (fewer filters, drawn with a fixed seed); ``torchvision`` (its ImageNet weights, from its
            cache or from the network); or a file of weights, of torchvision's ``vgg19`` or of the normalised VGG that
            style transfer uses.

    Raises ``InputError`` if there are no such weights.

    Source: Gatys et al., "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016; the layer is that of Li
    et al., "FreestyleRet: Retrieving Images from Style-Diversified Queries", ECCV 2024.
    """

    def __init__(self, source: str = "random"):
        super().__init__()
        channels = RANDOM_CHANNELS if source == "random" else CHANNELS
        self.outputs = channels[-1] * (channels[-1] + 1) // 2
        pairs = zip((3, *channels), channels, strict=False)
        layers = [nn.Conv2d(i, o, 3, padding=1, padding_mode="reflect") for i, o in pairs]
        chance = torch.Generator().manual_seed(0)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=chance)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        if source != "random" and READS_WEIGHTS.get():
            self.load_state_dict(read_filters(source))
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """RGB in [0, 1] (B, 3, H, W) → upper triangle of the logarithm of the Gram matrix, (B, G).

        ``log(F Fᵀ / (H·W) + 1e-6)`` for features F (C, H·W); G = C (C + 1) / 2 is 8256, or 528 of random filters.
        """
        first, second, third = self.layers
        x = F.max_pool2d(second(first(pixels).relu()).relu(), 2)
        x = third(x).relu().flatten(2)  # (B, C, H·W)
        gram = x @ x.transpose(1, 2) / x.shape[2]  # (B, C, C)
        rows, columns = torch.triu_indices(gram.shape[1], gram.shape[1], device=gram.device)
        logs: Tensor = (gram[:, rows, columns] + LOG_FLOOR).log()
        return logs


def read_filters(source: str) -> dict[str, Tensor]:
    """Weights of ``StyleFilters``, for RGB in [0, 1]. Raises ``InputError`` if there are none."""
    advice = "give a file of torchvision's vgg19 or of a normalised VGG, or filters: random"
    try:
        if source == "torchvision":
            import torchvision

            state: Mapping[str, Tensor] = torchvision.models.vgg19(weights="IMAGENET1K_V1").state_dict()
        elif source.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(source)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, of the file system, of a file that is none
        said = " ".join(str(error).split())[:200]
        raise InputError(f"filters: no weights from {source} ({advice}): {said}") from None
    try:
        return convert_filters(state)
    except InputError as error:
        raise InputError(f"filters: {source} {error}; {advice}") from None


def convert_filters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of torchvision's ``vgg19``, or of a normalised VGG, under the names of ``StyleFilters``.

    What they do to colours first, ``x → A x + b``, joins the first convolution: exact, as padding only repeats pixels.
    Raises ``InputError`` for another state dict.
    """
    kinds = (TORCHVISION_KEYS, STYLE_TRANSFER_KEYS)
    keys = next((keys for keys in kinds if all(f"{key}.weight" in state for key in keys)), None)
    shapes = [state[f"{key}.weight"].shape for key in keys or ()]
    if shapes != [(o, i, 3, 3) for i, o in zip((3, *CHANNELS), CHANNELS, strict=False)]:
        raise InputError("holds neither torchvision's vgg19 nor a normalised VGG")
    assert keys is not None
    places = [(f"layers.{n}.{part}", f"{key}.{part}") for n, key in enumerate(keys) for part in ("weight", "bias")]
    found = {own: state[theirs].float() for own, theirs in places}
    if keys == TORCHVISION_KEYS:
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        matrix, offset = torch.diag(1 / std), -mean / std
    else:
        matrix, offset = state["0.weight"].float()[:, :, 0, 0], state["0.bias"].float()
    kernel = found["layers.0.weight"]
    found["layers.0.bias"] = found["layers.0.bias"] + torch.einsum("oihw,i->o", kernel, offset)
    found["layers.0.weight"] = torch.einsum("oihw,ij->ojhw", kernel, matrix)
    return found


class StyleSpace(nn.Module):
    """Whitened style vectors, and a centre for each style: ``w = softmax(cos(v, μ) / temperature)``.

    Args:
        inputs: G, entries of a Gram matrix.
        styles: number of centres S.
        width: dimensions d of a style vector: the first principal components of the logarithms of Gram matrices.
        temperature: divisor of the cosines.

    Source: Li et al., ECCV 2024, whose centres lie in the space of prompts, without whitening and at temperature 1.
    """

    mean: Tensor
    components: Tensor
    centres: Tensor
    is_fitted: Tensor

    def __init__(self, inputs: int, styles: int, width: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("components", torch.zeros(inputs, width))
        self.register_buffer("centres", torch.zeros(styles, width))
        self.register_buffer("is_fitted", torch.tensor(0))

    def forward(self, grams: Tensor) -> Tensor:
        """Logarithms of Gram matrices (B, G) → style vectors (B, d) of unit variance."""
        return (grams - self.mean) @ self.components

    def weights(self, vectors: Tensor) -> Tensor:
        """Style vectors (B, d) → how near each centre is, (B, S), summing to 1."""
        cosines = F.normalize(vectors, dim=-1) @ F.normalize(self.centres, dim=-1).T  # (B, S)
        return (cosines / self.temperature).softmax(-1)

    @torch.no_grad()
    def fit(self, grams: Tensor, labels: Sequence[int] | None, seed: int = 0) -> None:
        """Set mean, components and centres by the logarithms of Gram matrices (N, G).

        Args:
            labels: style of each; None finds the centres by k-means.

        Raises ``InputError`` for too few pictures.
        """
        if len(grams) < 2 * len(self.centres):
            raise InputError(f"{len(self.centres)} styles need two pictures each, got {len(grams)} in all")
        rows = grams.double()
        mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-6)
        rows = (rows - mean) / deviation  # (N, G)
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending; right singular vectors are rowsᵀ u / √value
        count = min(self.components.shape[1], len(rows) - 1)
        values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
        is_kept = values > VARIANCE_FLOOR * values[0]
        values, vectors, count = values[is_kept], vectors[:, is_kept], int(is_kept.sum())
        whitening = rows.T @ vectors / values * (len(rows) - 1) ** 0.5  # (G, count)
        self.mean.copy_(mean)
        self.components.zero_()
        self.components[:, :count] = (whitening / deviation[:, None]).to(self.components)
        points = self(grams)  # (N, d)
        if labels is None:
            self.centres.copy_(kmeans(points, len(self.centres), seed))
        else:
            at = torch.tensor(labels, device=points.device)
            self.centres.copy_(torch.stack([points[at == n].mean(0) for n in range(len(self.centres))]))
        self.is_fitted.fill_(1)


def kmeans(points: Tensor, count: int, seed: int = 0, rounds: int = 100) -> Tensor:
    """Directions (count, d), of unit norm, of clusters of points (N, d) by their cosines, as ``weights`` compares them.

    Lloyd's algorithm on unit vectors, from the best of five starts by k-means++.
    """
    points, chance = F.normalize(points, dim=-1), torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(5):
        centres = points[torch.randint(len(points), (1,), generator=chance)]
        while len(centres) < count:
            apart = (1 - points @ centres.T).amin(1).clamp(min=0).cpu() + 1e-12
            centres = torch.cat([centres, points[torch.multinomial(apart, 1, generator=chance)]])
        for _ in range(rounds):
            nearest = (points @ centres.T).argmax(1)
            moved = [points[nearest == n].mean(0) if (nearest == n).any() else centres[n] for n in range(count)]
            before, centres = centres, F.normalize(torch.stack(moved), dim=-1)
            if torch.equal(before, centres):
                break
        score = (points @ centres.T).amax(1).sum().item()
        if best is None or score > best[0]:
            best = score, centres
    assert best is not None
    return best[1]
