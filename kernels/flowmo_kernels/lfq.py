"""Lookup-free quantization with exact entropies, in memory that grows with the tokens only.

    x [B, T, C] -> N = B*T*F tokens of E bits; F = C / E; bit k of token n = t*F + f is channel k*F + f
    q = +1 where x > 0, else -1;   token = sum_k 2^k [x_k > 0]
    The soft assignment softmax(2 x.c / temperature) over the 2^E codes c factorizes into independent bits:
        p_k = sigmoid(4 x_k / temperature)
    per-sample entropy  = mean_n sum_k Hb(p_nk)
    codebook entropy    = -sum_c P_c log(P_c + 1e-5),   P_c = mean_n prod_k (p_nk or 1 - p_nk)
    A code is a pair (i, j) of half-codes of E//2 and E - E//2 bits, so with the products of their bits
    A [N, 2^(E//2)] and B [N, 2^(E-E//2)]:  P = A^T B / N, one small matrix product for an [N, 2^E] tensor.
    commitment          = mean (x - q)^2, q held constant

Gradient: with G = dL/dP,  dA = B G^T / N,  dB = A G / N. A probability's logarithm has the derivative
d log p / dl = 1 - p, d log (1 - p) / dl = -p in its logit l, so bit k of the first half receives
    dl_k = (1 - p_k) sum_{i: bit k set} dA_i A_i  -  p_k sum_{i: bit k clear} dA_i A_i,
which never divides by a probability. Codes pass their gradient straight through.

Source: paper, section 3.2 and the supplement's quantizer settings; the strict x > 0, the bit order and the
1e-5 inside the codebook logarithm are the released implementation's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BITS = 20
CODEBOOK_EPS = 1e-5


class LFQOutput(NamedTuple):
    """What `lfq` returns; entropies in nats, scalars in fp32."""

    codes: Tensor  # [B, T, C], +1 or -1, dtype of x
    tokens: Tensor  # [B, T*F] int64
    per_sample_entropy: Tensor  # []
    codebook_entropy: Tensor  # []
    commitment: Tensor  # []


def _check(x: Tensor, bits: int, temperature: float) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; expected the number of bits to a token, 1 to {MAX_BITS} (9 or 14 in FlowMo)")
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point [B, T, C]")
    if x.shape[2] == 0 or x.shape[2] % bits:
        raise ValueError(f"x has {x.shape[2]} channels; expected a multiple of the {bits} bits of a token")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number (0.1 in FlowMo)")


def _half_code_table(p: Tensor, m: Tensor) -> Tensor:
    """Probabilities of all codes of k bits, [N, 2^k], bit 0 least significant, from p = P(bit set), m = 1 - p [N, k]."""
    table = p.new_ones(p.shape[0], 1)
    for k in range(p.shape[1]):
        table = torch.cat((table * m[:, k : k + 1], table * p[:, k : k + 1]), dim=1)
    return table


def lfq_ref(x: Tensor, bits: int, *, temperature: float = 0.1) -> LFQOutput:
    batch, length, channels = x.shape
    factors = channels // bits
    n = max(batch * length * factors, 1)
    with torch.autocast(x.device.type, enabled=False):
        xf = x if x.dtype == torch.float64 else x.float()
        positive = x > 0
        q = positive.to(xf.dtype) * 2 - 1
        codes = q.to(x.dtype) + (x - x.detach())
        weights = 1 << torch.arange(bits, device=x.device)
        groups = positive.reshape(batch, length, bits, factors)
        tokens = (groups * weights[:, None]).sum(2).reshape(batch, length * factors)

        logit = (4.0 / temperature) * xf.reshape(batch * length, bits, factors).transpose(1, 2).reshape(-1, bits)
        magnitude = logit.abs()
        per_sample = (F.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)).sum() / n

        p, m = torch.sigmoid(logit), torch.sigmoid(-logit)
        half = bits // 2
        a = _half_code_table(p[:, :half], m[:, :half])
        b = _half_code_table(p[:, half:], m[:, half:])
        mean = b.T @ a / n
        codebook = -(mean * torch.log(mean + CODEBOOK_EPS)).sum()
        commitment = (xf - q).square().sum() / max(xf.numel(), 1)
    return LFQOutput(codes, tokens, per_sample, codebook, commitment)


def lfq(x: Tensor, bits: int, *, temperature: float = 0.1) -> LFQOutput:
    """Quantize a latent to signs and measure the entropies that train it.

    Args:
        x: [B, T, C], the encoder's output; fp32, bf16 or fp16. C is a multiple of bits.
        bits: E, bits to a token (9 in FlowMo-Lo, 14 in FlowMo-Hi).
        temperature: of the soft assignment.

    Returns:
        LFQOutput. Codes carry a straight-through gradient; entropies (in nats, over all tokens of the batch) and
        commitment are fp32 whatever autocast says. An empty batch has zero entropies and commitment.

    Raises:
        ValueError: x is not floating point [B, T, C] with C a multiple of bits, or bits or temperature is out of range.
    """
    _check(x, bits, temperature)
    return lfq_ref(x, bits, temperature=temperature)
