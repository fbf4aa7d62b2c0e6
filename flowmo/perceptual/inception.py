"""Inception v3 as evaluations of generative models use it, and the features of FID, sFID and Inception Score.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, in the variant of TensorFlow's
classifier of 2015-12-05, under the state-dict keys of its port to PyTorch by the pytorch-fid project: average pooling
does not count the padding, the last block pools by maximum, and there are 1008 classes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.data.transforms import to_uint8
from flowmo.perceptual.weights import (
    FrozenNetwork,
    PathLike,
    PublishedFile,
    WeightsMissing,
    describe,
    he_init_,
    load_into,
    read_state_dict,
)

INCEPTION = PublishedFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    "by the pytorch-fid project in its release 'fid_weights' (the torch-fidelity project publishes the same weights)",
)
INPUT_SIZE = 299
POOL = 2048  # features of FID
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, 17 x 17: the 2023 features of sFID
RESIZES = ("tf1", "half_pixel")


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        pair = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (pair[0] // 2, pair[1] // 2)
        self.conv = nn.Conv2d(before, after, pair, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def valid(self) -> ConvBN:
        """The same without padding."""
        self.conv.padding = (0, 0)
        return self


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Block35(nn.Module):
    """35 x 35: 1x1, 5x5 and double 3x3 branches beside a pooled one."""

    def __init__(self, before: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBN(before, 64, 1)
        self.branch5x5_1 = ConvBN(before, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5)
        self.branch3x3dbl_1 = ConvBN(before, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean3(x))], 1)


class Reduce35(nn.Module):
    """35 x 35 x 288 -> 17 x 17 x 768."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvBN(288, 384, 3, 2).valid()
        self.branch3x3dbl_1 = ConvBN(288, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, 2).valid()

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Block17(nn.Module):
    """17 x 17: factorised 7x7 branches of inner width `c`."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBN(768, 192, 1)
        self.branch7x7_1 = ConvBN(768, c, 1)
        self.branch7x7_2 = ConvBN(c, c, (1, 7))
        self.branch7x7_3 = ConvBN(c, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBN(768, c, 1)
        self.branch7x7dbl_2 = ConvBN(c, c, (7, 1))
        self.branch7x7dbl_3 = ConvBN(c, c, (1, 7))
        self.branch7x7dbl_4 = ConvBN(c, c, (7, 1))
        self.branch7x7dbl_5 = ConvBN(c, 192, (1, 7))
        self.branch_pool = ConvBN(768, 192, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output and, first of its channels, the 1x1 branch alone."""
        one = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, self.branch_pool(_mean3(x))], 1), one


class Reduce17(nn.Module):
    """17 x 17 x 768 -> 8 x 8 x 1280."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBN(768, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, 2).valid()
        self.branch7x7x3_1 = ConvBN(768, 192, 1)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, 2).valid()

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class Block8(nn.Module):
    """8 x 8: split 3x3 branches; pooled by mean, or by maximum in the last block."""

    def __init__(self, before: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = ConvBN(before, 320, 1)
        self.branch3x3_1 = ConvBN(before, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBN(before, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1))
        self.branch_pool = ConvBN(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _mean3(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """[N, 3, 299, 299] normalised pictures -> pooled features [N, 2048] and the 1x1 branch of Mixed_6d."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2).valid()
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3).valid()
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3).valid()
        self.Mixed_5b = Block35(192, 32)
        self.Mixed_5c = Block35(256, 64)
        self.Mixed_5d = Block35(288, 64)
        self.Mixed_6a = Reduce35()
        self.Mixed_6b = Block17(128)
        self.Mixed_6c = Block17(160)
        self.Mixed_6d = Block17(160)
        self.Mixed_6e = Block17(192)
        self.Mixed_7a = Reduce17()
        self.Mixed_7b = Block8(1280, maximum=False)
        self.Mixed_7c = Block8(2048, maximum=True)
        self.fc = nn.Linear(POOL, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x, _ = self.Mixed_6b(self.Mixed_6a(x))
        x, _ = self.Mixed_6c(x)
        x, one = self.Mixed_6d(x)
        x, _ = self.Mixed_6e(x)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3)), one


class InceptionOutput(NamedTuple):
    pool: Tensor  # [N, 2048] float32: FID, precision and recall, and, by the classifier, Inception Score
    spatial: Tensor  # [N, 2023] float32: sFID; 17 x 17 positions x 7 channels, channels last


class InceptionFeatures(FrozenNetwork):
    """Features of pictures: uint8 [N, 3, H, W], or floating in [-1, 1] -> InceptionOutput.

    `resize` is how pictures reach 299 x 299: "tf1" as TensorFlow 1 and so the ADM evaluator does (bilinear from
    the top left corner, no antialiasing; floating pictures are rounded to the 256 levels first, and levels are scaled
    by (x - 128) / 128), "half_pixel" as pytorch-fid and the FlowMo release do (bilinear, pixel centres; floating
    pictures as they are, levels scaled by x / 127.5 - 1).
    """

    def __init__(self, network: InceptionV3, resize: str = "tf1", published: bool = True) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
        self.network, self.resize, self.published = network, resize, published
        self.freeze_(channels_last=True)

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionOutput:
        """Raises ValueError for anything but pictures [N, 3, H, W]."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception expects pictures [N, 3, H, W], got {list(images.shape)}")
        weight = self.network.fc.weight
        images = images.to(weight.device)
        if self.resize == "tf1":
            levels = images if images.dtype == torch.uint8 else to_uint8(images)
            x = (resize_tf1(levels.float(), INPUT_SIZE) - 128) / 128
        else:
            x = images / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
            x = F.interpolate(x, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        pool, one = self.network(x.to(weight.dtype))
        spatial = one[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).reshape(len(one), -1)
        return InceptionOutput(pool.float(), spatial.float())

    @torch.no_grad()
    def logits(self, pool: Tensor) -> Tensor:
        """Class scores [N, 1008] of pooled features, without the bias, as the ADM evaluator takes them."""
        weight = self.network.fc.weight
        return pool.to(weight.device, torch.float32) @ weight.float().T


def resize_tf1(
    images: Tensor,  # [N, C, H, W] float32
    size: int,
) -> Tensor:  # [N, C, size, size]
    """Bilinear resize of TensorFlow 1: output pixel i samples position i * H / size, without antialiasing."""
    rows, columns = (_tf1_matrix(side, size, images.device) for side in images.shape[2:])
    return rows @ images @ columns.T


def _tf1_matrix(side: int, size: int, device: torch.device) -> Tensor:
    """[size, side]: weights of the two source pixels of every output pixel; positions in fp32, as TensorFlow's."""
    step = torch.tensor(side, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    position = torch.arange(size, dtype=torch.float32) * step
    low = position.floor().long().clamp_(max=side - 1)
    high = (low + 1).clamp_(max=side - 1)
    share = (position - low)[:, None]
    matrix = torch.zeros(size, side)
    matrix.scatter_add_(1, low[:, None], 1 - share)
    matrix.scatter_add_(1, high[:, None], share)
    return matrix.to(device)


def load_inception(
    weights: PathLike | None,
    *,
    resize: str = "tf1",
    seed: int = 0,
    option: str = "--inception",
) -> InceptionFeatures:
    """Inception with the published weights at the path `weights`; "random" makes untrained ones from `seed`.

    Raises:
        WeightsMissing: names the file, its publisher and digest, and the ways on.
        WeightsInvalid: the file is damaged, altered, or of another network.
    """
    if weights == "random":
        warnings.warn(
            f"{option}=random: FID, sFID, Inception Score, precision and recall come from an untrained Inception and "
            "compare with no published number",
            stacklevel=2,
        )
        return random_inception(seed, resize)
    if weights is None or not Path(weights).is_file():
        raise WeightsMissing(
            f"Inception weights are not here: {describe(INCEPTION, option)}"
            + ("" if weights is None else f" ({weights} is no file)")
            + f". Or go on without: {option}=random takes an untrained network"
        )
    with torch.device("meta"):  # no default initialisation: it would cost time and the global random state
        network = InceptionV3()
    load_into(network, read_state_dict(INCEPTION, weights), weights)
    return InceptionFeatures(network, resize)


def random_inception(seed: int = 0, resize: str = "tf1") -> InceptionFeatures:
    """Inception with He-initialised convolutions and identity normalisation, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = InceptionV3()
    network.to_empty(device="cpu")
    he_init_(network, generator)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
        network.fc.weight.normal_(0.0, POOL**-0.5, generator=generator)
        network.fc.bias.zero_()
    return InceptionFeatures(network, resize, published=False)
