"""First layer of the MLP: y = GELU(x W^T + b), GELU in its tanh form.

GELU(u) = u/2 * (1 + tanh(sqrt(2/pi) * (u + 0.044715 u^3)))

Legend: D input channels, F output channels, any leading axes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_gelu_ref(
    x: Tensor,  # [..., D]
    w: Tensor,  # [F, D]
    b: Tensor,  # [F]
) -> Tensor:  # [..., F]
    """`linear_gelu` in plain PyTorch."""
    return F.gelu(F.linear(x, w, b), approximate="tanh")


def linear_gelu(
    x: Tensor,  # [..., D]
    w: Tensor,  # [F, D]
    b: Tensor,  # [F]
) -> Tensor:  # [..., F]
    """GELU(x W^T + b) with the tanh form of GELU."""
    return linear_gelu_ref(x, w, b)
