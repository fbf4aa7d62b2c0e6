"""First layer of the MLP: y = GELU(x W^T + b), GELU in its tanh form.

With s(z) the logistic function, c = sqrt(2/pi), a = 0.044715 and z = 2 c (u + a u^3):

    GELU(u) = u s(z),    GELU'(u) = s(z) + u s(z) s(-z) 2 c (1 + 3 a u^2)

Inference on a CUDA card is one matrix product with the GELU in its epilogue (cuBLASLt through torch).  Training
keeps u = x W^T + b; its backward is one pass that makes du = dy GELU'(u) and the bias gradient, then two matrix
products.

Legend: M rows (all leading axes together), D input channels, F output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import chosen
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, signature, sum_tiles
from ._triton import cast, cdiv, jit, next_power_of_2, tl


def linear_gelu_ref(
    x: Tensor,  # [..., D]
    w: Tensor,  # [F, D]
    b: Tensor,  # [F]
) -> Tensor:  # [..., F]
    """`linear_gelu` in plain PyTorch."""
    return F.gelu(F.linear(x, w, b), approximate="tanh")


@jit
def gelu_backward_kernel(
    p_dy,  # [M, F]
    p_u,  # [M, F]
    p_du,  # [M, F] contiguous
    p_part,  # [tiles, F] fp32: partial bias gradient
    n_rows,
    stride_dy,
    stride_u,
    N: tl.constexpr,  # F
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITERS: tl.constexpr,
):
    i_f = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64)
    o_f = i_f * COLUMNS + tl.arange(0, COLUMNS)
    b_db = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(ITERS):
        o_row = (i * ITERS + j) * ROWS + tl.arange(0, ROWS)
        m = (o_row < n_rows)[:, None] & (o_f < N)[None, :]
        b_dy = tl.load(p_dy + (o_row * stride_dy)[:, None] + o_f[None, :], mask=m, other=0.0).to(tl.float32)
        b_u = tl.load(p_u + (o_row * stride_u)[:, None] + o_f[None, :], mask=m, other=0.0).to(tl.float32)
        b_square = 0.044715 * b_u * b_u
        b_z = 1.5957691216057308 * b_u * (1.0 + b_square)
        # s(|z|) and s(-|z|) from exp(-|z|), which cannot overflow.
        b_e = tl.exp(-tl.abs(b_z))
        b_large = 1.0 / (1.0 + b_e)
        b_small = b_e * b_large
        b_slope = b_u * b_large * b_small * 1.5957691216057308 * (1.0 + 3.0 * b_square)
        b_du = b_dy * (tl.where(b_z >= 0, b_large, b_small) + b_slope)
        b_db += b_du
        tl.store(p_du + (o_row * N)[:, None] + o_f[None, :], cast(b_du, p_du.dtype.element_ty), mask=m)
    tl.store(p_part + i * N + o_f, tl.sum(b_db, 0), mask=o_f < N)


def _launch(n_rows: int, n_columns: int) -> tuple[int, int, int, int]:
    """(rows, columns, iterations, warps) of a program."""
    return 8, min(256, next_power_of_2(n_columns)), 16 if n_rows >= 4096 else 1, 4


def _inference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if not x.is_cuda or x.numel() == 0 or x.dtype not in (torch.bfloat16, torch.float16):
        # The fused epilogue is the erf form of GELU on a CPU, so it is for CUDA only. In fp32, where results are
        # compared to the last bits and nobody waits, its approximation of tanh is not trusted.
        return linear_gelu_ref(x, w, b)
    rows = x.reshape(-1, x.shape[-1])
    y = torch._addmm_activation(b, rows, w.t(), use_gelu=True)
    return y.view(*x.shape[:-1], w.shape[0])


def _inference_fake(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], w.shape[0]), device=x.device, dtype=x.dtype)


def _gelu_backward(dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    dy, u = rows_contiguous(dy), rows_contiguous(u)
    m, f = u.shape
    du, db = _gelu_backward_fake(dy, u)
    rows, columns, iters, num_warps = _launch(m, f)
    tiles = cdiv(m, rows * iters)
    partial = torch.empty(1, tiles, 1, f, device=u.device, dtype=torch.float32)
    if u.numel():
        gelu_backward_kernel[(cdiv(f, columns), tiles)](
            dy, u, du, partial, m, dy.stride(0), u.stride(0),
            N=f, ROWS=rows, COLUMNS=columns, ITERS=iters, num_warps=num_warps,
        )  # fmt: skip
    sum_tiles(partial, (db[None],), 0)
    return du, db


def _gelu_backward_fake(dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    du = torch.empty(u.shape, device=u.device, dtype=u.dtype)
    return du, torch.empty(u.shape[1], device=u.device, dtype=torch.float32)


_op = register("linear_gelu(Tensor x, Tensor w, Tensor b) -> Tensor", _inference, _inference_fake)
_op_backward = register(
    "gelu_backward(Tensor dy, Tensor u) -> (Tensor, Tensor)", _gelu_backward, _gelu_backward_fake
)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):  # type: ignore[no-untyped-def]
        u = F.linear(x, w, b)
        ctx.save_for_backward(x, w, u)
        ctx.bias_dtype = b.dtype
        return F.gelu(u, approximate="tanh")

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w, u = ctx.saved_tensors
        du, db = _op_backward(dy.reshape(-1, dy.shape[-1]), u.reshape(-1, u.shape[-1]))
        dx = (du @ w).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = du.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dw, db.to(ctx.bias_dtype)


def linear_gelu(
    x: Tensor,  # [..., D]
    w: Tensor,  # [F, D]
    b: Tensor,  # [F]
) -> Tensor:  # [..., F]
    """GELU(x W^T + b) with the tanh form of GELU.

    Args:
        x: [..., D].
        w, b: weight [F, D] and bias [F] in the dtype of x, or any under autocast, which casts all three.

    Returns:
        [..., F] in the dtype of x (of autocast where it is on).  Matrix products accumulate in fp32.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if w.dim() != 2 or x.shape[-1] != w.shape[1] or tuple(b.shape) != (w.shape[0],):
        raise ValueError(
            f"x {tuple(x.shape)}, w {tuple(w.shape)} and b {tuple(b.shape)} do not fit; expected [..., D], [F, D], [F]"
        )
    if chosen("linear_gelu", x) == "ref":
        return linear_gelu_ref(x, w, b)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    if not x.dtype == w.dtype == b.dtype:
        raise ValueError(f"x is {x.dtype}, w {w.dtype}, b {b.dtype}; give one dtype, or call it under autocast")
    if wants_grad(x, w, b):
        return _LinearGelu.apply(x, w, b)
    return _op(x, w, b)


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    found: list[Signature] = []
    for d in (768, 1152):
        rows, columns, iters, num_warps = _launch(8 * 4352, 4 * d)
        constants = {"N": 4 * d, "ROWS": rows, "COLUMNS": columns, "ITERS": iters}
        kinds = {"p_part": "*fp32"}
        label = f"gelu_backward F={4 * d}"
        found.append(signature(gelu_backward_kernel, kinds, constants, num_warps, 3, label))
    return found
