"""Structural similarity with the two windows in use.

Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, K1 = 0.01, K2 = 0.03, on
every colour channel, averaged over the positions where the window lies inside the picture, then over the channels.
"uniform" is scikit-image's default, a 7 x 7 box with sample covariances; "gaussian" the paper's own, 11 x 11 with a
deviation of 1.5 and population covariances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.metrics.reconstruction import levels

WINDOWS = ("uniform", "gaussian")


def ssim(
    a: Tensor,  # [N, 3, H, W], floating in [-1, 1] or uint8
    b: Tensor,  # [N, 3, H, W], floating in [-1, 1] or uint8
    window: str = "uniform",
) -> Tensor:  # [N] float64
    """Structural similarity of each picture, of the 256 levels that a file would hold.

    Raises ValueError for other shapes, for sides shorter than the window, and for NaN.
    """
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {window!r}")
    kernel = torch.full((7,), 1 / 7, dtype=torch.float64) if window == "uniform" else _gaussian(1.5, 5)
    side = len(kernel)
    x, y = levels(a, b)
    if min(x.shape[2:]) < side:
        raise ValueError(f"ssim with the {window} window needs sides of at least {side} pixels, got {list(x.shape)}")
    correction = side**2 / (side**2 - 1) if window == "uniform" else 1.0
    n, c, h, w = x.shape
    maps = torch.cat([x, y, x * x, y * y, x * y]).reshape(5 * n * c, 1, h, w)
    kernel = kernel.to(maps.device)
    maps = F.conv2d(F.conv2d(maps, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = maps.view(5, n, c, *maps.shape[2:])
    vx, vy, vxy = (correction * (square - product) for square, product in ((xx, mx * mx), (yy, my * my), (xy, mx * my)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean((1, 2, 3))


def _gaussian(deviation: float, radius: int) -> Tensor:
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (x / deviation).square())
    return weights / weights.sum()
