"""Attention on 8-bit numbers: q k^T in fp8 or int8, p v in fp8, all sums in fp32.  Inference only, an opt-in.

    q_i = a_i q8_i,  k_j = b_J k8_j,  v_j = g_J v8_j          a to a row, b and g to a block J of keys of one head
    p_ij = 2^(c a_i b_J (q8_i . k8_j) - m_i),  l_i = sum_j p_ij,  c = scale log2(e)
    o_i = (G / 256) sum_j fp8(256 p_ij g_J / G) v8_j / l_i,  G = max_J g_J,  m_i the running row maximum

The scales cost nothing inside: those of q and k are one number to a row and tile, where the logits are multiplied by c
anyway, and those of v go into p before it is rounded.  Rows of q and k are of one size after query-key RMSNorm, which
is what makes 8 bits enough.  A pass before (one read of q, k and v) rounds, and writes v channel by channel: fp8 matrix
units take both operands along the summed axis only.

Legend: B images, L keys, Lq queries, H heads, d channels of a head; a tile has M query rows and N key rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import KernelUnavailableError
from ._heads import check_reach, head_parts, load_part, result_of, store_part
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, signature
from ._triton import INTERPRETED, cast, cdiv, dot, jit, next_power_of_2, tl
from .fp8 import FP8, FP8_MAX, TINY, implementation

FORMATS = ("fp8", "int8")
INT8_MAX = 127.0


class _Blocks(NamedTuple):
    d1: int  # channels of the first part, a power of two
    d2: int  # channels of the second part, a power of two, or 0
    m: int  # query rows of a tile
    n: int  # key rows of a tile, which share a scale
    warps: int
    stages: int


def blocks(d: int, length: int) -> _Blocks:
    """Tile sizes for heads of d channels; 8-bit matrix units sum over 32 numbers at once."""
    return _Blocks(*head_parts(d, 32), 128, max(32, min(128, next_power_of_2(length))), 8, 3)


class Quantized(NamedTuple):
    """8-bit operands; keys are padded with zeros to whole blocks."""

    q: Tensor  # [B, H, Lq, d] e4m3 or int8
    k: Tensor  # [B, H, blocks * N, d] of the same type
    v: Tensor  # [B, H, d, blocks * N] e4m3
    q_scale: Tensor  # [B, H, Lq] fp32
    k_scale: Tensor  # [B, H, blocks] fp32
    v_scale: Tensor  # [B, H, blocks] fp32


def _rounded(x: Tensor, scale: Tensor, low: torch.dtype) -> Tensor:
    y = x / scale
    return y.round().to(low) if low == torch.int8 else y.to(low)


def quantize_ref(q: Tensor, k: Tensor, v: Tensor, low: torch.dtype, block: int) -> Quantized:
    """The pass before in plain PyTorch."""
    most = INT8_MAX if low == torch.int8 else FP8_MAX
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    pad = -k.shape[2] % block
    k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, block)) for t in (k, v))  # [B, H, blocks, N, d]
    q_scale = q.abs().amax(-1).clamp_min(TINY) / most
    k_scale = k.abs().amax((-1, -2)).clamp_min(TINY) / most
    v_scale = v.abs().amax((-1, -2)).clamp_min(TINY) / FP8_MAX
    k8 = _rounded(k, k_scale[..., None, None], low).flatten(2, 3)
    v8 = _rounded(v, v_scale[..., None, None], FP8).flatten(2, 3).transpose(2, 3).contiguous()
    return Quantized(_rounded(q, q_scale[..., None], low), k8, v8, q_scale, k_scale, v_scale)


def attention_quantized_ref(
    q: Tensor,  # [B, Lq, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
    *,
    format: str = "fp8",
) -> Tensor:  # [B, Lq, H, d]
    """`attention_quantized` in plain PyTorch; p is rounded below the maximum of its whole row."""
    if q.numel() == 0:
        return torch.empty_like(q)
    length = k.shape[1]
    block = blocks(q.shape[-1], length).n
    z = quantize_ref(q, k, v, _low(format), block)
    logits = z.q.float() @ z.k.float().transpose(2, 3)
    logits = (logits * z.q_scale[..., None] * z.k_scale.repeat_interleave(block, -1)[..., None, :])[..., :length]
    p = (scale * logits - scale * logits.amax(-1, keepdim=True)).exp()
    most = z.v_scale.amax(-1, keepdim=True)
    weight = (256 * z.v_scale / most).repeat_interleave(block, -1)[..., None, :length]
    o = (p * weight).to(FP8).float() @ z.v.float().transpose(2, 3)[:, :, :length]
    return (o * (most[..., None] / 256) / p.sum(-1, keepdim=True)).transpose(1, 2).to(q.dtype)


def _low(format: str) -> torch.dtype:
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    return torch.int8 if format == "int8" else FP8


@jit
def whole(b, dtype: tl.constexpr):
    """b as it is, or rounded to integers, ties to even, where dtype has no others; storing it converts it."""
    # Adding and subtracting 1.5 * 2^23 rounds an fp32 number to an integer.
    return (b + 12582912.0) - 12582912.0 if dtype == tl.int8 else b


@jit
def largest(b_1, b_2, D2: tl.constexpr):
    """Largest magnitude of each row of both parts."""
    b_most = tl.max(tl.abs(b_1), 1)
    return tl.maximum(b_most, tl.max(tl.abs(b_2), 1)) if D2 > 0 else b_most


if INTERPRETED:
    product = dot
else:

    @jit
    def product(a, b, acc):
        """acc + a b of 8-bit matrices, in fp32."""
        if a.dtype == tl.int8:
            return acc + tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        else:
            return tl.dot(a, b, acc)


@jit
def attention_quantize_kernel(
    p_q,  # [B, Lq, H, d]
    p_k,  # [B, L, H, d]
    p_v,
    p_q8,  # [B, H, Lq, d]
    p_k8,  # [B, H, blocks N, d]
    p_v8,  # [B, H, d, blocks N]
    p_qs,  # [B, H, Lq]
    p_ks,  # [B, H, blocks]
    p_vs,
    n_queries,
    length,
    n_blocks,
    H,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N: tl.constexpr,
    MOST: tl.constexpr,
):
    """N rows of q, by row, and of k and v, by block; zeros beyond the last key."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_n = i_n * N + tl.arange(0, N)
    low: tl.constexpr = p_q8.dtype.element_ty
    P2: tl.constexpr = D2 if D2 > 0 else 32  # a second part that is not there is one of zeros, and not stored
    if i_n * N < n_queries:
        p_q += i_b * stride_qb + i_h * stride_qh
        b_1 = load_part(p_q, stride_ql, o_n, n_queries, 0, D1, D, False).to(tl.float32)
        b_2 = load_part(p_q, stride_ql, o_n, n_queries, D1, P2, D, False).to(tl.float32)
        b_scale = tl.maximum(largest(b_1, b_2, D2), 1e-12) / MOST
        tl.store(p_qs + i_bh * n_queries + o_n, b_scale, mask=o_n < n_queries)
        p_q8 += i_bh * n_queries * D
        store_part(p_q8, D, o_n, n_queries, whole(b_1 / b_scale[:, None], low), 0, D1, D)
        if D2 > 0:
            store_part(p_q8, D, o_n, n_queries, whole(b_2 / b_scale[:, None], low), D1, D2, D)
    if i_n < n_blocks:
        n_padded = n_blocks * N
        p_k += i_b * stride_kb + i_h * stride_kh
        b_1 = load_part(p_k, stride_kl, o_n, length, 0, D1, D, False).to(tl.float32)
        b_2 = load_part(p_k, stride_kl, o_n, length, D1, P2, D, False).to(tl.float32)
        b_one = tl.maximum(tl.max(largest(b_1, b_2, D2), 0), 1e-12) / MOST
        tl.store(p_ks + i_bh * n_blocks + i_n, b_one)
        p_k8 += i_bh * n_padded * D
        store_part(p_k8, D, o_n, n_padded, whole(b_1 / b_one, low), 0, D1, D)
        if D2 > 0:
            store_part(p_k8, D, o_n, n_padded, whole(b_2 / b_one, low), D1, D2, D)
        p_v += i_b * stride_vb + i_h * stride_vh
        b_1 = load_part(p_v, stride_vl, o_n, length, 0, D1, D, False).to(tl.float32)
        b_2 = load_part(p_v, stride_vl, o_n, length, D1, P2, D, False).to(tl.float32)
        b_one = tl.maximum(tl.max(largest(b_1, b_2, D2), 0), 1e-12) / 448.0
        tl.store(p_vs + i_bh * n_blocks + i_n, b_one)
        p_v8 += i_bh * D * n_padded
        store_columns(p_v8, n_padded, o_n, tl.trans(b_1 / b_one), 0, D1, D)
        if D2 > 0:
            store_columns(p_v8, n_padded, o_n, tl.trans(b_2 / b_one), D1, D2, D)


@jit
def store_columns(p_x, stride, o_n, b, FIRST: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Part of the channels of N keys, [P, N], keys contiguous."""
    o = FIRST + tl.arange(0, P)
    tl.store(p_x + o[:, None] * stride + o_n[None, :], cast(b, p_x.dtype.element_ty), mask=(o < D)[:, None])


@jit
def load_columns(p_x, stride, o_n, FIRST: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    o = FIRST + tl.arange(0, P)
    if FIRST + P <= D:
        return tl.load(p_x + o[:, None] * stride + o_n[None, :])
    else:
        return tl.load(p_x + o[:, None] * stride + o_n[None, :], mask=(o < D)[:, None], other=0.0)


@jit
def attention_quantized_kernel(
    p_q8,  # [B, H, Lq, d]
    p_k8,  # [B, H, blocks N, d]
    p_v8,  # [B, H, d, blocks N]
    p_qs,  # [B, H, Lq]
    p_ks,  # [B, H, blocks]
    p_vs,
    p_o,  # [B, Lq, H, d], heads contiguous
    n_queries,
    length,
    n_blocks,
    H,
    stride_ob,
    stride_ol,
    c,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    n_padded = n_blocks * N
    p_q8 += i_bh * n_queries * D
    p_k8 += i_bh * n_padded * D
    p_v8 += i_bh * D * n_padded
    p_ks += i_bh * n_blocks
    p_vs += i_bh * n_blocks
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    o_block = tl.arange(0, BLOCKS)
    b_most = tl.max(tl.load(p_vs + o_block, mask=o_block < n_blocks, other=0.0), 0)
    b_c = tl.load(p_qs + i_bh * n_queries + o_m, mask=o_m < n_queries, other=0.0) * c
    b_q1 = load_part(p_q8, D, o_m, n_queries, 0, D1, D, False)
    b_o1 = tl.zeros([M, D1], tl.float32)
    if D2 > 0:
        b_q2 = load_part(p_q8, D, o_m, n_queries, D1, D2, D, False)
        b_o2 = tl.zeros([M, D2], tl.float32)
    b_l = tl.zeros([M], tl.float32)
    b_max = tl.full([M], float("-inf"), tl.float32)
    for i_n in range(0, n_blocks):
        o_n = i_n * N + tl.arange(0, N)
        b_k = load_part(p_k8, D, o_n, n_padded, 0, D1, D, True)
        b_s = product(b_q1, tl.trans(b_k), tl.zeros([M, N], tl.float32))
        if D2 > 0:
            b_k = load_part(p_k8, D, o_n, n_padded, D1, D2, D, True)
            b_s = product(b_q2, tl.trans(b_k), b_s)
        b_s *= (b_c * tl.load(p_ks + i_n))[:, None]
        if not EVEN_N:
            b_s = tl.where((o_n < length)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_max = b_new
        b_l = b_l * b_shrink + tl.sum(b_p, 1)
        b_p8 = cast(b_p * (256.0 * tl.load(p_vs + i_n) / b_most), p_v8.dtype.element_ty)
        b_v = load_columns(p_v8, n_padded, o_n, 0, D1, D)
        b_o1 = product(b_p8, tl.trans(b_v), b_o1 * b_shrink[:, None])
        if D2 > 0:
            b_v = load_columns(p_v8, n_padded, o_n, D1, D2, D)
            b_o2 = product(b_p8, tl.trans(b_v), b_o2 * b_shrink[:, None])
    b_scale = (b_most / 256.0 / b_l)[:, None]
    p_o += i_b * stride_ob + i_h * D
    store_part(p_o, stride_ol, o_m, n_queries, b_o1 * b_scale, 0, D1, D)
    if D2 > 0:
        store_part(p_o, stride_ol, o_m, n_queries, b_o2 * b_scale, D1, D2, D)


def quantize(q: Tensor, k: Tensor, v: Tensor, low: torch.dtype, size: _Blocks) -> Quantized:
    """`quantize_ref` in one launch."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    b, n_queries, h, d = q.shape
    length, device = k.shape[1], q.device
    n_blocks = cdiv(length, size.n)
    z = Quantized(
        torch.empty(b, h, n_queries, d, dtype=low, device=device),
        torch.empty(b, h, n_blocks * size.n, d, dtype=low, device=device),
        torch.empty(b, h, d, n_blocks * size.n, dtype=FP8, device=device),
        *(torch.empty(b, h, n, dtype=torch.float32, device=device) for n in (n_queries, n_blocks, n_blocks)),
    )
    attention_quantize_kernel[(max(n_blocks, cdiv(n_queries, size.n)), b * h)](
        q, k, v, *z, n_queries, length, n_blocks, h, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        D=d, D1=size.d1, D2=size.d2, N=size.n, MOST=INT8_MAX if low == torch.int8 else FP8_MAX, num_warps=4,
    )  # fmt: skip
    return z


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, format: str) -> Tensor:
    o = _fake(q, k, v, scale, format)
    b, n_queries, h, d = q.shape
    length = k.shape[1]
    if q.numel() == 0:
        return o
    check_reach(q, k, v)
    size = blocks(d, length)
    z = quantize(q, k, v, _low(format), size)
    n_blocks = z.k_scale.shape[2]
    attention_quantized_kernel[(cdiv(n_queries, size.m), b * h)](
        *z, o, n_queries, length, n_blocks, h, o.stride(0), o.stride(1), scale * math.log2(math.e),
        D=d, D1=size.d1, D2=size.d2, M=size.m, N=size.n, BLOCKS=next_power_of_2(n_blocks),
        EVEN_N=length % size.n == 0, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return o


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, format: str) -> Tensor:
    return result_of(q)


_op = register("attention_quantized(Tensor q, Tensor k, Tensor v, float scale, str format) -> Tensor", _run, _fake)


def attention_quantized(
    q: Tensor,  # [B, Lq, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
    *,
    format: str = "fp8",
) -> Tensor:  # [B, Lq, H, d]
    """softmax(scale * q k^T) v on 8-bit numbers; arguments as `joint_attention`, no gradient.

    Args:
        format: "fp8" rounds q and k to e4m3, "int8" to integers of 8 bits, which are finer for rows of one size; p and
            v are e4m3 in both.

    Returns:
        o [B, Lq, H, d] in the order of q in memory: image-major, or sequence-major where q's image stride is below
        its token stride.

    Raises:
        ValueError: no such format.
        RuntimeError: a gradient is wanted.
        KernelUnavailableError: the CUDA device is older than compute capability 8.9, or heads of over 128 channels.
    """
    _low(format)
    if wants_grad(q, k, v):
        raise RuntimeError("attention in 8 bits has no gradient: call it under torch.no_grad() or take another backend")
    if q.shape[-1] > 128:
        raise KernelUnavailableError(f"attention in 8 bits takes heads of at most 128 channels, not {q.shape[-1]}")
    if implementation("attention_fp8", q) == "ref":
        return attention_quantized_ref(q, k, v, scale, format=format)
    o: Tensor = _op(q, k, v, scale, format)
    return o


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    found: list[Signature] = []
    scales = {"p_qs": "*fp32", "p_ks": "*fp32", "p_vs": "*fp32"}
    for d in (64, 96):
        size = blocks(d, 4352)
        head = {"D": d, "D1": size.d1, "D2": size.d2, "N": size.n}
        for format, low, most in (("fp8", "*fp8e4nv", FP8_MAX), ("int8", "*i8", INT8_MAX)):
            kinds = {**scales, "p_q8": low, "p_k8": low, "p_v8": "*fp8e4nv", "c": "fp32"}
            constants = {**head, "MOST": most}
            found.append(
                signature(attention_quantize_kernel, kinds, constants, 4, 3, f"attention quantize {format} d={d}")
            )
            constants = {**head, "M": size.m, "BLOCKS": next_power_of_2(cdiv(4352, size.n)), "EVEN_N": True}
            found.append(
                signature(
                    attention_quantized_kernel, kinds, constants, size.warps, size.stages, f"attention {format} d={d}"
                )
            )
    return found
