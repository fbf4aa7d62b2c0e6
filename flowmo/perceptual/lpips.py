"""LPIPS: with VGG-16 the perceptual distance of the pre-training loss (paper, section 3.2), with AlexNet a metric.

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2,  |f| = sqrt(sum_c f_c^2 + eps)

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, equation 1. There eps is
added outside the square root, whose slope is then infinite where all features are zero; inside, it is bounded.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmo.perceptual import alexnet, vgg
from flowmo.perceptual.alexnet import AlexNetFeatures
from flowmo.perceptual.vgg import CHANNELS, VGG16Features
from flowmo.perceptual.weights import (
    ALEXNET,
    LPIPS_ALEX_HEADS,
    LPIPS_VGG_HEADS,
    VGG16,
    FrozenNetwork,
    PathLike,
    PublishedFile,
    WeightsInvalid,
    WeightsMissing,
    check_pair,
    describe,
    he_init_,
    load_into,
    read_state_dict,
    smooth_pictures,
)

EPS = 1e-10

# mean and deviation of ImageNet's pictures in [-1, 1], as LPIPS rounds them
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LPIPS(FrozenNetwork):
    """Perceptual distance of two batches of pictures in [-1, 1]: (x, y) -> float32 [N].

    Weights are fixed, gradients reach both pictures. `features` and `distance` are the two halves of the call, for
    targets that are compared more than once. The convolutions run in the trunk's dtype (or autocast's), everything
    behind them in fp32.
    """

    def __init__(self, trunk: VGG16Features | AlexNetFeatures, heads: list[Tensor], channels_last: bool = True) -> None:
        """`heads`: five weight vectors [C_l], one a stage."""
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.trunk = trunk
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.heads = nn.ParameterList(nn.Parameter(head.float().view(1, -1, 1, 1)) for head in heads)
        self.freeze_(channels_last)

    def features(
        self,
        x: Tensor,  # [N, 3, H, W] in [-1, 1]
    ) -> list[Tensor]:  # five float32 [N, C_l, H / 2^l, W / 2^l], of unit length along C_l
        """Feature maps normalised along the channels."""
        x = (x.float() - self.shift) / self.scale
        return [_unit(f) for f in self.trunk(x.to(next(self.trunk.parameters()).dtype))]

    def distance(self, x: list[Tensor], y: list[Tensor]) -> Tensor:
        """Distance of two results of `features`, float32 [N]."""
        stages = zip(x, y, self.heads)
        return torch.stack([((f - g).square() * w).sum(1).mean((1, 2)) for f, g, w in stages]).sum(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of pictures x and y, [N, 3, H, W] in [-1, 1], H and W at least 16 (AlexNet: 32) -> float32 [N]."""
        check_pair(x, y, "LPIPS", least=self.trunk.least)
        return self.distance(self.features(x), self.features(y))


def _unit(f: Tensor) -> Tensor:
    f = f.float()
    return f * torch.rsqrt(f.square().sum(1, keepdim=True) + EPS)


def load_perceptual(
    kind: str = "lpips",  # lpips | random | none
    weights: PathLike | None = None,
    heads: PathLike | None = None,
    *,
    seed: int = 0,
    channels_last: bool = True,
) -> LPIPS | None:
    """The perceptual distance that a config asks for; None for "none".

    Args:
        kind: "lpips": published weights. "random": a VGG-16 with random weights made from `seed`, a multi-scale
            comparison of edges and textures without any learned judgement; says so in a warning. "none".
        weights: file of the VGG-16 trunk (classifier weights in it are ignored), .pth or .safetensors.
        heads: file of the LPIPS heads; by default the one inside an installed torchmetrics.
        channels_last: keep the convolutions in that memory format.

    Raises:
        WeightsMissing: one message naming every missing file, its publisher and digest, and the ways on.
        WeightsInvalid: a file is damaged, altered, or of another network.
    """
    if kind == "none":
        return None
    if kind == "random":
        warnings.warn(
            "loss.perceptual=random: the perceptual distance uses a randomly initialised VGG-16, not LPIPS",
            stacklevel=2,
        )
        return random_lpips(seed, channels_last)
    if kind != "lpips":
        raise ValueError(f"perceptual distance must be 'lpips', 'random' or 'none', got {kind!r}")

    try:
        return load_lpips(
            "vgg", weights, heads, options=("loss.perceptual_weights", "loss.perceptual_heads"),
            channels_last=channels_last,
        )  # fmt: skip
    except WeightsMissing as error:
        raise WeightsMissing(
            f"loss.perceptual=lpips: {error}. Or go on without: "
            "loss.perceptual=none drops the term, loss.perceptual=random takes a randomly initialised VGG-16"
        ) from None


def load_lpips(
    net: str,  # vgg | alex
    weights: PathLike | None,
    heads: PathLike | None = None,
    *,
    options: tuple[str, str],
    channels_last: bool = True,
) -> LPIPS:
    """LPIPS with the published weights of one of its two trunks.

    Args:
        weights: file of the trunk (classifier weights in it are ignored), .pth or .safetensors.
        heads: file of the LPIPS heads; by default the one inside an installed torchmetrics.
        options: names of the two options that take these paths, for error messages.

    Raises:
        WeightsMissing: one message naming every missing file, its publisher and digest.
        WeightsInvalid: a file is damaged, altered, or of another network.
    """
    published, published_heads, channels, make = _NETS[net]
    heads = heads if heads is not None else _installed_heads(published_heads.name)
    missing = []
    for file, path, option in ((published, weights, options[0]), (published_heads, heads, options[1])):
        if path is None or not Path(path).is_file():
            missing.append(describe(file, option) + ("" if path is None else f" ({path} is no file)"))
    if missing:
        raise WeightsMissing(f"LPIPS ({net}) needs weights that are not here: " + ". And ".join(missing))
    assert weights is not None and heads is not None

    with torch.device("meta"):  # no default initialisation: it would cost time and the global random state
        trunk = make()
    state = read_state_dict(published, weights)
    load_into(trunk, {name: t for name, t in state.items() if not name.startswith("classifier.")}, weights)
    return LPIPS(trunk, _read_heads(heads, published_heads, channels), channels_last)


def random_lpips(seed: int = 0, channels_last: bool = True, net: str = "vgg") -> LPIPS:
    """LPIPS over a trunk with He-initialised weights, the same for the same seed.

    Biases are random too: without them, normalised features would not see contrast. The features of random ReLU
    networks grow alike with depth, so each stage is weighted by the reciprocal of its mean distance between unrelated
    smooth pictures: every stage then counts one fifth, and unrelated pictures are about 1 apart.
    """
    generator = torch.Generator().manual_seed(seed)
    _, _, channels, make = _NETS[net]
    with torch.device("meta"):
        trunk = make()
    trunk.to_empty(device="cpu")
    he_init_(trunk, generator, bias_std=0.1)
    plain = LPIPS(trunk, [torch.ones(width) for width in channels], channels_last=False)
    with torch.no_grad():
        maps = plain.features(smooth_pictures(8, generator))
    apart = [(f[:4] - f[4:]).square().sum(1).mean() for f in maps]
    return LPIPS(trunk, [(1 / (5 * d)).expand(c) for d, c in zip(apart, channels)], channels_last)


def _installed_heads(name: str = LPIPS_VGG_HEADS.name) -> Path | None:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), "functional", "image", "lpips_models", name)
    return path if path.is_file() else None


def _read_heads(
    path: PathLike, published: PublishedFile = LPIPS_VGG_HEADS, channels: tuple[int, ...] = CHANNELS
) -> list[Tensor]:
    state = read_state_dict(published, path)
    names = [f"lin{i}.model.1.weight" for i in range(5)]
    shapes = [(1, width, 1, 1) for width in channels]
    if set(state) != set(names) or any(tuple(state[n].shape) != s for n, s in zip(names, shapes)):
        found = {name: list(tensor.shape) for name, tensor in state.items()}
        raise WeightsInvalid(f"{path} does not hold the five LPIPS heads {dict(zip(names, shapes))}, but {found}")
    return [state[name].flatten() for name in names]


_NETS: dict[str, tuple[PublishedFile, PublishedFile, tuple[int, ...], type[VGG16Features] | type[AlexNetFeatures]]] = {
    "vgg": (VGG16, LPIPS_VGG_HEADS, vgg.CHANNELS, VGG16Features),
    "alex": (ALEXNET, LPIPS_ALEX_HEADS, alexnet.CHANNELS, AlexNetFeatures),
}
