"""From one sampling step to the next in one kernel: last layer, guidance, Euler step, next patch embedding.

    n  = LN((1 + scale) LN(h) + shift)                the last layer normalizes twice
    v  = n W_out^T + b_out                            velocity of a patch, P = 3 p^2 numbers
    v  = v_null + w (v - v_null)                      with h_null only
    z' = z - dt v                                     fp32 state
    x  = z' W_in^T + b_in                             the image tokens of the next step

LayerNorm has no affine part (eps 1e-6). The operands of both matrix products are rounded to the dtype of their
weights, as the separate layers would; everything else, the velocity included, stays in fp32. Between two forward
passes the tokens are then read once and written once, and neither n nor v reaches memory.

Source: paper, section 3.3 (sampling) and the supplement's architecture; the double LayerNorm and the sign of the step
are the released implementation's. Inference only: a call that must be differentiated runs the reference.

Legend: B images, N image tokens, D width, P = 3 p^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import chosen
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, signature_of
from ._triton import cast, cdiv, dot, jit, next_power_of_2, tl


class StepBoundary(NamedTuple):
    """What `step_boundary` returns."""

    z: Tensor  # [B, N, P] fp32, the state after the step
    x: Tensor  # [B, N, D] in the dtype of w_in, its patch embedding


def _check(
    h: Tensor, shift: Tensor, scale: Tensor, w_out: Tensor, b_out: Tensor, z: Tensor, w_in: Tensor, b_in: Tensor,
    h_null: Tensor | None,
) -> None:  # fmt: skip
    if h.ndim != 3 or not h.is_floating_point():
        raise ValueError(f"h is {h.dtype} of shape {tuple(h.shape)}; expected floating point [B, N, D]")
    batch, n, d = h.shape
    if w_out.ndim != 2 or w_out.shape[1] != d:
        raise ValueError(f"w_out has shape {tuple(w_out.shape)}; for h {tuple(h.shape)} it must be [P, {d}]")
    p = w_out.shape[0]
    if w_in.ndim != 2 or w_in.shape[1] != p:
        raise ValueError(f"w_in has shape {tuple(w_in.shape)}; for w_out {tuple(w_out.shape)} it must be [D, {p}]")
    for name, tensor, shape in (("b_out", b_out, (p,)), ("b_in", b_in, w_in.shape[:1]), ("z", z, (batch, n, p))):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z is {z.dtype}; expected the fp32 state of the sampler")
    for name, tensor in (("shift", shift), ("scale", scale)):
        if tuple(tensor.shape) not in ((batch, d), (1, d)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {(batch, d)} or {(1, d)}")
    if h_null is not None and (h_null.shape != h.shape or h_null.dtype != h.dtype):
        raise ValueError(f"h_null is {h_null.dtype} {tuple(h_null.shape)}; expected h's {h.dtype} {tuple(h.shape)}")


def step_boundary_ref(
    h: Tensor, shift: Tensor, scale: Tensor, w_out: Tensor, b_out: Tensor, z: Tensor, w_in: Tensor, b_in: Tensor,
    *, dt: float, h_null: Tensor | None = None, w: float = 1.0, eps: float = 1e-6,
) -> StepBoundary:  # fmt: skip
    dtype = z.dtype

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x.to(weight.dtype).to(dtype), weight.to(dtype), bias.to(dtype))

    def velocity(x: Tensor) -> Tensor:
        n = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
        n = torch.addcmul(shift.to(dtype)[:, None], n, 1 + scale.to(dtype)[:, None])
        return linear(F.layer_norm(n, n.shape[-1:], eps=eps), w_out, b_out)

    with torch.autocast(h.device.type, enabled=False):
        v = velocity(h)
        if h_null is not None:
            null = velocity(h_null)
            v = null + w * (v - null)
        z_next = z - dt * v
        return StepBoundary(z_next, linear(z_next, w_in, b_in).to(w_in.dtype))


@jit
def _merge_moments(b_mean, b_m2, seen, b_x, m_d, count):
    """Mean and sum of squared deviations of `seen` columns joined with those of `count` new ones (Chan et al.)."""
    b_new = tl.sum(tl.where(m_d, b_x, 0.0), axis=1) / count
    b_dev = tl.where(m_d, b_x - b_new[:, None], 0.0)
    b_delta = b_new - b_mean
    b_share = count / (seen + count)
    b_m2 += tl.sum(b_dev * b_dev, axis=1) + b_delta * b_delta * seen * b_share
    return b_mean + b_delta * b_share, b_m2


@jit
def _velocity(
    p_h, p_shift, p_scale, p_w, p_b, m_m, eps,
    D: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """v [rows, P] of the rows at p_h [rows, 1]; three passes over rows that stay in the first-level cache."""
    b_mean = tl.zeros((BLOCK_M,), tl.float32)
    b_m2 = tl.zeros((BLOCK_M,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)[None, :]
        m_d = m_m & (o_d < D)
        b_h = tl.load(p_h + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_mean, b_m2 = _merge_moments(b_mean, b_m2, i_d * 1.0, b_h, m_d, tl.minimum(D - i_d, BLOCK_D) * 1.0)
    b_rstd = 1.0 / tl.sqrt_rn(b_m2 / D + eps)

    b_mean_y = tl.zeros((BLOCK_M,), tl.float32)
    b_m2_y = tl.zeros((BLOCK_M,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)[None, :]
        m_d = m_m & (o_d < D)
        b_h = tl.load(p_h + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_scale = 1.0 + tl.load(p_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_y = b_scale * ((b_h - b_mean[:, None]) * b_rstd[:, None]) + b_shift
        b_mean_y, b_m2_y = _merge_moments(
            b_mean_y, b_m2_y, i_d * 1.0, b_y, m_d, tl.minimum(D - i_d, BLOCK_D) * 1.0
        )
    b_rstd_y = 1.0 / tl.sqrt_rn(b_m2_y / D + eps)

    o_p = tl.arange(0, BLOCK_P)[None, :]
    b_v = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)[None, :]
        m_d = m_m & (o_d < D)
        b_h = tl.load(p_h + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_scale = 1.0 + tl.load(p_scale + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_y = b_scale * ((b_h - b_mean[:, None]) * b_rstd[:, None]) + b_shift
        b_n = tl.where(m_d, (b_y - b_mean_y[:, None]) * b_rstd_y[:, None], 0.0)
        o_k = i_d + tl.arange(0, BLOCK_D)[:, None]
        b_w = tl.load(p_w + o_p * D + o_k, mask=(o_k < D) & (o_p < P), other=0.0)
        b_v = dot(cast(b_n, p_w.dtype.element_ty), b_w, b_v)
    return b_v + tl.load(p_b + o_p, mask=o_p < P, other=0.0).to(tl.float32)


@jit
def step_boundary_kernel(
    p_h, p_null, p_shift, p_scale, p_w_out, p_b_out, p_z, p_w_in, p_b_in, p_z_next, p_x,
    n, stride_hb, stride_hn, stride_nb, stride_nn, stride_shift, stride_scale, dt, w, eps,
    GUIDED: tl.constexpr, D: tl.constexpr, D_IN: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, image)."""
    i_b = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m = o_m < n
    p_shift += i_b * stride_shift
    p_scale += i_b * stride_scale
    b_v = _velocity(
        p_h + i_b * stride_hb + o_m * stride_hn, p_shift, p_scale, p_w_out, p_b_out, m_m, eps,
        D, P, BLOCK_M, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    if GUIDED:
        b_null = _velocity(
            p_null + i_b * stride_nb + o_m * stride_nn, p_shift, p_scale, p_w_out, p_b_out, m_m, eps,
            D, P, BLOCK_M, BLOCK_D, BLOCK_P,
        )  # fmt: skip
        b_v = b_null + w * (b_v - b_null)

    o_p = tl.arange(0, BLOCK_P)[None, :]
    o_z = (i_b * n + o_m) * P + o_p
    m_z = m_m & (o_p < P)
    b_z = tl.load(p_z + o_z, mask=m_z, other=0.0) - dt * b_v
    tl.store(p_z_next + o_z, b_z, mask=m_z)

    b_z = cast(tl.where(m_z, b_z, 0.0), p_w_in.dtype.element_ty)
    o_k = tl.arange(0, BLOCK_P)[:, None]
    for i_x in range(0, D_IN, BLOCK_X):
        o_x = i_x + tl.arange(0, BLOCK_X)[None, :]
        b_w = tl.load(p_w_in + o_x * P + o_k, mask=(o_x < D_IN) & (o_k < P), other=0.0)
        b_x = dot(b_z, b_w, tl.zeros((BLOCK_M, BLOCK_X), tl.float32))
        b_x += tl.load(p_b_in + o_x, mask=o_x < D_IN, other=0.0).to(tl.float32)
        o_out = (i_b * n + o_m) * D_IN + o_x
        tl.store(p_x + o_out, cast(b_x, p_x.dtype.element_ty), mask=m_m & (o_x < D_IN))


class Launch(NamedTuple):
    """Launch sizes of the kernel; swept by bench/tune.py."""

    block_m: int  # tokens to a program
    block_d: int  # columns of h at a time
    block_x: int  # columns of the embedding at a time
    warps: int


def boundary_launch(d: int, p: int) -> Launch:
    """Launch sizes for tokens of width d and patches of p numbers."""
    small = p <= 64
    return Launch(32, min(64 if small else 32, max(16, next_power_of_2(d))), 64, 4 if small else 8)


def _forward(
    h: Tensor, h_null: Tensor | None, shift: Tensor, scale: Tensor, w_out: Tensor, b_out: Tensor, z: Tensor,
    w_in: Tensor, b_in: Tensor, dt: float, w: float, eps: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, n, d = h.shape
    p = w_out.shape[0]
    h, shift, scale = rows_contiguous(h), rows_contiguous(shift), rows_contiguous(scale)
    null = h if h_null is None else rows_contiguous(h_null)
    w_out, b_out, z, w_in, b_in = (t.contiguous() for t in (w_out, b_out, z, w_in, b_in))
    if impl == "cuda":
        from . import _cuda

        null_or_none = None if h_null is None else null
        return _cuda.step_boundary(h, null_or_none, shift, scale, w_out, b_out, z, w_in, b_in, dt, w, eps)
    z_next = torch.empty_like(z)
    x = torch.empty(batch, n, w_in.shape[0], dtype=w_in.dtype, device=h.device)
    if z_next.numel():
        launch = boundary_launch(d, p)
        step_boundary_kernel[(cdiv(n, launch.block_m), batch)](
            h, null, shift, scale, w_out, b_out, z, w_in, b_in, z_next, x,
            n, h.stride(0), h.stride(1), null.stride(0), null.stride(1),
            shift.stride(0) if shift.shape[0] > 1 else 0, scale.stride(0) if scale.shape[0] > 1 else 0, dt, w, eps,
            GUIDED=h_null is not None, D=d, D_IN=w_in.shape[0], P=p,
            BLOCK_M=launch.block_m, BLOCK_D=launch.block_d, BLOCK_P=max(16, next_power_of_2(p)),
            BLOCK_X=launch.block_x, num_warps=launch.warps,
        )  # fmt: skip
    return z_next, x


def _forward_fake(
    h: Tensor, h_null: Tensor | None, shift: Tensor, scale: Tensor, w_out: Tensor, b_out: Tensor, z: Tensor,
    w_in: Tensor, b_in: Tensor, dt: float, w: float, eps: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = h.new_empty((h.shape[0], h.shape[1], w_in.shape[0]), dtype=w_in.dtype)
    return z.new_empty(z.shape), x


step_boundary_op = register(
    "step_boundary(Tensor h, Tensor? h_null, Tensor shift, Tensor scale, Tensor w_out, Tensor b_out, Tensor z,"
    " Tensor w_in, Tensor b_in, float dt, float w, float eps, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def step_boundary(
    h: Tensor,  # [B, N, D]
    shift: Tensor,  # [B, D] or [1, D]
    scale: Tensor,  # [B, D] or [1, D]
    w_out: Tensor,  # [P, D]
    b_out: Tensor,  # [P]
    z: Tensor,  # [B, N, P]
    w_in: Tensor,  # [D, P]
    b_in: Tensor,  # [D]
    *,
    dt: float,
    h_null: Tensor | None = None,  # [B, N, D]
    w: float = 1.0,
    eps: float = 1e-6,
) -> StepBoundary:
    """Finish one sampling step and embed the patches for the next.

    Args:
        h: [B, N, D], image rows after the last block; a slice of the joint sequence is read in place.
        shift, scale: modulation of the last layer at this time, per image or one for all.
        w_out, b_out: last layer's projection, P = 3 p^2 rows.
        z: [B, N, P] fp32, the state as patch tokens.
        w_in, b_in: patch embedding.
        dt: t_i - t_{i+1}.
        h_null: as h, of the null condition; None without guidance.
        w: guidance weight; used only with h_null.
        eps: of both LayerNorms.

    Returns:
        StepBoundary(z, x): the next state in fp32, and its embedding in the dtype of w_in.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names it.
    """
    _check(h, shift, scale, w_out, b_out, z, w_in, b_in, h_null)
    impl = chosen("step_boundary", h)
    if impl == "ref" or z.dtype != torch.float32 or wants_grad(h, shift, scale, w_out, b_out, z, w_in, b_in, h_null):
        return step_boundary_ref(
            h, shift, scale, w_out, b_out, z, w_in, b_in, dt=dt, h_null=h_null, w=w, eps=eps
        )
    args = h, h_null, shift, scale, w_out, b_out, z, w_in, b_in, float(dt), float(w), float(eps), impl
    return StepBoundary(*step_boundary_op(*args))


def aot_signatures() -> list[Signature]:
    """Decoders of FlowMo-Lo/Hi (D = 1152, p = 4) and small (D = 768, p = 8), for compilation without a card."""
    types = {f"p_{name}": "*bf16" for name in ("h", "null", "shift", "scale", "w_out", "b_out", "w_in", "b_in", "x")}
    types |= {"p_z": "*fp32", "p_z_next": "*fp32", "n": "i32", "dt": "fp32", "w": "fp32", "eps": "fp32"}
    types |= {f"stride_{name}": "i32:16" for name in ("hb", "hn", "nb", "nn", "shift", "scale")}
    signatures: list[Signature] = []
    for d, p in ((1152, 48), (768, 192)):
        launch = boundary_launch(d, p)
        for guided in (False, True):
            constexprs: dict[str, object] = {
                "GUIDED": guided, "D": d, "D_IN": d, "P": p, "BLOCK_M": launch.block_m, "BLOCK_D": launch.block_d,
                "BLOCK_P": next_power_of_2(p), "BLOCK_X": launch.block_x,
            }  # fmt: skip
            label = f"D={d} P={p}{' guided' if guided else ''}"
            types_in_order = signature_of(step_boundary_kernel, types, constexprs)
            signatures.append((step_boundary_kernel, types_in_order, constexprs, launch.warps, 3, label))
    return signatures
