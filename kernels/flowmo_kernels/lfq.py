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

from ._dispatch import chosen
from ._library import register, rows_contiguous
from ._rows import Signature, signature_of
from ._triton import cast, cdiv, jit, next_power_of_2, tl

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
        raise ValueError(f"bits is {bits}; expected the bits of a token, 1 to {MAX_BITS} (9 or 14 in FlowMo)")
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point [B, T, C]")
    if x.shape[2] == 0 or x.shape[2] % bits:
        raise ValueError(f"x has {x.shape[2]} channels; expected a multiple of the {bits} bits of a token")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number (0.1 in FlowMo)")


def _half_code_table(p: Tensor, m: Tensor) -> Tensor:
    """Probabilities [N, 2^k] of all codes of k bits, bit 0 least significant; p, m [N, k]: bit set, bit clear."""
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

        logit = (4.0 / temperature) * xf.reshape(-1, bits, factors).transpose(1, 2).reshape(-1, bits)
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


@jit
def _bit_logits(b_x, logit_scale):
    """Logit l, e = exp(-|l|) and log(1 + e); the quotient restores what 1 + e rounds away."""
    b_l = b_x * logit_scale
    b_e = tl.exp(-tl.abs(b_l))
    b_u = 1.0 + b_e
    return b_l, b_e, tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))


@jit
def _half_code_tile(
    b_set, b_clear, m_n, o_e, o_code, FIRST: tl.constexpr, BITS: tl.constexpr
):
    """Probabilities [tokens, half-codes] of half-codes of BITS bits from bit FIRST on.

    b_set, b_clear [tokens, bits] are the logarithms of the bit probabilities. Both are negative, so the exponent is a
    sum without cancellation; taken as two small matrix products it needs no register to a bit.
    """
    m_e = (o_e >= FIRST) & (o_e < FIRST + BITS)
    b_bit = (o_code[None, :] >> tl.where(m_e, o_e - FIRST, 0)[:, None]) & 1
    b_log = tl.dot(b_set, tl.where(m_e[:, None] & (b_bit == 1), 1.0, 0.0), input_precision="ieee")
    b_log = tl.dot(b_clear, tl.where(m_e[:, None] & (b_bit == 0), 1.0, 0.0), b_log, input_precision="ieee")
    return tl.where(m_n[:, None] & (o_code < (1 << BITS))[None, :], tl.exp(b_log), 0.0)


@jit
def lfq_forward_kernel(
    p_x, p_codes, p_tokens, p_pairs, p_sums, n, stride_x, logit_scale,
    F: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Codes, tokens, and this program's share of sum_n A^T B and of the two sums over tokens.

    Grid (splits, half-code tiles): program s of a tile takes every splits-th block of tokens.
    """
    HALF: tl.constexpr = BITS // 2
    REST: tl.constexpr = BITS - HALF
    TILES_I: tl.constexpr = ((1 << HALF) + BLOCK_I - 1) // BLOCK_I
    i_split = tl.program_id(0).to(tl.int64)
    splits = tl.num_programs(0)
    i_tile = tl.program_id(1)
    o_i = (i_tile % TILES_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = (i_tile // TILES_I) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_e = tl.arange(0, BLOCK_E)
    b_pairs = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    b_entropy = tl.zeros((BLOCK_N,), tl.float32)
    b_commitment = tl.zeros((BLOCK_N,), tl.float32)
    for i_block in range(i_split, (n + BLOCK_N - 1) // BLOCK_N, splits):
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < n
        o_t = o_n // F
        p_n = p_x + o_t * stride_x + o_n % F
        m_ne = m_n[:, None] & (o_e < BITS)[None, :]
        b_x = tl.load(p_n[:, None] + (o_e * F)[None, :], mask=m_ne, other=0.0).to(tl.float32)
        b_l, b_e, b_log = _bit_logits(b_x, logit_scale)
        b_set = tl.minimum(b_l, 0.0) - b_log
        b_clear = tl.minimum(-b_l, 0.0) - b_log
        b_a = _half_code_tile(b_set, b_clear, m_n, o_e, o_i, 0, HALF)
        b_b = _half_code_tile(b_set, b_clear, m_n, o_e, o_j, HALF, REST)
        b_pairs = tl.dot(tl.trans(b_b), b_a, b_pairs, input_precision="ieee")
        if i_tile == 0:
            b_q = tl.where(b_x > 0, 1.0, -1.0)
            p_code = p_codes + o_t * (BITS * F) + o_n % F
            tl.store(p_code[:, None] + (o_e * F)[None, :], cast(b_q, p_codes.dtype.element_ty), mask=m_ne)
            b_token = tl.sum(tl.where((b_x > 0) & m_ne, 1, 0) << o_e[None, :], axis=1)
            tl.store(p_tokens + o_n, b_token.to(tl.int64), mask=m_n)
            # Hb = log(1 + e) + |l| e / (1 + e)
            b_h = b_log + tl.abs(b_l) * b_e / (1.0 + b_e)
            b_entropy += tl.sum(tl.where(m_ne, b_h, 0.0), axis=1)
            b_commitment += tl.sum(tl.where(m_ne, (b_x - b_q) * (b_x - b_q), 0.0), axis=1)
    p_pair = p_pairs + (i_split << BITS) + (o_j[:, None] << HALF) + o_i[None, :]
    tl.store(p_pair, b_pairs, mask=(o_j < (1 << REST))[:, None] & (o_i < (1 << HALF))[None, :])
    if i_tile == 0:
        tl.store(p_sums + i_split, tl.sum(b_entropy, axis=0))
        tl.store(p_sums + splits + i_split, tl.sum(b_commitment, axis=0))


@jit
def lfq_codebook_kernel(p_pairs, p_gradient, p_entropies, splits, inverse_n, eps, size: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """P, summed over the splits in order; dH/dP = -(log(P + eps) + P / (P + eps)); the entropy of the block."""
    i_block = tl.program_id(0).to(tl.int64)
    o_c = i_block * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < size
    b_mean = tl.zeros((BLOCK,), tl.float32)
    for i_split in range(0, splits):
        b_mean += tl.load(p_pairs + i_split * size + o_c, mask=m_c, other=0.0)
    b_mean *= inverse_n
    b_log = tl.log(b_mean + eps)
    tl.store(p_gradient + o_c, -(b_log + b_mean / (b_mean + eps)), mask=m_c)
    tl.store(p_entropies + i_block, tl.sum(tl.where(m_c, -b_mean * b_log, 0.0), axis=0))


@jit
def _sum_of(p_values, count, BLOCK: tl.constexpr):
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_first in range(0, count, BLOCK):
        o_v = i_first + tl.arange(0, BLOCK)
        b_sum += tl.load(p_values + o_v, mask=o_v < count, other=0.0)
    return tl.sum(b_sum, axis=0)


@jit
def lfq_scalars_kernel(p_sums, p_entropies, p_sample, p_codebook, p_commitment, splits, blocks, inverse_n,
                       inverse_numel, BLOCK: tl.constexpr):  # fmt: skip
    tl.store(p_sample, _sum_of(p_sums, splits, BLOCK) * inverse_n)
    tl.store(p_commitment, _sum_of(p_sums + splits, splits, BLOCK) * inverse_numel)
    tl.store(p_codebook, _sum_of(p_entropies, blocks, BLOCK))


@jit
def _codebook_gradient(
    b_set, b_clear, b_p, b_m, p_gradient, m_n, o_e,
    FIRST: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr,
    OTHER_FIRST: tl.constexpr, OTHER_BITS: tl.constexpr, OTHER_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr,
):  # fmt: skip
    """N dL/dl of the bits of one half [tokens, bits]: dA = B G^T against A, or dB = A G against B."""
    b_sum_set = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    b_sum_clear = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for i_code in range(0, 1 << BITS, BLOCK):
        o_code = i_code + tl.arange(0, BLOCK)
        b_d = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        for i_other in range(0, 1 << OTHER_BITS, OTHER_BLOCK):
            o_other = i_other + tl.arange(0, OTHER_BLOCK)
            m_g = (o_other < (1 << OTHER_BITS))[:, None] & (o_code < (1 << BITS))[None, :]
            p_g = p_gradient + (o_other * OTHER_STRIDE)[:, None] + (o_code * STRIDE)[None, :]
            b_other = _half_code_tile(b_set, b_clear, m_n, o_e, o_other, OTHER_FIRST, OTHER_BITS)
            b_d = tl.dot(b_other, tl.load(p_g, mask=m_g, other=0.0), b_d, input_precision="ieee")
        b_d *= _half_code_tile(b_set, b_clear, m_n, o_e, o_code, FIRST, BITS)
        m_e = (o_e >= FIRST) & (o_e < FIRST + BITS)
        b_bit = (o_code[:, None] >> tl.where(m_e, o_e - FIRST, 0)[None, :]) & 1
        b_is_set = tl.where(m_e[None, :] & (b_bit == 1), 1.0, 0.0)
        b_is_clear = tl.where(m_e[None, :] & (b_bit == 0), 1.0, 0.0)
        b_sum_set = tl.dot(b_d, b_is_set, b_sum_set, input_precision="ieee")
        b_sum_clear = tl.dot(b_d, b_is_clear, b_sum_clear, input_precision="ieee")
    return b_m * b_sum_set - b_p * b_sum_clear


@jit
def lfq_backward_kernel(
    p_x, p_gradient, p_dcodes, p_dsample, p_dcodebook, p_dcommitment, p_dx,
    n, stride_x, logit_scale, inverse_n, inverse_numel,
    HAS_CODES: tl.constexpr, HAS_SAMPLE: tl.constexpr, HAS_CODEBOOK: tl.constexpr,
    HAS_COMMITMENT: tl.constexpr,
    F: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dx of a block of tokens and the bits of one half-code: the formula at the head of the file."""
    HALF: tl.constexpr = BITS // 2
    REST: tl.constexpr = BITS - HALF
    i_block = tl.program_id(0).to(tl.int64)
    i_half = tl.program_id(1)
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_t = o_n // F
    p_n = p_x + o_t * stride_x + o_n % F
    o_e = tl.arange(0, BLOCK_E)
    m_ne = m_n[:, None] & (o_e < BITS)[None, :]
    b_x = tl.load(p_n[:, None] + (o_e * F)[None, :], mask=m_ne, other=0.0).to(tl.float32)
    b_l, b_e, b_log = _bit_logits(b_x, logit_scale)
    b_r = 1.0 / (1.0 + b_e)
    b_p = tl.where(b_l >= 0, b_r, b_e * b_r)
    b_m = tl.where(b_l >= 0, b_e * b_r, b_r)
    m_half = m_ne & ((o_e < HALF) == (i_half == 0))[None, :]
    o_out = (o_t * (BITS * F) + o_n % F)[:, None] + (o_e * F)[None, :]

    b_dx = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if HAS_CODES:
        b_dx += tl.load(p_dcodes + o_out, mask=m_half, other=0.0).to(tl.float32)
    if HAS_SAMPLE:
        # dHb/dl = -l p (1 - p)
        b_dx -= tl.load(p_dsample) * inverse_n * logit_scale * b_l * b_p * b_m
    if HAS_COMMITMENT:
        b_dx += tl.load(p_dcommitment) * inverse_numel * 2.0 * (b_x - tl.where(b_x > 0, 1.0, -1.0))
    if HAS_CODEBOOK:
        b_lp = tl.minimum(b_l, 0.0) - b_log
        b_lm = tl.minimum(-b_l, 0.0) - b_log
        if i_half == 0:
            b_dl = _codebook_gradient(
                b_lp, b_lm, b_p, b_m, p_gradient, m_n, o_e, 0, HALF, 1, HALF, REST, 1 << HALF,
                BLOCK_N, BLOCK_E, BLOCK_I, BLOCK_J,
            )  # fmt: skip
        else:
            b_dl = _codebook_gradient(
                b_lp, b_lm, b_p, b_m, p_gradient, m_n, o_e, HALF, REST, 1 << HALF, 0, HALF, 1,
                BLOCK_N, BLOCK_E, BLOCK_J, BLOCK_I,
            )  # fmt: skip
        b_dx += tl.load(p_dcodebook) * inverse_n * logit_scale * b_dl
    tl.store(p_dx + o_out, cast(b_dx, p_dx.dtype.element_ty), mask=m_half)


class Launch(NamedTuple):
    """Launch sizes of the kernels; swept by bench/tune.py."""

    block_n: int
    block_i: int
    block_j: int
    warps: int


def forward_launch(bits: int) -> Launch:
    half, rest = 1 << bits // 2, 1 << (bits - bits // 2)
    block_i, block_j = min(max(half, 16), 64), min(max(rest, 16), 128)
    large = block_i * block_j > 2048
    return Launch(16 if large else 32, block_i, block_j, 8 if large else 4)


def backward_launch(bits: int) -> Launch:
    half, rest = 1 << bits // 2, 1 << (bits - bits // 2)
    block_i, block_j = min(max(half, 16), 64), min(max(rest, 16), 64)
    # Larger blocks of tokens, or more warps, spill on one architecture or another.
    return Launch(16 if block_i * block_j > 2048 else 32, block_i, block_j, 4)


# Programs that share the tokens: about one to a processor of the largest cards.
SPLITS = 128
REDUCE_BLOCK = 256


def _triton_forward(x: Tensor, bits: int, temperature: float) -> tuple[Tensor, ...]:
    batch, length, channels = x.shape
    factors = channels // bits
    n = batch * length * factors
    rows = rows_contiguous(x).reshape(batch * length, channels)
    size_i, size_j = 1 << bits // 2, 1 << (bits - bits // 2)
    launch = forward_launch(bits)
    tiles = cdiv(size_i, launch.block_i) * cdiv(size_j, launch.block_j)
    splits = max(1, min(cdiv(n, launch.block_n), SPLITS // tiles))
    blocks = cdiv(1 << bits, REDUCE_BLOCK)

    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = torch.empty(batch, length * factors, dtype=torch.int64, device=x.device)
    sample, codebook, commitment = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    gradient = x.new_empty((size_j, size_i), dtype=torch.float32)
    pairs = x.new_empty((splits, size_j, size_i), dtype=torch.float32)
    sums = x.new_empty((2, splits), dtype=torch.float32)
    entropies = x.new_empty(blocks, dtype=torch.float32)
    lfq_forward_kernel[(splits, tiles)](
        rows, codes, tokens, pairs, sums, n, rows.stride(0), 4.0 / temperature,
        F=factors, BITS=bits, BLOCK_N=launch.block_n, BLOCK_E=max(16, next_power_of_2(bits)),
        BLOCK_I=launch.block_i, BLOCK_J=launch.block_j, num_warps=launch.warps,
    )  # fmt: skip
    lfq_codebook_kernel[(blocks,)](
        pairs, gradient, entropies, splits, 1.0 / max(n, 1), CODEBOOK_EPS,
        size=1 << bits, BLOCK=REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    lfq_scalars_kernel[(1,)](
        sums, entropies, sample, codebook, commitment, splits, blocks,
        1.0 / max(n, 1), 1.0 / max(x.numel(), 1), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return codes, tokens, sample, codebook, commitment, gradient


def _triton_backward(
    x: Tensor,
    gradient: Tensor,
    dcodes: Tensor | None,
    dsample: Tensor | None,
    dcodebook: Tensor | None,
    dcommitment: Tensor | None,
    bits: int,
    temperature: float,
) -> Tensor:
    batch, length, channels = x.shape
    n = batch * length * (channels // bits)
    rows = rows_contiguous(x).reshape(batch * length, channels)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if n == 0:
        return dx
    launch = backward_launch(bits)
    lfq_backward_kernel[(cdiv(n, launch.block_n), 2)](
        rows, gradient, None if dcodes is None else dcodes.contiguous(), dsample, dcodebook, dcommitment, dx,
        n, rows.stride(0), 4.0 / temperature, 1.0 / n, 1.0 / x.numel(),
        HAS_CODES=dcodes is not None, HAS_SAMPLE=dsample is not None, HAS_CODEBOOK=dcodebook is not None,
        HAS_COMMITMENT=dcommitment is not None, F=channels // bits, BITS=bits, BLOCK_N=launch.block_n,
        BLOCK_E=max(16, next_power_of_2(bits)), BLOCK_I=launch.block_i, BLOCK_J=launch.block_j,
        num_warps=launch.warps,
    )  # fmt: skip
    return dx


def _forward(x: Tensor, bits: int, temperature: float, impl: str) -> tuple[Tensor, ...]:
    if impl == "cuda":
        from . import _cuda

        return _cuda.lfq(x, bits, temperature)
    return _triton_forward(x, bits, temperature)


def _forward_fake(x: Tensor, bits: int, temperature: float, impl: str) -> tuple[Tensor, ...]:
    batch, length, channels = x.shape
    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = x.new_empty((batch, length * (channels // bits)), dtype=torch.int64)
    scalars = [x.new_empty((), dtype=torch.float32) for _ in range(3)]
    gradient = x.new_empty((1 << (bits - bits // 2), 1 << bits // 2), dtype=torch.float32)
    return codes, tokens, *scalars, gradient


def _backward(
    x: Tensor,
    gradient: Tensor,
    dcodes: Tensor | None,
    dsample: Tensor | None,
    dcodebook: Tensor | None,
    dcommitment: Tensor | None,
    bits: int,
    temperature: float,
    impl: str,
) -> Tensor:
    if impl == "cuda":
        from . import _cuda

        return _cuda.lfq_backward(x, gradient, dcodes, dsample, dcodebook, dcommitment, bits, temperature)
    return _triton_backward(x, gradient, dcodes, dsample, dcodebook, dcommitment, bits, temperature)


def _backward_fake(x: Tensor, gradient: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


lfq_forward_op = register(
    "lfq_forward(Tensor x, int bits, float temperature, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
lfq_backward_op = register(
    "lfq_backward(Tensor x, Tensor gradient, Tensor? dcodes, Tensor? dsample, Tensor? dcodebook,"
    " Tensor? dcommitment, int bits, float temperature, str impl) -> Tensor",
    _backward,
    _backward_fake,
)


class _LFQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bits: int, temperature: float, impl: str):  # type: ignore[no-untyped-def]
        *outputs, gradient = lfq_forward_op(x, bits, temperature, impl)
        ctx.save_for_backward(x, gradient)
        ctx.arguments = bits, temperature, impl
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, dcodes, dtokens, dsample, dcodebook, dcommitment):  # type: ignore[no-untyped-def]
        x, gradient = ctx.saved_tensors
        dx = lfq_backward_op(x, gradient, dcodes, dsample, dcodebook, dcommitment, *ctx.arguments)
        return dx, None, None, None


def lfq(x: Tensor, bits: int, *, temperature: float = 0.1) -> LFQOutput:
    """Quantize a latent to signs and measure the entropies that train it.

    Args:
        x: [B, T, C], the encoder's output; fp32, bf16 or fp16. C is a multiple of bits.
        bits: E, bits to a token (9 in FlowMo-Lo, 14 in FlowMo-Hi).
        temperature: of the soft assignment.

    Returns:
        LFQOutput. Codes carry a straight-through gradient; entropies (nats, over all tokens of the batch) and
        commitment are fp32 whatever autocast says. An empty batch has zero entropies and commitment.

    Raises:
        ValueError: x is not floating point [B, T, C], C a multiple of bits; bits or temperature out of range.
    """
    _check(x, bits, temperature)
    impl = chosen("lfq", x)
    if impl == "ref":
        return lfq_ref(x, bits, temperature=temperature)
    return LFQOutput(*_LFQ.apply(x, bits, temperature, impl))


def aot_signatures() -> list[Signature]:
    """Real shapes of FlowMo-Lo and Hi, for compilation without a card."""
    signatures: list[Signature] = []
    types = {f"p_{name}": "*fp32" for name in ("pairs", "sums", "gradient", "entropies", "sample", "codebook")}
    types |= {f"p_{name}": "*fp32" for name in ("commitment", "dsample", "dcodebook", "dcommitment")}
    types |= {name: "*bf16" for name in ("p_x", "p_codes", "p_dcodes", "p_dx")} | {"p_tokens": "*i64"}
    types |= {name: "i32" for name in ("n", "stride_x", "splits", "blocks")}
    types |= {name: "fp32" for name in ("logit_scale", "inverse_n", "inverse_numel", "eps")}

    def add(kernel: object, constexprs: dict[str, object], warps: int, label: str) -> None:
        signatures.append((kernel, signature_of(kernel, types, constexprs), constexprs, warps, 3, label))

    for bits, factors in ((9, 2), (14, 4)):
        shared = {"F": factors, "BITS": bits, "BLOCK_E": 16}
        for plan, kernel in ((forward_launch, lfq_forward_kernel), (backward_launch, lfq_backward_kernel)):
            launch = plan(bits)
            sizes: dict[str, object] = {
                **shared, "BLOCK_N": launch.block_n, "BLOCK_I": launch.block_i, "BLOCK_J": launch.block_j,
            }  # fmt: skip
            if kernel is lfq_backward_kernel:
                sizes |= {f"HAS_{x}": True for x in ("CODES", "SAMPLE", "CODEBOOK", "COMMITMENT")}
            add(kernel, sizes, launch.warps, f"E={bits}")
        add(lfq_codebook_kernel, {"size": 1 << bits, "BLOCK": REDUCE_BLOCK}, 4, f"E={bits}")
    add(lfq_scalars_kernel, {"BLOCK": 128}, 4, "")
    return signatures
