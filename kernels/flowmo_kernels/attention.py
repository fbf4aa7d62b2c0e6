"""Joint attention over latent and image tokens: softmax(scale * q k^T) v, every token attending to all.

The scale is the caller's: 8 / d under muP, not 1 / sqrt(d) (released implementation).

Legend: B images, L tokens, H heads, d channels of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def joint_attention_ref(
    q: Tensor,  # [B, L, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
) -> Tensor:  # [B, L, H, d], contiguous
    """`joint_attention` in plain PyTorch."""
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return o.transpose(1, 2).contiguous()


def joint_attention(
    q: Tensor,  # [B, L, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
    *,
    backend: str = "auto",
) -> Tensor:  # [B, L, H, d], contiguous
    """softmax(scale * q k^T) v for every image and head."""
    return joint_attention_ref(q, k, v, scale)


def attention_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Name of the backend that `joint_attention` takes for these tensors."""
    return "math"
