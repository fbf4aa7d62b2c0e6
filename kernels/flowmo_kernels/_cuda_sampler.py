"""CUDA launches of the sampler's ops: `euler_step`, its gradient, and `step_boundary`.

Legend: B images, N image tokens, D width, P = 3 p^2 numbers of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cuda_rows import dtype_code
from ._ext import launch
from ._library import rows_contiguous


def euler_step(
    z: Tensor,  # any shape, float32
    v: Tensor,  # z's shape
    v_null: Tensor | None,  # as v
    dt: float,
    w: float = 1.0,
) -> tuple[Tensor, Tensor]:  # z' as z; z' in the dtype of v
    """One guided Euler step, as `flowmo_kernels.euler_step`.

    Raises:
        TypeError: z is not float32.
    """
    if z.dtype != torch.float32:
        raise TypeError(f"z is {z.dtype}; the CUDA kernel keeps the state in float32")
    z, v = z.contiguous(), v.contiguous()
    v_null = None if v_null is None else v_null.contiguous()
    z_next = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    copy = torch.empty(z.shape, dtype=v.dtype, device=z.device)
    launch("euler_step", z_next, copy, z, v, v_null, float(dt), float(w), z.numel(), dtype_code("v", v))
    return z_next, copy


def euler_step_backward(
    dnext: Tensor | None,  # gradient of z'
    dcopy: Tensor | None,  # gradient of the copy
    v: Tensor,  # only its shape and dtype are read
    guided: bool,
    dt: float,
    w: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # dz float32; dv, dv_null in the dtype of v (dv_null empty unless guided)
    """Gradients of `euler_step`."""
    dz = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dnull = torch.empty(v.shape if guided else (0,), dtype=v.dtype, device=v.device)
    dnext = None if dnext is None else dnext.float().contiguous()
    dcopy = None if dcopy is None else dcopy.to(v.dtype).contiguous()
    launch(
        "euler_step_backward", dz, dv, dnull if guided else None, dnext, dcopy, float(dt), float(w), v.numel(),
        dtype_code("v", v),
    )  # fmt: skip
    return dz, dv, dnull


def _per_image(name: str, m: Tensor) -> tuple[Tensor, int, int]:
    """A modulation vector [B, D] or [1, D]: the tensor, its stride of images (0 when shared), its type."""
    m = rows_contiguous(m)
    return m, m.stride(0) if m.shape[0] > 1 else 0, dtype_code(name, m)


def step_boundary(
    h: Tensor,  # [B, N, D]
    h_null: Tensor | None,  # [B, N, D]
    shift: Tensor,  # [B, D] or [1, D]
    scale: Tensor,  # [B, D] or [1, D]
    w_out: Tensor,  # [P, D]
    b_out: Tensor,  # [P]
    z: Tensor,  # [B, N, P] float32
    w_in: Tensor,  # [D', P]
    b_in: Tensor,  # [D']
    dt: float,
    w: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # z' [B, N, P] float32; x [B, N, D'] in the dtype of w_in
    """Last layer, guidance, Euler step and next patch embedding, as `flowmo_kernels.step_boundary`.

    Raises:
        TypeError: z is not float32, or the two weights differ in dtype.
    """
    if z.dtype != torch.float32:
        raise TypeError(f"z is {z.dtype}; the CUDA kernel keeps the state in float32")
    if w_out.dtype != w_in.dtype:
        raise TypeError(f"w_out is {w_out.dtype} and w_in is {w_in.dtype}; the CUDA kernel takes both in one dtype")
    h = rows_contiguous(h)
    null: tuple[Tensor | None, int, int] = (None, 0, 0)
    if h_null is not None:
        h_null = rows_contiguous(h_null.to(h.dtype))
        null = (h_null, h_null.stride(0), h_null.stride(1))
    w_out, b_out, z, w_in, b_in = (t.contiguous() for t in (w_out, b_out, z, w_in, b_in))
    batch, tokens, width = h.shape
    z_next = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    x = torch.empty(batch, tokens, w_in.shape[0], dtype=w_in.dtype, device=h.device)
    launch(
        "step_boundary", z_next, x, h, h.stride(0), h.stride(1), *null, dtype_code("h", h),
        *_per_image("shift", shift), *_per_image("scale", scale), w_out, b_out, dtype_code("b_out", b_out), z, w_in,
        b_in, dtype_code("b_in", b_in), batch, tokens, width, w_out.shape[0], w_in.shape[0], float(dt), float(w), eps,
        dtype_code("w_out", w_out),
    )  # fmt: skip
    return z_next, x
