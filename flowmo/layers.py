"""Formulas and small modules that the FlowMo transformers are built from.

Shapes: B images, T latent tokens, N image tokens, L = T + N, D hidden width, H heads, d = D / H, p patch side.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from flowmo_kernels import linear_gelu

ROPE_THETA = 10_000.0
ROPE_AXES = (8, 28, 28)  # per head_dim 64: latent index, row, column


def patchify(
    images: Tensor,  # [B, 3, S, S]
    patch: int,
) -> Tensor:  # [B, (S / p)^2, 3 p^2]
    """Cut images into patch vectors: row in patch, column in patch, channel, the channel running fastest."""
    b, c, height, width = images.shape
    rows, cols = height // patch, width // patch
    x = images.reshape(b, c, rows, patch, cols, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * cols, patch * patch * c)


def unpatchify(
    tokens: Tensor,  # [B, (S / p)^2, 3 p^2]
    patch: int,
    size: int,
) -> Tensor:  # [B, 3, S, S]
    """Inverse of :func:`patchify` for square pictures of `size` pixels."""
    b, grid = tokens.shape[0], size // patch
    x = tokens.reshape(b, grid, grid, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, size, size)


def timestep_embedding(
    t: Tensor,  # [B]
    dim: int = 256,
) -> Tensor:  # [B, dim] fp32
    """Sinusoidal embedding of 1000 t, cosines first, with periods 2 pi to 2 pi 10,000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_tables(
    latent_tokens: int,
    grid: int,
    head_dim: int,
) -> tuple[Tensor, Tensor]:  # cos, sin: [T + grid^2, head_dim / 2] fp32
    """Three-axis rotary tables for the joint sequence, latent tokens first.

    Latent token i sits at (i, i, i), the image token of row r and column c at (0, r, c). Angles are formed in
    fp64 and stored in fp32. The tables are made on the CPU, whatever the default device: the same bits everywhere.
    """
    axes = [a * head_dim // 64 for a in ROPE_AXES]
    if any(a % 2 for a in axes) or sum(axes) != head_dim:
        raise ValueError(f"head_dim {head_dim} cannot be split over three rotary axes; use a multiple of 32")
    index = torch.arange(latent_tokens, dtype=torch.float64, device="cpu")
    side = torch.arange(grid, dtype=torch.float64, device="cpu")
    row, col = torch.meshgrid(side, side, indexing="ij")
    image = torch.stack([torch.zeros_like(row).flatten(), row.flatten(), col.flatten()], dim=-1)
    positions = torch.cat([index[:, None].expand(-1, 3), image])
    angles = torch.cat(
        [
            positions[:, i, None] * ROPE_THETA ** (-torch.arange(0, a, 2, dtype=torch.float64, device="cpu") / a)
            for i, a in enumerate(axes)
        ],
        dim=-1,
    )
    return angles.cos().float(), angles.sin().float()


class MLPEmbedder(nn.Module):
    """Timestep features to the conditioning vector: Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(torch.nn.functional.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """AdaLN vectors of one stream of one block: (shift1, scale1, gate1, shift2, scale2, gate2).

    The gate rows start at zero, so a fresh block is the identity.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, 6 * hidden)
        with torch.no_grad():
            for gate in (2, 5):
                self.lin.weight[gate * hidden : (gate + 1) * hidden].zero_()
                self.lin.bias[gate * hidden : (gate + 1) * hidden].zero_()

    def forward(
        self,
        activated: Tensor,  # [B, D], SiLU of the conditioning vector
    ) -> tuple[Tensor, ...]:  # six [B, D]
        return self.lin(activated).chunk(6, dim=-1)


class Scale(nn.Module):
    """Learned per-channel gain of a query or key RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = Scale(dim)
        self.key_norm = Scale(dim)


class StreamAttention(nn.Module):
    """The attention weights of one stream; the attention itself is joint and lives in the block."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)


class MLP(nn.Sequential):
    """Linear to 4 D, tanh-GELU, Linear back; the first two as one op."""

    def __init__(self, hidden: int) -> None:
        super().__init__(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        first = cast(nn.Linear, self[0])
        return self[2](linear_gelu(x, first.weight, first.bias))
