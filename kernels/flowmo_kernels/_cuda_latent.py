"""CUDA launches of the quantizer and of the packing of its tokens: `lfq`, `pack_tokens`, `unpack_tokens`.

Legend: B images, T latent tokens of C channels, F = C / bits sub-codes, N = B T F tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cuda_rows import dtype_code
from ._ext import launch
from ._library import rows_contiguous

CODEBOOK_EPS = 1e-5
# Stretches of tokens that are accumulated apart: one to a processor of the largest cards; 8 MB of them at 14 bits.
SPLITS = 128
TOKENS_AT_ONCE, CODES_PER_BLOCK, ROWS_PER_BLOCK, MOST_BLOCKS = 16, 256, 8, 512


def _rows(x: Tensor) -> Tensor:
    """[B, T, C] as [B*T, C] with contiguous channels."""
    return rows_contiguous(rows_contiguous(x).reshape(-1, x.shape[-1]))


def lfq(
    x: Tensor,  # [B, T, C]
    bits: int,
    temperature: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Signs, tokens, per-sample entropy, codebook entropy, commitment, as `flowmo_kernels.lfq`.

    Returns:
        The five results of `lfq`, and dH/dP float32 [2^(bits - bits//2), 2^(bits//2)], which the gradient needs.
    """
    batch, length, channels = x.shape
    rows = _rows(x)
    factors = channels // bits
    half, rest = bits // 2, bits - bits // 2

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = torch.empty(batch, length * factors, dtype=torch.int64, device=x.device)
    sample, codebook, commitment = (fp32() for _ in range(3))
    gradient = fp32(1 << rest, 1 << half)
    side = 32 if bits <= 10 else 128
    tiles = -(-(1 << half) // side) * -(-(1 << rest) // side)
    splits = max(1, min(-(-rows.shape[0] * factors // TOKENS_AT_ONCE), SPLITS // tiles))
    blocks = max(1, min(-(-rows.shape[0] // ROWS_PER_BLOCK), MOST_BLOCKS))
    pairs = fp32(splits, 1 << bits)
    sums = fp32(2, blocks)
    entropies = fp32(-(-(1 << bits) // CODES_PER_BLOCK))
    launch(
        "lfq", codes, tokens, sample, codebook, commitment, gradient, pairs, sums, entropies, rows, rows.shape[0],
        rows.stride(0), channels, bits, splits, blocks, float(temperature), CODEBOOK_EPS, dtype_code("x", x),
    )  # fmt: skip
    return codes, tokens, sample, codebook, commitment, gradient


def lfq_backward(
    x: Tensor,  # [B, T, C]
    gradient: Tensor,  # [2^(bits - bits//2), 2^(bits//2)], from `lfq`
    dcodes: Tensor | None,  # [B, T, C]
    dsample: Tensor | None,  # []
    dcodebook: Tensor | None,  # []
    dcommitment: Tensor | None,  # []
    bits: int,
    temperature: float = 0.1,
) -> Tensor:  # [B, T, C], dtype of x
    """Gradient of `lfq` in x; an upstream gradient that is None counts as zero."""
    rows = _rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned = None if dcodebook is None else torch.empty_like(gradient)
    scalars = [None if g is None else g.to(torch.float32) for g in (dsample, dcodebook, dcommitment)]
    launch(
        "lfq_backward", dx, turned, None if dcodes is None else dcodes.to(x.dtype).contiguous(), *scalars, rows,
        gradient.contiguous(), rows.shape[0], rows.stride(0), x.shape[2], bits, float(temperature), dtype_code("x", x),
    )  # fmt: skip
    return dx


def pack_tokens(
    tokens: Tensor,  # [B, N] int64
    bits: int,
) -> Tensor:  # [B, ceil(N * bits / 8)] uint8
    """The low `bits` bits of every token as a stream, as `flowmo_kernels.pack_tokens`."""
    tokens = rows_contiguous(tokens)
    batch, n = tokens.shape
    packed = torch.empty(batch, -(-n * bits // 8), dtype=torch.uint8, device=tokens.device)
    launch("pack_tokens", packed, tokens, tokens.stride(0), batch, n, bits)
    return packed


def unpack_tokens(
    packed: Tensor,  # [B, ceil(n * bits / 8)] uint8
    bits: int,
    n: int,
) -> Tensor:  # [B, n] int64
    """The tokens of a stream, as `flowmo_kernels.unpack_tokens`."""
    packed = rows_contiguous(packed)
    batch = packed.shape[0]
    tokens = torch.empty(batch, n, dtype=torch.int64, device=packed.device)
    launch("unpack_tokens", tokens, packed, packed.stride(0), batch, n, bits)
    return tokens
