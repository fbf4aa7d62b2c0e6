"""Pictures larger than a model's images, as a grid of tiles side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowmo.autoencoder import FlowMo


def split_tiles(
    images: Tensor,  # [B, 3, H, W], H and W multiples of size
    size: int,
) -> Tensor:  # [B (H / size) (W / size), 3, size, size]
    """Cut pictures into square tiles, row by row."""
    b, c, height, width = images.shape
    if height % size or width % size:
        raise ValueError(f"images: expected sides that are multiples of the tile size {size}, got {height} x {width}")
    x = images.reshape(b, c, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, size, size)


def merge_tiles(
    tiles: Tensor,  # [B (H / size) (W / size), 3, size, size]
    height: int,
    width: int,
) -> Tensor:  # [B, 3, height, width]
    """Inverse of :func:`split_tiles`."""
    c, size = tiles.shape[1], tiles.shape[-1]
    x = tiles.reshape(-1, height // size, width // size, c, size, size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, height, width)


def reconstruct_tiled(
    model: FlowMo,
    images: Tensor,  # [B, 3, H, W] in [-1, 1], H and W multiples of the model's image size
    batch: int = 64,
    **sampler: Any,
) -> Tensor:  # [B, 3, H, W] in [-1, 1]
    """Encode and decode every tile on its own, `batch` tiles at a time; options as for `FlowMo.decode`."""
    tiles = split_tiles(images, model.config.image_size)
    done = [model.reconstruct(part, **sampler) for part in tiles.split(batch)]
    return merge_tiles(torch.cat(done), *images.shape[-2:])
