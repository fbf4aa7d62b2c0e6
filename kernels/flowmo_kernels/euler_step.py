"""One Euler step of the sampler on patch tokens, with classifier-free guidance.

    velocity = v_null + w (v - v_null)      (v alone without v_null)
    z'       = z - dt * velocity,            dt = t_i - t_{i+1} > 0
    second result: z' rounded to v's dtype, the input of the next patch embedding

The state stays in fp32 over the whole chain; the velocity may come in bf16 or fp16.
Source: paper, section 3.3 and equation 5, with the sign of the released implementation (v = noise - data).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check(z: Tensor, v: Tensor, v_null: Tensor | None) -> None:
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z is {z.dtype}; expected the fp32 state of the sampler (call z.float() once at the start)")
    if not v.is_floating_point() or v.shape != z.shape:
        raise ValueError(f"v is {v.dtype} {tuple(v.shape)}; expected floating point of z's shape {tuple(z.shape)}")
    if v_null is not None and (v_null.shape != v.shape or v_null.dtype != v.dtype):
        raise ValueError(
            f"v_null is {v_null.dtype} {tuple(v_null.shape)}; expected v's {v.dtype} {tuple(v.shape)}"
        )


def euler_step_ref(
    z: Tensor, v: Tensor, v_null: Tensor | None = None, *, dt: float, w: float = 1.0
) -> tuple[Tensor, Tensor]:
    velocity = v.to(z.dtype)
    if v_null is not None:
        null = v_null.to(z.dtype)
        velocity = null + w * (velocity - null)
    z_next = z - dt * velocity
    return z_next, z_next.to(v.dtype, copy=True)


def euler_step(
    z: Tensor,  # [B, N, P]
    v: Tensor,  # [B, N, P]
    v_null: Tensor | None = None,  # [B, N, P]
    *,
    dt: float,
    w: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Take one guided Euler step.

    Args:
        z: [B, N, P] fp32, the state as patch tokens (any shape will do, as long as all agree).
        v: z's shape, fp32, bf16 or fp16, the conditional velocity.
        v_null: as v, the velocity at the null condition, or None for an unguided step.
        dt: t_i - t_{i+1}.
        w: guidance weight; used only with v_null.

    Returns:
        (z', z' rounded to v's dtype), both of z's shape; differentiable in z, v and v_null.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(z, v, v_null)
    return euler_step_ref(z, v, v_null, dt=dt, w=w)
