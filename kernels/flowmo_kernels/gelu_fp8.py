"""GELU in its tanh form, with its result in row-scaled fp8: the input of the second layer of the MLP.

    g_mf = GELU(u_mf) = u_mf / (1 + exp(-z_mf)),  z = 2 c (u + a u^3),  c = sqrt(2/pi),  a = 0.044715
    s_m = max_f |g_mf| / 448,    y_mf = fp8(g_mf / s_m)

The product before leaves u in memory, since its fp8 form has no GELU epilogue.  So the pass that GELU needs anyway
finds the exact maximum of every row, and writes one byte a number instead of two.  Inference only.

Legend: M rows (all leading axes together), F channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import register, rows_contiguous
from ._rows import Signature, row_launch, signature
from ._triton import cast, cdiv, jit, tl
from .fp8 import FP8, implementation, quantize_rows, refuse_gradient


def gelu_fp8_ref(
    u: Tensor,  # [..., F]
) -> tuple[Tensor, Tensor]:  # float8_e4m3fn [..., F], fp32 [..., 1]
    """`gelu_fp8` in plain PyTorch."""
    return quantize_rows(F.gelu(u.float(), approximate="tanh"))


@jit
def gelu(b_u):
    b_u = b_u.to(tl.float32)
    # z log2(e) in Horner's form. The power overflows to infinity where GELU is zero: the quotient is that zero.
    return b_u / (1.0 + tl.exp2(b_u * (-2.302208198144325 - 0.1029432395800235 * b_u * b_u)))


@jit
def gelu_fp8_kernel(
    p_u,  # [M, F]
    p_y,  # [M, F] fp8, contiguous
    p_row_scale,  # [M] fp32
    n_rows,
    stride_u,
    D: tl.constexpr,  # F
    HI: tl.constexpr,
    LO: tl.constexpr,
    ITERS: tl.constexpr,
):
    """ITERS rows to a program, one at a time: its maximum is a scalar, which has no layout.

    With several rows at once the compiler brings the maxima of both parts into one layout by computing GELU twice.
    """
    i = tl.program_id(0).to(tl.int64)
    o_hi = tl.arange(0, HI)
    o_lo = HI + tl.arange(0, LO)
    m_lo = o_lo < D
    for j in range(ITERS):
        i_row = i * ITERS + j
        if i_row < n_rows:
            b_hi = gelu(tl.load(p_u + i_row * stride_u + o_hi))
            b_lo = gelu(tl.load(p_u + i_row * stride_u + o_lo, mask=m_lo, other=0.0))  # GELU(0) = 0 where masked
            b_most = tl.maximum(tl.maximum(tl.max(tl.abs(b_hi)), tl.max(tl.abs(b_lo))), 1e-12)
            tl.store(p_row_scale + i_row, b_most / 448.0)
            b_factor = 448.0 / b_most
            dtype: tl.constexpr = p_y.dtype.element_ty
            tl.store(p_y + i_row * D + o_hi, cast(b_hi * b_factor, dtype))
            tl.store(p_y + i_row * D + o_lo, cast(b_lo * b_factor, dtype), mask=m_lo)


def _forward(u: Tensor) -> tuple[Tensor, Tensor]:
    y, row_scale = _forward_fake(u)
    if u.numel() == 0:
        return y, row_scale
    d = u.shape[-1]
    rows = rows_contiguous(u.reshape(-1, d))
    launch = row_launch(d, len(rows), reduces=False)
    gelu_fp8_kernel[(cdiv(len(rows), launch.iters),)](
        rows, y, row_scale, len(rows), rows.stride(0),
        D=d, HI=launch.hi, LO=launch.lo, ITERS=launch.iters, num_warps=launch.num_warps,
    )  # fmt: skip
    return y, row_scale


def _forward_fake(u: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(u.shape, device=u.device, dtype=FP8)
    return y, torch.empty((*u.shape[:-1], 1), device=u.device, dtype=torch.float32)


_op = register("gelu_fp8(Tensor u) -> (Tensor, Tensor)", _forward, _forward_fake)


def gelu_fp8(
    u: Tensor,  # [..., F]
) -> tuple[Tensor, Tensor]:  # float8_e4m3fn [..., F], fp32 [..., 1]
    """GELU (tanh form) with its result in row-scaled fp8, for `linear_fp8`; no gradient.

    Args:
        u: [..., F], any float dtype, at least one axis.

    Returns:
        (values, scales): float8_e4m3fn [..., F] and fp32 [..., 1]; GELU(u) is about values * scales.

    Raises:
        ValueError: u has no axis or no column, or is not of a float dtype.
        RuntimeError: a gradient is wanted.
        KernelUnavailableError: the CUDA device is older than compute capability 8.9.
    """
    refuse_gradient("gelu_fp8", u)
    if u.dim() == 0 or not u.shape[-1] or not u.is_floating_point():
        raise ValueError(f"u is {u.dtype} {tuple(u.shape)}; expected a float dtype and shape [..., F] with F > 0")
    if implementation("gelu_fp8", u) == "ref":
        return gelu_fp8_ref(u)
    out: tuple[Tensor, Tensor] = _op(u)
    return out


def aot_signatures() -> list[Signature]:
    """The kernel at the widths of the published models and of `tiny` (compute capability 8.9 and up)."""
    found = []
    for f, u in ((256, "bf16"), (3072, "bf16"), (4608, "bf16"), (4608, "fp16")):
        launch = row_launch(f, 8 * 4352, reduces=False)
        constants = {"D": f, "HI": launch.hi, "LO": launch.lo, "ITERS": launch.iters}
        kinds = {"p_u": f"*{u}", "p_y": "*fp8e4nv", "p_row_scale": "*fp32"}
        found.append(signature(gelu_fp8_kernel, kinds, constants, launch.num_warps, 3, f"gelu_fp8 F={f} {u}"))
    return found
