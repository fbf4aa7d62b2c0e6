"""How near a reconstruction is to its original, and what its code costs."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmo.data.transforms import to_uint8


def psnr(
    a: Tensor,  # [N, 3, H, W], floating in [-1, 1] or uint8
    b: Tensor,  # [N, 3, H, W], floating in [-1, 1] or uint8
) -> Tensor:  # [N] float64, dB
    """Peak signal-to-noise ratio of each picture: 10 log10(255^2 / mean squared error), infinite for equal pictures.

    Floating pictures are first rounded to the 256 levels that a file would hold. Raises ValueError for other shapes,
    and for NaN.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"psnr expects two batches of one shape [N, 3, H, W], got {list(a.shape)} and {list(b.shape)}")
    levels = [(x if x.dtype == torch.uint8 else to_uint8(x)).double() for x in (a, b)]
    error = (levels[0] - levels[1]).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


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
