"""How near a reconstruction is to its original, and what its code costs."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmo.data.transforms import to_uint8

RELEASED_BATCH = 5  # pictures over which the released evaluation pools the squared error


def levels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of pictures [N, 3, H, W], floating in [-1, 1] or uint8, as float64 levels 0 to 255.

    Floating pictures are first rounded to the 256 levels that a file would hold. Raises ValueError for other shapes,
    and for NaN.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"expected two batches of one shape [N, 3, H, W], got {list(a.shape)} and {list(b.shape)}")
    x, y = ((p if p.dtype == torch.uint8 else to_uint8(p)).double() for p in (a, b))
    return x, y


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Of each picture, float64 [N], in levels squared; pictures as :func:`levels` takes them."""
    x, y = levels(a, b)
    return (x - y).square().mean((1, 2, 3))


def psnr_of(error: Tensor) -> Tensor:
    """dB of mean squared errors in levels squared: 10 log10(255^2 / error), infinite for none."""
    return 10 * torch.log10(255.0**2 / error)


def psnr(
    a: Tensor,  # [N, 3, H, W], floating in [-1, 1] or uint8
    b: Tensor,  # [N, 3, H, W], floating in [-1, 1] or uint8
) -> Tensor:  # [N] float64, dB
    """Peak signal-to-noise ratio of each picture; arguments and errors as for :func:`levels`."""
    return psnr_of(mean_squared_error(a, b))


def pooled_psnr(
    error: Tensor,  # [N] mean squared errors in levels squared, in the order of evaluation
    batch: int = RELEASED_BATCH,
) -> float:  # dB
    """PSNR as the released evaluation takes it: of the mean error of `batch` successive pictures, averaged.

    By Jensen's inequality never above the mean of the pictures' own PSNR. A last batch that is not full counts by its
    pictures.
    """
    groups = error.double().split(batch)
    return float(sum(psnr_of(group.mean()) * len(group) for group in groups)) / len(error)


def truncated_levels(images: Tensor) -> Tensor:
    """Floating pictures in [-1, 1] -> uint8 by cutting off, as the released evaluation converts them.

    Of originals normalised in double precision it returns 95 of the 256 levels one too low; to_uint8 rounds and
    returns them all.
    """
    return ((images.float() + 1) / 2 * 255).clamp_(0, 255).to(torch.uint8)


def mean_colour_baseline(images: Tensor) -> Tensor:
    """Each picture [N, 3, H, W] in [-1, 1] as one area of its own mean colour: what three numbers can tell of it."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def bits_per_pixel(tokens: int, bits: int, height: int, width: int) -> float:
    """Size of a code of `tokens` tokens of `bits` bits, per pixel of the height x width picture that it stands for."""
    if min(tokens, bits, height, width) < 1:
        raise ValueError(
            f"bits_per_pixel expects positive numbers, got tokens={tokens}, bits={bits}, {height} x {width} pixels"
        )
    return tokens * bits / (height * width)
