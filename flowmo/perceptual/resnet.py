"""ResNet-50 under torchvision's names, and the distance of its logits used in post-training (paper, section 3.3).

He et al., "Deep Residual Learning for Image Recognition", 2016; the stride sits on the 3 x 3 convolution.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.perceptual.weights import (
    RESNET50,
    FrozenNetwork,
    PathLike,
    WeightsMissing,
    check_pair,
    describe,
    he_init_,
    load_into,
    read_state_dict,
    smooth_pictures,
)

INPUT_SIZE = 224
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pictures in [0, 1]
_STD = (0.229, 0.224, 0.225)
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width of the 3 x 3 convolutions, blocks


class Bottleneck(nn.Module):
    """relu(shortcut(x) + 1x1 -> 3x3 -> 1x1 (x)), the output four times as wide as the middle."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4 width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet50(nn.Module):
    """[N, 3, H, W] normalised pictures -> [N, 1000] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, (width, blocks) in enumerate(_STAGES):
            stage = []
            for block in range(blocks):
                stage.append(Bottleneck(channels, width, stride=2 if i > 0 and block == 0 else 1))
                channels = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for i in range(len(_STAGES)):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


class ResNetDistance(FrozenNetwork):
    """Mean squared difference of ResNet-50 logits of two batches of pictures in [-1, 1]: (x, y) -> float32 [N].

    Pictures go to [0, 1], are resized to 224 x 224 (bilinear, antialiased) and normalised with ImageNet's mean and
    deviation. Weights and batch statistics are fixed, gradients reach both pictures.
    """

    def __init__(self, network: ResNet50, channels_last: bool = True) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.network = network
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.freeze_(channels_last)

    def features(
        self,
        x: Tensor,  # [N, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [N, 1000] float32
        """Logits."""
        x = x.float() * 0.5 + 0.5
        if x.shape[2:] != (INPUT_SIZE, INPUT_SIZE):
            x = F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std
        return self.network(x.to(self.network.conv1.weight.dtype)).float()

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two results of `features`, float32 [N]."""
        return (x - y).square().mean(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of pictures x and y, [N, 3, H, W] in [-1, 1] -> float32 [N]."""
        check_pair(x, y, "ResNetDistance", least=1)
        return self.distance(self.features(x), self.features(y))


def load_resnet_distance(
    kind: Literal["resnet50", "random", "none"] = "resnet50",
    weights: PathLike | None = None,
    *,
    seed: int = 0,
    channels_last: bool = True,
    option: str = "loss.resnet",  # the config key of `kind`; the path's key is option_weights
) -> ResNetDistance | None:
    """The logits distance that a config asks for; None for "none".

    Raises:
        WeightsMissing: names the file, its publisher and digest, and the ways on.
        WeightsInvalid: the file is damaged, altered, or of another network.
    """
    if kind == "none":
        return None
    if kind == "random":
        warnings.warn(f"{option}=random: the logits are those of a randomly initialised ResNet-50", stacklevel=2)
        return random_resnet_distance(seed, channels_last)
    if kind != "resnet50":
        raise ValueError(f"logits distance must be 'resnet50', 'random' or 'none', got {kind!r}")
    if weights is None or not Path(weights).is_file():
        raise WeightsMissing(
            f"{option}=resnet50 needs weights that are not here: {describe(RESNET50, f'{option}_weights')}"
            + ("" if weights is None else f" ({weights} is no file)")
            + f". Or go on without: {option}=none drops the term, {option}=random takes a random ResNet-50"
        )
    with torch.device("meta"):  # no default initialisation: it would cost time and the global random state
        network = ResNet50()
    load_into(network, read_state_dict(RESNET50, weights), weights)
    return ResNetDistance(network, channels_last)


def random_resnet_distance(seed: int = 0, channels_last: bool = True) -> ResNetDistance:
    """ResNet-50 with He-initialised convolutions, the same for the same seed.

    The batch statistics are taken from seeded smooth pictures, and the last layer is scaled so that unrelated ones are
    1 apart on average. Photographs differ more, by orders of magnitude: this is for trials, not for results.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = ResNet50()
    network.to_empty(device="cpu")
    he_init_(network, generator)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
                layer.momentum = 1.0  # one pass replaces the statistics
        network.fc.weight.normal_(0.0, network.fc.in_features**-0.5, generator=generator)
        network.fc.bias.zero_()
        pictures = F.interpolate(smooth_pictures(8, generator), size=INPUT_SIZE, mode="bilinear")
        distance = ResNetDistance(network, channels_last)
        network.train()
        distance.features(pictures)
        network.eval()
        logits = distance.features(pictures)
        network.fc.weight.mul_(distance.distance(logits[:4], logits[4:]).mean().rsqrt())
    return distance
